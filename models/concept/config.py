"""What a concept encoder is for and made of: the description that stands in its file, and how
pictures become its pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..attention.parts import Merge
from ..network.blocks import UNET_STAGES, BlockId, block_name
from ..safetensor import number, real
from .tower import SIZES, check_tower

FORMAT = "kindred.concept_encoder"  # the metadata's one key
VERSION = 1


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the tower's pixels: short side to `size` (bicubic), centre cut, 8 bits,
    (x - mean) / std.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of CLIP
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __call__(self, images: Tensor) -> Tensor:
        """[b Y X 3|4] in 0..1 -> [b 3 size size] fp32; alpha is laid over white."""
        x = images.float()
        if x.shape[-1] == 1:
            x = x.expand(*x.shape[:-1], 3)
        elif x.shape[-1] == 4:
            x = x[..., :3] * x[..., 3:] + (1 - x[..., 3:])
        x = x.movedim(-1, 1)
        scale = self.size / min(x.shape[-2:])
        y, w = (max(round(scale * n), self.size) for n in x.shape[-2:])
        x = F.interpolate(x, (y, w), mode="bicubic", antialias=True)
        top, left = (y - self.size) // 2, (w - self.size) // 2
        x = (
            x[..., top : top + self.size, left : left + self.size]
            .clamp(0, 1)
            .mul(255)
            .round()
            .div(255)
        )
        return (x - x.new_tensor(self.mean)[:, None, None]) / x.new_tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class ConceptConfig:
    """What a concept encoder is for and made of; all of it stands in the file."""

    family: str  # the host's name of the base model's kind: SD15, SD20, SDXL
    # cross-attention layers in the order the UNet runs them, and their channels
    layers: tuple[tuple[BlockId, int], ...]
    width: int  # of the text
    tower_width: int
    # transformers' CLIPVisionConfig; None: the host's CLIP Vision gives the tokens
    tower: Mapping[str, Any] | None = None
    preprocessing: Preprocessing = Preprocessing()
    merge: Merge = Merge.CONCAT  # what it was trained with
    training: Mapping[str, Any] = field(default_factory=dict)  # facts: steps, data, rates, loss

    def metadata(self) -> dict[str, str]:
        """One entry, since safetensors writes several in no fixed order."""
        settings = {
            "version": VERSION,
            "family": self.family,
            "layers": [[*block, channels] for block, channels in self.layers],
            "width": self.width,
            "tower_width": self.tower_width,
            "tower": self.tower,
            "preprocessing": asdict(self.preprocessing),
            "merge": self.merge.value,
            "training": dict(self.training),
        }
        return {FORMAT: json.dumps(settings, sort_keys=True)}

    @staticmethod
    def read(settings: Mapping[str, Any]) -> ConceptConfig:
        """Raises KeyError, ValueError, TypeError or AttributeError where it is not what `metadata`
        writes.
        """
        pixels, tower = settings["preprocessing"], settings["tower"]
        if not isinstance(settings["family"], str) or not settings["family"]:
            raise ValueError(f"family is {settings['family']!r:.60}")
        config = ConceptConfig(
            settings["family"],
            read_layers(settings["layers"]),
            number(settings["width"], 1, 65536, "width"),
            number(settings["tower_width"], 1, SIZES["hidden_size"][1], "tower_width"),
            tower,
            Preprocessing(
                number(pixels["size"], 1, SIZES["image_size"][1], "size"),
                *(tuple(real(v, -10, 10, name) for v in pixels[name]) for name in ("mean", "std")),
            ),
            Merge(settings["merge"]),
            dict(settings["training"].items()),
        )
        check_pixels(config)
        return config


def read_layers(layers: Sequence[Any]) -> tuple[tuple[BlockId, int], ...]:
    """[stage, index, depth, channels] each -> (block, channels); ValueError or TypeError where they
    are none of a UNet.
    """
    known = tuple(
        (
            (stage, number(i, 0, 99, "a block"), number(d, 0, 99, "a block")),
            number(channels, 1, 65536, "channels"),
        )
        for stage, i, d, channels in layers
    )
    unknown = any(block[0] not in UNET_STAGES for block, _ in known)
    if not known or len(known) > 1000 or unknown or len(dict(known)) < len(known):
        raise ValueError("layers are no cross-attention layers of a UNet")
    return known


def check_pixels(config: ConceptConfig) -> None:
    """What is said of the pixels, and of the tower that sees them; ValueError."""
    pixels, tower = config.preprocessing, config.tower
    if {len(pixels.mean), len(pixels.std)} != {3} or min(pixels.std) <= 0:
        raise ValueError("mean and std are three numbers each, and std above 0")
    if tower is None:
        return
    check_tower(tower)
    if (tower["hidden_size"], tower["image_size"]) != (config.tower_width, pixels.size):
        raise ValueError(
            f"the tower is {tower['hidden_size']} wide and sees {tower['image_size']} pixels, but "
            f"the rest says "
            f"{config.tower_width} and {pixels.size}"
        )


def check_layers(
    config: ConceptConfig, family: str, layers: Sequence[tuple[BlockId, int]], width: int, node: str
) -> None:
    """An encoder's layers against a UNet's, [(block, channels)] and the width of its text;
    ValueError names both.
    """
    own, wanted = dict(config.layers), dict(layers)
    if config.width != width or own != wanted:
        first = next((b for b in {**own, **wanted} if own.get(b) != wanted.get(b)), None)
        where = (
            first
            and f"; {block_name(first)} has {own.get(first, 'no')} channels there and "
            f"{wanted.get(first, 'none')} here"
            or ""
        )
        raise ValueError(
            f"{node}: the concept encoder was trained for {config.family} ({len(own)} "
            f"cross-attention layers, text width "
            f"{config.width}), but the model given is {family} ({len(wanted)} layers, text width "
            f"{width}){where}. "
            f"Use an encoder trained for {family}, or a {config.family} checkpoint."
        )
