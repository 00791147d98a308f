"""Host laws of DDIM Invert: the way to noise and back through the host's own model wrapper (I33-I35, I44)."""

from __future__ import annotations

import math
import re

import pytest
import torch
from kindred.models.noise.inversion import ddim_sample, edit_friendly_replay
from kindred.nodes import host as door
from networks import random_model
from studio import STEPS, coarse, counted, differs, invert, negative, photo, sample
from torch import Tensor

MODEL = random_model("tiny")
CALM = random_model(
    "tiny", gain=0.2
)  # a damped network: its noise bends little from step to step, as a trained one's
BRIGHT = {
    "samples": photo()["samples"] / 0.18215
}  # a picture of unit variance in the model's scale, as a VAE's are
EDIT = "edit-friendly ddpm"
LAW = pytest.mark.parametrize


@torch.inference_mode()
def through(model, down: Tensor, loop):
    """Run loop(denoise) at guidance 1 through the host's sampling, as the nodes do."""
    prompt = door.read_prompt(model, coarse(), "positive", "test", 1)
    return door.reference_pass(
        model,
        photo()["samples"].shape,
        down,
        prompt,
        None,
        lambda denoise, device, progress: loop(denoise),
    )


def in_model_scale(model, latent) -> Tensor:
    return model.model.process_latent_in(latent["samples"])


def round_trip(report: str) -> float:
    """The decibels of "round trip 17.6 dB in latent space"."""
    return float(re.search(r"round trip (-?[\d.]+|inf) dB in latent space", report)[1])


# there and back ------------------------------------------------------------------------------------------------------------


def test_the_round_trip_gets_better_with_the_steps():
    """I33: the photo comes back, and the node's own report says how well."""
    decibels = []
    for steps in (4, 16):
        trajectory, noise, said = invert(CALM, BRIGHT, steps=steps, scheduler="normal")
        decibels.append(round_trip(said))
        assert trajectory.latents.shape == (steps + 1, 1, 4, 8, 8)
        assert torch.equal(trajectory.latents[0], in_model_scale(CALM, BRIGHT))
    assert decibels[1] > decibels[0] + 4 and decibels[1] > 15


def test_the_report_is_the_measured_round_trip():
    trajectory, _, said = invert(CALM)
    back = through(
        CALM,
        trajectory.sigmas.flip(0),
        lambda denoise: ddim_sample(denoise, trajectory.latents[-1], trajectory.sigmas.flip(0)),
    )
    z0 = trajectory.latents[0]
    mse = (back - z0).square().mean().item()
    assert f"{10 * math.log10((z0.max() - z0.min()).item() ** 2 / mse):.1f} dB" in said
    assert said.startswith("ddim_uniform, 3 steps, ddim:")


@LAW("method", ["ddim", EDIT])
@LAW("check", [True, False])
def test_the_check_costs_as_many_calls_again_and_changes_nothing(method, check):
    with counted(MODEL) as rows:
        trajectory, _, said = invert(MODEL, method=method, check=check)
    assert rows == [1] * (STEPS * (2 if check else 1)) and ("dB" in said) == check
    assert torch.equal(trajectory.latents, invert(MODEL, method=method)[0].latents)


def test_the_noise_resumes_exactly_in_a_sampler():
    """KSampler (Advanced) with add_noise disabled runs the very steps of ddim_sample."""
    trajectory, noise, _ = invert(MODEL)
    down = trajectory.sigmas.flip(0)
    back = through(MODEL, down, lambda denoise: ddim_sample(denoise, trajectory.latents[-1], down))
    resumed = sample(
        MODEL,
        cfg=1.0,
        positive=coarse(),
        latent=noise["samples"],
        disable_noise=True,
        start_step=0,
        last_step=10000,
    )
    assert differs(in_model_scale(MODEL, {"samples": resumed}), back) < 1e-4
    torch.testing.assert_close(in_model_scale(MODEL, noise), trajectory.latents[-1])


@LAW("model", [MODEL, CALM], ids=["wild", "calm"])
def test_edit_friendly_gives_the_latent_back(model):
    """I35, and its seed: its own generator, the same maps every time."""
    trajectory, _, said = invert(model, method=EDIT, seed=5)
    z0 = in_model_scale(model, photo())
    back = through(
        model,
        trajectory.sigmas.flip(0),
        lambda denoise: edit_friendly_replay(
            denoise, trajectory.latents[-1], trajectory.sigmas, trajectory.noise_maps
        ),
    )
    assert ((back - z0).abs().max() / z0.abs().max()).item() < 1e-4
    assert round_trip(said) > 60
    assert torch.equal(invert(model, method=EDIT, seed=5)[0].noise_maps, trajectory.noise_maps)
    assert not torch.equal(
        invert(model, method=EDIT, seed=6)[0].latents[-1], trajectory.latents[-1]
    )


