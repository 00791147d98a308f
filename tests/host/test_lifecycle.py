"""Host laws of a run's life (I37-I39): nothing is left, nothing is changed, and the neighbours are heard."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG
from comfy_extras.nodes_freelunch import FreeU
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from comfy_extras.nodes_sag import SelfAttentionGuidance
from kindred.models.network.call import Half
from kindred.models.run import Run
from kindred.nodes.host import KEY, SAMPLER
from networks import build_model, random_model
from studio import (
    SCHEDULER,
    SIZE,
    STEPS,
    bank_of,
    capture,
    coarse,
    differs,
    fingerprint,
    inject,
    invert,
    negative,
    of_bank,
    of_model,
    photo,
    plain,
    prompt,
    sample,
)

MODEL = random_model("tiny")
TIGHT, FELT = 1e-4, 1e-2
LAW = pytest.mark.parametrize


@pytest.fixture
def runs(monkeypatch):
    """Weak references to every run that begins."""
    seen: list[weakref.ref] = []
    read = Run.expect

    def expect(self, parts):
        seen.append(weakref.ref(self))
        read(self, parts)

    monkeypatch.setattr(Run, "expect", expect)
    return seen


def alive(runs) -> int:
    gc.collect()
    return sum(r() is not None for r in runs)


class Stop(Exception):
    """Another node's failure in the middle of a run."""


def failing(model, action, at: int = 2):
    """A clone whose UNet call number `at` runs into `action` in the middle of its attention."""
    calls, m = [], model.clone()

    def patch(n, context, value, options):
        if options["block"] == ("middle", 0):
            calls.append(1)
            if len(calls) == at:
                action()
        return n, context, value

    m.set_model_attn2_patch(patch)
    return m


def stop() -> None:
    raise Stop


# nothing is left -----------------------------------------------------------------------------------------------------------


def test_a_run_dies_with_its_sampler(runs):
    sample(inject(inject(MODEL, bank_of()), bank_of(steps=5)))
    capture(MODEL)
    invert(MODEL)
    assert len(runs) > 3 and alive(runs) == 0


@LAW("where", ["sampling", "live", "capture", "inversion"])
def test_a_run_dies_with_an_error(where, runs):
    model = (
        inject(MODEL, bank_of())
        if where == "sampling"
        else inject(MODEL, bank_of(steps=5))
        if where == "live"
        else MODEL
    )
    with pytest.raises(Stop):
        {"sampling": sample, "live": sample, "capture": capture, "inversion": invert}[where](
            failing(model, stop)
        )
    assert runs and alive(runs) == 0
    assert torch.equal(sample(MODEL), plain())


def test_a_run_dies_with_an_interrupt(runs):
    """The button: the host's progress bar raises where it finds the flag."""

    def hook(*args, **kwargs):
        comfy.model_management.throw_exception_if_processing_interrupted()

    model = inject(MODEL, bank_of())
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        for interrupted in (sample, capture, invert):
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                interrupted(
                    failing(model, comfy.model_management.interrupt_current_processing, at=1)
                )
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
        comfy.model_management.interrupt_current_processing(False)
    assert len(runs) == 3 and alive(runs) == 0
    assert torch.equal(sample(MODEL), plain())


def test_an_abandoned_run_holds_no_tensors():
    """Whoever keeps the run's options (a guider in a traceback, another node) keeps no features."""
    kept, samplers = [], []
    model = inject(MODEL, bank_of(steps=5))

    def patch(n, context, value, options):
        kept.append(options[KEY])
        samplers.append(options.get(SAMPLER))
        return n, context, value

    model.set_model_attn1_patch(patch)
    sample(model)
    assert {run.ways is None for run in kept} == {True, False}  # the live pass, the sampler's own
    assert not any(run.watchers or run.active or run.sites or run.parts or run.turn for run in kept)
    assert not any(
        run.step_tokens or run.guider or run.model_options for run in samplers if run is not None
    )
    assert [run is None for run in samplers] == [run.ways is None for run in kept]


def test_nothing_of_ours_lies_in_the_options_afterwards():
    model = inject(MODEL, bank_of())
    sample(model)
    options = model.model_options["transformer_options"]
    assert isinstance(options[KEY], tuple) and len(options[KEY]) == 1
    assert not options.get("patches") and "optimized_attention_override" not in options


# nothing is changed (I38, I39) ---------------------------------------------------------------------------------------------


