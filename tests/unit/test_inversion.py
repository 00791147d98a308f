"""Laws of inversion: method invariants I33-I35 and I44 on denoisers that are known in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from kindred.models.noise.inversion import (
    ddim_invert,
    ddim_sample,
    edit_friendly_invert,
    edit_friendly_replay,
)
from kindred.models.noise.path import DIFFUSION, Diffusion, ancestral_step
from small_denoisers import SHAPE, as_denoiser, curved, ladder, mixture, randn

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
