"""LATENTs and the model's own latents: scale, channels, and the frame that some networks have
beside y and x.
"""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor


def framed(model: ModelPatcher, x: Tensor) -> Tensor:
    """[b c y x] as this model's sampler holds it: [b c 1 y x] where its latents have frames.

    They have in Qwen-Image, Krea 2, Anima, JoyImage and the video models, which draw one frame.
    """
    has_frames = model.get_model_object("latent_format").latent_dimensions == 3
    return x.unsqueeze(2) if has_frames and x.ndim == 4 else x


def unframed(x: Tensor) -> Tensor:
    """What the host holds of one picture each, [b c y x] or [b c 1 y x] -> [b c y x]."""
    return x.squeeze(2) if x.ndim == 5 else x


def latent_in(model: ModelPatcher, samples: Tensor, node: str) -> Tensor:
    """A LATENT's samples in model scale [b c y x], checked: channels, finiteness, and not the empty
    latent.
    """
    channels = model.get_model_object("latent_format").latent_channels
    frames = samples.ndim == 5 and framed(model, samples[:, :, 0]).ndim == 5
    if frames and samples.shape[2] != 1:
        raise ValueError(
            f"{node}: the latent has {samples.shape[2]} frames, but a reference is one picture, of "
            f"1 frame. "
            "Encode one picture (VAE Encode)."
        )
    if not (samples.ndim == 4 or frames) or samples.shape[1] != channels:
        raise ValueError(
            f"{node}: the latent is {list(samples.shape)}, but this model's latents have "
            f"{channels} channels "
            "[b c y x]. Encode the photo with this checkpoint's VAE (VAE Encode)."
        )
    if not torch.isfinite(samples).all():
        bad = (~torch.isfinite(samples)).sum().item()
        raise ValueError(
            f"{node}: {bad} of {samples.numel()} latent values are NaN or infinite. A VAE in fp16 "
            f"does this to "
            "some pictures: start ComfyUI with --fp32-vae or use another VAE."
        )
    if not samples.any():
        raise ValueError(
            f"{node}: the latent is empty (all zeros). Wire the encoded photo of the subject, "
            f"not Empty Latent Image."
        )
    return to_model_scale(model, samples)


def to_model_scale(model: ModelPatcher, samples: Tensor) -> Tensor:
    """A LATENT's samples in model scale [b c y x], on the CPU."""
    # --fp16-intermediates and --gpu-only give others
    return unframed(
        model.get_model_object("latent_format").process_in(framed(model, samples.float().cpu()))
    )


def latent_out(model: ModelPatcher, samples: Tensor) -> Tensor:
    """Latents [b c y x] in model scale -> a LATENT's samples, with their frame where the host's
    have one.
    """
    return model.get_model_object("latent_format").process_out(framed(model, samples))


def cell(model: ModelPatcher) -> int:
    """How many pixels a latent cell is wide."""
    return int(model.get_model_object("latent_format").spacial_downscale_ratio)
