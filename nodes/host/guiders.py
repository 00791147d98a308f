"""What a guider of the host draws with the MODEL that it was given: the negative too, or not, or by
another MODEL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider

from ...models.network.call import Halves
from .model import KEY
from .page import warn

_begun: ContextVar[bool] = ContextVar("a run of ours", default=False)
DUAL = "Dual Model CFG Guider"
ELSEWHERE = (
    f"Kindred: a Kindred node is wired before model_negative of {DUAL}, where it has no effect. "
    "Wire it before model, and wire the MODEL without it into model_negative."
)


@contextmanager
def begun() -> Iterator[None]:
    """While a guider samples with a MODEL of ours."""
    token = _begun.set(True)
    try:
        yield
    finally:
        _begun.reset(token)


def say_elsewhere(model: ModelPatcher) -> None:
    """ON_PRE_RUN of a MODEL of ours: a warning where the guider that prepares it samples with
    another one.
    """
    if not _begun.get():
        warn(ELSEWHERE)


def require_one_model(guider: Any, injections: Sequence[Any]) -> None:
    """ValueError where a half is to be read that the guider draws by another MODEL: Ideogram 4 is
    loaded twice, for the prompt and for the negative.
    """
    other = getattr(guider, "uncond_model_patcher", None)
    if other is None:
        return
    ours = {id(injection) for injection in injections}
    theirs = other.model_options.get("transformer_options", {}).get(KEY, ())
    if any(id(injection) not in ours for injection in theirs):
        raise ValueError(ELSEWHERE)
    halves = next((i.halves for i in injections if i.halves is not Halves.COND), None)
    if halves is not None and draws_negative(guider, guider.model_options):
        raise ValueError(
            f"Kindred: halves is {halves.value!r}, but {DUAL} draws the negative by model_negative,"
            f" where nothing of Kindred is read. Set halves to {Halves.COND.value}, or leave "
            "model_negative unwired."
        )


def draws_negative(guider: Any, model_options: Mapping[str, Any]) -> bool:
    """Whether it draws a negative; False only of the host's own ways to leave it out: no negative,
    or guidance 1.
    """
    if getattr(type(guider), "set_cfg", None) is not CFGGuider.set_cfg:
        return True  # it has other numbers
    every = model_options.get("disable_cfg1_optimization", False)
    return "negative" in guider.conds and (every or not math.isclose(guider.cfg, 1.0))
