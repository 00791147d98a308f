"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from .claims import dead, hold, release


@contextmanager
def whole(path: Path, tensors: Iterable[Tensor] = ()) -> Iterator[Path]:
    """Yields a temporary path to write; renamed to `path` when the block ends well, removed when it
    does not.

    A kill, a power cut or a full disk leaves the older file as it was; what a killed process left
    of this name goes first, what a living one is writing stays. tensors: most of what will be
    written. Raises OSError where the disk does, whoever wrote, with the folder and its room.
    """
    _clear(path)
    size = sum(t.numel() * t.element_size() for t in tensors)
    place, lock, handle = _place(path), path, None
    try:
        while handle is None:
            place = _place(path)
            lock = place.with_suffix(".lock")
            handle = hold(lock)
        partial = place / "file.partial"
        place.mkdir()  # safetensors writes beside the name it is given, and a kill leaves that too
        yield partial
        _finish(partial, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and "inline_container" not in str(error):
            raise  # only with this word torch.save speaks of a disk
        discard(place)  # its room is free again
        if handle is not None:
            release(lock, handle)
            handle = None
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        refused = refusal(path, size, reason)
        refused.errno = getattr(error, "errno", None)
        raise refused from error
    finally:
        discard(place)
        if handle is not None:
            release(lock, handle)


def _clear(path: Path) -> None:
    """Take away what killed processes left of this name; what a living one is writing stays."""
    name = glob.escape(path.name)
    for stale in path.parent.glob(f".{name}.*.partial"):
        if dead(stale.with_suffix(".lock")):
            discard(stale)
    for lock in path.parent.glob(f".{name}.*.lock"):  # of one that was killed behind its last step
        dead(lock)


def _finish(partial: Path, path: Path) -> None:
    """Flush what was written to the disk, and give it its name."""
    place = partial.parent
    plain = place / "plain.partial"
    plain.touch()
    partial.chmod(plain.stat().st_mode)  # safetensors makes files that nobody else may read
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    discard(place)
    flush_folder(path.parent)


def _place(path: Path) -> Path:
    """Where `path` is written before it has its name; other machines count their processes from 1
    too.
    """
    return path.with_name(f".{path.name}.{os.getpid()}{secrets.randbelow(10**8):08}.partial")


def discard(place: Path) -> None:
    """What cannot go stays: a disk that became read-only; on Windows, somebody else's that is still
    open.
    """
    shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):
        place.unlink(missing_ok=True)  # of an older Kindred, which had no folder for it


def flush_folder(folder: Path) -> None:
    """After this a power cut keeps the new name too. Windows opens no folders, and some network
    disks flush none: then it is up to them.
    """
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refusal(path: Path, size: int, said: str) -> OSError:
    """What a person needs to know; safetensors and torch.save do not always say why."""
    room = [f"it takes {size / 1e6:.1f} MB"] if size else []
    with contextlib.suppress(OSError):  # the folder itself may be gone
        room.append(f"{shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free there")
    return OSError(
        f"{path.name} could not be written to {path.parent}: "
        f"{'; '.join([said, ' and '.join(room)]).rstrip('; ')}"
    )


def remedy(error: OSError, elsewhere: str) -> str:
    """What a person can do about a file that the system refused to write; elsewhere: what else can
    be chosen.
    """
    allow = f"let ComfyUI write there, or choose {elsewhere}"
    known = {
        errno.ENOSPC: "make room there",
        errno.EDQUOT: "make room there",
        errno.EROFS: f"choose {elsewhere}",
        errno.EACCES: allow,
        errno.EPERM: allow,
        errno.ENOTDIR: "move the file that lies where the folder should be",
        errno.ENAMETOOLONG: "give a shorter name",
        None: "make room there",  # torch.save and safetensors do not say why; mostly it is that
    }
    return known.get(error.errno, "see that the folder is there and its disk is well")


def unread(path: Path, error: OSError) -> Exception:
    """What to raise of a file that could not be read: the system's own fault, or that its contents
    are torn.
    """
    if not of_system(error):
        return torn(path, error)
    named = type(error)(f"{path.name} could not be read in {path.parent}: {error.strerror}")
    named.errno = error.errno
    return named


def of_system(error: Exception) -> bool:
    """Whether the system did not give a file. Without a number it is a library that speaks of the
    contents, with EINVAL they led astray.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def torn(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path.name} is torn or no .safetensors ({str(error):.200}). Copy or download it again."
    )
