"""The CLIP vision tower of a concept encoder: its description, and its penultimate tokens.

Axes: b pictures, m tokens of a picture, d channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..safetensor import number, real

# Lowest and highest of what a file may say: a real tower is well inside, and outside of it nothing
# could be built.
SIZES = {
    "hidden_size": (1, 8192),
    "intermediate_size": (1, 65536),
    "num_hidden_layers": (1, 128),
    "num_attention_heads": (1, 512),
    "num_channels": (3, 3),
    "image_size": (1, 4096),
    "patch_size": (1, 4096),
}
RATES = {
    "layer_norm_eps": (1e-12, 0.1),
    "initializer_range": (0.0, 10.0),
    "initializer_factor": (0.0, 10.0),
}
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
# the rest of transformers' configuration is no architecture; some of it can fetch code
TOWER = (
    *SIZES,
    *RATES,
    "hidden_act",
)


def check_tower(tower: Mapping[str, Any]) -> None:
    """A description of a CLIP vision tower, before anything is built of it; ValueError or
    AttributeError when it is none.
    """
    for name, bounds in SIZES.items():
        if name in tower or name in (
            "hidden_size",
            "num_hidden_layers",
            "image_size",
            "patch_size",
        ):
            number(tower.get(name), *bounds, name)
    for name, limits in RATES.items():
        if name in tower:
            real(tower[name], *limits, name)
    if tower.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act is {tower['hidden_act']!r:.60}; it can be {', '.join(ACTIVATIONS)}"
        )
    if tower["hidden_size"] % tower.get("num_attention_heads", 12):
        raise ValueError(
            f"{tower['hidden_size']} channels do not divide into "
            f"{tower.get('num_attention_heads', 12)} heads"
        )
    if (
        tower["patch_size"] > tower["image_size"]
        or (tower["image_size"] // tower["patch_size"]) ** 2 > 1 << 16
    ):
        raise ValueError(
            f"a picture of {tower['image_size']} pixels has no patches of {tower['patch_size']}"
        )


class VisionTower(nn.Module):
    """CLIP's vision transformer up to its penultimate layer: what lies behind that is not held, so
    nothing is frozen.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import (
            CLIPVisionConfig,
            CLIPVisionModel,
        )  # takes a second; only who builds a tower pays

        super().__init__()
        check_tower(config)
        own = {name: value for name, value in config.items() if name in TOWER}
        model = CLIPVisionModel(
            CLIPVisionConfig(**{**own, "num_hidden_layers": config["num_hidden_layers"] - 1})
        )
        self.model = getattr(model, "vision_model", model)  # transformers 4 has one more level
        self.model.post_layernorm = nn.Identity()
        tokens = self.model.embeddings.position_embedding.num_embeddings
        # no weight, so real on the meta device too
        self.model.embeddings.position_ids = torch.arange(tokens, device="cpu")[None]

    def forward(self, pixels: Tensor) -> Tensor:
        """[b 3 size size] -> penultimate tokens [b m d]."""
        return self.model(pixel_values=pixels).last_hidden_state

    def load_clip(self, weights: Mapping[str, Tensor]) -> None:
        """Weights of a whole CLIP vision model in transformers' names, with or without
        "vision_model."; RuntimeError if some lack.
        """
        own = self.model.state_dict()
        renamed = {name.removeprefix("vision_model."): value for name, value in weights.items()}
        self.model.load_state_dict({name: renamed[name] for name in own if name in renamed})
