"""Host laws of Cross-Attn Detail Inject: what is nothing (I2), what the weight means (I9), when and where it is heard."""

from __future__ import annotations

import pytest
import torch
from kindred.models.attention.attend import CONCEPT_ODDS, WeightMode, dial
from kindred.models.injection import Merge
from kindred.models.reference.bank import Halves
from kindred.nodes.host import KEY
from networks import build_model, random_model
from studio import (
    SIZE,
    bank_of,
    concept,
    counted,
    differs,
    encoder_of,
    fingerprint,
    inject,
    negative,
    of_bank,
    of_encoder,
    of_model,
    plain,
    prompt,
    sample,
    subject,
)

TIGHT = 1e-4  # float32 through a few UNet calls, relative to the picture's spread
FELT = 1e-2  # an effect that cannot be rounding
MODEL = random_model("tiny")
LAW = pytest.mark.parametrize
MERGES = [m.value for m in Merge]


# I2: nothing is exactly nothing --------------------------------------------------------------------------------------------


@LAW("merge", MERGES)
@LAW(
    "nothing",
    [
        {"weight": 0.0},
        {"strength": 0.0},
        {"strength": 0.0, "weight": 9.0},
        {"target_mask": torch.zeros(1, 64, 64)},
        {"start_percent": 1.0},
        {"end_percent": 0.0},
        {"start_percent": 0.6, "end_percent": 0.6},
    ],
)
def test_no_weight_no_mask_or_no_window_is_no_injection(nothing, merge):
    model = concept(MODEL, merge=merge, **nothing)
    assert (
        model is not MODEL
        and KEY not in model.model_options["transformer_options"]
        and not model.wrappers
    )
    assert torch.equal(sample(model), plain())


@LAW("merge", MERGES)
def test_a_window_between_two_steps_is_the_plain_picture_bit_for_bit(merge):
    """3 uniform steps are at 0.33, 0.67 and 1 of the schedule."""
    assert torch.equal(
        sample(concept(MODEL, start_percent=0.4, end_percent=0.6, merge=merge)), plain()
    )


def test_a_mask_beside_the_area_of_the_only_prompt_is_the_plain_picture():
    """The corner of the picture that the mask names is in no prompt's area."""
    area = [[prompt()[0][0], prompt()[0][1] | {"area": (5, 6, 2, 1)}]]
    corner = torch.zeros(1, 64, 64)
    corner[:, :8, :8] = 1
    how = {
        "positive": area,
        "uncond": [[negative()[0][0], negative()[0][1] | {"area": (5, 6, 2, 1)}]],
    }
    assert differs(sample(concept(MODEL, target_mask=corner), **how), sample(MODEL, **how)) < TIGHT
    assert differs(sample(concept(MODEL), **how), sample(MODEL, **how)) > FELT


def test_inputs_stay_as_they_were():
    model, encoder, image, mask = (
        build_model("tiny"),
        encoder_of(),
        subject(2),
        torch.ones(1, 64, 64),
    )

    def state():
        return [
            of_model(model),
            of_encoder(encoder),
            fingerprint([image, mask, prompt(), negative()]),
            of_bank(bank_of()),
        ]

    before = state()
    injected = concept(model, 1.5, image, halves="both", target_mask=mask)
    carrying = of_model(injected)
    sample(concept(inject(injected, bank_of()), 0.5))
    sample(injected, sampler="dpm_2")
    assert state() == before and of_model(injected) == carrying


def test_the_picture_of_the_subject_may_change_afterwards():
    """The injection holds keys and values, not the caller's picture."""
    image = subject()
    model = concept(MODEL, image=image)
    first = sample(model)
    image.zero_()
    assert torch.equal(sample(model), first)


def test_run_a_then_b_then_a_gives_a_and_plain_stays_plain():
    a, b = concept(MODEL, 2.0), concept(MODEL, 0.5, subject(seed=9), halves="shared")
    first = sample(a)
    sample(b, sampler="dpm_2")
    assert torch.equal(sample(a), first) and torch.equal(sample(MODEL), plain())


# what the weight means -----------------------------------------------------------------------------------------------------


@LAW("merge", MERGES)
@LAW("halves", [h.value for h in Halves])
def test_the_subject_is_felt(merge, halves):
    out = sample(concept(MODEL, merge=merge, halves=halves))
    assert (
        differs(out, plain()) > FELT
        and differs(out, sample(concept(MODEL, image=subject(seed=8), merge=merge, halves=halves)))
        > 1e-3
    )


