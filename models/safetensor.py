"""What a .safetensors file says of itself, looked at before it is believed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from .files import unread

GREATEST = 65504.0  # float16's; beyond it a run would overflow, and no model leaves such values
MOST_HEADER = 1 << 26  # bytes; a real one has a few hundred kB


def check_safetensors(path: Path) -> None:
    """Refuse what safetensors would misread or execute: ValueError for a pickle, an empty or cut
    file, a header that cannot be.

    OSError where the system does not give it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head, brace = file.read(8), file.read(1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unread(path, error) from error
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if brace == b"{" and 0 < length <= min(
        MOST_HEADER, size - 8
    ):  # a length may begin with a pickle's bytes too
        return
    if head[:2] == b"PK" or head[:1] == b"\x80":
        raise ValueError(
            f"{path.name} is a pickle (.bin, .pt, .ckpt), which can run programs when it is "
            f"opened, so Kindred does not. "
            "Use the .safetensors form of it."
        )
    raise ValueError(
        f"{path.name} is torn or no .safetensors ({size} bytes). Copy or download it again."
    )


def shape_of(view: Any) -> tuple[int, ...]:
    """Of a tensor that still lies in its file."""
    return tuple(view.get_shape())


def number(value: Any, lowest: int, highest: int, what: str) -> int:
    """A whole number within its bounds; ValueError for anything else."""
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"{what} is {value!r:.60}; it can be {lowest} to {highest}")
    return value


def real(value: Any, lowest: float, highest: float, what: str) -> float:
    """A finite number within its bounds; ValueError for anything else."""
    if type(value) not in (int, float) or not lowest <= value <= highest:  # NaN lies in no bounds
        raise ValueError(f"{what} is {value!r:.60}; it can be {lowest} to {highest}")
    return float(value)
