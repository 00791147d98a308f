"""Samplers that ask the model at other sizes than the latent's, or past their schedule: what public packs do, in lines of the tests."""

from __future__ import annotations

from typing import Any

import comfy.k_diffusion.sampling
import torch
import torch.nn.functional as F
from comfy.samplers import KSAMPLER, CFGGuider
from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale
from studio import negative, prompt
from torch import Tensor

SIGMAS = torch.tensor([14.6, 7.0, 3.0, 1.0, 0.0])


def _euler(x: Tensor, model: Any, sigma: Tensor, to: Tensor, args: dict[str, Any]) -> Tensor:
    return x + (x - model(x, sigma * x.new_ones(len(x)), **args)) / sigma * (to - sigma)


@torch.no_grad()
def sample_every_second_cell(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, **_: Any
) -> Tensor:
    """As euler_dy: at some levels every second cell is a picture of its own, which the model is asked about too."""
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        if i in (1, 2):
            x = x.clone()
            x[:, :, 1::2, 1::2] = _euler(x[:, :, 1::2, 1::2], model, sigma, to, extra_args)
        x = _euler(x, model, sigma, to, extra_args)
    return x


@torch.no_grad()
def sample_a_quarter_more(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, **_: Any
) -> Tensor:
    """As euler_smea_dy: at some levels the model is asked about a larger picture."""
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        if i == 1:
            larger = F.interpolate(x, scale_factor=1.25, mode="nearest-exact")
            x = F.interpolate(
                _euler(larger, model, sigma, to, extra_args), size=x.shape[2:], mode="nearest-exact"
            )
        x = _euler(x, model, sigma, to, extra_args)
    return x


@torch.no_grad()
def sample_half_size(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, **_: Any
) -> Tensor:
    """All of it at half the size, which is another picture's whole run."""
    small = x[:, :, ::2, ::2]
    for sigma, to in zip(sigmas[:-1], sigmas[1:]):
        small = _euler(small, model, sigma, to, extra_args)
    return F.interpolate(small, scale_factor=2, mode="nearest-exact")


@torch.no_grad()
def sample_upper_half(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, **_: Any
) -> Tensor:
    """A part of the picture, which is no resize."""
    for sigma, to in zip(sigmas[:-1], sigmas[1:]):
        upper = _euler(x[:, :, : x.shape[2] // 2], model, sigma, to, extra_args)
        x = torch.cat((upper, x[:, :, x.shape[2] // 2 :]), 2)
    return x


@torch.no_grad()
def sample_louder(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, **_: Any
) -> Tensor:
    """As euler_negative: every level is passed over, and one with more noise asked for instead."""
    for sigma, to in zip(sigmas[:-1], sigmas[1:]):
        x = _euler(x, model, sigma * 1.4, to, extra_args)
    return x


@torch.no_grad()
def sample_leaping(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, **_: Any
) -> Tensor:
    """The last level but one is never asked for."""
    levels = torch.cat((sigmas[:-2], sigmas[-1:]))
    for sigma, to in zip(levels[:-1], levels[1:]):
        x = _euler(x, model, sigma, to, extra_args)
    return x


@torch.no_grad()
def sample_ahead(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, **_: Any
) -> Tensor:
    """Looks two levels ahead at every level, and comes back for the one between."""
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        following = _euler(x, model, sigma, to, extra_args)
        if i + 2 < len(sigmas) - 1:
            model(x, sigmas[i + 2] * x.new_ones(len(x)), **extra_args)
        x = following
    return x


RESIZING = {
    "every second cell": (KSAMPLER(sample_every_second_cell), "every_second_cell", "8x8"),
    "a quarter more": (KSAMPLER(sample_a_quarter_more), "a_quarter_more", "20x20"),
    "half size": (KSAMPLER(sample_half_size), "half_size", "8x8"),
    "LCM upscale": (SamplerLCMUpscale.execute(2.0, 2, "nearest-exact")[0], "lcm_upscale", "24x24"),
}
ODD = (sample_louder, sample_leaping, sample_ahead)


@torch.inference_mode()
def drawn(
    model: Any,
    sampler: Any,
    noise: Tensor,
    positive: list | None = None,
    cfg: float = 4.0,
    sigmas: Tensor = SIGMAS,
) -> Tensor:
    guider = CFGGuider(model)
    guider.set_conds(positive or prompt(), negative())
    guider.set_cfg(cfg)
    torch.manual_seed(1)  # LCM draws from the global numbers
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=1)


EULER = KSAMPLER(comfy.k_diffusion.sampling.sample_euler)
