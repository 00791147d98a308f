"""A training that was stopped: its state as a file, and whether it is that of the run that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import of_system, unread


def unlike_tensors(what: str, given: Any, own: Mapping[str, Tensor]) -> str:
    """How tensors of a file differ from those they are to replace, in names, shapes or finiteness; "" where they do not."""
    if not isinstance(given, Mapping) or given.keys() != own.keys():
        return f"its {what} has other names"
    for name, value in own.items():
        if not isinstance(given[name], Tensor) or given[name].shape != value.shape:
            return f"{name} of its {what} is {list(getattr(given[name], 'shape', ()))}, but {list(value.shape)} is needed"
        if value.is_floating_point() and not (
            given[name].is_floating_point() and torch.isfinite(given[name]).all()
        ):
            return f"{name} of its {what} holds NaN or infinite values"
    return ""


def read_state(path: Path) -> dict[str, Any]:
    """What Trainer.save wrote, and its file's name; nothing in it is executed.

    ValueError for a torn or foreign one, OSError where the system does not give it.
    """
    try:
        path.open("rb").close()
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle fails in every way there is
        if of_system(error):
            raise unread(path, error) from error
        raise ValueError(
            f"training: {path.name} is torn or no state of a training ({(str(error) or repr(error)).splitlines()[0]:.200}). "
            "Remove it to begin again; the encoder beside it is a file of its own."
        ) from error
    return {**state, "file": path.name}
