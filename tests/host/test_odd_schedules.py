"""Every inject node under schedules that hold no step, one, or steps in an order that no sampler means: the host's plain result, or a
sentence; never another error."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from kindred.models.network.call import Half
from kindred.models.reference.bank import ReferenceBank
from networks import random_model
from ours import OURS, leaving_nothing
from studio import (
    MOMENTS,
    anchors,
    bank_of,
    capture,
    counted,
    invert,
    negative,
    noise_of,
    prompts_of,
    story,
)

LAW = pytest.mark.parametrize
MODEL = random_model("tiny")
WHOLE = torch.tensor([14.6, 7.0, 3.0, 1.0, 0.0])
PLAIN = {  # schedules in which nothing is asked, or nothing that can be shared
    "empty": torch.zeros(0),
    "split at 0": WHOLE[:1],
    "split at the end": WHOLE[-1:],
    "zero alone, twice": torch.zeros(2),
}
ODD = {
    "zero in the middle": torch.tensor([14.6, 0.0, 7.0, 0.0]),
    "zero first": torch.tensor([0.0, 7.0, 3.0]),
    "one step": WHOLE[[0, 4]],
    "one step that stops": WHOLE[:2],
    "rising": WHOLE.flip(0),
    "rising from above 0": WHOLE[:-1].flip(0),
    "repeated": torch.tensor([14.6, 7.0, 7.0, 3.0, 3.0, 0.0]),
    "all equal": torch.tensor([7.0, 7.0, 7.0]),
    "up and down": torch.tensor([7.0, 14.6, 3.0, 7.0, 1.0, 0.0]),
    "beyond the model's": torch.tensor([1e4, 14.6, 1e-6, 0.0]),
    "negative": torch.tensor([14.6, -1.0, 0.0]),
    "not a number": torch.tensor([14.6, float("nan"), 0.0]),
    "infinite": torch.tensor([float("inf"), 7.0, 0.0]),
}
UNSHARED = (
    "zero first",
    "one step",
    "one step that stops",
    "rising",
    "rising from above 0",
    "all equal",
    "not a number",
)
SAID = "no step of this run follows a noisier one, so nothing was shared"


@cache
def kept() -> ReferenceBank:
    """Anchors of a whole story."""
    return anchors(story(MODEL), (0, 1))[1]


NODES = {
    **OURS,
    "masks": lambda m: story(m, masks=torch.ones(1, 64, 64)),
    "photos": lambda m: story(m, reference=bank_of(steps=MOMENTS), feature_injection=0.0),
    "further": lambda m: story(m, reference=kept()),
    "official": lambda m: story(m, order="official"),
}


@torch.inference_mode()
def draw(model, sigmas, sampler="euler"):
    noise, sampler = custom.RandomNoise.execute(1)[0], custom.KSamplerSelect.execute(sampler)[0]
    guider = custom.CFGGuider.execute(model, prompts_of((0, 1)), negative(), 4.0)[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, noise_of((0, 1)))[
        0
    ]["samples"]


@pytest.fixture(autouse=True)
def nothing_is_left():
    kept(), bank_of(steps=MOMENTS)
    with leaving_nothing():
        yield


@LAW("sigmas", PLAIN)
@LAW("node", NODES)
def test_where_no_step_is_sampled_the_picture_is_the_hosts(node, sigmas):
    assert torch.allclose(
        draw(NODES[node](MODEL), PLAIN[sigmas]),
        draw(MODEL, PLAIN[sigmas]),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@LAW("sigmas", ODD)
@LAW("node", NODES)
def test_an_odd_schedule_ends_in_a_picture_or_in_a_sentence(node, sigmas, caplog):
    """A picture of numbers where the host's has them; further pictures name the noise level that their anchors lack."""
    if node == "further":
        with pytest.raises(
            ValueError,
            match="this sampler asks for noise level .* which the anchors do not have.*Take the sampler",
        ):
            draw(NODES[node](MODEL), ODD[sigmas])
        return
    plain, out = draw(MODEL, ODD[sigmas]), draw(NODES[node](MODEL), ODD[sigmas])
    assert torch.isfinite(plain).all() == torch.isfinite(out).all()
    alone = node in (
        "sharing",
        "story",
        "official",
    )  # the subject is found by its word in the pictures themselves
    if alone and sigmas in UNSHARED:
        assert torch.equal(out, plain) or not torch.isfinite(plain).all()
        assert SAID in caplog.text and "could not be compared" not in caplog.text
    else:
        assert SAID not in caplog.text or node == "all"
        assert not torch.equal(out, plain) or sigmas == "all equal"


@LAW("how", [{}, {"feature_injection": 0.0}], ids=str)
def test_anchors_of_one_step_are_refused_unless_masks_say_where_the_subject_is(how):
    said = "ConsiStory Anchor Sampler: only one step is sampled, but the subject is located from the step before, .*Sample 2 steps"
    with counted(MODEL) as rows, pytest.raises(ValueError, match=said):
        anchors(story(MODEL, **how), (0, 1), steps=1)
    assert not rows
    bank = anchors(story(MODEL, masks=torch.ones(1, 64, 64), **how), (0, 1), steps=1)[1]
    assert all(len(t) for t in bank.features[Half.COND])


@LAW(
    "act",
    [
        lambda s: invert(MODEL, sigmas=s),
        lambda s: invert(MODEL, sigmas=s, method="edit-friendly ddpm"),
        lambda s: capture(MODEL, sigmas=s),
    ],
    ids=["invert", "edit-friendly", "capture"],
)
@LAW("sigmas", [*PLAIN, *ODD, "two lists", "a number"])
def test_a_schedule_that_cannot_be_inverted_is_refused(act, sigmas):
    given = {**PLAIN, **ODD, "two lists": WHOLE[None], "a number": torch.tensor(3.0)}[sigmas]
    if sigmas in ("one step", "beyond the model's"):
        act(given)
        return
    said = r"sigmas \(custom, \d steps\) must fall from step to step and end in 0, but \[.*\(\d values, last .* were given. Take another"
    with counted(MODEL) as rows, pytest.raises(ValueError, match=said):
        act(given)
    assert not rows


@LAW("method", ["ddim", "edit-friendly ddpm"])
def test_a_photo_of_one_colour_is_inverted_and_reported(method):
    assert (
        "round trip" in invert(MODEL, {"samples": torch.full((1, 4, 8, 8), 0.06)}, method=method)[2]
    )
