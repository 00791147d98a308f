"""Make this checkout importable as the package `kindred`, whatever its folder is called: for tests and tools."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def version() -> str:
    """The pack's version, from pyproject.toml (tomllib came with Python 3.11)."""
    lines = (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version"))


def as_kindred() -> None:
    """`from kindred.models.subject.masks import ...` works afterwards. Nothing of the pack is run, not even its __init__.py.

    The root itself must not be on sys.path: its folder `nodes` would shadow the host's nodes.py.
    """
    if "kindred" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "kindred", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["kindred"] = importlib.util.module_from_spec(spec)
