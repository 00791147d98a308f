"""The miniature's programs run, and put what they make, as those of tools/ do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools" / "client"))

from results import make_folder, prepare  # noqa: E402
from terminal import run_program, settle  # noqa: E402

__all__ = ["make_folder", "prepare", "run_program", "settle"]
