"""This pack's inject nodes as the columns of the matrix of neighbours: each alone, and all of them on one model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from kindred.models.run import Run
from matrix import seed_all, states
from networks import random_model
from studio import (
    MOMENTS,
    STEPS,
    bank_of,
    capture,
    concept,
    inject,
    negative,
    of_model,
    pictures,
    sample,
    story,
)
from torch import Tensor

MODEL = random_model("tiny")
FELT, TIGHT = (
    1e-3,
    1e-4,
)  # an effect that cannot be rounding, and what rounding may do; relative to the pictures' spread


@dataclass(frozen=True)
class Column:
    """node: MODEL and REFERENCE in, MODEL out; read: steps of the bank it reads; steps: of its sampler."""

    node: Callable[[Any, Any], Any]
    read: int = 0
    steps: int = STEPS

    def __call__(self, model: Any, maker: Any = None) -> Any:
        """maker: the model that the reference is made with, where it is another than MODEL."""
        if not self.read:
            return self.node(model, None)
        if maker is None:
            return self.node(model, bank_of(steps=self.read))
        return self.node(
            model,
            capture(maker, steps=self.read, negative=negative(), mask=torch.ones(1, 64, 64))[0],
        )

    def sampled(self, model: Any, **how: Any) -> Tensor:
        return pictures(model, **{"who": (0, 1), "steps": self.steps} | how)


def everything(model: Any, bank: Any) -> Any:
    return story(concept(inject(model, bank, 2.0), 2.0))


OURS = {
    "self cached": Column(lambda m, bank: inject(m, bank, 2.0), read=STEPS),
    "self live": Column(lambda m, bank: inject(m, bank, 2.0), read=MOMENTS),
    "cross": Column(lambda m, bank: concept(m, 2.0)),
    "sharing": Column(lambda m, bank: story(m, feature_injection=0.0)),
    "story": Column(lambda m, bank: story(m), steps=MOMENTS),
    "all": Column(everything, read=MOMENTS, steps=MOMENTS),
}
READERS = {
    name for name, column in OURS.items() if column.read
}  # of a reference, which was made with one model
STORIES = {"sharing", "story", "all"}


@cache
def alone(name: str, **how: Any) -> Tensor:
    """A shared picture of one of our columns without neighbours."""
    return OURS[name].sampled(OURS[name](MODEL), **how)


def seeded(act: Callable[[], Tensor]) -> tuple[Tensor, str]:
    """The pictures, and the global random states that drawing them leaves."""
    seed_all()
    return act(), states()


@cache
def untouched() -> tuple[Tensor, Any]:
    """The plain picture, and MODEL as its owner sees it."""
    return sample(MODEL, steps=1), of_model(MODEL)


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Whatever happens inside: no run of ours outlives it, MODEL is as it was, and so is the plain picture bit for bit."""
    picture, model = untouched()
    seen: list[weakref.ref] = []
    read = Run.expect

    def expect(self: Run, parts: Any) -> None:
        seen.append(weakref.ref(self))
        read(self, parts)

    gc.collect()
    gc.freeze()  # what lives already is not looked through again
    Run.expect = expect
    try:
        yield
    finally:
        Run.expect = read
        gc.collect()
        gc.unfreeze()
    left = [referrer for run in seen if run() for referrer in gc.get_referrers(run())]
    assert not left, [str(referrer)[:300] for referrer in left]
    assert (
        torch.equal(sample(MODEL, steps=1), picture) and of_model(MODEL) == model
    )  # sampling puts the others' objects away
