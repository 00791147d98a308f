"""The concept encoder of paper A (arXiv 2403.11284, section 2.3): a photo becomes extra keys and values of cross-attention.

Reading E2 of "257x768 from the penultimate layer" (method.md 2.3): tokens of a CLIP vision tower's penultimate layer, an MLP
to the text's width, one linear layer per cross-attention layer for the keys and one for the values. IP-Adapter's full-face
weights (arXiv 2308.06721) have the same form and load into the same class.
Axes: b pictures, m tokens of a picture, d channels of the tower, w width of the text, c channels of a layer.
"""
from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import whole
from .injection import Merge
from .reference import BlockId, block_name

FORMAT = "kindred.concept_encoder"  # the metadata's one key
VERSION = 1
MOST_HEADER = 1 << 26  # bytes; a real one has a few hundred kB
KeysValues = dict[BlockId, tuple[Tensor, Tensor]]  # k, v [b m c] per cross-attention layer
# full-face files number their layers input, output, middle (arXiv 2308.06721's code), the middle last
SD_STAGES = {"input": {i: 1 for i in (1, 2, 4, 5, 7, 8)}, "output": {i: 1 for i in range(3, 12)}, "middle": {0: 1}}
XL_STAGES = {"input": {4: 2, 5: 2, 7: 10, 8: 10}, "output": {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2}, "middle": {0: 10}}


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the tower's pixels: short side to `size` (bicubic), centre cut, 8 bits, (x - mean) / std."""
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
        x = x[..., top:top + self.size, left:left + self.size].clamp(0, 1).mul(255).round().div(255)
        return (x - x.new_tensor(self.mean)[:, None, None]) / x.new_tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class ConceptConfig:
    """What a concept encoder is for and made of; all of it stands in the file."""
    family: str  # the host's name of the base model's kind: SD15, SD20, SDXL
    layers: tuple[tuple[BlockId, int], ...]  # cross-attention layers in the order the UNet runs them, and their channels
    width: int  # of the text
    tower_width: int
    tower: Mapping[str, Any] | None = None  # transformers' CLIPVisionConfig; None: the host's CLIP Vision gives the tokens
    preprocessing: Preprocessing = Preprocessing()
    merge: Merge = Merge.CONCAT  # what it was trained with
    training: Mapping[str, Any] = field(default_factory=dict)  # facts: steps, data, rates, loss

    @property
    def tokens(self) -> int | None:
        """Tokens of a picture: patches and the class token; None without a tower."""
        return None if self.tower is None else (self.tower["image_size"] // self.tower["patch_size"]) ** 2 + 1

    def metadata(self) -> dict[str, str]:
        """One entry, since safetensors writes several in no fixed order."""
        told = {"version": VERSION, "family": self.family, "layers": [[*block, channels] for block, channels in self.layers],
                "width": self.width, "tower_width": self.tower_width, "tower": self.tower, "preprocessing": asdict(self.preprocessing),
                "merge": self.merge.value, "training": dict(self.training)}
        return {FORMAT: json.dumps(told, sort_keys=True)}

    @staticmethod
    def read(told: Mapping[str, Any]) -> ConceptConfig:
        """Raises KeyError, ValueError, TypeError or AttributeError where it is not what `metadata` writes."""
        pixels = told["preprocessing"]
        return ConceptConfig(str(told["family"]), tuple(((str(s), int(i), int(d)), int(c)) for s, i, d, c in told["layers"]),
                             int(told["width"]), int(told["tower_width"]), told["tower"],
                             Preprocessing(int(pixels["size"]), tuple(pixels["mean"]), tuple(pixels["std"])),
                             Merge(told["merge"]), dict(told["training"]))


class VisionTower(nn.Module):
    """CLIP's vision transformer up to its penultimate layer: what lies behind that is not held, so nothing is frozen."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel  # takes a second; only who builds a tower pays
        super().__init__()
        model = CLIPVisionModel(CLIPVisionConfig(**{**config, "num_hidden_layers": config["num_hidden_layers"] - 1}))
        self.model = getattr(model, "vision_model", model)  # transformers 4 has one more level
        self.model.post_layernorm = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """[b 3 size size] -> penultimate tokens [b m d]."""
        return self.model(pixel_values=pixels).last_hidden_state

    def load_clip(self, weights: Mapping[str, Tensor]) -> None:
        """Weights of a whole CLIP vision model in transformers' names, with or without "vision_model."; RuntimeError if some lack."""
        own = self.model.state_dict()
        given = {name.removeprefix("vision_model."): value for name, value in weights.items()}
        self.model.load_state_dict({name: given[name] for name in own if name in given})


class ConceptEncoder(nn.Module):
    """Pixels -> keys and values per cross-attention layer, eq. (6)."""

    def __init__(self, config: ConceptConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = None if config.tower is None else VisionTower(config.tower)
        d, w = config.tower_width, config.width
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, w), nn.LayerNorm(w))
        self.to_k = nn.ModuleDict({"_".join(map(str, b)): nn.Linear(w, c, bias=False) for b, c in config.layers})
        self.to_v = nn.ModuleDict({"_".join(map(str, b)): nn.Linear(w, c, bias=False) for b, c in config.layers})

    def features(self, penultimate: Tensor) -> Tensor:
        """Penultimate tokens [b m d] -> F [b m w]."""
        return self.mlp(penultimate)

    def keys_values(self, features: Tensor) -> KeysValues:
        """F [b m w] -> (k, v) [b m c] of every layer."""
        names = {block: "_".join(map(str, block)) for block, _ in self.config.layers}
        return {block: (self.to_k[name](features), self.to_v[name](features)) for block, name in names.items()}

    def forward(self, pixels: Tensor) -> KeysValues:
        """[b 3 size size] -> (k, v) [b m c] of every layer. ValueError without a tower."""
        if self.tower is None:
            raise ValueError("This concept encoder holds no CLIP tower, so it reads penultimate tokens and not pictures: "
                             "connect CLIP Vision to Concept Encoder Load.")
        return self.keys_values(self.features(self.tower(pixels)))

    @torch.no_grad()
    def start_from_text(self, text: Mapping[BlockId, tuple[Tensor, Tensor]]) -> None:
        """Keys and values start as those of the text, (to_k, to_v) [c w] per layer (method.md 2.3: zeros would not be the plain model)."""
        for block, (k, v) in text.items():
            name = "_".join(map(str, block))
            self.to_k[name].weight.copy_(k)
            self.to_v[name].weight.copy_(v)

    def save(self, path: Path, dtype: torch.dtype = torch.float16) -> None:
        """One .safetensors with the configuration in its metadata; whole or absent. The same encoder gives the same bytes."""
        weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in sorted(self.state_dict().items())
                   if value.is_floating_point()}
        with whole(path) as partial:
            save_file(weights, partial, self.config.metadata())


