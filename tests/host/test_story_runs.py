"""Host laws of a story's run: the Anchor Sampler, how the host calls, what is left, and what is changed (I36-I40)."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from kindred.models.network.call import Half, Halves
from kindred.models.run import Run
from kindred.models.story.story import Story
from kindred.nodes.host.stages import Stages
from networks import build_model
from stories import FELT, MODEL, SHARING, TIGHT, plain, told
from studio import (
    MOMENTS,
    SIZE,
    anchors,
    counted,
    differs,
    fingerprint,
    negative,
    noise_of,
    of_bank,
    of_model,
    passes,
    pictures,
    prompts_of,
    story,
)

LAW = pytest.mark.parametrize


# the anchor sampler ----------------------------------------------------------------------------------------------------------


def test_the_anchor_sampler_draws_what_ksampler_draws():
    for how in ({}, SHARING, {"order": "official"}, {"masks": torch.ones(1, 64, 64)}):
        model = story(MODEL, **how)
        latent, bank = anchors(model)
        assert torch.equal(latent, pictures(model))
        assert bank.pictures == 2 and torch.equal(
            bank.trajectory.latents[0], MODEL.model.process_latent_in(latent[:2])
        )


def test_what_anchors_leave():
    """Rows for every noise level, the latents asked for there, masks at every grid, the words' maps, the settings and prompts."""
    latent, bank = anchors(story(MODEL, seed=11), (0, 1, 2))
    a = bank.anchors
    assert len(bank.trajectory.sigmas) == MOMENTS + 1 and bank.maps.shape == (MOMENTS, 2, 4, 4)
    assert {b[0] for b in bank.blocks} == {"output"} and set(bank.features) == set(Half)
    assert bank.masks[SIZE].shape == (2, *SIZE) and 0 < bank.masks[SIZE].float().mean() < 1
    assert (
        a.settings["seed"] == 11
        and a.settings["order"] == "fast"
        and bank.prompts[Half.COND].text.count("\n") == 1
    )
    counts = [len(o) for o in a.outputs]
    assert [c > 0 for c in counts] == [
        False,
        False,
        True,
        True,
        False,
    ]  # ascending: the window holds the second step and the third
    _, fewer = anchors(story(MODEL, **SHARING))
    assert (
        fewer.anchors.features is None
        and not any(len(o) for o in fewer.anchors.outputs)
        and fewer.bytes < bank.bytes
    )


# how the host calls (I36, I37, I40) -------------------------------------------------------------------------------------------


@LAW(
    "how",
    [{}, {"halves": "cond only"}, {"order": "official", "anchors": 0}],
    ids=["both", "cond", "official"],
)
def test_cond_and_uncond_in_two_calls_equal_one(how, monkeypatch):
    model = story(MODEL, **how)
    together, (_, bank) = pictures(model), anchors(model)
    monkeypatch.setattr(
        type(MODEL), "get_free_memory", lambda self, device: 0
    )  # the host then runs one cond per call
    with counted(MODEL) as split:
        apart, (_, same) = pictures(model), anchors(model)
    assert set(split) == {3} and differs(apart, together) < TIGHT
    assert all(torch.equal(bank.masks[g], same.masks[g]) for g in bank.masks)
    if not how.get("anchors", 2):
        return
    read = pictures(story(MODEL, reference=same, **how), [2])
    assert differs(read, together[2:]) < TIGHT


@LAW("halves", [Halves.BOTH.value, Halves.COND.value])
def test_at_guidance_1_there_is_but_one_half(halves):
    model = story(MODEL, halves=halves)
    with passes(MODEL) as rows:
        out = pictures(model, cfg=1.0)
    assert set(rows) == {3} and differs(out, plain(cfg=1.0)) > FELT
    assert torch.equal(out, pictures(story(MODEL), cfg=1.0))


DRAWING = ("heun", "dpm_2", "dpmpp_2m", "uni_pc", "euler_ancestral", "dpmpp_sde", "dpm_fast")
LATE = {
    "injection_start_percent": 0.45,
    "injection_end_percent": 0.6,
}  # two steps before it, and a middle of two steps inside it


@LAW("sampler", DRAWING)
def test_any_sampler(sampler, monkeypatch):
    """I37. The answers that the second stage is handed are those that the model would give it: without them, the same picture."""
    model, how = story(MODEL, **LATE), {"sampler": sampler, "steps": 6}
    with passes(MODEL) as handed:
        out = pictures(model, (0, 1), **how)
    assert torch.isfinite(out).all() and differs(out, plain((0, 1), **how)) > 1e-3
    assert torch.equal(pictures(model, (0, 1), **how), out)
    monkeypatch.setattr(Stages, "replayed", lambda *told: None)
    with passes(MODEL) as asked:
        assert torch.equal(pictures(model, (0, 1), **how), out)
    assert len(asked) > len(handed)


