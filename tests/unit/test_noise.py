"""Laws of the two noise paths, x_0 + sigma eps and (1 - sigma) x_0 + sigma eps."""

from __future__ import annotations

import math

import pytest
import torch
from kindred.models.noise.path import DIFFUSION, Diffusion, Flow, ancestral_step, slope
from torch import Tensor

SHAPE = (2, 3, 4, 6)  # b c y x
PATHS = [DIFFUSION, Flow(), Flow(8.0)]
NAMES = ["diffusion", "flow", "flow with louder noise"]
LAW = pytest.mark.parametrize


def randn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_what_mixing_is() -> None:
    x0, eps = randn(1), randn(2)
    close(DIFFUSION.mix(x0, eps, 3.0), x0 + 3 * eps)
    close(Flow().mix(x0, eps, 0.3), 0.7 * x0 + 0.3 * eps)
    close(Flow(8.0).mix(x0, eps, 0.3), 0.7 * x0 + 2.4 * eps)


@LAW("noise", PATHS, ids=NAMES)
@LAW("sigma", [1e-3, 0.3, 1.0])
def test_the_noise_that_was_mixed_in_is_found_again(noise, sigma) -> None:
    x0, eps = randn(1), randn(2)
    torch.testing.assert_close(
        noise.noise_of(noise.mix(x0, eps, sigma), x0, sigma), eps, rtol=0, atol=1e-11
    )


@LAW("noise", PATHS, ids=NAMES)
def test_the_slope_is_the_derivative_of_mixing(noise) -> None:
    x0, eps = randn(1), randn(2)
    secant = (noise.mix(x0, eps, 0.7) - noise.mix(x0, eps, 0.2)) / 0.5  # a straight line in sigma
    for sigma in (0.2, 0.45, 1.0):
        close(slope(noise.mix(x0, eps, sigma), x0, sigma), secant)


@LAW("noise", PATHS, ids=NAMES)
def test_both_ends(noise) -> None:
    """Sigma 0 is the picture and a flow's sigma 1 the noise, bit for bit: 1 - sigma is 0 there, and nothing is divided by it."""
    x0, eps = randn(1), randn(2)
    assert torch.equal(noise.mix(x0, eps, 0.0), x0)
    assert noise.top == (math.inf if noise == DIFFUSION else 1.0)
    if noise.top == 1:
        assert torch.equal(noise.mix(x0, eps, 1.0), noise.scale * eps)


def test_a_diffusions_point_is_relabelled_and_a_flows_is_not() -> None:
    x = randn(1)
    shown = DIFFUSION.relabel(x, 0.5, 2.0) / (1 + 2.0**2) ** 0.5
    close(shown, x / (1 + 0.5**2) ** 0.5)
    with pytest.raises(ValueError, match="no x of sigma 0.5 looks like one of 0.75"):
        Flow().relabel(x, 0.5, 0.75)


@LAW("source, target", [(0.9, 0.7), (0.5, 0.04), (0.3, 0.0)])
@LAW("scale", [1.0, 8.0])
def test_a_flows_ddpm_step_is_the_diffusions_of_the_same_points(source, target, scale) -> None:
    """x / (1 - sigma) is a diffusion at sigma / (1 - sigma), in units of the noise's scale."""
    noise, x, denoised = Flow(scale), randn(1), randn(2)
    mean, spread = noise.posterior(x, denoised, source, target)
    high, low = (scale * s / (1 - s) for s in (source, target))
    wanted, unit = DIFFUSION.posterior(x / (1 - source), denoised, high, low)
    close(mean, (1 - target) * wanted)
    if target:
        assert spread == pytest.approx((1 - target) * unit, rel=1e-12)
    else:
        assert torch.equal(mean, denoised) and spread == scale * source


def test_the_first_ddpm_step_of_a_flow_forgets_all_but_the_picture() -> None:
    x, denoised = randn(1), randn(2)
    mean, spread = Flow().posterior(x, denoised, 1.0, 0.75)
    assert mean.isfinite().all() and spread == 0.75
    close(mean, 0.25 * denoised)


@LAW("noise", PATHS, ids=NAMES)
@LAW("source, target", [(1.0, 0.8), (0.8, 0.3)])
def test_a_ddpm_step_from_the_true_picture_keeps_the_amount_of_noise(noise, source, target) -> None:
    """Its mean holds what remains of eps, its spread what is drawn anew: together sigma's own."""
    x0, eps = randn(1), randn(2)
    mean, spread = noise.posterior(noise.mix(x0, eps, source), x0, source, target)
    kept = noise.mix(x0, eps, target) - noise.mix(x0, torch.zeros_like(eps), target)  # sigma eps
    share = ((mean - noise.mix(x0, torch.zeros_like(eps), target)) / kept).mean().item()
    unit = (kept / eps).mean().item()
    assert math.hypot(share * unit, spread) == pytest.approx(unit, rel=1e-12)


@LAW("source, target", [(14.6, 12.0), (0.5, 0.04), (0.5, 0.0)])
def test_a_diffusions_ddpm_step_is_the_ancestral_one(source, target) -> None:
    share, spread = ancestral_step(source, target)
    mean, unit = Diffusion().posterior(randn(1), randn(2), source, target)
    assert torch.equal(mean, torch.lerp(randn(2), randn(1), share)) and unit == (spread or source)


@LAW("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_none_is_refused(scale) -> None:
    with pytest.raises(ValueError, match=f"must have a scale above 0; got {scale}"):
        Flow(scale)


def test_the_flows_floor_reads_the_velocity_well_in_float32() -> None:
    """Error of (x - D) / sigma against the exact velocity at sigma 0, for one Gaussian: D is known, v(x, 0) = -x (1 + 0) there."""
    spread, x0 = 0.35, randn(3)

    def error(sigma: float) -> float:
        x = x0.float()
        share = (1 - sigma) * spread**2 / ((1 - sigma) ** 2 * spread**2 + sigma**2)
        velocity = (x - share * x) / sigma
        exact = -x0  # dx/dsigma = (x - D) / sigma -> (1 - share) / sigma x -> -x as sigma -> 0
        return ((velocity.double() - exact).norm() / exact.norm()).item()

    floor = Flow().floor
    assert error(floor) < 0.01
    assert error(30 * floor) > 5 * error(floor) and error(floor / 1e4) > 5 * error(floor)
