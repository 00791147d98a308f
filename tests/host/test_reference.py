"""Host laws of Masked Self-Attn Inject, on references of Ref-UNet Feature Capture: what it gives, and what it leaves alone."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from kindred.models.attention.weights import SELF_ODDS, WeightMode, dial
from kindred.models.network.call import AttnCall, Half, Halves, Part, Role
from kindred.models.reference.bank import ReferenceBank
from kindred.nodes.inject import MaskedSelfInjection
from networks import build_model, random_model
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
    plain,
    prompt,
    sample,
)

TIGHT = 1e-4  # float32 through a few UNet calls, relative to the picture's spread
FELT = 1e-2  # an effect that cannot be rounding
MODEL = random_model("tiny")
LAW = pytest.mark.parametrize


# I1: nothing is exactly nothing --------------------------------------------------------------------------------------------


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
        {"start_percent": 0.4, "end_percent": 0.6},
    ],
)
def test_no_weight_no_mask_or_no_step_is_the_plain_picture_bit_for_bit(nothing):
    """The last window lies between two steps: 3 uniform steps are at 0.33, 0.67 and 1 of the schedule."""
    assert torch.equal(sample(inject(MODEL, bank_of(), **nothing)), plain())


def test_the_reference_is_felt():
    assert differs(sample(inject(MODEL, bank_of())), plain()) > FELT


@LAW("mode", [m.value for m in WeightMode])
@LAW("strength", [1.0, 0.5, 0.05])
def test_the_dial_turns_the_weight_and_nothing_else(strength, mode):
    turned = sample(inject(MODEL, bank_of(), 2.0, strength=strength, weight_mode=mode))
    share = dial(strength, "", SELF_ODDS if mode == "logit bias" else 0.0)
    assert torch.equal(turned, sample(inject(MODEL, bank_of(), 2.0 * share, weight_mode=mode)))


def test_every_turn_of_the_dial_is_felt():
    turns = [sample(inject(MODEL, bank_of(), strength=i / 4)) for i in range(5)]
    assert min(differs(a, b) for a, b in zip(turns, turns[1:])) > 1e-3


def test_a_window_is_the_steps_it_holds():
    """All steps, the first alone, the others alone: three different pictures, and the wide window is no window."""
    whole, first, rest = (
        sample(inject(MODEL, bank_of(), start_percent=a, end_percent=b))
        for a, b in ((0, 1), (0, 0.5), (0.5, 1))
    )
    assert torch.equal(whole, sample(inject(MODEL, bank_of())))
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
        > FELT
    )


def test_a_mask_of_ones_is_no_mask_and_a_partial_one_is_partial():
    ones, half = torch.ones(1, 64, 64), torch.zeros(1, 64, 64)
    half[:, :, 32:] = 1
    free = sample(inject(MODEL, bank_of()))
    assert torch.equal(sample(inject(MODEL, bank_of(), target_mask=ones)), free)
    part = sample(inject(MODEL, bank_of(), target_mask=half))
    assert differs(part, free) > FELT and differs(part, plain()) > FELT


@LAW("mode", [m.value for m in WeightMode])
def test_every_weight_mode_draws(mode):
    one, more = (sample(inject(MODEL, bank_of(), w, weight_mode=mode)) for w in (1.0, 2.5))
    assert differs(one, plain()) > FELT and differs(more, one) > 1e-3
    assert (
        differs(one, sample(inject(MODEL, bank_of()))) < TIGHT
    )  # weight 1 is the plain concatenation in every mode


@LAW("halves", [h.value for h in Halves])
def test_the_halves_of_guidance_differ(halves):
    out = sample(inject(MODEL, bank_of(), halves=halves))
    assert differs(out, plain()) > FELT
    others = [sample(inject(MODEL, bank_of(), halves=h.value)) for h in Halves if h.value != halves]
    assert all(differs(out, other) > FELT for other in others)


def test_at_guidance_1_only_the_cond_half_matters():
    cond, both, shared = (sample(inject(MODEL, bank_of(), halves=h.value), cfg=1.0) for h in Halves)
    assert (
        torch.equal(cond, both)
        and torch.equal(cond, shared)
        and differs(cond, plain(cfg=1.0)) > FELT
    )


# I5, I6, I9: what the weight means end to end --------------------------------------------------------------------------------


@LAW("weight", [0.5, 1.0, 4.0])
def test_a_picture_that_is_its_own_reference_is_unchanged_at_the_first_step(weight):
    """I6: start at the trajectory's last latent, same prompt, guidance 1, the whole picture as mask."""
    trajectory, noise, _ = invert(MODEL)
    bank, _ = capture(MODEL, inversion=trajectory, mask=torch.ones(1, 64, 64))
    how = {
        "latent": noise["samples"],
        "cfg": 1.0,
        "positive": coarse(),
        "disable_noise": True,
        "start_step": 0,
        "last_step": 1,
    }
    assert differs(sample(inject(MODEL, bank, weight), **how), sample(MODEL, **how)) < TIGHT
    other = {**how, "latent": noise["samples"].flip(-1)}
    assert (
        differs(sample(inject(MODEL, bank, weight), **other), sample(MODEL, **other)) > 1e-3
    )  # any other picture is changed