@LAW("sampler", ["euler_cfg_pp", "dpmpp_2m_cfg_pp"])
def test_samplers_that_listen_to_every_call_are_asked_anew(sampler):
    """CFG++ takes the uncond answer from the call itself, which a replayed answer does not make."""
    out = pictures(story(MODEL, **LATE), sampler=sampler, steps=6)
    assert (
        torch.isfinite(out).all() and differs(out, pictures(MODEL, sampler=sampler, steps=6)) > 1e-2
    )


def test_keyframes_of_hooks_begin_again_with_the_second_stage():
    """They only move forward, and the host sets them back before a sampler begins, not within it."""
    order, model = [], object()
    hook = SimpleNamespace(
        initialize_timesteps=lambda given: order.append(("keyframes", given is model))
    )
    guider = SimpleNamespace(
        inner_model=model, conds={"positive": [{"hooks": SimpleNamespace(hooks=[hook])}, {}]}
    )
    told = SimpleNamespace(
        stage=1,
        schedule=SimpleNamespace(first_stage=3),
        begin_second_stage=lambda: None,
        finish=lambda: None,
    )
    given = {"model_options": {"transformer_options": {}}}
    Stages(told).sample(
        lambda *_, **__: order.append("sampler"),
        guider,
        torch.linspace(3, 0, 4),
        given,
        None,
        torch.zeros(1),
    )
    assert order == ["sampler", ("keyframes", True), "sampler"]


@LAW("sampler", ["dpm_2", "uni_pc", "dpmpp_2m"])
def test_anchors_of_other_samplers_serve_them(sampler):
    """Of every sampler that asks once at each noise level and draws no noise of its own, which it draws for a whole batch."""
    how = {"sampler": sampler, "steps": 6}
    whole, (_, bank) = (
        pictures(story(MODEL, **LATE), **how),
        anchors(story(MODEL, **LATE), (0, 1), **how),
    )
    assert differs(pictures(story(MODEL, reference=bank, **LATE), [2], **how), whole[2:]) < TIGHT


def test_evaluating_twice_is_evaluating_once():
    """I37: maps are not counted twice, and the anchors' copy is of the last call."""
    model, answers = story(MODEL), []

    def twice(apply, args):
        answers.append([apply(args["input"], args["timestep"], **args["c"]) for _ in range(2)])
        return answers[-1][1]

    again = model.clone()
    again.set_model_unet_function_wrapper(twice)
    assert torch.equal(pictures(again), told()) and all(torch.equal(a, b) for a, b in answers)
    (_, bank), (_, other) = anchors(model), anchors(again)
    assert of_bank(bank) == of_bank(other)


