"""Fits what the host's live previews show: `python -m miniature.preview` prints the numbers that stand in layout.py.

The host's Latent2RGB draws a latent as one pixel per cell, red, green and blue being a linear map of the channels, in -1..1.
"""
from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import render_range
from .pack import CHECKPOINT, load_autoencoder


@torch.no_grad()
def fit_colours(latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [b c y x] and images [b 3 8y 8x] in 0..1 -> factors [c 3] and bias [3] of least squares."""
    pixels = (F.interpolate(images, latents.shape[-2:], mode="area") * 2 - 1).movedim(1, -1).flatten(0, 2)
    channels = latents.movedim(1, -1).flatten(0, 2)
    solved = torch.linalg.lstsq(torch.cat((channels, torch.ones(len(channels), 1)), 1).double(), pixels.double()).solution
    return solved[:-1], solved[-1]


@torch.no_grad()
def fit_shipped(count: int = 400) -> tuple[Tensor, Tensor]:
    """The fit for the packed checkpoint over the first `count` training renderings."""
    from safetensors import safe_open

    autoencoder = load_autoencoder()
    with safe_open(CHECKPOINT, "pt") as file:
        spread = float(file.get_tensor("first_stage_model.vae_scale"))
    images = torch.from_numpy(render_range(0, count).images).permute(0, 3, 1, 2).float() / 255
    return fit_colours(torch.cat([autoencoder.encode(part) for part in images.split(16)]) / spread, images)


def main() -> None:
    """Prints the lines for layout.py."""
    factors, bias = fit_shipped()
    rows = "".join(f"    [{', '.join(f'{value:.4f}' for value in row)}],\n" for row in factors.tolist())
    sys.stdout.write(f"PREVIEW = [\n{rows}]\nPREVIEW_BIAS = [{', '.join(f'{value:.4f}' for value in bias.tolist())}]\n")


if __name__ == "__main__":
    main()
