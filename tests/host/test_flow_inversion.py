"""Host laws of DDIM Invert on flows: tiny random transformers of the host's own classes, through the host's own sampling."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from typing import Any

import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from kindred.models.noise.inversion import ddim_sample
from kindred.models.noise.path import DIFFUSION, Flow
from kindred.nodes import host as door
from kindred.nodes.host.latents import framed
from networks import random_model
from studio import STEPS, capture, counted, differs, invert
from torch import Tensor

LAW = pytest.mark.parametrize
CELLS = (8, 6)
SIZES = {  # latents [b 16 y x] of Flux, [b 16 1 y x] of Qwen-Image
    "Flux": dict(
        in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=48, hidden_size=64, mlp_ratio=4.0, num_heads=2, depth=1,
        depth_single_blocks=1, axes_dim=[8, 12, 12], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
    ),
    "QwenImage": dict(
        in_channels=64, out_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48,
        axes_dims_rope=(8, 12, 12),
    ),
}  # fmt: skip
FLOWS = LAW("family", SIZES)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def tiny(family: str) -> Any:
    """A calm random network: its velocity bends little from step to step, as a trained one's."""
    parent = getattr(comfy.supported_models, family)
    own = type(parent.__name__, (parent,), {"unet_extra_config": {}})  # its own sizes would win
    config = own(dict(SIZES[family]))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu").eval()
    for i, p in enumerate(model.diffusion_model.parameters()):
        p.data = (
            (0.5 if p.ndim > 1 else 0.2) * randn(*p.shape, seed=i) / max(p[0].numel(), 1) ** 0.5
        )
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def words(family: str) -> list:
    extras = {"pooled_output": randn(1, 32, seed=5)} if family == "Flux" else {}
    return [[randn(1, 6, 48, seed=2), extras]]


def picture(family: str, pictures: int = 1) -> dict[str, Tensor]:
    """A LATENT as VAE Encode would give it."""
    return {"samples": framed(tiny(family), randn(pictures, 16, *CELLS, seed=3))}


def inverted(family: str, model: Any = None, **more: Any) -> tuple:
    how = {"latent": picture(family), "positive": words(family), "scheduler": "simple"} | more
    return invert(model or tiny(family), **how)


@torch.inference_mode()
def through(family: str, loop: Any) -> Any:
    """Run loop(denoise) at guidance 1 through the host's sampling, as the node does."""
    model, down = tiny(family), torch.tensor([1.0, 0.0])
    prompt = door.read_prompt(model, words(family), "positive", "test", 1)
    return door.reference_pass(
        model, (1, 16, *CELLS), down, prompt, None, lambda denoise, *_: loop(denoise)
    )


# what ddim is on a flow ------------------------------------------------------------------------------------------------------


@FLOWS
def test_ddim_on_a_flow_is_fireflow(family):
    """A saved workflow keeps its method, and the node says what it did."""
    trajectory, _, said = inverted(family)
    assert said.startswith("simple, 3 steps, fireflow (what ddim is on this model): round trip")
    assert (trajectory.method, trajectory.noise) == ("fireflow", Flow())
    assert trajectory.latents.shape == (STEPS + 1, 1, 16, *CELLS) and trajectory.sigmas[-1] == 1
    named, _, said = inverted(family, method="fireflow")
    assert said.startswith("simple, 3 steps, fireflow: round trip")
    assert torch.equal(named.latents, trajectory.latents)


@FLOWS
def test_the_trajectory_is_fireflows_by_hand(family):
    """Slopes at midpoints, each begun with the slope of the midpoint before; the network asked as the sampler asks it."""
    trajectory, _, _ = inverted(family, check=False)
    sigmas = trajectory.sigmas.tolist()

    def path(denoise):
        def slope(x: Tensor, s: float) -> Tensor:
            return (x - denoise(x, torch.tensor([s]))) / s

        x = trajectory.latents[0]
        found, v = [x], slope(x, 1e-3)
        for low, high in pairwise(sigmas):
            v = slope(x + (high - low) / 2 * v, (low + high) / 2)
            x = x + (high - low) * v
            found.append(x)
        return torch.stack(found)

    assert differs(trajectory.latents, through(family, path)) < 1e-5


