"""Host laws of Ref-UNet Feature Capture: what a reference holds, what it costs, and which settings are heard."""

from __future__ import annotations

import logging

import pytest
import torch
from kindred.models.network.call import Half
from kindred.nodes.host import SUBJECT
from kindred.models.subject.masks import resize_user_mask
from kindred.models.subject.words import SubjectTokens
from networks import random_model
from studio import (
    SIZE,
    STEPS,
    bank_of,
    capture,
    coarse,
    counted,
    differs,
    inject,
    invert,
    negative,
    photo,
    prompt,
    sample,
)

TIGHT = 1e-4  # float32 through a few UNet calls, relative to the picture's spread
FELT = 1e-2  # an effect that cannot be rounding
MODEL = random_model("tiny")
LAW = pytest.mark.parametrize


def test_a_reference_costs_one_call_more_than_its_steps():
    with counted(MODEL) as fresh:
        capture(MODEL)
    with counted(MODEL) as inverting:
        trajectory, _, _ = invert(MODEL, check=False)
    with counted(MODEL) as replayed:
        capture(MODEL, inversion=trajectory, negative=negative())
    assert (fresh, inverting, replayed) == ([1] * (STEPS + 1), [1] * STEPS, [2] * STEPS)


def test_the_bank_is_the_same_every_time():
    """I17: no seed, no state of an earlier run."""
    torch.manual_seed(5)
    bank, mask = capture(MODEL, negative=negative())
    assert all(torch.equal(bank.features[half], bank_of().features[half]) for half in Half)
    assert torch.equal(
        mask, bank_of().masks[SIZE].float().repeat_interleave(8, 1).repeat_interleave(8, 2)
    )


def test_a_model_that_carries_our_injection_is_captured_like_the_plain_one():
    carrying, _ = capture(inject(MODEL, bank_of(seed=8), 4.0), negative=negative())
    assert all(torch.equal(carrying.features[half], bank_of().features[half]) for half in Half)


def test_features_do_not_depend_on_the_prompt_of_the_other_half():
    assert differs(capture(MODEL)[0].features[Half.COND], bank_of().features[Half.COND]) < TIGHT


def test_the_features_are_those_of_the_stored_latents():
    """From a latent or from an inversion of the same points: equal, since one pass asks at the points it stores."""
    bank = bank_of()
    replayed, _ = capture(MODEL, inversion=bank.trajectory, negative=negative())
    assert all(differs(replayed.features[half], bank.features[half]) < TIGHT for half in Half)


def test_the_users_mask_decides_which_tokens_are_kept():
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 8:24] = 1  # cells y 2-5, x 1-2
    bank, out = capture(MODEL, mask=mask, positive=prompt(1))  # no subject word needed
    assert torch.equal(out, mask) and bank.maps is None
    assert bank.kept[SIZE].tolist() == [8 * y + x for y in range(2, 6) for x in (1, 2)]
    assert torch.equal(bank.masks[4, 4], resize_user_mask(mask, (4, 4)))


def test_one_mask_serves_all_pictures_and_r_masks_one_each():
    one, two = torch.zeros(1, 64, 64), torch.zeros(2, 64, 64)
    one[:, :32] = two[0, :32] = two[1, 32:] = 1
    latent = photo(pictures=2)
    shared, each = (capture(MODEL, latent, mask=m)[0].masks[SIZE] for m in (one, two))
    assert (
        torch.equal(shared[0], shared[1])
        and torch.equal(each[0], shared[0])
        and torch.equal(each[1], ~each[0])
    )


def test_the_whole_picture_as_mask_differs_from_the_word():
    whole, _ = capture(MODEL, mask=torch.ones(1, 64, 64))
    assert len(whole.kept[SIZE]) == 64 > len(bank_of().kept[SIZE])
    assert differs(sample(inject(MODEL, whole)), sample(inject(MODEL, bank_of()))) > 1e-3


