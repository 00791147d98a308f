"""Latents at the door: some families take those of pictures as videos of one frame."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from torch import Tensor


def with_time(model: ModelPatcher, latents: Tensor) -> Tensor:
    """Latents [b c y x] as this MODEL takes them: [b c 1 y x] in the families whose latents have an axis of time."""
    film = model.get_model_object("latent_format").latent_dimensions == 3
    return latents.unsqueeze(2) if film and latents.ndim == 4 else latents


def without_time(latents: Tensor) -> Tensor:
    """Latents [b c (1) y x] -> [b c y x]."""
    return latents.squeeze(2) if latents.ndim == 5 else latents


def cell(model: ModelPatcher) -> int:
    """How many pixels a latent cell is wide."""
    return int(model.get_model_object("latent_format").spacial_downscale_ratio)
