"""Host laws of ConsiStory Shared Attention: what it gives, what it leaves alone, and who reads whom (I19-I26)."""

from __future__ import annotations

import logging

import pytest
import torch
from kindred.models.attention.attend import STORY_ODDS, dial
from kindred.models.reference.bank import Halves
from kindred.nodes.host import KEY
from stories import FELT, MODEL, SHARING, TIGHT, plain, told
from studio import MOMENTS, anchors, differs, passes, pictures, story

LAW = pytest.mark.parametrize


# nothing is exactly nothing --------------------------------------------------------------------------------------------------


def test_a_story_is_felt_in_every_picture_and_by_every_part_of_the_method():
    """Sharing, dropout, the query blend, its window, injection, its strength and its window: each alone changes the pictures."""
    whole = told()
    assert all(differs(a, b) > FELT for a, b in zip(whole, plain()))
    for less in (
        {"weight": 0.0},
        {"weight": 3.0},
        {"dropout": 0.0},
        {"seed": 7},
        {"query_blend": 0.0},
        {"blend_end_percent": 0.3},
        {"query_blend_end": 0.0},
        {"feature_injection": 0.0},
        {"feature_injection": 0.3},
        {"injection_end_percent": 0.5},
        {"blocks": "output 0"},
        {"halves": "cond only"},
        {"anchors": 1},
        {"anchors": 0},
    ):
        assert differs(told(**less), whole) > 1e-3, less


@LAW("halves", [Halves.BOTH.value, Halves.COND.value])
@LAW("cfg", [1.0, 4.0])
def test_one_picture_stays_plain_bit_for_bit_and_the_log_says_why(cfg, halves, caplog):
    """I19."""
    caplog.set_level(logging.INFO)
    with passes(MODEL) as rows:
        alone = pictures(story(MODEL, halves=halves), (1,), cfg=cfg)
    assert len(rows) == MOMENTS and torch.equal(alone, plain((1,), cfg=cfg))
    assert (
        "one picture has nobody to share with, so it stays plain. Raise the batch size, or wire a reference"
        in caplog.text
    )


@LAW(
    "how",
    [{}, {"weight": 3.0}, {"dropout": 0.0, "feature_injection": 1.0}, {"query_blend": 1.0}],
    ids=str,
)
def test_strength_0_is_plain_bit_for_bit(how):
    model = story(MODEL, strength=0.0, **how)
    assert (
        model is not MODEL
        and KEY not in model.model_options["transformer_options"]
        and not model.wrappers
    )
    with passes(MODEL) as rows:
        out = pictures(model)
    assert len(rows) == MOMENTS and torch.equal(out, plain())


def test_the_dial_turns_sharing_and_injection_and_nothing_else():
    assert torch.equal(told(strength=1.0), told())
    assert torch.equal(
        told(strength=0.5), told(weight=dial(0.5, "", STORY_ODDS), feature_injection=0.4)
    )
    assert min(differs(told(strength=0.5), other) for other in (told(), plain())) > 1e-3


@LAW(
    "nothing",
    [{"dropout": 1.0}, {"weight": 0.0}, {"masks": torch.zeros(1, 64, 64)}],
    ids=["dropout", "weight", "masks"],
)
@LAW(
    "injection",
    [{"feature_injection": 0.0}, {"injection_start_percent": 1.0, "injection_end_percent": 0.0}],
)
def test_nothing_shared_and_nothing_injected_is_plain_bit_for_bit(nothing, injection):
    """I20."""
    with passes(MODEL) as rows:
        out = pictures(story(MODEL, **injection, **nothing))
    assert len(rows) == MOMENTS and torch.equal(out, plain())


@LAW("injection", [0.0, 0.8])
def test_anchors_without_a_subject_are_shared_with_nobody(injection):
    """I21, I28: the extra has a subject, which nobody reads; both stages, and still the plain pictures bit for bit."""
    masks = torch.zeros(3, 64, 64)
    masks[2] = 1
    assert torch.equal(pictures(story(MODEL, masks=masks, feature_injection=injection)), plain())


def test_the_only_anchor_is_plain():
    """I21: it has nobody to read, so nothing is injected into it either."""
    out = told(anchors=1)
    assert differs(out[:1], plain()[:1]) < TIGHT and all(
        differs(a, b) > FELT for a, b in zip(out[1:], plain()[1:])
    )


def test_identical_pictures_that_share_everything_are_plain():
    """I26: own tokens twice are own tokens; part of them twice is something else."""
    who, everything, part = (1, 1, 1), torch.ones(1, 64, 64), torch.ones(1, 64, 64)
    part[:, :32] = 0
    how = {**SHARING, "dropout": 0.0, "anchors": 0}
    assert differs(pictures(story(MODEL, masks=everything, **how), who), plain(who)) < TIGHT
    assert differs(pictures(story(MODEL, masks=part, **how), who), plain(who)) > FELT


# who reads whom --------------------------------------------------------------------------------------------------------------


@LAW("injection", [0.0, 0.8])
def test_the_order_of_the_pictures_is_irrelevant(injection):
    """I22: all read all, no dropout, features injected from a snapshot."""
    how = {"anchors": 0, "dropout": 0.0, "feature_injection": injection}
    order = (2, 0, 3, 1)
    one = pictures(story(MODEL, **how), range(4))
    other = pictures(story(MODEL, **how), order)
    assert differs(other, one[list(order)]) < TIGHT and differs(other, one) > FELT


@LAW("injection", [0.0, 0.8])
def test_extras_change_neither_the_anchors_nor_one_another(injection):
    """I23, I24."""
    two, four, other = (
        told(who, feature_injection=injection) for who in ((0, 1), (0, 1, 2, 3), (0, 1, 3))
    )
    assert differs(four[:2], two) < TIGHT and differs(other[:2], two) < TIGHT
    assert differs(other[2:], four[3:]) < TIGHT
    assert all(differs(a, b) > FELT for a, b in zip(four, plain((0, 1, 2, 3))))


def test_the_first_so_many_are_the_anchors():
    """With one more picture as an anchor, the two that were anchors before change; with more than there are, all are."""
    assert differs(told((0, 1, 2, 3), anchors=3)[:2], told((0, 1, 2, 3))[:2]) > 1e-3
    assert torch.equal(told(anchors=3), told(anchors=0)) and torch.equal(
        told(anchors=9), told(anchors=0)
    )


def test_more_anchors_than_pictures_are_said(caplog):
    pictures(story(MODEL, anchors=9, **SHARING), (0, 1))
    assert (
        "9 anchors were asked for, but the batch has 2 pictures: each of them is an anchor"
        in caplog.text
    )


# anchors once, pictures later (I25) -------------------------------------------------------------------------------------------


@LAW(
    "how",
    [
        {},
        {"order": "official"},
        SHARING,
        {"halves": "cond only"},
        {"query_blend": 0.0, "anchors": 3},
    ],
    ids=["fast", "official", "sharing", "cond", "three anchors"],
)
def test_further_pictures_are_what_they_were_in_the_first_batch(how):
    """One at a time, two together, and in another order; the anchors' own batch may be without them or with them."""
    k, whole = how.get("anchors", 2), pictures(story(MODEL, **how), range(5))
    for who in (tuple(range(k)), (0, 1, 2, 3))[: 1 if how else 2]:
        _, bank = anchors(story(MODEL, **how), who)
        assert bank.pictures == k
        reads = story(MODEL, reference=bank, **how)
        for extras in ([3], [4, 3]):
            assert differs(pictures(reads, extras), whole[extras]) < TIGHT
    assert differs(pictures(reads, [4]), plain((4,))) > FELT