def test_as_trained_is_what_the_file_says():
    for merge in MERGES:
        own = sample(concept(MODEL, encoder=encoder_of(merge=merge)))
        assert torch.equal(own, sample(concept(MODEL, merge=merge)))
    assert (
        differs(sample(concept(MODEL, merge="add")), sample(concept(MODEL, merge="concat"))) > 1e-3
    )


@LAW("merge", MERGES)
@LAW("mode", [m.value for m in WeightMode])
def test_the_dial_turns_the_weight_and_nothing_else(mode, merge):
    odds = CONCEPT_ODDS if mode == "logit bias" and merge == "concat" else 0.0
    for strength in (1.0, 0.5):
        turned = sample(concept(MODEL, 2.0, strength=strength, weight_mode=mode, merge=merge))
        assert torch.equal(
            turned,
            sample(concept(MODEL, 2.0 * dial(strength, "", odds), weight_mode=mode, merge=merge)),
        )


@LAW("mode", [m.value for m in WeightMode])
def test_every_weight_mode_draws(mode):
    one, more = (sample(concept(MODEL, w, weight_mode=mode)) for w in (1.0, 3.0))
    assert differs(one, sample(concept(MODEL))) < TIGHT and differs(more, one) > 1e-3


@LAW("merge", MERGES)
def test_two_nodes_of_half_the_weight_are_one(merge):
    half = concept(concept(MODEL, 1.5, merge=merge), 1.5, merge=merge)
    assert differs(sample(half), sample(concept(MODEL, 3.0, merge=merge))) < TIGHT


@LAW("halves", [h.value for h in Halves])
@LAW("merge", MERGES)
def test_equal_pictures_are_one_picture(merge, halves):
    """I9 inside one node, for every half that reads."""
    three = subject().expand(3, -1, -1, -1)
    one = sample(concept(MODEL, 2.0, merge=merge, halves=halves))
    assert differs(sample(concept(MODEL, 2.0, three, merge=merge, halves=halves)), one) < TIGHT


def test_several_pictures_are_several_nodes_of_a_share_each():
    a, b = subject(seed=7), subject(seed=8)
    both = sample(concept(MODEL, 2.0, torch.cat((a, b))))
    assert differs(both, sample(concept(concept(MODEL, 1.0, a), 1.0, b))) < TIGHT
    assert differs(both, sample(concept(MODEL, 2.0, a))) > 1e-3


def test_both_injections_in_either_order():
    ab, ba = (
        concept(inject(MODEL, bank_of(), 2.0), 1.5),
        inject(concept(MODEL, 1.5), bank_of(), 2.0),
    )
    full = sample(ab)
    assert differs(sample(ba), full) < TIGHT
    assert (
        min(
            differs(full, sample(m))
            for m in (inject(MODEL, bank_of(), 2.0), concept(MODEL, 1.5), MODEL)
        )
        > FELT
    )


def test_both_injections_with_masks_and_windows_of_their_own():
    left = torch.zeros(1, 64, 64)
    left[:, :, :32] = 1
    how = {"target_mask": left, "end_percent": 0.5}
    ab, ba = (
        sample(m)
        for m in (
            concept(inject(MODEL, bank_of()), 2.0, **how),
            inject(concept(MODEL, 2.0, **how), bank_of()),
        )
    )
    assert (
        differs(ab, ba) < TIGHT
        and differs(ab, sample(concept(inject(MODEL, bank_of()), 2.0))) > 1e-3
    )


def test_a_reference_pass_does_not_hear_the_concept():
    """Live reading with another sampler's schedule: the Ref-UNet is the plain model."""
    from studio import capture

    bank, _ = capture(concept(MODEL, 4.0), negative=negative())
    assert all(
        torch.equal(bank.features[half], bank_of().features[half]) for half in bank_of().features
    )


# when and where it is heard ------------------------------------------------------------------------------------------------


def test_a_window_is_the_steps_it_holds():
    whole, first, rest = (
        sample(concept(MODEL, start_percent=a, end_percent=b))
        for a, b in ((0, 1), (0, 0.5), (0.5, 1))
    )
    assert torch.equal(whole, sample(concept(MODEL)))
    assert (
        min(
            differs(a, b)
            for a, b in (
                (whole, first),
                (whole, rest),
                (first, rest),
                (first, plain()),
                (rest, plain()),
            )
        )
        > 1e-3
    )