def load_concept_encoder(path: Path, device: torch.device | str = "cpu") -> ConceptEncoder:
    """A Kindred concept encoder, or IP-Adapter full-face weights (merge "add", no tower), in float32.

    Raises ValueError that names the file, what is wrong and what to do: a pickle, a torn or foreign file, another version.
    """
    check_safetensors(path)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path.name} is torn or no .safetensors ({error}). Copy or download it again.") from error
    if FORMAT in metadata:
        try:
            told = json.loads(metadata[FORMAT])
            version = told["version"]
            config = ConceptConfig.read(told) if version == VERSION else None
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name}: its description is damaged ({error!r}). Copy or download it again.") from error
        if config is None:
            raise ValueError(f"{path.name} is a concept encoder of format {version}, but this Kindred reads format {VERSION}. "
                             "Update Kindred, or train the encoder again.")
    else:
        config, weights = read_full_face(path, weights)
    encoder = ConceptEncoder(config)
    expected = {name: tuple(value.shape) for name, value in encoder.state_dict().items() if value.is_floating_point()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        name = next(n for n in sorted(expected.keys() | found.keys()) if expected.get(n) != found.get(n))
        raise ValueError(f"{path.name}: {name} is {found.get(name, 'missing')}, but its description says "
                         f"{expected.get(name, 'that there is none')}. Copy or download it again.")
    bad = next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)
    if bad:
        raise ValueError(f"{path.name}: {bad} holds NaN or infinite values. Copy it again, or train with a lower learning rate.")
    encoder.load_state_dict(weights, strict=False)
    return encoder.eval().requires_grad_(False)


