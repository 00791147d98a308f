"""Laws of inversion: method invariants I33-I35 and I44 on denoisers that are known in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from kindred.models.noise.inversion import (
    InversionTrajectory,
    ddim_invert,
    ddim_sample,
    edit_friendly_invert,
    edit_friendly_replay,
    fireflow_invert,
    forward_noise,
)
from kindred.models.noise.path import DIFFUSION, Diffusion, Flow, ancestral_step
from torch import Tensor

SHAPE = (2, 3, 4, 6)  # b c y x
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0)  # abar of SD1.x, 2.x, SDXL


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def steps_of(count: int) -> list[int]:
    """Timesteps of `count` steps, ascending, on the grid the papers use (1, 21, .. 981 for 50)."""
    return [1 + i * (1000 // count) for i in range(count)]


def ladder(count: int) -> Tensor:
    """0 and the sigmas of steps_of: [t+1], ascending."""
    abar = ALPHAS[steps_of(count)]
    return torch.cat((torch.zeros(1, dtype=torch.float64), ((1 - abar) / abar) ** 0.5))


def column(sigma: Tensor) -> Tensor:
    return sigma.reshape(-1, 1, 1, 1)


def curved(z: Tensor, sigma: Tensor) -> Tensor:
    """Some noise prediction in the papers' scale z, that depends on both arguments."""
    return torch.tanh(1.7 * z + 0.3 * column(sigma)) - 0.4 * z.roll(1, -1)


def as_denoiser(predict, log: list | None = None):
    """eps(z, sigma) as the host's denoised = x - sigma eps(x / sqrt(1 + sigma^2), sigma)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (x.shape[0],)
        if log is not None:
            log.append((x, sigma[0].item()))
        return x - column(sigma) * predict(x / (1 + column(sigma) ** 2) ** 0.5, sigma)

    return denoise


def mixture(centres: Tensor, spread: float):
    """Exact denoiser of data drawn as a centre [k 1 c y x] plus spread * noise: E[x_0 | x]."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        variance = spread**2 + column(sigma) ** 2
        away = (x[None] - centres).square().flatten(2).sum(-1)
        share = torch.softmax(-away / (2 * variance.flatten()), 0)[..., None, None, None]
        return (share * (spread**2 * x[None] + column(sigma) ** 2 * centres) / variance).sum(0)

    return denoise


# I33, I34: DDIM up and down -----------------------------------------------------------------------------------------------


