"""Tells the host what the miniature is, so that its own CheckpointLoaderSimple loads it.

Beside nodes/host/ the only file that imports comfy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import folder_paths

from .layout import CONTEXT, LATENT_CHANNELS, LAYOUT, PREVIEW, PREVIEW_BIAS, TEXT

WEIGHTS = Path(__file__).parent / "weights"


class MiniatureLatent(comfy.latent_formats.LatentFormat):
    """Eight channels of unit spread: the checkpoint's vae_scale already divides by the spread."""

    latent_channels = LATENT_CHANNELS
    scale_factor = 1.0
    latent_rgb_factors = PREVIEW
    latent_rgb_factors_bias = PREVIEW_BIAS


class MiniatureTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """The standard vocabulary; embeddings files of width 64 fit."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None) -> None:
        class Words(comfy.sd1_clip.SDTokenizer):
            def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None) -> None:
                super().__init__(embedding_directory=embedding_directory, embedding_size=CONTEXT, tokenizer_data=tokenizer_data or {})

        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=Words)


class _Words(comfy.sd1_clip.SDClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        super().__init__(device=device, dtype=dtype, textmodel_json_config=dict(TEXT), model_options=model_options or {})


class MiniatureText(comfy.sd1_clip.SD1ClipModel):
    """Two layers of width 64 under Stable Diffusion 1.5's key names."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None, **rest: Any) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=_Words, **rest)


class KindredMiniature(comfy.supported_models.SD15):
    """Stable Diffusion 1.5's layout with 64 channels, two levels and a context of 64."""

    unet_config = comfy.supported_models.SD15.unet_config | {"context_dim": CONTEXT, "model_channels": LAYOUT["model_channels"]}
    unet_extra_config = {"num_heads": LAYOUT["num_heads"], "num_head_channels": -1}
    latent_format = MiniatureLatent
    memory_usage_factor = 0.2

    def inpaint_model(self) -> bool:
        """No: eight channels are its latents here, not latents beside a masked picture."""
        return False

    def clip_target(self, state_dict: dict | None = None) -> comfy.supported_models_base.ClipTarget:
        """The text encoder's two classes."""
        return comfy.supported_models_base.ClipTarget(MiniatureTokenizer, MiniatureText)


def register() -> None:
    """Adds the architecture and the weights' folders to the host; calling it again, or from a reloaded pack, changes nothing more."""
    known = comfy.supported_models.models
    known[:] = [model for model in known if model.__name__ != KindredMiniature.__name__] + [KindredMiniature]
    for kind in ("checkpoints", "controlnet"):
        folder_paths.add_model_folder_path(kind, str(WEIGHTS / kind))