def test_inputs_stay_as_they_were():
    model, latent, positive, uncond, bank = (
        build_model("tiny"),
        photo(),
        coarse(),
        negative(),
        bank_of(),
    )
    latent["noise_mask"] = torch.ones(1, 64, 64)

    def state():
        return [
            of_model(model),
            fingerprint(latent),
            fingerprint(positive),
            fingerprint(uncond),
            of_bank(bank),
        ]

    before = state()
    _, noise, _ = invert(model, latent, positive)
    invert(model, latent, positive, method="edit-friendly ddpm")
    capture(model, latent, positive, negative=uncond)
    injected = inject(model, bank, halves="both")
    carrying = of_model(injected)
    chained = inject(injected, bank_of(seed=8))
    sample(injected, sampler="dpm_2")
    sample(chained)
    assert state() == before and of_model(injected) == carrying
    assert noise.keys() == latent.keys() and noise["samples"] is not latent["samples"]


def test_the_plain_picture_comes_back_bit_for_bit():
    model = inject(MODEL, bank_of())
    first = sample(model)
    assert torch.equal(sample(MODEL), plain())
    assert torch.equal(sample(model.clone()), first)


def test_run_a_then_b_then_a_gives_a():
    a, b = inject(MODEL, bank_of(), 2.0), inject(MODEL, bank_of(seed=8), 0.5, halves="both")
    first = sample(a)
    sample(b, sampler="dpm_2")
    assert torch.equal(sample(a), first)


def test_the_global_random_state_is_untouched():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    capture(MODEL, negative=negative())
    trajectory, _, _ = invert(MODEL)
    invert(MODEL, method="edit-friendly ddpm", seed=7)
    capture(MODEL, inversion=trajectory)
    inject(MODEL, bank_of())
    assert torch.equal(torch.get_rng_state(), before)


def test_live_reading_does_not_disturb_a_sampler_that_draws():
    """euler_ancestral draws from the global state: an end that reads nothing must leave its draws alone."""
    how = {"sampler": "euler_ancestral", "scheduler": "karras"}
    torch.manual_seed(1)
    before = sample(MODEL, **how)
    sample(inject(MODEL, bank_of(), end_percent=0.3), **how)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    sample(MODEL, **how)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(sample(MODEL, **how), before)


def test_evaluating_twice_is_evaluating_once():
    """I37: a node that calls the model twice at the same point gets the same answer twice."""
    model, answers = inject(MODEL, bank_of(steps=5), 2.0, halves="both"), []

    def twice(apply, args):
        answers.append([apply(args["input"], args["timestep"], **args["c"]) for _ in range(2)])
        return answers[-1][1]

    again = model.clone()
    again.set_model_unet_function_wrapper(twice)
    assert torch.equal(sample(again), sample(model)) and all(torch.equal(a, b) for a, b in answers)


# the neighbours ------------------------------------------------------------------------------------------------------------


def with_override(model, seen: list):
    """As sage attention nodes do it, asking a predecessor."""
    m = model.clone()
    before = m.model_options["transformer_options"].get("optimized_attention_override")

    def override(func, *args, **kwargs):
        seen.append(args[1].shape[1])
        return func(*args, **kwargs) if before is None else before(func, *args, **kwargs)

    m.model_options["transformer_options"]["optimized_attention_override"] = override
    return m


def test_other_attention_overrides_are_asked_before_and_after():
    ours, seen = sample(inject(MODEL, bank_of(), 2.0)), []
    tokens = sum(len(bank_of().kept[layer.grid]) for layer in bank_of().layers[:1])
    for model in (
        inject(with_override(MODEL, seen), bank_of(), 2.0),
        with_override(inject(MODEL, bank_of(), 2.0), seen),
        with_override(inject(with_override(MODEL, seen), bank_of(), 2.0), seen),
    ):
        seen.clear()
        assert torch.equal(sample(model), ours)
        assert (
            SIZE[0] * SIZE[1] + tokens in seen and 77 in seen
        )  # longer keys, and cross-attention passes through


def test_another_packs_attention_patch_works_before_and_after():
    def patched(model):
        m = model.clone()
        m.set_model_attn1_patch(lambda n, context, value, options: (n, context, value * 0.5))
        return m

    before, after = (
        sample(inject(patched(MODEL), bank_of(), 2.0)),
        sample(patched(inject(MODEL, bank_of(), 2.0))),
    )
    assert torch.equal(before, after)
    assert (
        differs(before, sample(patched(MODEL))) > FELT
        and differs(before, sample(inject(MODEL, bank_of(), 2.0))) > FELT
    )


def pag(model):
    return PerturbedAttentionGuidance.execute(model, 2.0)[0]


def sag(model):
    return SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]


def freeu(model):
    return FreeU.execute(model, 1.3, 1.4, 0.9, 0.2)[0]


def hypertile(model):
    out = HyperTile.execute(model, 32, 1, 0, False)
    return out[0]


