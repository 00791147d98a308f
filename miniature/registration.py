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
import comfy.utils
import folder_paths

from .layout import (
    CONTEXT,
    FLOW_CHANNELS,
    FLOW_LAYOUT,
    FLOW_OFFERED,
    FLOW_PREVIEW,
    FLOW_PREVIEW_BIAS,
    FLOW_SHIFT,
    LATENT_CHANNELS,
    LAYOUT,
    PREVIEW,
    PREVIEW_BIAS,
    TEXT,
)
from .scenes import SIZE

WEIGHTS = Path(__file__).parent / "weights"


class MiniatureLatent(comfy.latent_formats.LatentFormat):
    """Eight channels of unit spread: the checkpoint's vae_scale already divides by the spread."""

    latent_channels = LATENT_CHANNELS
    scale_factor = 1.0
    latent_rgb_factors = PREVIEW
    latent_rgb_factors_bias = PREVIEW_BIAS
    kindred_size = SIZE  # the nodes warn before much larger pictures


class MiniatureTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """The standard vocabulary; embeddings files of width 64 fit."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None) -> None:
        class Words(comfy.sd1_clip.SDTokenizer):
            def __init__(
                self, embedding_directory: Any = None, tokenizer_data: dict | None = None
            ) -> None:
                super().__init__(
                    embedding_directory=embedding_directory,
                    embedding_size=CONTEXT,
                    tokenizer_data=tokenizer_data or {},
                )

        super().__init__(
            embedding_directory=embedding_directory,
            tokenizer_data=tokenizer_data or {},
            tokenizer=Words,
        )


class _Words(comfy.sd1_clip.SDClipModel):
    def __init__(
        self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None
    ) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(TEXT),
            model_options=model_options or {},
        )


class MiniatureText(comfy.sd1_clip.SD1ClipModel):
    """Two layers of width 64 under Stable Diffusion 1.5's key names."""

    def __init__(
        self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None, **rest: Any
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, model_options=model_options or {}, clip_model=_Words, **rest
        )


class KindredMiniature(comfy.supported_models.SD15):
    """Stable Diffusion 1.5's layout with 64 channels, two levels and a context of 64."""

    unet_config = comfy.supported_models.SD15.unet_config | {
        "context_dim": CONTEXT,
        "model_channels": LAYOUT["model_channels"],
    }
    unet_extra_config = {"num_heads": LAYOUT["num_heads"], "num_head_channels": -1}
    latent_format = MiniatureLatent
    memory_usage_factor = 0.2

    def inpaint_model(self) -> bool:
        """No: eight channels are its latents here, not latents beside a masked picture."""
        return False

    def clip_target(self, state_dict: dict | None = None) -> comfy.supported_models_base.ClipTarget:
        """The text encoder's two classes."""
        return comfy.supported_models_base.ClipTarget(MiniatureTokenizer, MiniatureText)


class FlowMiniatureLatent(comfy.latent_formats.LatentFormat):
    """Sixteen channels of unit spread: the checkpoint's vae_scale already divides by the spread."""

    latent_channels = FLOW_CHANNELS
    scale_factor = 1.0
    latent_rgb_factors = FLOW_PREVIEW
    latent_rgb_factors_bias = FLOW_PREVIEW_BIAS
    kindred_size = SIZE


class KindredFlowMiniature(comfy.supported_models.FluxSchnell):
    """FLUX's layout with ten blocks of width 192 on single latent cells, and the UNet miniature's text encoder."""

    unet_config = {"image_model": "flux"} | {
        name: FLOW_LAYOUT[name] for name in ("hidden_size", "context_in_dim")
    }
    unet_extra_config = {
        name: FLOW_LAYOUT[name]
        for name in ("in_channels", "out_channels", "patch_size", "axes_dim", "num_heads", "theta")
    }
    sampling_settings = {"multiplier": 1.0, "shift": FLOW_SHIFT}
    latent_format = FlowMiniatureLatent
    memory_usage_factor = 0.2
    vae_key_prefix = ["first_stage_model."]
    text_encoder_key_prefix = ["cond_stage_model."]

    def process_clip_state_dict(self, state_dict: dict) -> dict:
        """As of Stable Diffusion 1.5, whose text model has no projection; here it has one, since the pooled text is read."""
        return comfy.utils.state_dict_prefix_replace(
            state_dict, {"cond_stage_model.": "clip_l."}, filter_keys=True
        )

    def clip_target(self, state_dict: dict | None = None) -> comfy.supported_models_base.ClipTarget:
        """The text encoder's two classes."""
        return comfy.supported_models_base.ClipTarget(MiniatureTokenizer, MiniatureText)


def register() -> None:
    """Adds the architectures and the weights' folders to the host; calling it again, or from a reloaded pack, changes nothing more.

    The host takes the first class that fits, and FLUX.1's fits the flow miniature too.
    """
    known = comfy.supported_models.models
    ours = (KindredFlowMiniature.__name__, KindredMiniature.__name__)
    known[:] = [
        KindredFlowMiniature,
        *(model for model in known if model.__name__ not in ours),
        KindredMiniature,
    ]
    for kind in ("checkpoints", "controlnet"):
        folder_paths.add_model_folder_path(kind, str(WEIGHTS / kind))
    if FLOW_OFFERED:
        folder_paths.add_model_folder_path("checkpoints", str(WEIGHTS / "flow"))