def test_two_chained_nodes_of_half_the_weight_are_one():
    half = inject(inject(MODEL, bank_of(), 1.5), bank_of(), 1.5)
    assert differs(sample(half), sample(inject(MODEL, bank_of(), 3.0))) < TIGHT


def test_the_order_of_chained_references_is_irrelevant():
    a, b = bank_of(), bank_of(seed=8)
    ab, ba = (
        sample(inject(inject(MODEL, a, 0.7), b, 2.0)),
        sample(inject(inject(MODEL, b, 2.0), a, 0.7)),
    )
    assert differs(ab, ba) < TIGHT
    assert (
        min(differs(ab, sample(inject(MODEL, a, 0.7))), differs(ab, sample(inject(MODEL, b, 2.0))))
        > FELT
    )


def test_two_pictures_in_one_reference_are_two_chained_references():
    latent = {"samples": torch.cat((photo(seed=3)["samples"], photo(seed=8)["samples"]))}
    both, mask = capture(MODEL, latent, negative=negative())
    assert mask.shape == (2, 64, 64) and not torch.equal(mask[0], mask[1])
    assert {g: len(kept) for g, kept in both.kept.items()} == {
        g: int(m.sum()) for g, m in both.masks.items()
    }
    chained = inject(inject(MODEL, bank_of(seed=3)), bank_of(seed=8))
    assert differs(sample(inject(MODEL, both)), sample(chained)) < TIGHT


# I17: cached and live --------------------------------------------------------------------------------------------------------