@FLOWS
@LAW(
    "method, calls",
    [
        ("ddim", STEPS + 1),
        ("fireflow", STEPS + 1),
        ("edit-friendly ddpm", STEPS),
        ("forward noise", 0),
    ],
)
@LAW("check", [True, False])
def test_the_calls_of_every_method(family, method, calls, check):
    with counted(tiny(family)) as rows:
        trajectory, _, said = inverted(family, method=method, check=check)
    back = STEPS if check and calls else 0
    assert rows == [1] * (calls + back) and ("dB" in said) == bool(back)
    assert trajectory.latents.isfinite().all()


@FLOWS
def test_a_flow_comes_back(family):
    """The sampler's own Euler steps lead from the noise to the photo, the nearer the more there are."""
    few, many = (
        float(re.search(r"(-?[\d.]+) dB", inverted(family, steps=steps)[2])[1]) for steps in (4, 16)
    )
    assert many > few + 6 and many > 20


@FLOWS
def test_edit_friendly_gives_a_flows_latent_back(family):
    assert (
        float(re.search(r"(-?[\d.]+) dB", inverted(family, method="edit-friendly ddpm")[2])[1]) > 60
    )


@FLOWS
def test_the_noise_taken_as_noise_starts_the_hosts_sampler_there(family):
    """Finite at sigma 1, where the host's own inverting sampler would divide by 0: its steps from there are ddim_sample's."""
    trajectory, _, _ = inverted(family)
    model, down, noise = tiny(family), trajectory.sigmas.flip(0), trajectory.latents[-1]
    want = through(family, lambda denoise: ddim_sample(denoise, noise, down))
    start = framed(model, noise)
    with torch.inference_mode():
        out = comfy.sample.sample(
            model,
            start,
            STEPS,
            1.0,
            "euler",
            "simple",
            words(family),
            words(family),
            torch.zeros_like(start),
            seed=0,
        )
    assert differs(door.to_model_scale(model, out), want) < 1e-4


# forward noise -----------------------------------------------------------------------------------------------------------------


def louder() -> Any:
    """Flux whose noise is eight times as loud, as HiDream-O1's is."""

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    model, sampling = tiny("Flux").clone(), Sampling()
    sampling.set_noise_scale(8.0)
    model.add_object_patch("model_sampling", sampling)
    return model


@LAW("scale", [1.0, 8.0])
def test_forward_noise_is_the_hosts_mixing(scale):
    model = tiny("Flux") if scale == 1 else louder()
    trajectory, noise, said = inverted("Flux", model, method="forward noise", seed=7)
    assert trajectory.noise == Flow(scale) and said == "simple, 3 steps, forward noise"
    z0, sampling = trajectory.latents[0], model.get_model_object("model_sampling")
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(7))
    for latent, sigma in zip(trajectory.latents, trajectory.sigmas, strict=True):
        torch.testing.assert_close(
            latent, sampling.noise_scaling(sigma[None], eps, z0), rtol=0, atol=1e-5
        )
    torch.testing.assert_close(door.to_model_scale(model, noise["samples"]), trajectory.latents[-1])
    assert not torch.equal(
        inverted("Flux", model, method="forward noise", seed=8)[0].latents[1:],
        trajectory.latents[1:],
    )


@LAW("method, calls", [("fireflow", STEPS + 1), ("forward noise", 0)])
def test_the_new_methods_serve_unets_too(method, calls):
    model = random_model("tiny", gain=0.2)
    with counted(model) as rows:
        trajectory, _, said = invert(model, method=method, check=False)
    assert (
        rows == [1] * calls
        and said == f"ddim_uniform, 3 steps, {method}"
        and trajectory.noise == DIFFUSION
    )
    assert (
        capture(model, inversion=trajectory, mask=torch.ones(1, 64, 64))[0].trajectory is trajectory
    )
    if method == "forward noise":
        eps = torch.randn(trajectory.latents[0].shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            trajectory.latents[-1], trajectory.latents[0] + trajectory.sigmas[-1] * eps
        )


# which noise a model has -------------------------------------------------------------------------------------------------------


def sampled_by(kind: str, table: str = "ModelSamplingDiscrete") -> Any:
    own = type(
        "Sampling", (getattr(comfy.model_sampling, table), getattr(comfy.model_sampling, kind)), {}
    )
    model = random_model("tiny").clone()
    model.add_object_patch("model_sampling", own(model.model.model_config))
    return model


@LAW("kind", ["EPS", "V_PREDICTION", "X0", "EDM", "COSMOS_RFLOW"])
def test_a_diffusion_is_known(kind):
    assert door.noise_of(sampled_by(kind), "node") == DIFFUSION


