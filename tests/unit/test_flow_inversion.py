"""Laws of the inversion of a flow, on a denoiser that is known in closed form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kindred.models.noise.inversion import (
    ddim_invert,
    ddim_sample,
    edit_friendly_invert,
    edit_friendly_replay,
    fireflow_invert,
    forward_noise,
)
from kindred.models.noise.path import DIFFUSION, Flow
from small_denoisers import FLOWS, SHAPE, column, euler_invert, flow_ladder, flow_mixture, randn
from torch import Tensor


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("noise", FLOWS, ids=["unit", "louder"])
@pytest.mark.parametrize("invert", [euler_invert, fireflow_invert])
def test_constant_velocity_is_inverted_exactly(invert, noise) -> None:
    """I59: one picture, one noise: the path is the straight line between them, and both come back."""
    x0, eps, sigmas = randn(*SHAPE, seed=20), randn(*SHAPE, seed=21), flow_ladder(7)
    velocity = noise.scale * eps - x0
    denoise = lambda x, sigma: x - column(sigma) * velocity  # noqa: E731
    latents = invert(denoise, x0, sigmas, noise=noise)
    assert torch.equal(latents[0], x0)
    wanted = torch.stack([noise.mix(x0, eps, sigma) for sigma in sigmas.tolist()])
    torch.testing.assert_close(latents, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        ddim_sample(denoise, latents[-1], sigmas.flip(0)), x0, rtol=0, atol=1e-11
    )


def test_fireflow_is_of_second_order_and_euler_of_first() -> None:
    """I59: on the exact flow of a mixture, twice the steps leave a quarter of FireFlow's error and half of Euler's."""
    denoise, x0 = flow_mixture()
    fine = fireflow_invert(denoise, x0, flow_ladder(4096), noise=Flow())
    errors = {euler_invert: [], fireflow_invert: []}
    for count in (32, 64, 128):
        sigmas = flow_ladder(count)
        for invert, found in errors.items():
            found.append(rms(invert(denoise, x0, sigmas, noise=Flow()) - fine[:: 4096 // count]))
    assert all(1.8 < high / low < 2.2 for high, low in pairwise(errors[euler_invert]))
    assert all(3.5 < high / low < 6.0 for high, low in pairwise(errors[fireflow_invert]))
    assert errors[fireflow_invert][0] < errors[euler_invert][2]  # 33 calls against 128


def test_a_flows_round_trip_gets_better_with_the_steps() -> None:
    """There by FireFlow or Euler, back by the sampler: the error is then the sampler's own, of first order."""
    denoise, x0 = flow_mixture()
    errors = {euler_invert: [], fireflow_invert: []}
    for count in (20, 40, 80):
        sigmas = flow_ladder(count)
        for invert, found in errors.items():
            noise = invert(denoise, x0, sigmas, noise=Flow())[-1]
            found.append(rms(ddim_sample(denoise, noise, sigmas.flip(0)) - x0))
    for found in errors.values():
        assert found[0] < 0.15 and all(1.7 < high / low < 2.3 for high, low in pairwise(found))
    assert all(map(float.__lt__, errors[fireflow_invert], errors[euler_invert]))


def test_fireflow_asks_at_the_floor_and_at_midpoints_alone() -> None:
    log, seen, sigmas = [], [], flow_ladder(5)
    denoise, x0 = flow_mixture(log)
    latents = fireflow_invert(
        denoise, x0, sigmas, noise=Flow(), on_step=lambda *step: seen.append(step)
    )
    assert latents.shape == (6, *SHAPE) and len(log) == 6
    middles = [(low + high) / 2 for low, high in pairwise(sigmas.tolist())]
    assert [sigma for _, sigma in log] == [Flow.floor, *middles]
    assert [step[:2] for step in seen] == [(i, 6) for i in range(6)]
    for (x, sigma), (_, _, asked, denoised) in zip(tuple(log), seen, strict=True):
        assert torch.equal(x, asked) and torch.equal(denoised, denoise(x, x.new_full((2,), sigma)))
    assert not any(torch.equal(x, latent) for x, _ in log[1:6] for latent in latents)


