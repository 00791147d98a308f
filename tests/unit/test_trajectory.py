"""Laws of the trajectory that an inversion leaves: the path between its levels, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from kindred.models.noise.inversion import InversionTrajectory, ddim_invert, forward_noise
from kindred.models.noise.path import DIFFUSION, Flow
from small_denoisers import (
    SHAPE,
    as_denoiser,
    curved,
    euler_invert,
    flow_ladder,
    flow_mixture,
    ladder,
    randn,
)
from torch import Tensor


def trajectory(**changes: object) -> InversionTrajectory:
    sigmas = ladder(10).float()
    latents = (
        randn(1, *SHAPE, seed=14, dtype=torch.float32)
        + sigmas.reshape(-1, 1, 1, 1, 1) * randn(*SHAPE, seed=15).float()
    )
    fields = {
        "sigmas": sigmas,
        "latents": latents,
        "method": "ddim target",
        "prompt": "a photo of a cat",
    }
    return InversionTrajectory(
        **{**fields, "model_key": "sd15", "schedule": "ddim_uniform", **changes}
    )


def test_between_levels_the_path_is_exact_for_constant_noise() -> None:
    path = trajectory()
    x0, eps = path.latents[0], (path.latents[-1] - path.latents[0]) / path.sigmas[-1]
    for sigma in (0.0, 0.01, 0.5, 3.3, 8.1, path.sigmas[-1].item()):
        torch.testing.assert_close(path.at(sigma), x0 + sigma * eps, rtol=0, atol=1e-5)
    low, high = path.sigmas[9].item(), path.sigmas[10].item()  # the same in z would not be
    z = 0.5 * (path.latents[9] / (1 + low**2) ** 0.5 + path.latents[10] / (1 + high**2) ** 0.5)
    middle = 0.5 * (low + high)
    assert (z * (1 + middle**2) ** 0.5 - path.at(middle)).abs().max() > 0.05


def test_between_levels_the_path_is_the_inverting_euler_step() -> None:
    sigmas, x0 = ladder(10), randn(*SHAPE, seed=16)
    latents = ddim_invert(as_denoiser(curved), x0, sigmas, label="source")
    path = trajectory(sigmas=sigmas.float(), latents=latents.float())
    source, middle = sigmas[4], 0.3 * sigmas[4] + 0.7 * sigmas[5]
    step = latents[4] + (middle - source) * curved(
        latents[4] / (1 + source**2) ** 0.5, source.expand(SHAPE[0])
    )
    torch.testing.assert_close(path.at(middle.item()).double(), step, rtol=0, atol=1e-5)


def test_between_the_levels_of_a_flow_the_path_is_straight_in_sigma() -> None:
    """Exact for one noise, and Euler's own step elsewhere; in sigma / (1 - sigma) it would not be."""
    denoise, x0 = flow_mixture()
    sigmas, noise = flow_ladder(6), Flow()
    levels = {"sigmas": sigmas.float(), "noise": noise}
    drawn = forward_noise(x0, sigmas, torch.Generator().manual_seed(3), noise=noise)
    path, eps = trajectory(latents=drawn.float(), **levels), noise.noise_of(drawn[-1], x0, 1.0)
    for sigma in (0.0, 0.01, 0.5, 0.93, 1.0):
        wanted = noise.mix(x0, eps, sigma)
        torch.testing.assert_close(path.at(sigma).double(), wanted, rtol=0, atol=1e-5)
    latents = euler_invert(denoise, x0, sigmas, noise)
    path, middle = trajectory(latents=latents.float(), **levels), (sigmas[3] + sigmas[4]).item() / 2
    step = (
        latents[3]
        + (middle - sigmas[3]) * (latents[3] - denoise(latents[3], sigmas[3].expand(2))) / sigmas[3]
    )
    torch.testing.assert_close(path.at(middle).double(), step, rtol=0, atol=1e-5)


def test_a_trajectory_is_a_diffusions_unless_it_says_otherwise() -> None:
    assert trajectory().noise == DIFFUSION
    with pytest.raises(
        ValueError, match="Inversion trajectory: a flow's sigmas go from 0 to 1; got 8.39"
    ):
        trajectory(noise=Flow())


def test_a_stored_level_is_returned_as_it_is() -> None:
    path = trajectory()
    for i, sigma in enumerate(path.sigmas.tolist()):
        assert torch.equal(path.at(sigma), path.latents[i]) and torch.equal(
            path.at(sigma * (1 + 1e-6)), path.latents[i]
        )
        assert path.nearest(sigma, 1e-6) == i


def test_outside_of_the_range_is_refused() -> None:
    path = trajectory()
    for sigma in (path.sigmas[-1].item() * 1.01, -0.1, math.nan):
        with pytest.raises(
            ValueError,
            match=f"sigma {sigma:.6g} lies outside of the inverted range 0 to {path.sigmas[-1]:.6g}",
        ):
            path.at(sigma)


def test_nearest_measures_in_log_sigma() -> None:
    path = trajectory()
    low, high = path.sigmas[3].item(), path.sigmas[4].item()
    middle = math.sqrt(low * high)
    assert path.nearest(middle * 0.99, 10.0) == 3 and path.nearest(middle * 1.01, 10.0) == 4
    assert path.nearest(low * 1.009, 0.01) == 3 and path.nearest(low * 1.02, 0.01) is None
    assert (
        path.nearest(0.0, 0.01) == 0
        and path.nearest(1e-9, 0.01) is None
        and path.nearest(-1.0, 10.0) is None
    )


def broken(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[5] = math.nan
    return x


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (lambda p: {"latents": broken(p.latents)}, "1 of 1584 values of latents are not finite"),
        (lambda p: {"latents": p.latents[:-1]}, r"t\+1 = 11 sigmas; got \[10, 2, 3, 4, 6\]"),
        (lambda p: {"latents": p.latents[:, 0]}, r"got \[11, 3, 4, 6\]"),
        (
            lambda p: {"latents": p.latents.double()},
            "latents must be float32 on the CPU; got torch.float64 on cpu",
        ),
        (lambda p: {"sigmas": p.sigmas.flip(0)}, "the lowest sigma must be 0; got 8.39"),
        (
            lambda p: {"sigmas": p.sigmas[[0, 2, 1, *range(3, 11)]]},
            "must ascend; got 0.346.* before 0.04",
        ),
        (
            lambda p: {"sigmas": p.sigmas[[0, 1, 1, *range(3, 11)]]},
            "must ascend; got 0.04.* before 0.04",
        ),
        (lambda p: {"sigmas": p.sigmas[:1]}, r"\[t\+1\] with t >= 1; got \[1\]"),
        (lambda p: {"noise_maps": p.latents}, r"= \[10, 2, 3, 4, 6\]; got \[11, 2, 3, 4, 6\]"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes, sentence) -> None:
    path = trajectory()
    assert trajectory(noise_maps=path.latents[1:]).noise_maps is not None
    with pytest.raises(ValueError, match=sentence):
        trajectory(**changes(path))
