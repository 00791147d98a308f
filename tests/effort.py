"""How much is done, counted and not timed: the same on every machine, however busy it is. Tests import it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType


class TooMuch(BaseException):
    """Not an Exception, so that nobody takes it for a fault of the input."""


@contextlib.contextmanager
def at_most(calls: int) -> Iterator[None]:
    """TooMuch at the call after so many, of Python's functions and of C's, in this thread."""
    left = calls

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        left -= event in ("call", "c_call")
        if left < 0:
            raise TooMuch(f"more than {calls} calls")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