def test_several_pictures_are_inverted_at_once():
    pair = photo(pictures=2)
    both, noise, _ = invert(MODEL, pair)
    second, _, _ = invert(MODEL, {"samples": pair["samples"][1:]})
    assert (
        noise["samples"].shape == (2, 4, 8, 8)
        and differs(both.latents[:, 1:], second.latents) < 1e-4
    )


# the two predictions (I44) ---------------------------------------------------------------------------------------------------


def by_hand(model, z0: Tensor, sigmas: Tensor, context: Tensor, predicts_v: bool) -> Tensor:
    """DDIM inversion in the papers' scale z = x / sqrt(1 + sigma^2), the network called by its timestep: Song et al. 2021, eq. 13.

    eps from v: eps = sqrt(abar) v + sqrt(1 - abar) z (Salimans and Ho 2022, appendix D).
    """
    unet, sampling = model.model.diffusion_model, model.get_model_object("model_sampling")
    abar = 1 / (1 + sigmas**2)
    z, path = z0, [z0]
    for i in range(1, len(sigmas)):
        a, b = abar[i - 1], abar[i]
        out = unet(z, timesteps=sampling.timestep(sigmas[i : i + 1]).float(), context=context)
        eps = b**0.5 * out + (1 - b) ** 0.5 * z if predicts_v else out
        z = b**0.5 * (z - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
        path.append(z / b**0.5)
    return torch.stack(path)


@LAW("family", ["tiny", "tiny_v"])
def test_inversion_is_that_of_the_papers_for_noise_and_for_v(family):
    model = random_model(family)
    trajectory, _, _ = invert(model, check=False)
    with torch.inference_mode():
        path = by_hand(
            model, trajectory.latents[0], trajectory.sigmas, coarse()[0][0], family == "tiny_v"
        )
    assert differs(trajectory.latents, path) < 1e-4


def test_a_calm_v_model_comes_back():
    model = random_model("tiny_v", gain=0.2)
    few, many = (
        round_trip(invert(model, BRIGHT, steps=steps, scheduler="normal")[2]) for steps in (4, 16)
    )
    assert many > few + 4 and many > 15


# schedules -------------------------------------------------------------------------------------------------------------------


@LAW("scheduler", ["ddim_uniform", "karras", "normal", "sgm_uniform", "beta"])
def test_the_trajectory_has_the_sigmas_of_the_sampler(scheduler):
    """Also where the host's schedule is not of the length asked for: ddim_uniform has 8 steps for 7."""
    import comfy.samplers

    steps = 7 if scheduler == "ddim_uniform" else 4
    trajectory, _, _ = invert(MODEL, steps=steps, scheduler=scheduler, check=False)
    asked = comfy.samplers.KSampler(
        MODEL, steps, torch.device("cpu"), "euler", scheduler, 1.0
    ).sigmas
    assert torch.equal(trajectory.sigmas.flip(0), asked)


def test_wired_sigmas_win():
    sigmas = torch.tensor([12.0, 3.0, 0.7, 0.0])
    trajectory, _, said = invert(MODEL, sigmas=sigmas, steps=50)
    assert trajectory.sigmas.tolist() == sigmas.flip(0).tolist() and said.startswith(
        "custom, 3 steps"
    )


@LAW("sigmas", [[0.0, 1.0, 9.0], [9.0, 1.0], [9.0, 9.0, 0.0], [9.0, float("nan"), 0.0], [0.0]])
def test_sigmas_that_cannot_be_inverted_are_refused(sigmas):
    """Flipped, not ending in 0, resting, not a number, too few."""
    with pytest.raises(
        ValueError,
        match=r"DDIM Invert: sigmas .* must fall from step to step and end in 0.*not flipped ones",
    ) as refused:
        invert(MODEL, sigmas=torch.tensor(sigmas))
    assert f"({len(sigmas)} values" in str(refused.value)


def test_what_it_was_made_with_is_written_down():
    trajectory, _, _ = invert(MODEL, method=EDIT)
    assert (trajectory.method, trajectory.prompt, trajectory.schedule) == (
        EDIT,
        "a photo of a cat",
        "ddim_uniform, 3 steps",
    )
    assert trajectory.model_key == door.model_key(MODEL)


def test_the_prompt_is_read():
    assert (
        differs(invert(MODEL)[0].latents[-1], invert(MODEL, positive=negative())[0].latents[-1])
        > 1e-3
    )
