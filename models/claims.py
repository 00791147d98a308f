"""Files that tell other processes, on this machine or on a shared disk, that somebody living holds
a name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

NEVER_WRITTEN = 1 << 20  # Windows locks bytes, also those behind a file's end


def _lock(handle: int) -> bool:
    """Whether this open file is now ours alone, until it is closed or we die. OSError where the
    disk knows no locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(handle, NEVER_WRITTEN, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    return True


def hold(claim: Path) -> int | None:
    """Make the file `claim` and hold it -> its handle, or None where somebody else made it first.

    On a disk without locks the file alone stands for its holder. OSError where none can be made
    there.
    """
    try:
        handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_RDWR)
    except FileExistsError:
        return None
    try:
        ours = _lock(handle)
    except OSError:
        return handle
    if ours and _is_at(
        claim, handle
    ):  # else another process locked it first and took it for a dead one's
        return handle
    os.close(handle)
    return None


def release(claim: Path, handle: int) -> None:
    """Give the name back."""
    if os.name == "nt":  # no open file goes there
        os.close(handle)
    with contextlib.suppress(OSError):
        claim.unlink()
    if os.name != "nt":
        os.close(handle)


def _is_at(claim: Path, handle: int) -> bool:
    """Whether an open file is the one that has this name now; Windows gives no name twice while a
    file is open.
    """
    with contextlib.suppress(OSError):
        return os.name == "nt" or os.fstat(handle).st_ino == os.stat(claim).st_ino
    return False


def dead(claim: Path) -> bool:
    """Whether nobody living holds `claim`; then the file is gone. Where that cannot be known,
    somebody does.
    """
    try:
        handle = os.open(claim, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        # else its holder let go and another took the name
        free = _lock(handle) and _is_at(claim, handle)
    except OSError:
        free = False
    if free:
        release(claim, handle)
    else:
        os.close(handle)
    return free


@contextmanager
def first_free(paths: Iterable[Path]) -> Iterator[Path]:
    """The first of `paths` where no file is and that no other process holds; ours until the block
    ends.
    """
    for path in paths:
        claim = path.with_name(f".{path.name}.claim")
        if path.exists() or claim.exists() and not dead(claim):
            continue
        handle = hold(claim)
        if handle is None:
            continue
        try:
            if not path.exists():  # whoever held it before us may have written it
                yield path
                return
        finally:
            release(claim, handle)
