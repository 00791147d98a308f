"""References beside a pack whose wrappers and injected modules belong together: a reference pass runs without both, or with both."""

from __future__ import annotations

import pytest
import strangers
import torch
from comfy_extras.nodes_easycache import EasyCacheNode
from kindred.models.reference.bank import ReferenceBank
from kindred.models.reference.recorder import Recorder
from kindred.nodes.host import model_key
from ours import FELT, MODEL, OURS, TIGHT, alone, leaving_nothing, seeded
from studio import (
    MOMENTS,
    STEPS,
    bank_of,
    capture,
    differs,
    inject,
    invert,
    pictures,
    sample,
    story,
)
from test_bypassed_lora import lora

LAW = pytest.mark.parametrize
PACKS = {"one key": {}, "keys of their own": {"wrapped_by": "motion, sampling"}}


@pytest.fixture(autouse=True)
def nothing_is_left():
    with leaving_nothing():
        yield


def moved(model, seen=None, **how):
    return strangers.motion(model, [] if seen is None else seen, **how)


def modules(model) -> list[str]:
    return [type(m).__name__ for m in model.model.diffusion_model.modules()]


@LAW("how", PACKS)
@LAW("column", OURS)
def test_both_are_felt_in_either_order_with_a_reference_of_the_plain_network(column, how):
    ours, seen = OURS[column], []
    theirs = {**PACKS[how], "seen": seen}
    (before, left), (behind, left_behind), (none, left_by_them) = (
        seeded(lambda m=m: ours.sampled(m))
        for m in (ours(moved(MODEL, **theirs)), moved(ours(MODEL), **theirs), moved(MODEL))
    )
    assert torch.equal(before, behind) and left == left_behind == left_by_them
    assert differs(before, none) > FELT < differs(before, alone(column))
    sample(MODEL, steps=1)
    assert seen.count("put") == seen.count("taken") and "Motion" not in modules(MODEL)


@LAW("how", PACKS)
def test_a_reference_is_made_as_on_the_plain_network(how):
    theirs = moved(MODEL, **PACKS[how])
    assert model_key(theirs) == model_key(MODEL)
    for make in (capture, lambda m: capture(m, inversion=invert(m)[0])):
        made, meant = make(theirs)[0], make(MODEL)[0]
        assert made.model_key == meant.model_key
        assert all(
            torch.equal(a, b)
            for half in meant.features
            for a, b in zip(made.features[half], meant.features[half])
        )


@LAW("how", PACKS)
def test_read_live_equals_cached(how, monkeypatch):
    model = inject(moved(MODEL, **PACKS[how]), bank_of(), 2.0)
    cached = pictures(model, (0, 1), steps=STEPS)
    monkeypatch.setattr(ReferenceBank, "step_of", lambda self, sigma: None)
    assert differs(pictures(model, (0, 1), steps=STEPS), cached) < TIGHT


@LAW("how", PACKS)
def test_photos_tell_a_story_beside_it(how):
    told, bank = [], bank_of(steps=MOMENTS)
    for model in (
        story(moved(MODEL, **PACKS[how]), reference=bank),
        moved(story(MODEL, reference=bank), **PACKS[how]),
    ):
        told.append(pictures(model, (0, 1)))
    assert torch.equal(*told) and differs(told[0], pictures(moved(MODEL), (0, 1))) > FELT


def test_the_modules_are_back_after_a_reference_pass_that_fails(monkeypatch):
    """The rest of the run has them, and whoever samples next finds what the host put there."""
    seen, own = [], Recorder.self_tokens
    theirs = inject(moved(MODEL), bank_of(steps=MOMENTS), 2.0)

    def broken(self, call, n):
        seen.append("Motion" in modules(MODEL))
        raise KeyError("midway")

    monkeypatch.setattr(Recorder, "self_tokens", broken)
    with pytest.raises(KeyError, match="midway"):
        sample(theirs)
    assert seen == [False] and "Motion" in modules(MODEL)
    monkeypatch.setattr(Recorder, "self_tokens", own)
    assert torch.equal(sample(theirs), sample(inject(moved(MODEL), bank_of(steps=MOMENTS), 2.0)))


def test_loras_in_bypass_mode_stay_in_the_pass():
    """They are weights, whoever wraps what: the host's own wrappers come from the same package."""
    with_lora = lora(MODEL)
    for theirs in (
        moved(with_lora),
        lora(moved(MODEL)),
        EasyCacheNode.execute(with_lora, 0.2, 0.15, 0.95, False).result[0],
    ):
        assert model_key(theirs) == model_key(with_lora) != model_key(MODEL)
        made, meant = capture(theirs)[0], capture(with_lora)[0]
        assert all(
            torch.equal(a, b)
            for half in meant.features
            for a, b in zip(made.features[half], meant.features[half])
        )


def test_modules_that_need_nobody_stay_in_the_pass():
    theirs = strangers.fixture(MODEL)
    made = capture(theirs)[0]
    assert made.model_key == model_key(theirs) != model_key(MODEL)
    assert not torch.equal(made.features["cond"][0], bank_of().features["cond"][0])
    beside = strangers.wrappers(theirs, [])  # another's
    assert model_key(beside) == model_key(theirs)


def test_a_pass_takes_nothing_out_of_the_network_that_is_not_the_packs():
    """The clone of a loaded model says that it is injected too, and the host would eject twice."""
    theirs = strangers.fixture(MODEL)
    before = sample(theirs)
    capture(theirs)
    assert torch.equal(sample(theirs), before)
