"""Sets of blocks that papers give for FLUX.1, which is one network with 19 double and 38 single
blocks.

The papers and their code number the blocks through: 0 to 18 are double, 19 to 56 single.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..network.blocks import BlockId

DOUBLE, SINGLE = 19, 38  # blocks of FLUX.1


@dataclass(frozen=True)
class Published:
    """A preset and where it comes from."""

    name: str  # in an input `blocks`
    source: str
    numbers: tuple[int, ...]

    @property
    def blocks(self) -> tuple[BlockId, ...]:
        return tuple(_block(number) for number in self.numbers)


def _block(number: int) -> BlockId:
    return ("double", number, 0) if number < DOUBLE else ("single", number - DOUBLE, 0)


PUBLISHED = (
    Published(
        "stable flow",
        "vital for the picture, Stable Flow, arXiv 2411.14430",
        (0, 1, 17, 18, 25, 28, 53, 54, 56),
    ),
    Published(
        "freecus",
        "vital for a subject, FreeCus, arXiv 2507.15249",
        (0, 1, 2, 17, 18, 25, 28, 53, 54, 56),
    ),
    Published(
        "freeflux content",
        "blocks that compare contents, FreeFlux, arXiv 2503.16153",
        (0, 7, 8, 9, 10, 18, 25, 28, 37, 42, 45, 50, 56),
    ),
    Published(
        "freeflux position",
        "blocks that compare positions, FreeFlux, arXiv 2503.16153",
        (1, 2, 4, 26, 30, 54, 55),
    ),
    Published(
        "characonsist",
        "every second single block, CharaConsist, arXiv 2507.11533",
        tuple(range(DOUBLE, DOUBLE + SINGLE, 2)),
    ),
)


def has_published(blocks: Iterable[BlockId]) -> bool:
    """Whether a network has exactly the blocks that these sets are numbered for."""
    return {*blocks} == {_block(number) for number in range(DOUBLE + SINGLE)}
