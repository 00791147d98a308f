"""Which line of the pack, or of the host, asked for what a test counts."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]


def line() -> tuple[str, str]:
    """The innermost line of the pack or the host, "models/reference/rows.py:90", and the innermost of the pack alone."""
    frame, where = sys._getframe(1), ""
    while frame is not None:
        file, ours = named(frame.f_code.co_filename)
        if ours and frame.f_code.co_name != "sent":  # models/copies.py: who sent it is meant
            found = f"{file}:{frame.f_lineno}"
            return where or found, found
        if file and not where:
            where = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return where or "elsewhere", ""


@cache
def named(file: str) -> tuple[str, bool]:
    """What a file is called here, and whether it is the pack's; "" for one of neither it nor the host."""
    path = Path(file)
    if path.is_relative_to(PACK) and path.relative_to(PACK).parts[0] in ("models", "nodes"):
        return path.relative_to(PACK).as_posix(), True
    hosts = {"comfy", "comfy_extras"} & set(path.parts[-4:-1])
    return "/".join(path.parts[-2:]) if hosts else "", False
