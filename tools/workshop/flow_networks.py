"""Random FLUX.1 and SD3.5 networks: the host's classes at their real width, with fewer of their blocks; "tiny_flux" is small throughout.

A block does the same work wherever it stands, so what a method costs beside the plain sampler needs a few; see SIZES for how many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

FLUX: dict[str, Any] = {  # FLUX.1 dev; it has 19 double and 38 single blocks
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [16, 56, 56],
    "theta": 10_000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
SD35: dict[
    str, Any
] = {  # SD3.5 large, as wide as its depth of 38 makes it; num_blocks of them are there
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 38,
    "num_blocks": 6,
    "input_size": None,
    "adm_in_channels": 2048,
    "qk_norm": "rms",
    "num_patches": None,
    "pos_embed_max_size": None,
    "pos_embed_scaling_factor": None,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 4096, "out_features": 2432},
    },
}


@dataclass(frozen=True)
class Size:
    """One network: its class in comfy.supported_models, its constructor's arguments, and the texts that it reads."""

    config: str
    arguments: dict[str, Any]
    words: int
    width: int  # of a word
    pooled: int

    @property
    def blocks(self) -> int:
        a = self.arguments
        return a.get("num_blocks") or a["depth"] + a["depth_single_blocks"]


SIZES = {
    "flux": Size("Flux", FLUX, 256, 4096, 768),
    "sd35": Size("SD3", SD35, 154, 4096, 2048),
    "tiny_flux": Size(
        "Flux",
        FLUX
        | {
            "vec_in_dim": 32,
            "context_in_dim": 48,
            "hidden_size": 64,
            "num_heads": 2,
            "axes_dim": [8, 12, 12],
        },
        12,
        48,
        32,
    ),
}


def config_of(family: str, arguments: dict[str, Any] | None = None) -> Any:
    """The host's configuration of it, which makes the model; arguments: other ones than its own."""
    import comfy.ops
    import comfy.supported_models

    size = SIZES[family]
    parent = getattr(comfy.supported_models, size.config)
    kind = type(parent.__name__, (parent,), {"unet_extra_config": {}})
    config = kind(dict(arguments or size.arguments))
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = comfy.ops.manual_cast
    return config


def random_text(family: str, seed: int) -> list:
    """CONDITIONING of random features, as the family's text encoders give it."""
    size, generator = SIZES[family], torch.Generator().manual_seed(seed)
    text = torch.randn(1, size.words, size.width, generator=generator)
    pooled = torch.randn(1, size.pooled, generator=generator)
    return [[text, {"pooled_output": pooled, "kindred_text": "a photo of a cat"}]]