@LAW("halves", [h.value for h in Halves])
@LAW("made_from", ["latent", "inversion"])
def test_cached_equals_live_and_the_log_says_which(made_from, halves, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    bank = (
        bank_of()
        if made_from == "latent"
        else capture(MODEL, inversion=invert(MODEL)[0], negative=negative())[0]
    )
    model = inject(MODEL, bank, 2.0, halves=halves)
    cached = sample(model)
    assert ways(caplog) == ["cached"]
    caplog.clear()
    monkeypatch.setattr(ReferenceBank, "step_of", lambda self, sigma: None)
    live = sample(model)
    assert ways(caplog) == ["live"] and "made with ddim_uniform, 3 steps" in caplog.text
    assert differs(live, cached) < TIGHT and differs(cached, plain()) > FELT


def ways(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Each way once per run, in the order it was taken."""
    said = [r.getMessage() for r in caplog.records if "the reference is read" in r.getMessage()]
    return [("live" if "live" in message else "cached") for message in said]


@LAW(
    ("sampler", "scheduler", "denoise", "taken"),
    [
        ("euler", "ddim_uniform", 1.0, {"cached"}),
        ("ddim", "ddim_uniform", 1.0, {"cached"}),
        ("heun", "ddim_uniform", 1.0, {"cached"}),
        ("dpm_2", "ddim_uniform", 1.0, {"cached", "live"}),
        ("dpmpp_2m", "ddim_uniform", 1.0, {"cached"}),
        ("euler_ancestral", "ddim_uniform", 1.0, {"cached"}),
        ("uni_pc", "ddim_uniform", 1.0, None),
        ("dpmpp_2s_ancestral", "karras", 1.0, {"live"}),
        ("euler", "karras", 1.0, {"live"}),
        ("euler", "ddim_uniform", 0.5, None),
        ("euler_cfg_pp", "ddim_uniform", 1.0, {"cached"}),
        ("euler_ancestral_cfg_pp", "ddim_uniform", 1.0, {"cached"}),
        ("dpmpp_2m_cfg_pp", "ddim_uniform", 1.0, {"cached"}),
    ],
)
def test_any_sampler_and_schedule(sampler, scheduler, denoise, taken, caplog):
    caplog.set_level(logging.INFO)
    how = {
        "sampler": sampler,
        "scheduler": scheduler,
        "denoise": denoise,
        "latent": photo(seed=11)["samples"],
    }
    bank = bank_of(
        steps=4 if sampler in ("dpm_2", "uni_pc") else STEPS
    )  # the host drops these samplers' last level but one
    out = sample(inject(MODEL, bank, 2.0), **how)
    assert taken is None or set(ways(caplog)) == taken
    assert len(ways(caplog)) == len(set(ways(caplog)))  # each way is logged once
    assert differs(out, sample(MODEL, **how)) > FELT


def test_ksampler_advanced_in_two_segments_is_one_run():
    model, empty = inject(MODEL, bank_of(), 2.0), torch.zeros(1, 4, *SIZE)
    first = sample(model, latent=empty, start_step=0, last_step=1)
    second = sample(model, latent=first, start_step=1, last_step=10000, disable_noise=True)
    assert differs(second, sample(model)) < TIGHT
    swapped = sample(MODEL, latent=first, start_step=1, last_step=10000, disable_noise=True)
    assert differs(second, swapped) > FELT  # the second segment reads the reference too


def test_a_reference_of_other_steps_is_read_between_its_levels(caplog):
    caplog.set_level(logging.INFO)
    assert (
        differs(sample(inject(MODEL, bank_of(steps=5), 2.0), steps=4), sample(MODEL, steps=4))
        > FELT
    )
    assert "live" in ways(caplog)


def test_edit_friendly_trajectories_serve_too():
    trajectory, _, _ = invert(MODEL, method="edit-friendly ddpm", check=False)
    bank, _ = capture(MODEL, inversion=trajectory)
    for scheduler in ("ddim_uniform", "karras"):
        assert (
            differs(
                sample(inject(MODEL, bank, 2.0), scheduler=scheduler),
                sample(MODEL, scheduler=scheduler),
            )
            > FELT
        )


def test_a_cached_reference_costs_no_call_and_a_live_one_one_per_sigma(monkeypatch):
    one, other = bank_of(), bank_of(seed=8)  # made before the calls are counted
    with counted(MODEL) as cached:
        sample(inject(inject(MODEL, one), other))
    monkeypatch.setattr(ReferenceBank, "step_of", lambda self, sigma: None)
    with counted(MODEL) as live:
        sample(inject(inject(MODEL, one), one, 0.5))  # the same bank twice: one call
    assert cached == [2] * STEPS and live == [1, 2] * STEPS


# batches, sizes, splits (I36) ------------------------------------------------------------------------------------------------


@LAW("cfg", [1.0, 7.0])
def test_a_picture_in_a_batch_is_the_picture_alone(cfg):
    model = inject(MODEL, bank_of(), 2.0, halves="both")
    three = sample(model, cfg=cfg, batch=3)
    assert three.shape[0] == 3 and differs(three[:1], sample(model, cfg=cfg)) < TIGHT
    assert all(differs(row, out) > FELT for row, out in zip(three, sample(MODEL, cfg=cfg, batch=3)))


def test_target_masks_go_to_their_pictures():
    masks = torch.zeros(3, 64, 64)
    masks[1] = 1
    out, free = (
        sample(inject(MODEL, bank_of(), target_mask=masks), batch=3),
        sample(inject(MODEL, bank_of()), batch=3),
    )
    none = plain(batch=3)
    assert (
        torch.equal(out[0], none[0])
        and torch.equal(out[2], none[2])
        and torch.equal(out[1], free[1])
    )


@LAW("size", [(12, 10), (15, 17), (64, 8), (5, 9)])
def test_any_size_of_latent(size):
    """Grids are ceil halves: 15 x 17 is 8 x 9 below. The bank knows the very grids that attention runs on."""
    bank, mask = capture(MODEL, photo(size), steps=2)
    assert mask.shape == (1, 8 * size[0], 8 * size[1]) and 0 < mask.mean() < 1
    fine, low = size, (-(-size[0] // 2), -(-size[1] // 2))
    assert {layer.grid for layer in bank.layers} == {fine, low} and bank.maps.shape == (2, 1, *low)
    masked = inject(MODEL, bank, target_mask=torch.ones(1, 32, 32))
    out = sample(inject(MODEL, bank), steps=2, size=size)
    assert (
        torch.equal(out, sample(masked, steps=2, size=size))
        and differs(out, sample(MODEL, steps=2, size=size)) > FELT
    )


@LAW("size", [(12, 10), (4, 4), (64, 8)])
def test_a_reference_of_another_size(size):
    assert differs(sample(inject(MODEL, bank_of(size=size))), plain()) > FELT


@LAW("halves", [h.value for h in Halves])
def test_cond_and_uncond_in_two_calls_equal_one(halves, monkeypatch):
    model = inject(MODEL, bank_of(), 2.0, halves=halves)
    with counted(MODEL) as joined:
        together = sample(model, batch=2)
    monkeypatch.setattr(
        type(MODEL), "get_free_memory", lambda self, device: 0
    )  # the host then runs one cond per call
    with counted(MODEL) as split:
        apart = sample(model, batch=2)
    assert (set(joined), set(split)) == ({4}, {2}) and len(split) == 2 * len(joined)
    assert differs(apart, together) < TIGHT and differs(together, plain(batch=2)) > FELT


@LAW("tokens", [77, 154, 8 * 77])
def test_prompts_of_any_length(tokens, monkeypatch):
    """The host repeats the shorter prompt (77 beside 154) or runs two calls (8 chunks): neither may be felt."""
    long, model = prompt(tokens=tokens), inject(MODEL, bank_of(), 2.0, halves="both")
    out = sample(model, positive=long)
    monkeypatch.setattr(type(MODEL), "get_free_memory", lambda self, device: 0)
    assert (
        differs(out, sample(model, positive=long)) < TIGHT
        and differs(out, sample(MODEL, positive=long)) > FELT
    )


# regional prompts ------------------------------------------------------------------------------------------------------------


def with_area(host) -> list:
    """A whole prompt and one for an area of 5 x 6 cells at (1, 2)."""
    (area,) = host.NODE_CLASS_MAPPINGS["ConditioningSetArea"]().append(
        prompt(6), 48, 40, 16, 8, 1.0
    )
    return prompt() + area


def with_mask(host) -> list:
    mask = torch.zeros(1, 64, 64)
    mask[:, :40, 24:] = 1
    (bounds,) = host.NODE_CLASS_MAPPINGS["ConditioningSetMask"]().append(
        prompt(6), mask, "mask bounds", 1.0
    )
    (whole,) = host.NODE_CLASS_MAPPINGS["ConditioningSetMask"]().append(
        prompt(7), mask, "default", 0.5
    )
    return prompt() + bounds + whole


@LAW("regional", [with_area, with_mask])
def test_regional_prompts(regional, host):
    positive = regional(host)
    free = sample(inject(MODEL, bank_of(), halves="both"), positive=positive)
    assert differs(free, sample(MODEL, positive=positive)) > FELT
    ones = inject(MODEL, bank_of(), halves="both", target_mask=torch.ones(1, 64, 64))
    assert torch.equal(sample(ones, positive=positive), free)


def test_outside_of_the_target_mask_a_regional_call_is_plain(host):
    """The area's own call reads nothing when the mask lies outside of the area; the crop takes the mask's right part along."""
    area = with_area(host)[1:]
    corner = torch.zeros(1, 64, 64)
    corner[:, :, :16] = 1  # x cells 0 and 1; the area begins at 2
    inner = Seen(MODEL, (8, 8), (5, 6, 1, 2))
    assert not inner.mask(corner, (5, 6)).any() and inner.mask(1 - corner, (5, 6)).all()
    assert area[0][1]["area"] == (5, 6, 1, 2)


class Seen:
    """What the target mask is for one attention call of a run."""

    def __init__(self, model, latent, area=None) -> None:
        self.model, self.latent, self.area = model, latent, area

    def mask(self, target: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[y x] of the first picture."""
        config = MaskedSelfInjection(
            bank_of(), 1.0, WeightMode.LOGIT_BIAS, frozenset(), 0.0, 1.0, Halves.COND, target
        )
        call = AttnCall(("middle", 0, 0), grid, (Part(Role.COND, self.area),), self.latent)
        q = torch.zeros(1, grid[0] * grid[1], 8)
        return (
            config.start_run(
                SimpleNamespace(
                    at=lambda *percents: percents,
                    sigmas=(),
                    foretell=lambda *told: None,
                    foretell_halves=lambda halves: None,
                )
            )
            .target(call, q)[0, 0]
            .unflatten(0, grid)
        )


@LAW("area", [None, (6, 8, 2, 4)])
def test_a_spot_of_the_target_mask_lands_on_its_cell(area):
    """I40, on a picture that is not square, and cropped: one-hot in, one-hot out."""
    spot = torch.zeros(1, 80, 128)  # 10 x 16 cells
    spot[:, 8 * 5 : 8 * 6, 8 * 9 : 8 * 10] = 1
    y, x = (5, 9) if area is None else (3, 5)
    size = (10, 16) if area is None else area[:2]
    for divisor in (1, 2):
        grid = (size[0] // divisor, size[1] // divisor)
        found = Seen(MODEL, (10, 16), area).mask(spot, grid)
        assert found.nonzero().tolist() == [[y // divisor, x // divisor]]


# other families ----------------------------------------------------------------------------------------------------------------


def test_sdxls_layout_with_pooled_prompts_and_depth():
    model = random_model("tiny_xl")
    bank = bank_of("tiny_xl")
    assert (
        len(bank.layers) == 8
        and ("middle", 0, 1) in bank.blocks
        and bank.prompts[Half.COND].extras["pooled_output"].shape == (1, 1280)
    )
    how = {"positive": prompt(5, "tiny_xl"), "uncond": negative("tiny_xl")}
    none = sample(model, **how)
    assert torch.equal(sample(inject(model, bank, 0.0), **how), none)
    assert differs(sample(inject(model, bank, blocks="middle 0.1"), **how), none) > 1e-3
    live = {**how, "scheduler": "karras"}
    assert differs(sample(inject(model, bank, halves="both"), **live), sample(model, **live)) > FELT


def test_v_prediction(monkeypatch):
    model, bank = random_model("tiny_v"), bank_of("tiny_v")
    cached, none = sample(inject(model, bank, 2.0)), sample(model)
    assert differs(cached, none) > 1e-3
    monkeypatch.setattr(ReferenceBank, "step_of", lambda self, sigma: None)
    assert differs(sample(inject(model, bank, 2.0)), cached) < TIGHT


def test_a_model_in_bfloat16():
    model = build_model("tiny").clone()
    model.set_model_compute_dtype(torch.bfloat16)
    bank, _ = capture(model)
    assert bank.features[Half.COND].dtype == torch.bfloat16
    none = sample(model)
    assert (
        torch.equal(sample(inject(model, bank, 0.0)), none)
        and differs(sample(inject(model, bank)), none) > FELT
    )
