"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed."""
from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor


@contextmanager
def whole(path: Path, tensors: Iterable[Tensor] = ()) -> Iterator[Path]:
    """Yields a temporary path to write; renamed to `path` when the block ends well, removed when it does not.

    A kill, a power cut or a full disk leaves the older file as it was; what a killed process left of this name goes first.
    tensors: most of what will be written. Raises OSError where the disk does, whoever wrote, with the folder and its room.
    """
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        discard(stale)
    size = sum(t.numel() * t.element_size() for t in tensors)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush_folder(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and "inline_container" not in str(error):  # so begins what torch.save says of a disk
            raise
        discard(partial)  # its room is free again
        raise refusal(path, size, getattr(error, "strerror", None) or str(error).splitlines()[0]) from error
    finally:
        discard(partial)


def discard(partial: Path) -> None:
    with contextlib.suppress(OSError):  # a disk that became read-only; on Windows, somebody else's that is still open
        partial.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """After this a power cut keeps the new name too. Windows opens no folders, and some network disks flush none: then it is up to them."""
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
    return OSError(f"{path.name} could not be written to {path.parent}: {'; '.join([said, ' and '.join(room)]).rstrip('; ')}")
