"""What `dev.py test` leaves to `dev.py test --long`: of laws asked of very many networks or settings, two thirds of the cells.

Each such law is asked of a third of its cells, the same third on every machine, so every commit asks every law, and every
network many laws; with KINDRED_LONG=1, which `--long` sets, all cells are asked.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from zlib import crc32

SWEEPS = frozenset(
    {
        "test_encoders",
        "test_families",
        "test_hostile_names",
        "test_matrix",
        "test_networks",
        "test_odd_schedules",
        "test_placed_references",
        "test_transformer_anchors",
        "test_transformer_bad_input",
        "test_transformer_concepts",
        "test_transformer_rows",
        "test_transformer_stories",
        "test_transformer_training",
        "test_transformer_words",
        "test_transformers",
        "test_transformers_plain",
    }
)
MANY = 9  # a law of fewer cells is asked of all
SHARE = 3


def long() -> bool:
    """Whether every cell is asked."""
    return os.environ.get("KINDRED_LONG") == "1"


def file_of(nodeid: str) -> str:
    """tests/host/test_networks.py::test_x[Flux] -> test_networks."""
    return nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")


def left_to_the_long_form(nodeids: Sequence[str]) -> set[str]:
    """The cells that the short form leaves out; which they are depends on each law's own cells alone."""
    laws: dict[str, list[str]] = defaultdict(list)
    for nodeid in nodeids:
        if file_of(nodeid) in SWEEPS and "[" in nodeid:
            laws[nodeid.partition("[")[0]].append(nodeid)
    left: set[str] = set()
    for cells in laws.values():
        if len(cells) >= MANY:
            ranked = sorted(cells, key=lambda nodeid: (crc32(nodeid.encode()), nodeid))
            left.update(ranked[-(-len(cells) // SHARE) :])
    return left
