"""The concept encoder of paper A (arXiv 2403.11284, section 2.3): a photo becomes extra keys and
values of cross-attention.

Reading E2 of "257x768 from the penultimate layer" (method.md 2.3): tokens of a CLIP vision tower's
penultimate layer, an MLP to the text's width, one linear layer per cross-attention layer for the
keys and one for the values. IP-Adapter's full-face weights (arXiv 2308.06721) have the same form
and load into the same class.
Axes: b pictures, m tokens of a picture, d channels of the tower, w width of the text, c channels of
a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import whole
from ..network.blocks import BlockId
from .config import ConceptConfig
from .tower import VisionTower

KeysValues = dict[BlockId, tuple[Tensor, Tensor]]  # k, v [b m c] per cross-attention layer


def layer_name(block: BlockId) -> str:
    """What a block's layer is called among an encoder's weights."""
    return "_".join(map(str, block))


class ConceptEncoder(nn.Module):
    """Pixels -> keys and values per cross-attention layer, eq. (6)."""

    def __init__(self, config: ConceptConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = None if config.tower is None else VisionTower(config.tower)
        d, w = config.tower_width, config.width
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, w), nn.LayerNorm(w))
        leading = [(b, c) for b, c in config.layers if config.leaders[b] == b]
        self.to_k, self.to_v = (
            nn.ModuleDict({layer_name(b): nn.Linear(w, c, bias=False) for b, c in leading})
            for _ in "kv"
        )

    def features(self, penultimate: Tensor) -> Tensor:
        """Penultimate tokens [b m d] -> F [b m w]."""
        return self.mlp(penultimate)

    def keys_values(self, features: Tensor) -> KeysValues:
        """F [b m w] -> (k, v) [b m c] of every layer."""
        names = {leader: layer_name(leader) for leader in self.config.leaders.values()}
        led = {
            leader: (self.to_k[name](features), self.to_v[name](features))
            for leader, name in names.items()
        }
        return {block: led[leader] for block, leader in self.config.leaders.items()}

    def forward(self, pixels: Tensor) -> KeysValues:
        """[b 3 size size] -> (k, v) [b m c] of every layer. ValueError without a tower."""
        if self.tower is None:
            raise ValueError(
                "This concept encoder holds no CLIP tower, so it reads penultimate tokens and not "
                "pictures: "
                "connect CLIP Vision to Concept Encoder Load."
            )
        return self.keys_values(self.features(self.tower(pixels)))

    @torch.no_grad()
    def start_from_text(self, text: Mapping[BlockId, tuple[Tensor, Tensor]]) -> None:
        """Keys and values start as those of the text, (to_k, to_v) [c w] per layer (method.md 2.3:
        zeros would not be the plain model).
        """
        for block, (k, v) in text.items():
            name = layer_name(block)
            self.to_k[name].weight.copy_(k)
            self.to_v[name].weight.copy_(v)

    @torch.no_grad()
    def start_silent(self) -> None:
        """Values start at 0: beside a transformer's softmax that is the plain model, D (10)."""
        for layer in self.to_v.values():
            layer.weight.zero_()

    def save(self, path: Path, dtype: torch.dtype = torch.float16) -> None:
        """One .safetensors with the configuration in its metadata; whole or absent. The same
        encoder gives the same bytes.
        """
        weights = {
            name: value.detach().to("cpu", dtype).contiguous()
            for name, value in sorted(self.state_dict().items())
            if value.is_floating_point()
        }
        with whole(path, weights.values()) as partial:
            save_file(weights, partial, self.config.metadata())
