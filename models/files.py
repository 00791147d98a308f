"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; renamed to `path` when the block ends well, removed when it does not.

    A kill or a full disk leaves the older file as it was. Raises OSError where the disk does, whoever wrote.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, SafetensorError) or "inline_container" in str(error):  # how safetensors and torch.save put it
            raise OSError(f"{path.name} could not be written: {str(error).splitlines()[0]}") from error
        raise
    finally:
        partial.unlink(missing_ok=True)
