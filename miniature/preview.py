"""Fits what the host's live previews show: `python -m miniature.preview` prints the numbers that stand in layout.py.

The host's Latent2RGB draws a latent as one pixel per cell, red, green and blue being a linear map of the channels, in -1..1.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from .autoencoder import Autoencoder
from .data import Renderings, held_out, render_range
from .layout import FLOW_CHANNELS
from .pack import CHECKPOINT, flow_autoencoder, load_autoencoder
from .program import run_program


@torch.no_grad()
def fit_colours(latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [b c y x] and images [b 3 8y 8x] in 0..1 -> factors [c 3] and bias [3] of least squares."""
    pixels = (
        (F.interpolate(images, latents.shape[-2:], mode="area") * 2 - 1)
        .movedim(1, -1)
        .flatten(0, 2)
    )
    channels = latents.movedim(1, -1).flatten(0, 2)
    solved = torch.linalg.lstsq(
        torch.cat((channels, torch.ones(len(channels), 1)), 1).double(), pixels.double()
    ).solution
    return solved[:-1], solved[-1]


@torch.no_grad()
def agreement(factors: Tensor, bias: Tensor, latents: Tensor, images: Tensor) -> Tensor:
    """Correlation of the preview of latents [b c y x] with images [b 3 8y 8x], averaged per cell -> [b 3] by picture and colour."""
    shown = (
        (torch.einsum("bcyx,ck->bkyx", latents, factors.float()) + bias.float()[:, None, None])
        .clamp(-1, 1)
        .flatten(2)
    )
    pixels = F.interpolate(images, latents.shape[-2:], mode="area").flatten(2)
    return F.cosine_similarity(
        shown - shown.mean(2, keepdim=True), pixels - pixels.mean(2, keepdim=True), 2
    )


@torch.no_grad()
def coded(pictures: Renderings, autoencoder: Autoencoder | None = None) -> tuple[Tensor, Tensor]:
    """Latents of renderings as a miniature's network sees them, of unit spread, and their images [b 3 y x].

    autoencoder: the packed UNet checkpoint's unless another is given.
    """
    from safetensors import safe_open

    images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2).float() / 255
    latents = torch.cat(
        [(autoencoder or load_autoencoder()).encode(part) for part in images.split(16)]
    )
    if autoencoder is not None:
        return latents / latents.std(), images
    with safe_open(CHECKPOINT, "pt") as file:
        return latents / float(file.get_tensor("first_stage_model.vae_scale")), images


def main() -> None:
    """Prints the lines for layout.py, fitted on 400 training renderings, and how well they serve 60 held-out ones."""
    flow = Autoencoder(FLOW_CHANNELS)
    flow.load_state_dict(flow_autoencoder())
    for name, autoencoder in (("PREVIEW", None), ("FLOW_PREVIEW", flow.eval())):
        factors, bias = fit_colours(*coded(render_range(0, 400), autoencoder))
        rows = "".join(
            f"    [{', '.join(f'{value:.4f}' for value in row)}],\n" for row in factors.tolist()
        )
        sys.stdout.write(
            f"{name} = [\n{rows}]\n{name}_BIAS = [{', '.join(f'{value:.4f}' for value in bias.tolist())}]\n"
        )
        share = agreement(factors, bias, *coded(held_out(60), autoencoder))
        sys.stdout.write(
            f"# correlation with the picture: {float(share.mean()):.3f} on average, {float(share.min()):.3f} at least\n"
        )


if __name__ == "__main__":
    run_program(main)