@LAW("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "uni_pc"])
def test_samplers_that_ask_several_times_a_step(sampler):
    """The window is of sigmas, not of calls; the run costs the host's own number of calls."""
    how = {"sampler": sampler, "scheduler": "karras", "steps": 4}
    with counted(MODEL) as own:
        none = sample(MODEL, **how)
    with counted(MODEL) as calls:
        out = sample(concept(MODEL, 2.0), **how)
    assert calls == own and differs(out, none) > FELT
    early = sample(concept(MODEL, 2.0, end_percent=0.5), **how)
    assert differs(early, out) > 1e-4 and differs(early, none) > 1e-4


def test_ksampler_advanced_in_two_segments_is_one_run():
    model, empty = concept(MODEL, 2.0), torch.zeros(1, 4, *SIZE)
    first = sample(model, latent=empty, start_step=0, last_step=1)
    second = sample(model, latent=first, start_step=1, last_step=10000, disable_noise=True)
    assert differs(second, sample(model)) < TIGHT


def test_blocks_are_where_it_is_read():
    parts = {
        preset: sample(concept(MODEL, 2.0, blocks=preset))
        for preset in ("all", "encoder", "middle", "decoder", "output 0-1")
    }
    assert torch.equal(parts["all"], sample(concept(MODEL, 2.0)))
    assert torch.equal(parts["encoder"], sample(concept(MODEL, 2.0, blocks="input 1, input 3")))
    chained = concept(
        concept(concept(MODEL, 2.0, blocks="decoder"), 2.0, blocks="middle"), 2.0, blocks="encoder"
    )
    assert differs(sample(chained), parts["all"]) < TIGHT
    assert min(differs(out, plain()) for out in parts.values()) > 1e-4
    assert (
        differs(parts["decoder"], parts["encoder"]) > 1e-4
        and differs(parts["decoder"], parts["output 0-1"]) > 1e-4
    )


@LAW("merge", MERGES)
def test_a_mask_of_ones_is_no_mask_and_masks_go_to_their_pictures(merge):
    free, none = sample(concept(MODEL, 2.0, merge=merge), batch=3), plain(batch=3)
    assert torch.equal(
        sample(concept(MODEL, 2.0, merge=merge, target_mask=torch.ones(1, 64, 64)), batch=3), free
    )
    masks = torch.zeros(3, 64, 64)
    masks[1] = 1
    out = sample(concept(MODEL, 2.0, merge=merge, target_mask=masks), batch=3)
    assert (
        torch.equal(out[0], none[0])
        and torch.equal(out[2], none[2])
        and torch.equal(out[1], free[1])
    )


@LAW("merge", MERGES)
def test_outside_of_the_mask_the_first_layer_is_plain(merge):
    """What the first cross-attention adds to the picture: nothing where the mask is black, all of it where it is white."""
    left = torch.zeros(1, 64, 64)
    left[:, :, :32] = 1
    none, part, free = (
        first_layer(m)
        for m in (
            MODEL,
            concept(MODEL, 2.0, merge=merge, target_mask=left),
            concept(MODEL, 2.0, merge=merge),
        )
    )
    assert torch.equal(part[:, :, 4:], none[:, :, 4:]) and torch.equal(
        part[:, :, :4], free[:, :, :4]
    )
    assert differs(free, none) > FELT


def first_layer(model) -> torch.Tensor:
    """The first cross-attention's output in the first step's cond row, [c y x]."""
    seen, m = [], model.clone()

    def patch(n, options):
        seen.append(
            n[options["cond_or_uncond"].index(0)].T.unflatten(1, options["activations_shape"][2:])
        )
        return n

    m.set_model_attn2_output_patch(patch)
    sample(m, start_step=0, last_step=1)
    return seen[0]


@LAW("size", [(12, 10), (15, 17), (64, 8), (5, 9)])
def test_any_size_of_latent(size):
    how = {"steps": 2, "size": size}
    out = sample(concept(MODEL, 2.0), **how)
    masked = concept(MODEL, 2.0, target_mask=torch.ones(1, 32, 32))
    assert torch.equal(out, sample(masked, **how)) and differs(out, sample(MODEL, **how)) > FELT
