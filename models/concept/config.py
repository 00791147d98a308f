"""What a concept encoder is for and made of: the description that stands in its file, and how
pictures become its pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..attention.parts import Merge
from ..network.backbone import ALONE, DOUBLE, SINGLE
from ..network.blocks import UNET_STAGES, BlockId, block_name
from ..safetensor import number, real
from .tower import SIZES, check_tower

FORMAT = "kindred.concept_encoder"  # the metadata's one key
VERSION = 1
# where a block may lie that reads a concept
STAGES = (UNET_STAGES, (DOUBLE, SINGLE, ALONE))
WIDEST = 1024  # a transformer has some 50 blocks, each with keys and values of so many rows
# kinds of one network, between which an encoder may be exchanged
KIN = {"FluxSchnell": "Flux", "FluxInpaint": "Flux"}


class Kind(str, Enum):
    """Whose layout a public adapter's file has, and so what it reads of a picture."""

    SHAKKER = "IP-Adapter by InstantX and Shakker Labs"  # FLUX.1: SigLIP's pooled picture
    XLABS = "IP-Adapter by XLabs"  # FLUX.1: CLIP's projected picture
    TIMED = "IP-Adapter by InstantX"  # SD3.5: SigLIP's penultimate tokens, anew at each noise level


@dataclass(frozen=True)
class Adapter:
    """What a public adapter is made of besides its layers."""

    kind: Kind
    tokens: int  # that it makes of a picture
    hidden: int = 0  # width of the resampler, and of the time that it is told
    depth: int = 0  # layers of the resampler
    head: int = 0  # width of the network's attention heads
    waves: int = 0  # of the noise level's code


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
    # cross-attention layers in the order the UNet runs them, and their channels; of a transformer
    # the blocks in which the picture reads the text
    layers: tuple[tuple[BlockId, int], ...]
    width: int  # of the text; of a transformer that of the concept's tokens
    tower_width: int
    # transformers' CLIPVisionConfig; None: the host's CLIP Vision gives the tokens
    tower: Mapping[str, Any] | None = None
    preprocessing: Preprocessing = Preprocessing()
    merge: Merge = Merge.CONCAT  # what it was trained with
    training: Mapping[str, Any] = field(default_factory=dict)  # facts: steps, data, rates, loss
    adapter: Adapter | None = None  # None: an encoder of this pack, or IP-Adapter full-face
    tied: int = 1  # neighbouring blocks of one kind that read the same keys and values

    @property
    def decoupled(self) -> bool:
        """Whether it is for a transformer, where it is read beside each block's softmax."""
        return self.layers[0][0][0] not in UNET_STAGES

    @property
    def leaders(self) -> dict[BlockId, BlockId]:
        """Whose keys and values each block reads: of `tied` neighbours of one stage and width those
        of the first.
        """
        leaders: dict[BlockId, BlockId] = {}
        leader, kind, count = self.layers[0][0], ("", 0), 0
        for block, channels in self.layers:
            if (block[0], channels) != kind or count == self.tied:
                leader, kind, count = block, (block[0], channels), 0
            leaders[block], count = leader, count + 1
        return leaders

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
        if self.tied > 1:
            settings["tied"] = self.tied
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
            tied=number(settings.get("tied", 1), 1, 1000, "tied"),
        )
        check_pixels(config)
        return config


def read_layers(layers: Sequence[Any]) -> tuple[tuple[BlockId, int], ...]:
    """[stage, index, depth, channels] each -> (block, channels); ValueError or TypeError where they
    are none of a UNet and none of a transformer.
    """
    known = tuple(
        (
            (stage, number(i, 0, 99, "a block"), number(d, 0, 99, "a block")),
            number(channels, 1, 65536, "channels"),
        )
        for stage, i, d, channels in layers
    )
    stages = {block[0] for block, _ in known}
    unknown = not any(stages <= {*kind} for kind in STAGES)
    if not known or len(known) > 1000 or unknown or len(dict(known)) < len(known):
        raise ValueError("layers are no cross-attention layers of a UNet, nor a transformer's")
    return known


def tokens_width(layers: Sequence[tuple[BlockId, int]], text: int | None) -> int:
    """The width of a new encoder's tokens: of a UNet's text, or of a transformer's narrowest block,
    at most WIDEST.
    """
    return min(WIDEST, *(channels for _, channels in layers)) if text is None else text


def new_config(
    family: str,
    layers: tuple[tuple[BlockId, int], ...],
    text: int | None,
    tower: Mapping[str, Any],
    merge: Merge,
    tied: int,
    node: str,
) -> ConceptConfig:
    """Of an encoder with a new tower; text: the width of a UNet's text, None for a transformer, on
    which a concept is always added. ValueError where a UNet's layers are to be tied.
    """
    if text is not None and tied > 1:
        raise ValueError(
            f"{node}: tie_blocks is {tied}, but a UNet's layers have keys and values of their own. "
            "Set it to 1."
        )
    merge = Merge.ADD if text is None else merge
    width, pixels = tokens_width(layers, text), Preprocessing(tower["image_size"])
    return ConceptConfig(
        family, layers, width, tower["hidden_size"], tower, pixels, merge, tied=tied
    )


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
    config: ConceptConfig,
    family: str,
    layers: Sequence[tuple[BlockId, int]],
    width: int | None,
    node: str,
) -> None:
    """An encoder's layers against a network's, [(block, channels)], and the width of a UNet's text,
    None for a transformer; ValueError names both.

    A transformer's encoder may be for some of its blocks, but for no other family.
    """
    own, wanted = dict(config.layers), dict(layers)
    if width is None and config.decoupled:
        fits = own.items() <= wanted.items() and _kin(config.family) == _kin(family)
    else:
        fits = config.width == width and own == wanted
    if fits:
        return
    first = next((b for b in {**own, **wanted} if own.get(b) != wanted.get(b)), None)
    where = ""
    if first:
        where = (
            f"; {block_name(first)} has {own.get(first, 'no')} channels there and "
            f"{wanted.get(first, 'none')} here"
        )
    raise ValueError(
        f"{node}: the concept encoder was trained for {config.family} "
        f"({_counted(own, None if config.decoupled else config.width)}), but the model given is "
        f"{family} ({_counted(wanted, width, 'layers')}){where}. "
        f"Use an encoder trained for {family}, or a {config.family} checkpoint."
    )


def _kin(family: str) -> str:
    name, slash, latents = family.partition("/")
    return KIN.get(name, name) + slash + latents


def _counted(
    layers: Mapping[BlockId, int], width: int | None, what: str = "cross-attention layers"
) -> str:
    """How many layers there are, and the width of a UNet's text."""
    return f"{len(layers)} blocks" if width is None else f"{len(layers)} {what}, text width {width}"
