"""What a story costs: passes through the UNet, one progress bar, the size of its tensors, waits for the device."""

from __future__ import annotations

import sys
from collections import Counter
from math import prod

import latent_preview
import pytest
import torch
from comfy.ldm.modules.attention import attention_basic
from counting import Counting
from kindred.models.story.story import Story
from kindred.nodes.consistory import ConsiStory
from networks import random_model
from studio import MOMENTS, anchors, passes, pictures, story
from torch.overrides import TorchFunctionMode

MODEL = random_model("tiny")
LAW = pytest.mark.parametrize
ONCE = 6  # in a whole run: positions of the words, matches, masks where the stages meet


# passes ----------------------------------------------------------------------------------------------------------------------


@LAW(
    ("how", "count"),
    [
        ({}, 88),
        ({"order": "official"}, 101),
        ({"feature_injection": 0.0}, 55),
        ({"query_blend": 0.0}, 82),
        ({"weight": 0.0, "feature_injection": 0.0}, 50),
    ],
    ids=["fast", "official", "no injection", "no blend", "nothing"],
)
def test_passes_of_fifty_steps(how, count, caplog):
    """37 + 45 + 6 and 50 + 45 + 6; the windows are the node's own. It is said before the run."""
    caplog.set_level("INFO")
    with torch.inference_mode():
        model = ConsiStory.execute(MODEL, **how).result[0]
    with passes(MODEL) as rows:
        pictures(model, (0, 1), steps=50)
    assert len(rows) == count and set(rows) == {4}
    assert (
        f"2 pictures in {count} calls of the model where the plain run has 50" in caplog.text
    ) is (count > 50)


@LAW(("how", "count"), [({}, 89), ({"feature_injection": 0.0}, 56)], ids=["fast", "no injection"])
def test_a_mask_that_is_wired_blends_from_the_first_step_on(how, count, caplog):
    caplog.set_level("INFO")
    with torch.inference_mode():
        model = ConsiStory.execute(MODEL, masks=torch.ones(1, 64, 64).tril(), **how).result[0]
    with passes(MODEL) as rows:
        pictures(model, (0, 1), steps=50)
    assert len(rows) == count and f"in {count} calls" in caplog.text


@LAW("sampler", ["euler", "heun", "dpm_2", "uni_pc", "dpmpp_2m"])
@LAW("order", ["fast", "official"])
def test_one_progress_bar(sampler, order, monkeypatch):
    """Its total is told once and kept, its steps rise to the last, and each comes with a picture to show."""
    seen = []
    monkeypatch.setattr(
        latent_preview,
        "prepare_callback",
        lambda model, steps, x0=None: (
            lambda step, denoised, x, total: seen.append((step, total, denoised.shape))
        ),
    )
    pictures(MODEL, (0, 1), sampler=sampler, steps=6)
    (alone,), shown = {total for _, total, _ in seen}, len(seen)
    seen.clear()
    pictures(story(MODEL, order=order, injection_end_percent=0.6), (0, 1), sampler=sampler, steps=6)
    (total,) = {total for _, total, _ in seen}
    at = [step for step, _, _ in seen]
    assert (
        at == sorted(set(at))
        and at[0] == 0
        and at[-1] == total - 1
        and alone < total <= 2 * alone
        and len(at) > shown
    )
    assert {shape for _, _, shape in seen} == {(2, 4, 8, 8)}


# tensors ---------------------------------------------------------------------------------------------------------------------