def test_a_flow_is_known():
    assert door.noise_of(sampled_by("CONST", "ModelSamplingDiscreteFlow"), "node") == Flow()
    assert door.noise_of(sampled_by("CONST", "ModelSamplingFlux"), "node") == Flow()
    assert door.noise_of(louder(), "node") == Flow(8.0)


@LAW("kind", ["IMG_TO_IMG", "IMG_TO_IMG_FLOW", "V_PREDICTION_DDPM"])
def test_other_ways_to_mix_are_refused(kind):
    sentence = r"node: needs a model that denoises a picture \(noise, v or flow prediction\), but the model given is SD15"
    with pytest.raises(ValueError, match=sentence):
        door.noise_of(sampled_by(kind), "node")


def test_sigmas_of_a_diffusion_are_refused_before_the_work():
    with (
        counted(tiny("Flux")) as rows,
        pytest.raises(
            ValueError,
            match=r"DDIM Invert \(custom, 2 steps\): a flow's sigmas go from 0 to 1; got 14.6. Take the SIGMAS of",
        ),
    ):
        inverted("Flux", sigmas=torch.tensor([14.6, 1.0, 0.0]))
    assert not rows


# schedules -------------------------------------------------------------------------------------------------------------------


@FLOWS
@LAW("scheduler, late", [("ddim_uniform", True), ("simple", False), ("beta", False)])
def test_a_schedule_that_leaves_out_the_first_noise_is_said(family, scheduler, late, caplog):
    """ddim_uniform, the default for SD, begins below sigma 1, where a flow's samplers begin; the levels stay as they were."""
    sigmas, name = door.chosen_sigmas(tiny(family), 8, scheduler, None, "a node")
    assert (float(sigmas[0]) < 0.999) is late
    said = [r.getMessage() for r in caplog.records if "levels begin at" in r.getMessage()]
    assert len(said) == late
    if late:
        assert said[0].startswith("a node: with ddim_uniform, 8 steps this model's noise levels")
        assert f"begin at {float(sigmas[0]):.3f}" in said[0] and "Take simple" in said[0]
        caplog.clear()
        assert torch.equal(door.chosen_sigmas(tiny(family), 8, name, sigmas, "a node")[0], sigmas)
        assert not caplog.records  # wired SIGMAS are as they are meant


def test_no_such_word_of_a_diffusion(caplog):
    assert len(door.chosen_sigmas(random_model("tiny"), 8, "ddim_uniform", None, "a node")[0]) == 9
    assert not caplog.records


# latents with a frame ----------------------------------------------------------------------------------------------------------


@LAW("frame", [True, False])
def test_a_frame_is_put_on_and_taken_off_at_the_door(frame):
    """VAE Encode gives [b c 1 y x]; what we keep is [b c y x]; the noise is a LATENT as a KSampler leaves it."""
    latent = picture("QwenImage", pictures=2)["samples"]
    given = latent if frame else latent[:, :, 0]
    trajectory, noise, _ = inverted("QwenImage", latent={"samples": given}, check=False)
    scaled = tiny("QwenImage").model.process_latent_in(latent)
    assert trajectory.latents.shape == (STEPS + 1, 2, 16, *CELLS) and torch.equal(
        trajectory.latents[0], scaled[:, :, 0]
    )
    assert noise["samples"].shape == (2, 16, 1, *CELLS)
    assert torch.equal(
        trajectory.latents,
        inverted("QwenImage", latent={"samples": latent}, check=False)[0].latents,
    )


@LAW("family, shape, said", [
    ("QwenImage", (1, 16, 3, 8, 6), "the latent has 3 frames, but a reference is one picture, of 1 frame"),
    ("QwenImage", (1, 4, 1, 8, 6), r"the latent is \[1, 4, 1, 8, 6\], but this model's latents have 16 channels"),
    ("Flux", (1, 16, 1, 8, 6), r"the latent is \[1, 16, 1, 8, 6\], but this model's latents have 16 channels"),
    ("Flux", (1, 4, 8, 6), r"the latent is \[1, 4, 8, 6\], but this model's latents have 16 channels")])  # fmt: skip
def test_latents_that_do_not_fit_are_refused(family, shape, said):
    with pytest.raises(ValueError, match=f"DDIM Invert: {said}.*VAE Encode"):
        inverted(family, latent={"samples": randn(*shape, seed=1)})
