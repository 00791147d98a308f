"""The miniature's programs run as those of tools/ do: its run_program and settle."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

from terminal import run_program, settle  # noqa: E402

__all__ = ["run_program", "settle"]
