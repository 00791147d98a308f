"""A training that was stopped: its state as a file, and whether it is that of the run that
goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import of_system, unread
from ..identity import differences, read_key
from .settings import TrainSettings


def refuse(state: Mapping[str, Any], fault: str) -> None:
    """ValueError where there is a fault."""
    if fault:
        raise ValueError(
            f"training: {state.get('file', 'the state')} is damaged, or of another encoder: "
            f"{fault}. Remove it to begin "
            "again; the encoder beside it is a file of its own."
        )


def unlike_a_state(state: Mapping[str, Any]) -> str:
    """What of a state is none at all, before its settings are compared; "" where there is
    nothing.
    """
    for name, kind in (
        ("settings", Mapping),
        ("encoder", Mapping),
        ("optimizer", Mapping),
        ("losses", list),
        ("step", int),
    ):
        if not isinstance(state.get(name), kind):
            return f"its {name} is {state.get(name)!r:.40}"
    moments = state["optimizer"].get("state")
    if not isinstance(state.get("made_with", {}), Mapping) or not isinstance(moments, Mapping):
        return "it does not say how it was made, or how far"
    return ""


def check_settings(
    state: Mapping[str, Any], settings: TrainSettings, made_with: Mapping[str, Any]
) -> None:
    """ValueError names the settings that would make it another run."""
    # a setting that the state does not know came later
    was = {**asdict(TrainSettings()), **state["settings"], **state.get("made_with", {})}
    now = {**asdict(settings), **{k: v for k, v in made_with.items() if k in was}}
    free = () if settings.schedule == "cosine" else ("steps",)  # a cosine ends where the run does
    if "base" in now:  # the same weights may be loaded in another precision
        was["base"], now["base"] = read_key(was["base"]), read_key(now["base"])
    differ = [k for k, v in now.items() if k not in free and _differs(k, was.get(k), v)]
    if differ:
        file = f" {state['file']}" if "file" in state else ""
        raise ValueError(
            f"training: the checkpoint{file} was made with "
            + ", ".join(f"{k} {was.get(k)!s:.80}" for k in differ)
            + ", but "
            + ", ".join(f"{k} {now[k]}" for k in differ)
            + " was asked for. Give the same settings, "
            "or another output folder or name."
        )


def _differs(name: str, was: Any, now: Any) -> bool:
    return differences(was, now) != () if name == "base" else was != now


def unlike_losses(state: Mapping[str, Any]) -> str:
    """What is wrong with how far a state says it is; "" where nothing is."""
    step, losses = state["step"], state["losses"]
    finite = all(type(x) is float and math.isfinite(x) for x in losses)
    if step < 0 or len(losses) != step or not finite:
        return f"it is of step {step} and tells {len(losses)} losses"
    return ""


def unlike_moments(state: Mapping[str, Any], learning: Sequence[Tensor]) -> str:
    """What of the optimizer's moments does not fit the tensors that learn; "" where everything
    does.
    """
    step, moments = state["step"], state["optimizer"]["state"]
    if step and moments.keys() != set(range(len(learning))):
        return f"it has moments of {len(moments)} tensors, and {len(learning)} learn"
    for i, own in moments.items():
        wanted = {"step": torch.zeros(()), "exp_avg": learning[i], "exp_avg_sq": learning[i]}
        fault = unlike_tensors(f"moments of tensor {i}", own, wanted)
        if fault:
            return fault
        if (own["exp_avg_sq"] < 0).any() or own["step"] != step:
            return "negative squares"
    return ""


def unlike_tensors(what: str, loaded: Any, own: Mapping[str, Tensor]) -> str:
    """How tensors of a file differ from those they are to replace, in names, shapes or finiteness;
    "" where they do not.
    """
    if not isinstance(loaded, Mapping) or loaded.keys() != own.keys():
        return f"its {what} has other names"
    for name, value in own.items():
        if not isinstance(loaded[name], Tensor) or loaded[name].shape != value.shape:
            shape = list(getattr(loaded[name], "shape", ()))
            return f"{name} of its {what} is {shape}, but {list(value.shape)} is needed"
        if value.is_floating_point() and not (
            loaded[name].is_floating_point() and torch.isfinite(loaded[name]).all()
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
            f"training: {path.name} is torn or no state of a training "
            f"({(str(error) or repr(error)).splitlines()[0]:.200}). "
            "Remove it to begin again; the encoder beside it is a file of its own."
        ) from error
    return {**state, "file": path.name}