def test_mask_settings_are_heard():
    """The threshold by value, more steps in the union (a superset), and other blocks for the map."""
    auto = bank_of().masks[SIZE]
    low, high = (
        capture(MODEL, mask_threshold="value", mask_value=v)[0].masks[SIZE] for v in (0.1, 0.9)
    )
    assert (low | high).equal(low) and low.sum() > high.sum()
    one, three = (capture(MODEL, mask_steps=t)[0].masks[SIZE] for t in (1, 3))
    assert (one | auto).equal(auto) and (auto | three).equal(three)  # I14
    middle, every = (capture(MODEL, mask_blocks=b)[0] for b in ("middle", "all"))
    assert (
        middle.maps.shape[2:] == (4, 4) and every.maps.shape[2:] == SIZE
    )  # several grids meet at the finest


def test_fewer_blocks_and_half_precision_hold_less():
    full = bank_of(both=False)
    decoder, _ = capture(MODEL, blocks="decoder")
    assert {b[0] for b in decoder.blocks} == {"output"} and decoder.bytes < full.bytes
    half, _ = capture(MODEL, precision="float16")
    assert half.bytes * 2 == full.bytes and half.features[Half.COND].dtype == torch.float16
    assert differs(half.features[Half.COND].float(), full.features[Half.COND]) < 1e-2
    assert (
        differs(sample(inject(MODEL, decoder)), sample(inject(MODEL, full, blocks="decoder")))
        < TIGHT
    )
    assert (
        differs(
            sample(inject(MODEL, full, blocks="output 0-1")),
            sample(inject(MODEL, full, blocks="decoder")),
        )
        > 1e-3
    )


def test_sigmas_are_the_schedule_of_the_reference(caplog):
    caplog.set_level(logging.INFO)
    sigmas = torch.tensor([11.0, 4.0, 1.0, 0.0])
    bank, _ = capture(MODEL, sigmas=sigmas)
    assert (
        bank.trajectory.sigmas.tolist() == [0.0, 1.0, 4.0, 11.0]
        and bank.trajectory.schedule == "custom, 3 steps"
    )


def test_half_precision_latents_are_read():
    """--fp16-intermediates hands latents over in float16."""
    bank, _ = capture(MODEL, {"samples": photo()["samples"].half()})
    assert bank.trajectory.latents.dtype == torch.float32
    assert differs(bank.trajectory.latents, bank_of().trajectory.latents) < FELT


def test_the_capture_may_be_split_too(monkeypatch):
    whole = bank_of()
    monkeypatch.setattr(type(MODEL), "get_free_memory", lambda self, device: 0)
    split, _ = capture(MODEL, negative=negative())
    for half in Half:
        assert differs(split.features[half], whole.features[half]) < TIGHT
    assert all(torch.equal(split.masks[g], whole.masks[g]) for g in whole.masks)


@LAW("tokens", [154, 8 * 77])
def test_the_capture_reads_the_same_features_beside_a_longer_negative(tokens):
    """I13: the word's map is summed over the repeats."""
    bank, mask = capture(MODEL, negative=negative(tokens=tokens))
    alone, its_mask = capture(MODEL)
    assert differs(bank.features[Half.COND], alone.features[Half.COND]) < TIGHT
    assert torch.equal(mask, its_mask) and differs(bank.maps, alone.maps) < TIGHT


def test_the_subject_of_a_row_per_picture():
    """A prompt per reference picture: each row has its own positions."""
    rows = [
        [
            torch.cat((coarse()[0][0], prompt(6)[0][0])),
            {SUBJECT: SubjectTokens(("cat",), ((5,), (9,)))},
        ]
    ]
    latent = photo(pictures=2)
    bank, _ = capture(MODEL, latent, rows)
    second = [[prompt(6)[0][0], {SUBJECT: SubjectTokens(("cat",), ((9,),))}]]
    alone, _ = capture(MODEL, {"samples": latent["samples"][1:]}, second)
    assert differs(bank.maps[:, 1:], alone.maps) < TIGHT


@pytest.mark.parametrize("background, warned", [(True, True), (False, False)])
def test_a_mask_that_marks_the_background_of_a_cut_out_is_said(caplog, background, warned):
    """The host's mask of a cut-out is what is transparent."""
    subject = torch.zeros(1, 64, 64)
    subject[:, 16:48, 16:48] = 1
    with caplog.at_level(logging.WARNING):
        capture(random_model("tiny"), mask=1 - subject if background else subject)
    assert ("put InvertMask between" in caplog.text) is warned