def test_one_pass_by_euler_captures_at_the_points_of_a_flow() -> None:
    seen, sigmas = [], flow_ladder(5)
    denoise, x0 = flow_mixture()
    latents = euler_invert(
        denoise, x0, sigmas, Flow(), evaluate_last=True, on_step=lambda *step: seen.append(step)
    )
    assert [step[:2] for step in seen] == [(i, 6) for i in range(6)]
    for i in range(1, 6):
        assert torch.equal(seen[i][2], latents[i])
        assert torch.equal(seen[i][3], denoise(latents[i], sigmas[i].expand(2)))


@pytest.mark.parametrize("invert", [euler_invert, fireflow_invert])
def test_the_end_of_a_flow_is_arrived_at_and_never_asked(invert) -> None:
    """I60: at sigma 1 a network need know nothing: the trajectory is finite there."""
    denoise, x0 = flow_mixture()
    blind = lambda x, sigma: denoise(x, sigma) / (sigma[0] < 1)  # noqa: E731
    latents = invert(blind, x0, flow_ladder(6), noise=Flow())
    assert latents.isfinite().all() and torch.equal(
        latents, invert(denoise, x0, flow_ladder(6), noise=Flow())
    )


def test_the_floor_of_a_short_first_step_is_that_step() -> None:
    log, sigmas = [], torch.tensor([0.0, 4e-4, 0.5, 1.0], dtype=torch.float64)
    denoise, x0 = flow_mixture(log)
    for invert in (euler_invert, fireflow_invert):
        log.clear()
        invert(denoise, x0, sigmas, noise=Flow())
        assert log[0][1] == 4e-4


@pytest.mark.parametrize("noise", [DIFFUSION, *FLOWS], ids=["diffusion", "flow", "louder"])
def test_forward_noise_is_one_noise_at_every_level(noise) -> None:
    x0, sigmas = randn(*SHAPE, seed=22), flow_ladder(6)
    before = torch.get_rng_state()
    latents = forward_noise(x0, sigmas, torch.Generator().manual_seed(3), noise=noise)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(latents[0], x0) and latents.dtype == x0.dtype and latents.isfinite().all()
    eps = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).double()
    for latent, sigma in zip(latents[1:], sigmas[1:].tolist(), strict=True):
        torch.testing.assert_close(noise.noise_of(latent, x0, sigma), eps, rtol=0, atol=1e-10)
    other = forward_noise(x0, sigmas, torch.Generator().manual_seed(4), noise=noise)
    assert torch.equal(other[0], x0) and not torch.equal(other[1:], latents[1:])


@pytest.mark.parametrize("noise", FLOWS, ids=["unit", "louder"])
def test_an_edit_friendly_flow_gives_back_the_picture(noise) -> None:
    """Every level with noise of its own, from sigma 1 down; with another network the edit differs."""
    denoise, x0 = flow_mixture()
    sigmas = flow_ladder(8)
    latents, maps = edit_friendly_invert(
        denoise, x0, sigmas, torch.Generator().manual_seed(0), noise=noise
    )
    assert latents.isfinite().all() and maps.isfinite().all()
    back = edit_friendly_replay(denoise, latents[-1], sigmas, maps, noise=noise)
    assert torch.equal(back, latents[0])
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-12)
    eps = torch.stack(
        [noise.noise_of(latents[i], x0, sigmas[i].item()).flatten() for i in range(1, 9)]
    )
    assert (torch.corrcoef(eps) - torch.eye(8)).abs().max() < 0.35  # 144 values each
    other = lambda x, sigma: 0.9 * denoise(x, sigma)  # noqa: E731
    assert rms(edit_friendly_replay(other, latents[-1], sigmas, maps, noise=noise) - x0) > 1e-2


def test_a_flow_takes_no_target_label_and_no_sigma_above_one() -> None:
    denoise, x0 = flow_mixture(log := [])
    with pytest.raises(
        ValueError,
        match="no x of sigma 0 looks like one of 0.4286. Read the velocity where the path stands",
    ):
        ddim_invert(denoise, x0, flow_ladder(5), noise=Flow())
    generator = torch.Generator()
    for invert in (
        euler_invert,
        fireflow_invert,
        lambda d, x, s, noise: forward_noise(x, s, generator, noise=noise),
        lambda d, x, s, noise: edit_friendly_invert(d, x, s, generator, noise=noise),
    ):
        with pytest.raises(
            ValueError,
            match="a flow's sigmas go from 0 to 1; got 14.6. Take the SIGMAS of the model",
        ):
            invert(denoise, x0, torch.tensor([0.0, 0.5, 14.6]), noise=Flow())
    assert not log