@LAW("neighbour", [pag, sag, freeu, hypertile])
@LAW("first", [True, False])
def test_guidance_and_tiling_of_the_host(neighbour, first):
    how = {"size": (16, 16), "batch": 2}
    model = (
        inject(neighbour(MODEL), bank_of(), 2.0)
        if first
        else neighbour(inject(MODEL, bank_of(), 2.0))
    )
    out = sample(model, **how)
    assert differs(out, sample(neighbour(MODEL), **how)) > 1e-3
    assert differs(out, sample(inject(MODEL, bank_of(), 2.0), **how)) > 1e-3


def test_hypertile_reads_the_whole_reference_from_every_tile():
    """A reference of every token of the picture itself would be found by each tile; silent, it is HyperTile's own picture."""
    how = {"size": (16, 16)}
    none = sample(hypertile(MODEL), **how)
    assert torch.equal(sample(inject(hypertile(MODEL), bank_of(), 0.0), **how), none)
    faint = sample(inject(hypertile(MODEL), bank_of(), 1e-4), **how)
    assert (
        differs(faint, none)
        < FELT
        < differs(sample(inject(hypertile(MODEL), bank_of(), 2.0), **how), none)
    )


def test_a_capture_beside_the_neighbours():
    """Extra guidance is not for a reference; what changes the network itself (FreeU, tiles) is."""
    for neighbour in (pag, sag):
        bank, _ = capture(neighbour(MODEL), negative=negative())
        assert all(
            differs(bank.features[half], f) < TIGHT for half, f in bank_of().features.items()
        )
    everything = torch.ones(1, 64, 64)
    assert (
        differs(
            *(
                capture(m, blocks="decoder", mask=everything)[0].features[Half.COND]
                for m in (freeu(MODEL), MODEL)
            )
        )
        > 1e-3
    )
    louder = MODEL.clone()
    louder.set_model_attn1_patch(lambda n, context, value, options: (2 * n, context, value))
    heard, own = (
        capture(m, inversion=bank_of().trajectory, mask=everything)[0].tokens(
            Half.COND, 0, torch.device("cpu"), torch.float32
        )["input", 1, 0]
        for m in (louder, MODEL)
    )
    assert torch.equal(heard, own)  # norm(x) itself, not what another patch made of it
    tiled, _ = capture(hypertile(MODEL), photo((16, 16)))
    assert all(torch.isfinite(f).all() for f in tiled.features.values())


def test_wrappers_of_others_still_run_and_are_not_for_the_reference_pass():
    from comfy.patcher_extension import WrappersMP

    seen, m = [], MODEL.clone()

    def wrapper(executor, *args, **kwargs):
        seen.append(1)
        return executor(*args, **kwargs)

    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", wrapper)
    capture(m)
    assert not seen
    assert (
        torch.equal(sample(inject(m, bank_of())), sample(inject(MODEL, bank_of())))
        and len(seen) == STEPS
    )
    seen.clear()
    sample(inject(m, bank_of(steps=5)))  # live passes between
    assert len(seen) == STEPS


# the guiders ---------------------------------------------------------------------------------------------------------------


def guided(guider, **how):
    """SamplerCustomAdvanced's heart."""
    model_sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, SCHEDULER, STEPS)
    noise = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            sigmas,
            disable_pbar=True,
            seed=1,
        )


def basic(model):
    g = Guider_Basic(model)
    g.set_conds(prompt())
    return g


def dual(model):
    g = Guider_DualCFG(model)
    g.set_conds(prompt(), prompt(6), negative())
    g.set_cfg(4.0, 2.0)
    return g


def perpneg(model):
    g = Guider_PerpNeg(model)
    g.set_conds(prompt(), negative(), prompt(6))
    g.set_cfg(4.0, 1.0)
    return g


def cfg(model):
    g = comfy.samplers.CFGGuider(model)
    g.set_conds(prompt(), negative())
    g.set_cfg(4.0)
    return g


@LAW("guider", [basic, cfg, dual, perpneg])
def test_every_guider_reads_the_reference(guider):
    try:
        none = guided(guider(MODEL))
    except TypeError:
        pytest.fail("the guider's arguments changed")
    for halves in ("cond only", "both"):
        assert differs(guided(guider(inject(MODEL, bank_of(), 2.0, halves=halves))), none) > FELT


def test_a_guider_is_used_twice():
    """SamplerCustomAdvanced keeps its guider between segments."""
    g = cfg(inject(MODEL, bank_of(), 2.0))
    first = guided(g)
    assert torch.equal(guided(g), first)
    assert isinstance(g.model_options["transformer_options"][KEY], tuple)
