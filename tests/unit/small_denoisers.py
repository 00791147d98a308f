"""Denoisers that are known in closed form, of diffusions and of flows, and the schedules that inversion is tested on."""

from __future__ import annotations

import torch
from kindred.models.noise.inversion import ddim_invert
from kindred.models.noise.path import Flow
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