def dense(shapes: set[tuple[int, ...]], b: int, grid: tuple[int, int]) -> set[tuple[int, ...]]:
    """Those that hold a number for each token and each token of all pictures, at either of the tiny model's grids."""
    found = set()
    for n in (grid[0] * grid[1], -(-grid[0] // 2) * -(-grid[1] // 2)):
        found |= {s for s in shapes if len(s) > 1 and {s[-1], s[-2]} == {n, b * n}}
    return found


@LAW("k", [1, 2, 0])
def test_no_tensor_holds_all_tokens_against_all_pictures(k):
    """A fifth of each picture is subject, nothing drops out: keys are 1 + k / 5 of the picture's own, never b times."""
    size, b = (10, 12), 4
    masks = torch.zeros(1, 80, 96)
    masks[:, 48:, 48:] = 1

    def basic(func, q, k, v, heads, mask=None, **kwargs):  # a kernel whose scores can be seen
        return attention_basic(q, k, v, heads, mask, **kwargs)

    def shapes(model, steps=1):
        m = model.clone()
        m.model_options["transformer_options"]["optimized_attention_override"] = basic
        with Counting() as spent:
            pictures(m, range(b), steps=steps, size=size)
        return spent.shapes

    plain = shapes(MODEL)
    how = {"feature_injection": 0.0, "dropout": 0.0, "anchors": k}
    seen = shapes(story(MODEL, masks=masks, **how))
    assert not dense(seen, b, size)
    assert max(map(prod, seen)) <= max(map(prod, plain)) * (1 + (k or b - 1) / 5)
    assert not dense(shapes(story(MODEL, masks=masks, anchors=k), steps=MOMENTS), b, size)
    assert dense(
        shapes(story(MODEL, masks=torch.ones(1, 8, 8), **how | {"anchors": 0})), b, size
    )  # where all of all is read, it is seen


# waits -----------------------------------------------------------------------------------------------------------------------


class Far(torch.Tensor):
    """A tensor as if on a device."""


READS = (
    "cpu",
    "item",
    "tolist",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "equal",
    "masked_select",
    "numpy",
    "argwhere",
    "unique",
)


class Waits(TorchFunctionMode):
    """Where the pack waits for the device: it reads a far value, or copies a near one there without non_blocking.

    What arrives here is a plain tensor, what is copied there a far one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if not args or not isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        far, ours = (
            isinstance(args[0], Far),
            sys._getframe(1).f_globals["__name__"].startswith("kindred"),
        )
        goals = [*args[1:], *kwargs.values()]
        here = name == "cpu" or name == "to" and "cpu" in [g for g in goals if isinstance(g, str)]
        there = (
            name == "to"
            and not far
            and any(isinstance(g, (torch.device, torch.Tensor)) for g in goals)
        )
        chosen = goals[0] if name == "__getitem__" else ()
        picks = any(
            isinstance(i, torch.Tensor) and i.dtype is torch.bool
            for i in (chosen if isinstance(chosen, tuple) else (chosen,))
        )
        if (
            far
            and (here or picks or name in READS)
            or ours
            and there
            and not kwargs.get("non_blocking")
        ):
            self.seen.append(f"{name} in {sys._getframe(1).f_code.co_qualname}")
        out = func(*args, **kwargs)
        return (
            out.as_subclass(Far)
            if ours and there
            else out.as_subclass(torch.Tensor)
            if far and here
            else out
        )


def waits(model, sampled=pictures, **how) -> tuple[list[str], int]:
    """Where one run waits for what the UNet's calls leave, and how many calls there are."""
    m, calls = model.clone(), []

    def far(apply, args):
        calls.append(1)
        c = {
            k: v.as_subclass(Far) if isinstance(v, torch.Tensor) else v
            for k, v in args["c"].items()
        }
        return apply(args["input"].as_subclass(Far), args["timestep"], **c).as_subclass(
            torch.Tensor
        )

    m.set_model_unet_function_wrapper(far)
    with Waits() as mode:
        sampled(m, **how)
    return mode.seen, len(calls)


@LAW(
    "how",
    [
        {},
        {"anchors": 0},
        {"order": "official"},
        {"halves": "cond only"},
        {"feature_injection": 0.0},
    ],
    ids=str,
)
def test_a_step_waits_for_the_device_once(how):
    """The words' maps, beside the noise level itself, which is read outside; a few more once in a run."""
    alone, calls = waits(MODEL)
    assert not alone and calls == MOMENTS
    found, calls = waits(story(MODEL, **how))
    assert found and calls >= MOMENTS and len(found) <= calls + ONCE, Counter(found)


def test_reading_anchors_waits_once_more():
    """Their tokens lie in host memory: the copy of each half need not wait."""
    _, bank = anchors(story(MODEL), (0, 1))
    found, calls = waits(story(MODEL, reference=bank), who=(2, 3))
    assert found and len(found) <= calls + ONCE, Counter(found)


def test_a_wait_in_every_layer_would_be_seen(monkeypatch):
    keep = Story.self_tokens
    for wait in (lambda n: n.sum().item(), lambda n: n.cpu(), lambda n: n[n > 0], bool):
        monkeypatch.setattr(
            Story,
            "self_tokens",
            lambda self, call, n: (wait(n if wait is not bool else n.sum()), keep(self, call, n))[
                1
            ],
        )
        found, calls = waits(story(MODEL))
        assert len(found) > 2 * calls