@LAW("size", [(9, 13), (16, 6)])
def test_any_size_of_latent(size):
    """I40: grids are ceil halves; the extras of an odd picture read its anchors exactly."""
    whole, none = pictures(story(MODEL), size=size), plain(size=size)
    _, bank = anchors(story(MODEL), (0, 1), size=size)
    low = -(-size[0] // 2), -(-size[1] // 2)
    assert {layer.grid for layer in bank.layers} == {size, low} and bank.masks[low].shape == (
        2,
        *low,
    )
    assert (
        differs(pictures(story(MODEL, reference=bank), [2], size=size), whole[2:])
        < TIGHT
        < differs(whole, none)
    )


def test_a_drawn_mask_lands_where_it_was_drawn():
    """I40: a spot in a picture of 10 x 16 cells is kept at its own token of every grid."""
    for y, x in ((0, 0), (3, 5), (9, 15), (4, 14)):
        spot = torch.zeros(1, 80, 128)
        spot[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 1
        _, bank = anchors(
            story(MODEL, masks=spot, dropout=0.0, **SHARING), (0, 1), size=(10, 16), steps=1
        )
        for grid, divisor in (((10, 16), 1), ((5, 8), 2)):
            n = grid[0] * grid[1]
            at = y // divisor * grid[1] + x // divisor
            assert bank.anchors.kept[grid][0].tolist() == [at, n + at]


# nothing is left, nothing is changed (I38, I39) -------------------------------------------------------------------------------


def test_inputs_stay_as_they_were():
    model, positive, uncond, (_, bank) = (
        build_model("tiny"),
        prompts_of(3),
        negative(),
        anchors(story(MODEL), (0, 1)),
    )
    latent = noise_of((0, 1, 2))

    def state():
        return [
            of_model(model),
            fingerprint(positive),
            fingerprint(uncond),
            fingerprint(latent),
            of_bank(bank),
            fingerprint(
                [bank.anchors.outputs, bank.anchors.features, bank.anchors.first[Half.COND]]
            ),
        ]

    before = state()
    carrying = story(model)
    kept = of_model(carrying)
    pictures(carrying, positive=positive, uncond=uncond, sampler="heun")
    anchors(carrying, positive=positive)
    pictures(story(model, reference=bank), (2, 3))
    assert state() == before and of_model(carrying) == kept
    assert torch.equal(pictures(model), plain()) and torch.equal(pictures(carrying.clone()), told())


def test_run_a_then_b_then_a_gives_a():
    a, b = story(MODEL), story(MODEL, anchors=0, seed=5, halves="cond only", order="official")
    first = pictures(a)
    pictures(b, sampler="dpm_2")
    anchors(b)
    assert torch.equal(pictures(a), first) and torch.equal(first, told())


@LAW("sampler", ["euler", "euler_ancestral", "dpmpp_sde"])
def test_the_global_random_state_is_what_the_host_leaves(sampler):
    """Two stages draw no more of it than one, so what is sampled next is unchanged."""
    states = []
    for run in (
        lambda: pictures(MODEL, sampler=sampler),
        lambda: pictures(story(MODEL), sampler=sampler),
        lambda: anchors(story(MODEL), sampler=sampler),
    ):
        torch.manual_seed(123)
        run()
        states.append(torch.get_rng_state())
    assert all(torch.equal(s, states[0]) for s in states)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    story(MODEL)
    assert torch.equal(torch.get_rng_state(), before)


class Stop(Exception):
    """Another node's failure in the middle of a run."""


def stop() -> None:
    raise Stop


WHEN = {
    "stage 1": lambda run: run.story.stage == 1 and run.story.sigma < 10,
    "stage 2": lambda run: run.story.stage == 2,
    "vanilla pass": lambda run: bool(run.calls.watchers) and run.calls.watchers != [run.story],
}


def failing(model, when: str, action):
    """A clone that runs into `action` inside an attention of the stage."""
    m = model.clone()

    def patch(n, context, value, options):
        run = options["kindred_sampler"]
        if options["block"] == ("output", 1) and WHEN[when](run):
            action()
        return n, context, value

    m.set_model_attn2_patch(patch)
    return m


@pytest.fixture
def alive(monkeypatch):
    """How many runs and stories that began are still held."""
    seen: list[weakref.ref] = []
    read, made = Run.expect, Story.__post_init__

    def expect(self, parts):
        seen.append(weakref.ref(self))
        read(self, parts)

    def post(self):
        seen.append(weakref.ref(self))
        made(self)

    monkeypatch.setattr(Run, "expect", expect)
    monkeypatch.setattr(Story, "__post_init__", post)

    def count() -> tuple[int, int]:
        gc.collect()
        return len(seen), sum(r() is not None for r in seen)

    return count


@LAW("when", WHEN)
@LAW("how", ["error", "interrupt"])
def test_a_run_dies_wherever_it_is_stopped(when, how, alive):
    interrupted = comfy.model_management.InterruptProcessingException

    def interrupt() -> None:
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    for sampled in (pictures, anchors):
        with pytest.raises(Stop if how == "error" else interrupted):
            sampled(failing(story(MODEL), when, stop if how == "error" else interrupt))
    assert alive() == (4, 0)
    assert torch.equal(pictures(MODEL), plain()) and torch.equal(pictures(story(MODEL)), told())


def test_a_run_dies_with_its_sampler(alive):
    _, bank = anchors(story(MODEL), (0, 1))
    pictures(story(MODEL, reference=bank), (2, 3))
    assert alive() == (4, 0)


def test_an_abandoned_run_holds_no_tensors():
    """Whoever keeps the run's options keeps no features."""
    kept, m = [], story(MODEL)

    def patch(n, context, value, options):
        kept.append(options["kindred_sampler"])
        return n, context, value

    m.set_model_attn1_patch(patch)
    pictures(m)
    (run,) = {id(run): run for run in kept}.values()
    assert not (
        run.calls.watchers
        or run.calls.active
        or run.story
        or run.stages
        or run.step_tokens
        or run.guider
        or run.parts
    )
