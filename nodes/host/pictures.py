"""Latents of a reference back to pictures: where there is a VAE but no MODEL, and roughly where it
is the other way round.
"""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor


def decode(vae: Any, latents: Tensor, made_with: str, node: str) -> Tensor:
    """Latents [b c y x] in model scale -> pictures [b Y X 3] float32 in 0..1 on the CPU.

    made_with: a model_key, whose first word is the family; the family knows the scale of its
    latents. ValueError where the family is unknown, the VAE reads other channels, or what it gives
    is not finite.
    """
    name, scale = made_with.split(" ")[0].partition("/")[0], _format_of(made_with)
    if scale is None:
        raise ValueError(
            f"{node}: the reference was made with a model of the kind {name}, which this ComfyUI "
            f"does not know. Update "
            "ComfyUI, or install the pack that brings this kind."
        )
    channels = getattr(vae, "latent_channels", latents.shape[1])
    if channels != latents.shape[1]:
        raise ValueError(
            f"{node}: the reference has latents of {latents.shape[1]} channels, but the VAE reads "
            f"{channels}. Wire the VAE "
            f"of the checkpoint that made the reference ({made_with})."
        )
    if scale.latent_dimensions == 3:  # of one frame each
        latents = latents.unsqueeze(2)
    pictures = vae.decode(scale().process_out(latents)).float().cpu()
    pictures = pictures.flatten(0, 1) if pictures.ndim == 5 else pictures
    if not pictures.isfinite().all():
        raise ValueError(
            f"{node}: the VAE gave NaN or infinite pixels. A VAE in fp16 does this to some "
            f"pictures: start ComfyUI with "
            "--fp32-vae or use another VAE."
        )
    return pictures[..., :3].clamp(0, 1)


def _format_of(made_with: str) -> type[comfy.latent_formats.LatentFormat] | None:
    """The latents of a model_key's family; None for one that this host does not know."""
    name, _, own = made_with.split(" ")[0].partition("/")
    if own:
        return getattr(comfy.latent_formats, own, None)
    family = next((kind for kind in comfy.supported_models.models if kind.__name__ == name), None)
    return getattr(family, "latent_format", None)


def cell_of(made_with: str) -> int:
    """How many pixels a latent cell is wide, by a model_key alone."""
    return int(getattr(_format_of(made_with), "spacial_downscale_ratio", 8))


def rough_pictures(model: ModelPatcher, latents: Tensor) -> Tensor | None:
    """Latents in model scale [b c y x] -> [b y x 3] in 0..1, in the colours of the host's fast
    previews; None for a family without.
    """
    return _in_rough_colours(model.get_model_object("latent_format"), latents)


def rough_pictures_of(made_with: str, latents: Tensor) -> Tensor | None:
    """The same without the model, by its model_key."""
    kind = _format_of(made_with)
    return None if kind is None else _in_rough_colours(kind(), latents)


def _in_rough_colours(family: comfy.latent_formats.LatentFormat, latents: Tensor) -> Tensor | None:
    factors, bias = family.latent_rgb_factors, family.latent_rgb_factors_bias
    # reshaped ones have another grid
    if factors is None or family.latent_rgb_factors_reshape is not None:
        return None
    if len(factors) != latents.shape[1]:
        return None
    colours = latents.float().cpu().movedim(1, -1) @ torch.tensor(factors) + (
        0 if bias is None else torch.tensor(bias)
    )
    return ((colours + 1) / 2).clamp(0, 1)


def pictures_in(images: Any, node: str, name: str) -> Tensor:
    """An IMAGE [b Y X 1|3|4] -> [b Y X 3] float32 in 0..1 on the CPU, alpha laid over white;
    ValueError for what is no picture.
    """
    shape = list(getattr(images, "shape", ()))
    if len(shape) != 4 or shape[-1] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"{node}: {name} is {shape or type(images).__name__}; pictures are [b y x 3], one of "
            f"them at least. Wire an IMAGE "
            "into it."
        )
    images = images.detach().float().cpu()
    if not (fine := images.isfinite()).all():
        raise ValueError(
            f"{node}: {int((~fine).sum())} values of {name} are NaN or infinite. Look at it with "
            f"Preview Image; a VAE in fp16 "
            "does this to some pictures: start ComfyUI with --fp32-vae or use another VAE."
        )
    images = images.clamp(0, 1)
    if shape[-1] == 4:
        return images[..., :3] * images[..., 3:] + (1 - images[..., 3:])
    return images.expand(*shape[:3], 3)
