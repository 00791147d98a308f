"""What a MODEL says of itself is its own: not what another MODEL of the same checkpoint left in the shared network, nor what the host's
module holds where a pack put something in its place."""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_management
import comfy.samplers
import pytest
import strangers
import torch
from comfy.patcher_extension import CallbacksMP
from comfy_extras.nodes_model_advanced import ModelComputeDtype
from kindred.nodes import host
from networks import build_model, random_model
from ours import TIGHT
from studio import (
    MOMENTS,
    SCHEDULER,
    STEPS,
    bank_of,
    capture,
    differs,
    inject,
    invert,
    photo,
    sample,
)
from test_bypassed_lora import lora

import nodes

LAW = pytest.mark.parametrize


# schedules that packs compute ------------------------------------------------------------------------------------------------


@LAW(
    "make",
    [
        lambda m: invert(m, scheduler="aligned")[0].sigmas,
        lambda m: capture(m, scheduler="aligned")[0].trajectory.sigmas,
    ],
    ids=["invert", "capture"],
)
def test_a_schedule_that_a_pack_gives_ksampler_is_ours_too(make, monkeypatch):
    """As packs with schedules of their own do it: a name in the host's list, and KSampler's own function changed."""
    own, asked = comfy.samplers.KSampler.calculate_sigmas, torch.tensor([14.6, 4.0, 1.0, 0.0])

    def calculate_sigmas(self, steps):
        return asked.clone() if self.scheduler == "aligned" else own(self, steps)

    monkeypatch.setattr(comfy.samplers.KSampler, "calculate_sigmas", calculate_sigmas)
    monkeypatch.setattr(
        comfy.samplers.KSampler, "SCHEDULERS", [*comfy.samplers.SCHEDULER_NAMES, "aligned"]
    )
    assert torch.equal(make(random_model("tiny")).flip(0), asked)


@LAW("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_the_hosts_schedules_are_those_of_its_sampler(scheduler):
    model = random_model("tiny")
    meant = comfy.samplers.KSampler(model, STEPS, "cpu", "euler", scheduler).sigmas
    assert torch.equal(host.model.schedule(model, scheduler, STEPS), meant)


# objects of other MODELs -----------------------------------------------------------------------------------------------------


def other_latents(model):
    """As the host's nodes do it for Playground 2.5: latents of another scale."""
    m, latents = model.clone(), comfy.latent_formats.SD15()
    latents.scale_factor = 2.0
    m.add_object_patch("latent_format", latents)
    return m


@LAW("first", [None, "plain", "other"])
def test_latents_are_in_the_scale_of_this_model_whichever_ran_before(first):
    plain = build_model("tiny")
    other = other_latents(plain)
    if first:
        sample({"plain": plain, "other": other}[first], steps=1)
    latent = photo()["samples"]
    for model, factor in ((plain, 0.18215), (other, 2.0)):
        assert torch.equal(host.latent_in(model, latent, "a test"), latent * factor)
        assert torch.equal(host.latent_out(model, latent), latent / factor)


def test_the_photo_is_read_in_the_scale_of_its_model():
    plain = build_model("tiny")
    other = other_latents(plain)
    sample(plain, steps=1)
    _, noise, _ = invert(other)
    sample(plain, steps=1)
    trajectory, _, _ = invert(other)
    assert torch.equal(trajectory.latents[0], photo()["samples"] * 2.0)
    assert torch.equal(noise["samples"], trajectory.latents[-1] / 2.0)


@LAW("first", [None, "plain", "half"])
def test_the_precision_is_that_of_this_model_whichever_ran_before(first):
    """Model Compute Dtype is an object patch."""
    plain = build_model("tiny")
    (half,) = ModelComputeDtype().patch(plain, "bf16")
    if first:
        sample({"plain": plain, "half": half}[first], steps=1)
    assert [host.computes_in(m) for m in (plain, half)] == [torch.float32, torch.bfloat16]


def test_a_training_computes_in_the_precision_it_asks_for():
    """And not in the one that a node before it asks for."""
    with torch.inference_mode():
        (half,) = ModelComputeDtype().patch(
            nodes.CheckpointLoaderSimple().load_checkpoint("kindred_miniature.safetensors")[0],
            "bf16",
        )
    with host.training(half, torch.float32, "a test") as copy:
        comfy.model_management.load_models_gpu([copy])
        assert copy.model.get_dtype_inference() == torch.float32


# injections that are taken out and put back -----------------------------------------------------------------------------------


@LAW("beside", [False, True], ids=["alone", "beside a LoRA in bypass mode"])
def test_who_waits_for_injections_is_told_around_a_live_pass(beside):
    """By the patcher's own methods, as where the host takes them out for hooks; what stays in the pass is put back for it."""
    told, model = [], lora(random_model("tiny")) if beside else random_model("tiny")
    theirs = strangers.motion(model, [])
    theirs.add_callback(
        CallbacksMP.ON_INJECT_MODEL, lambda patcher: told.append(("in", patcher.is_injected))
    )
    theirs.add_callback(
        CallbacksMP.ON_EJECT_MODEL, lambda patcher: told.append(("out", patcher.is_injected))
    )

    def heard(steps):
        told.clear()
        assert torch.isfinite(sample(inject(theirs, capture(model, steps=steps)[0], 2.0))).all()
        return [*told]

    heard(STEPS)  # what ran before is put away first
    cached, live = heard(STEPS), heard(MOMENTS)
    around = [("out", False), *[("in", True), ("out", False)] * beside, ("in", True)]
    calls = sum(
        bank_of(steps=MOMENTS).step_of(float(s)) is None
        for s in host.model.schedule(model, SCHEDULER, STEPS)[:-1]
    )
    assert calls == 2 and any(
        live == [*cached[:at], *around * calls, *cached[at:]] for at in range(len(cached))
    )


def test_a_packs_own_callbacks_go_with_its_injections():
    """While its modules are out it is not told that they are in, whatever else stays."""
    told = []
    model = lora(random_model("tiny"))
    theirs = strangers.motion(inject(model, capture(model, steps=MOMENTS)[0], 2.0), told)
    theirs.add_callback_with_key(
        CallbacksMP.ON_INJECT_MODEL,
        "motion",
        lambda patcher: told.append(
            "there" if "Motion" in str(patcher.model.diffusion_model) else "not there"
        ),
    )
    assert torch.isfinite(sample(theirs)).all() and "there" in told and "not there" not in told


def test_a_live_pass_beside_both_reads_what_a_cached_one_does():
    model = lora(random_model("tiny"))
    theirs = strangers.motion(model, [])
    bank = capture(theirs)[0]
    cached = sample(inject(theirs, bank, 2.0))
    bank.__class__.step_of, own = (lambda self, sigma: None), bank.__class__.step_of
    try:
        assert differs(sample(inject(theirs, bank, 2.0)), cached) < TIGHT
    finally:
        bank.__class__.step_of = own
    assert bank_of() is not bank
