"""What the host laws of stories share: one tiny random model, its plain pictures and its stories."""

from __future__ import annotations

from functools import cache
from typing import Any

from networks import random_model
from studio import pictures, story
from torch import Tensor

MODEL = random_model("tiny")
TIGHT, FELT = (
    1e-4,
    1e-2,
)  # float32 through a run, relative to the pictures' spread; an effect that cannot be rounding
SHARING = {"feature_injection": 0.0}  # one stage


@cache
def plain(who: tuple[int, ...] = (0, 1, 2), **how: Any) -> Tensor:
    return pictures(MODEL, who, **how)


@cache
def told(who: tuple[int, ...] = (0, 1, 2), **inputs: Any) -> Tensor:
    """A shared story: (name, value) pairs of the node's inputs."""
    return pictures(story(MODEL, **inputs), who)