def test_a_ddim_step_in_z_is_an_euler_step_in_x() -> None:
    sigmas = ladder(20)
    abar = 1 / (1 + sigmas**2)
    x = 5 * randn(*SHAPE, seed=1)
    z = x * abar[-1].sqrt()
    for low, high in reversed(
        list(pairwise(range(len(sigmas))))
    ):  # Song et al. 2021, eq. 12 without noise
        eps = curved(z, sigmas[high].expand(SHAPE[0]))
        predicted = (z - (1 - abar[high]).sqrt() * eps) / abar[high].sqrt()
        z = abar[low].sqrt() * predicted + (1 - abar[low]).sqrt() * eps
    torch.testing.assert_close(
        ddim_sample(as_denoiser(curved), x, sigmas.flip(0)), z, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("label", ["target", "source"])
def test_constant_noise_makes_an_exact_round_trip(label) -> None:
    eps, sigmas, x0 = randn(*SHAPE, seed=2), ladder(10), randn(*SHAPE, seed=3)
    denoise = as_denoiser(lambda z, sigma: eps)
    latents = ddim_invert(denoise, x0, sigmas, label=label)
    assert latents.shape == (11, *SHAPE) and torch.equal(latents[0], x0)
    torch.testing.assert_close(
        latents, x0 + sigmas.reshape(-1, 1, 1, 1, 1) * eps, rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        ddim_sample(denoise, latents[-1], sigmas.flip(0)), x0, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("label", ["target", "source"])
def test_the_round_trip_error_falls_with_the_steps(label) -> None:
    centres = 0.8 * randn(4, 1, *SHAPE[1:], seed=4)
    denoise = mixture(centres, 0.35)
    x0 = centres[:2, 0] + 0.35 * randn(*SHAPE, seed=5)
    errors = []
    for count in (10, 20, 50, 100, 250):
        sigmas = ladder(count)
        back = ddim_sample(
            denoise, ddim_invert(denoise, x0, sigmas, label=label)[-1], sigmas.flip(0)
        )
        errors.append((back - x0).square().mean().sqrt().item())
    assert errors[0] < 0.5 and all(low < high for high, low in pairwise(errors))
    assert (
        0.35 < errors[3] / errors[2] < 0.65 and 0.3 < errors[4] / errors[3] < 0.5
    )  # ~ 1/n: halved at 100, x 0.4 at 250


def test_sampling_starts_anywhere_and_may_stop_early() -> None:
    sigmas, x = ladder(10), 3 * randn(*SHAPE, seed=6)
    denoise = as_denoiser(curved)
    half = ddim_sample(denoise, x, sigmas[5:].flip(0))
    torch.testing.assert_close(
        ddim_sample(denoise, half, sigmas[:6].flip(0)), ddim_sample(denoise, x, sigmas.flip(0))
    )


# I44: which point the noise is read at ------------------------------------------------------------------------------------


def test_target_label_is_the_papers_inversion_in_z() -> None:
    sigmas, x0 = ladder(20), randn(*SHAPE, seed=7)
    abar = 1 / (1 + sigmas**2)
    z, path = x0, [x0]
    for low, high in pairwise(range(len(sigmas))):  # the current z, told that it lies at the target
        eps = curved(z, sigmas[high].expand(SHAPE[0]))
        predicted = (z - (1 - abar[low]).sqrt() * eps) / abar[low].sqrt()
        z = abar[high].sqrt() * predicted + (1 - abar[high]).sqrt() * eps
        path.append(z / abar[high].sqrt())
    latents = ddim_invert(as_denoiser(curved), x0, sigmas)
    torch.testing.assert_close(latents, torch.stack(path), rtol=1e-12, atol=1e-12)


def test_source_label_is_euler_on_the_flipped_sigmas() -> None:
    sigmas, x = ladder(20), randn(*SHAPE, seed=7)
    path = [x]
    for source, target in pairwise(sigmas):
        asked = source if source > 0 else torch.tensor(DIFFUSION.floor, dtype=torch.float64)
        x = x + (target - source) * curved(x / (1 + asked**2) ** 0.5, asked.expand(SHAPE[0]))
        path.append(x)
    latents = ddim_invert(as_denoiser(curved), path[0], sigmas, label="source")
    torch.testing.assert_close(latents, torch.stack(path), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(
        latents, ddim_invert(as_denoiser(curved), path[0], sigmas, label="target")
    )


@pytest.mark.parametrize("floor, asked", [(1e-4, 1e-4), (0.02, 0.02), (9.0, None)])
def test_the_floor_is_asked_once_and_never_above_the_first_sigma(floor, asked) -> None:
    log, sigmas = [], ladder(5)
    noise = type("Floored", (Diffusion,), {"floor": floor})()
    x = randn(*SHAPE, seed=8)
    ddim_invert(as_denoiser(curved, log), x, sigmas, label="source", noise=noise)
    assert [sigma for _, sigma in log] == [asked or sigmas[1].item(), *sigmas[1:-1].tolist()]


def test_one_pass_inverts_and_captures() -> None:
    """The points a denoising run over the trajectory asks at are the ones "source" has asked: t + 1 calls, not 2t."""
    log, seen, sigmas = [], [], ladder(10)
    denoise = as_denoiser(curved, log)
    latents = ddim_invert(
        denoise,
        randn(*SHAPE, seed=9),
        sigmas,
        label="source",
        evaluate_last=True,
        on_step=lambda *step: seen.append(step),
    )
    assert len(log) == len(seen) == 11 and [step[:2] for step in seen] == [
        (i, 11) for i in range(11)
    ]
    for i in range(1, 11):
        assert log[i][1] == sigmas[i].item() and torch.equal(seen[i][2], latents[i])
        assert torch.equal(seen[i][3], denoise(latents[i], sigmas[i].expand(SHAPE[0])))


def test_target_calls_and_reports_once_a_step() -> None:
    log, seen, sigmas = [], [], ladder(10)
    ddim_invert(
        as_denoiser(curved, log),
        randn(*SHAPE, seed=9),
        sigmas,
        on_step=lambda *step: seen.append(step),
    )
    assert [sigma for _, sigma in log] == sigmas[1:].tolist()
    assert [step[:2] for step in seen] == [(i, 10) for i in range(10)]
    assert all(torch.equal(asked, step[2]) for (asked, _), step in zip(log, seen, strict=True))


# I35: edit-friendly -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, target", [(14.6, 12.0), (2.0, 1.9), (0.5, 0.04)])
def test_the_ancestral_step_is_the_ddpm_posterior(source, target) -> None:
    """Ho et al. 2020, eq. 7: in z, mean sqrt(abar') beta x0 / (1-abar) + sqrt(alpha) (1-abar') z / (1-abar), variance beta~."""
    abar, abar_next = 1 / (1 + source**2), 1 / (1 + target**2)
    alpha = abar / abar_next
    x, x0 = 3.1, -0.7
    mean = math.sqrt(abar_next) * (1 - alpha) / (1 - abar) * x0
    mean += math.sqrt(alpha) * (1 - abar_next) / (1 - abar) * math.sqrt(abar) * x
    variance = (1 - abar_next) / (1 - abar) * (1 - alpha)
    share, spread = ancestral_step(source, target)
    assert x0 + share * (x - x0) == pytest.approx(mean / math.sqrt(abar_next), rel=1e-12)
    assert spread == pytest.approx(math.sqrt(variance / abar_next), rel=1e-12)
    assert math.hypot(target * target / source, spread) == pytest.approx(
        target, rel=1e-12
    )  # sigma_down, sigma_up


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_replay_gives_back_the_picture(dtype, atol) -> None:
    sigmas, x0 = ladder(20), randn(*SHAPE, seed=10, dtype=dtype)
    denoise = as_denoiser(curved)
    latents, noise_maps = edit_friendly_invert(
        denoise, x0, sigmas, torch.Generator().manual_seed(0)
    )
    assert (
        latents.shape == (21, *SHAPE)
        and noise_maps.shape == (20, *SHAPE)
        and latents.dtype == noise_maps.dtype == dtype
    )
    for start in (None, 20, 12, 1):
        back = edit_friendly_replay(
            denoise, latents[20 if start is None else start], sigmas, noise_maps, start=start
        )
        torch.testing.assert_close(back, x0, rtol=0, atol=atol)
    assert torch.equal(
        edit_friendly_replay(denoise, latents[-1], sigmas, noise_maps), latents[0]
    )  # the path itself, bit by bit
    other = edit_friendly_replay(
        as_denoiser(lambda z, sigma: 0.9 * curved(z, sigma)), latents[-1], sigmas, noise_maps
    )
    assert (other - x0).abs().max() > 1e-2


def test_every_level_has_its_own_noise() -> None:
    sigmas, x0 = ladder(6), randn(1, 4, 48, 48, seed=11)
    oracle = lambda x, sigma: x0  # noqa: E731
    latents, noise_maps = edit_friendly_invert(oracle, x0, sigmas, torch.Generator().manual_seed(1))
    eps = ((latents[1:] - x0) / sigmas[1:].reshape(-1, 1, 1, 1, 1)).flatten(1)
    torch.testing.assert_close(
        torch.corrcoef(eps), torch.eye(6, dtype=torch.float64), rtol=0, atol=0.06
    )
    for i in range(
        1, 6
    ):  # with independent eps and D = x_0 the maps' variance is (1 + share) / (1 - share)
        share, spread = ancestral_step(sigmas[i + 1].item(), sigmas[i].item())
        assert noise_maps[i].var().item() == pytest.approx((1 + share) / (1 - share), rel=0.08)
        reused = (
            (latents[i + 1] - x0) / sigmas[i + 1] * sigmas[i]
        )  # x_i - x_0, had eps been drawn once
        assert (
            (reused - share * (latents[i + 1] - x0)) / spread - noise_maps[i]
        ).abs().mean() > 0.5
    assert noise_maps[0].abs().max() == 0  # the last step's remainder x_0 - D


def test_the_last_map_is_the_remainder_in_units_of_its_sigma() -> None:
    sigmas, x0, denoise = ladder(6), randn(*SHAPE, seed=18), as_denoiser(curved)
    latents, noise_maps = edit_friendly_invert(
        denoise, x0, sigmas, torch.Generator().manual_seed(1)
    )
    remainder = (x0 - denoise(latents[1], sigmas[1].expand(SHAPE[0]))) / sigmas[1]
    torch.testing.assert_close(noise_maps[0], remainder, rtol=0, atol=1e-10)


def test_one_seed_gives_one_inversion_and_the_global_generator_is_left_alone() -> None:
    sigmas, x0, denoise = ladder(5), randn(*SHAPE, seed=12), as_denoiser(curved)
    before = torch.get_rng_state()
    a = edit_friendly_invert(denoise, x0, sigmas, torch.Generator().manual_seed(3))
    b = edit_friendly_invert(denoise, x0, sigmas, torch.Generator().manual_seed(3))
    c = edit_friendly_invert(denoise, x0, sigmas, torch.Generator().manual_seed(4))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])
    assert torch.equal(before, torch.get_rng_state())


def test_edit_friendly_asks_each_level_once_from_the_noise_down() -> None:
    log, seen, sigmas = [], [], ladder(5)
    x0, generator = randn(*SHAPE, seed=13), torch.Generator().manual_seed(3)
    edit_friendly_invert(
        as_denoiser(curved, log), x0, sigmas, generator, on_step=lambda *step: seen.append(step)
    )
    assert [sigma for _, sigma in log] == sigmas[1:].flip(0).tolist()
    assert [step[:2] for step in seen] == [(i, 5) for i in range(5)]


# flows --------------------------------------------------------------------------------------------------------------------

FLOWS = [Flow(), Flow(8.0)]


def flow_ladder(count: int, shift: float = 3.0) -> Tensor:
    """A shifted schedule of a flow, ascending from 0 to 1: [t+1]."""
    even = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    return shift * even / (1 + (shift - 1) * even)


def flow_mixture(log: list | None = None):
    """Exact denoiser E[x_0 | x] of a flow for data drawn as one of four centres plus 0.35 * noise; and two such pictures."""
    centres, spread = 0.8 * randn(4, 1, *SHAPE[1:], seed=4), 0.35

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if log is not None:
            log.append((x, sigma[0].item()))
        s = column(sigma)
        variance = ((1 - s) * spread) ** 2 + s**2
        away = (x[None] - (1 - s) * centres).square().flatten(2).sum(-1)
        share = torch.softmax(-away / (2 * variance.flatten()), 0)[..., None, None, None]
        posterior = centres + (1 - s) * spread**2 / variance * (x[None] - (1 - s) * centres)
        return (share * posterior).sum(0)

    return denoise, centres[:2, 0] + spread * randn(*SHAPE, seed=5)


def euler_invert(denoise, x0: Tensor, sigmas: Tensor, noise: Flow, **more) -> Tensor:
    return ddim_invert(denoise, x0, sigmas, label="source", noise=noise, **more)


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


# the trajectory -----------------------------------------------------------------------------------------------------------


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


def test_calls_that_do_not_fit_are_refused() -> None:
    denoise, x0, sigmas = as_denoiser(curved), randn(*SHAPE, seed=17), ladder(5)
    with pytest.raises(ValueError, match="lowest sigma must be 0; got 0.04"):
        ddim_invert(denoise, x0, sigmas[1:])
    with pytest.raises(ValueError, match="must ascend"):
        ddim_sample(denoise, x0, sigmas)
    with pytest.raises(ValueError, match='needs label "source"; got "target"'):
        ddim_invert(denoise, x0, sigmas, evaluate_last=True)
    with pytest.raises(ValueError, match="got 'middle'"):
        ddim_invert(denoise, x0, sigmas, label="middle")
    with pytest.raises(ValueError, match=r"got \[6\] and \[3, 4, 6\]"):
        ddim_invert(denoise, x0[0], sigmas)
    with pytest.raises(
        ValueError,
        match="5 steps need 5 noise maps and a start from 1 to 5; got 4 maps and start 9",
    ):
        edit_friendly_replay(denoise, x0, sigmas, randn(4, *SHAPE, seed=1), start=9)