def check_safetensors(path: Path) -> None:
    """Refuse what safetensors would misread or execute: ValueError for a pickle, an empty or cut file, a header that cannot be."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        raise ValueError(f"{path.name} is a pickle (.bin, .pt, .ckpt), which can run programs when it is opened, so Kindred does not. "
                         "Use the .safetensors form of it.")
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 0 < length <= min(MOST_HEADER, size - 8):
        raise ValueError(f"{path.name} is torn or no .safetensors ({size} bytes). Copy or download it again.")


def read_full_face(path: Path, weights: Mapping[str, Tensor]) -> tuple[ConceptConfig, dict[str, Tensor]]:
    """IP-Adapter full-face tensors -> configuration and tensors in our names; ValueError for any other file."""
    try:
        first = weights["image_proj.proj.0.weight"]
        width = weights["image_proj.proj.3.weight"].shape[0]
    except KeyError:
        kind = "an IP-Adapter of another kind (only full-face has one token per patch)" if "image_proj.proj.weight" in weights or any(
            name.startswith("image_proj.") for name in weights) else "no concept encoder"
        raise ValueError(f"{path.name} is {kind}. Choose a file that Concept Encoder Train or tools/train_concept_encoder.py made, "
                         "or IP-Adapter full-face weights.") from None
    family, stages = {768: ("SD15", SD_STAGES), 1024: ("SD20", SD_STAGES), 2048: ("SDXL", XL_STAGES)}.get(width, (None, {}))
    numbered: list[BlockId] = [(stage, i, d) for stage, blocks in stages.items() for i, depth in blocks.items()
                               for d in range(depth)]
    names = [f"ip_adapter.{2 * n + 1}.to_" for n in range(len(numbered))]
    if family is None or any(name + "k_ip.weight" not in weights for name in names):
        raise ValueError(f"{path.name} is IP-Adapter full-face weights for a base model Kindred does not know: text width {width}, "
                         f"{sum(n.endswith('to_k_ip.weight') for n in weights)} layers. SD1.5 has 768 and 16, SD2.x 1024 and 16, SDXL 2048 "
                         "and 70.")
    renamed = {"mlp." + name.removeprefix("image_proj.proj."): value for name, value in weights.items() if name.startswith("image_proj.")}
    for block, name in zip(numbered, names):
        own = "_".join(map(str, block))
        renamed[f"to_k.{own}.weight"], renamed[f"to_v.{own}.weight"] = weights[name + "k_ip.weight"], weights[name + "v_ip.weight"]
    order = {"input": 0, "middle": 1, "output": 2}
    layers = sorted(((b, weights[n + "k_ip.weight"].shape[0]) for b, n in zip(numbered, names)), key=lambda x: (order[x[0][0]], x[0]))
    config = ConceptConfig(family, tuple(layers), width, first.shape[0], merge=Merge.ADD, training={"source": "IP-Adapter full-face"})
    return config, renamed


def check_layers(config: ConceptConfig, family: str, layers: Sequence[tuple[BlockId, int]], width: int, node: str) -> None:
    """An encoder's layers against a UNet's, [(block, channels)] and the width of its text; ValueError names both."""
    own, given = dict(config.layers), dict(layers)
    if config.width != width or own != given:
        first = next((b for b in {**own, **given} if own.get(b) != given.get(b)), None)
        where = first and f"; {block_name(first)} has {own.get(first, 'no')} channels there and {given.get(first, 'none')} here" or ""
        raise ValueError(f"{node}: the concept encoder was trained for {config.family} ({len(own)} cross-attention layers, text width "
                         f"{config.width}), but the model given is {family} ({len(given)} layers, text width {width}){where}. "
                         f"Use an encoder trained for {family}, or a {config.family} checkpoint.")


def for_merge(config: ConceptConfig, merge: Merge, **facts: Any) -> ConceptConfig:
    """The configuration with what a training has to say."""
    return replace(config, merge=merge, training={**config.training, **facts})
