"""The concept encoder of paper A (arXiv 2403.11284, section 2.3): a photo becomes extra keys and values of cross-attention.

Reading E2 of "257x768 from the penultimate layer" (method.md 2.3): tokens of a CLIP vision tower's penultimate layer, an MLP
to the text's width, one linear layer per cross-attention layer for the keys and one for the values. IP-Adapter's full-face
weights (arXiv 2308.06721) have the same form and load into the same class.
Axes: b pictures, m tokens of a picture, d channels of the tower, w width of the text, c channels of a layer.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import torn, unread, whole
from ..injection import Merge
from ..reference.bank import UNET_STAGES, BlockId, block_name
from ..reference.soundness import GREATEST

FORMAT = "kindred.concept_encoder"  # the metadata's one key
VERSION = 1
MOST_HEADER = 1 << 26  # bytes; a real one has a few hundred kB
# Lowest and highest of what a file may say: a real tower is well inside, and outside of it nothing could be built.
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
TOWER = (
    *SIZES,
    *RATES,
    "hidden_act",
)  # the rest of transformers' configuration is no architecture; some of it can fetch code
KeysValues = dict[BlockId, tuple[Tensor, Tensor]]  # k, v [b m c] per cross-attention layer
# full-face files number their layers input, output, middle (arXiv 2308.06721's code), the middle last
SD_STAGES = {
    "input": {i: 1 for i in (1, 2, 4, 5, 7, 8)},
    "output": {i: 1 for i in range(3, 12)},
    "middle": {0: 1},
}
XL_STAGES = {
    "input": {4: 2, 5: 2, 7: 10, 8: 10},
    "output": {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2},
    "middle": {0: 10},
}


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
    layers: tuple[
        tuple[BlockId, int], ...
    ]  # cross-attention layers in the order the UNet runs them, and their channels
    width: int  # of the text
    tower_width: int
    tower: Mapping[str, Any] | None = (
        None  # transformers' CLIPVisionConfig; None: the host's CLIP Vision gives the tokens
    )
    preprocessing: Preprocessing = Preprocessing()
    merge: Merge = Merge.CONCAT  # what it was trained with
    training: Mapping[str, Any] = field(default_factory=dict)  # facts: steps, data, rates, loss

    def metadata(self) -> dict[str, str]:
        """One entry, since safetensors writes several in no fixed order."""
        told = {
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
        return {FORMAT: json.dumps(told, sort_keys=True)}

    @staticmethod
    def read(told: Mapping[str, Any]) -> ConceptConfig:
        """Raises KeyError, ValueError, TypeError or AttributeError where it is not what `metadata` writes."""
        pixels, tower = told["preprocessing"], told["tower"]
        if not isinstance(told["family"], str) or not told["family"]:
            raise ValueError(f"family is {told['family']!r:.60}")
        layers = tuple(
            (
                (s, number(i, 0, 99, "a block"), number(d, 0, 99, "a block")),
                number(c, 1, 65536, "channels"),
            )
            for s, i, d, c in told["layers"]
        )
        if (
            not layers
            or len(layers) > 1000
            or any(b[0] not in UNET_STAGES for b, _ in layers)
            or len(dict(layers)) < len(layers)
        ):
            raise ValueError("layers are no cross-attention layers of a UNet")
        config = ConceptConfig(
            told["family"],
            layers,
            number(told["width"], 1, 65536, "width"),
            number(told["tower_width"], 1, SIZES["hidden_size"][1], "tower_width"),
            tower,
            Preprocessing(
                number(pixels["size"], 1, SIZES["image_size"][1], "size"),
                *(tuple(real(v, -10, 10, name) for v in pixels[name]) for name in ("mean", "std")),
            ),
            Merge(told["merge"]),
            dict(told["training"].items()),
        )
        if {len(config.preprocessing.mean), len(config.preprocessing.std)} != {3} or min(
            config.preprocessing.std
        ) <= 0:
            raise ValueError("mean and std are three numbers each, and std above 0")
        if tower is not None:
            check_tower(tower)
            if (tower["hidden_size"], tower["image_size"]) != (
                config.tower_width,
                config.preprocessing.size,
            ):
                raise ValueError(
                    f"the tower is {tower['hidden_size']} wide and sees {tower['image_size']} pixels, but the rest says "
                    f"{config.tower_width} and {config.preprocessing.size}"
                )
        return config


def number(value: Any, lowest: int, highest: int, what: str) -> int:
    """A whole number within its bounds; ValueError for anything else."""
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"{what} is {value!r:.60}; it can be {lowest} to {highest}")
    return value


def real(value: Any, lowest: float, highest: float, what: str) -> float:
    """A finite number within its bounds; ValueError for anything else."""
    if type(value) not in (int, float) or not lowest <= value <= highest:  # NaN lies in no bounds
        raise ValueError(f"{what} is {value!r:.60}; it can be {lowest} to {highest}")
    return float(value)


def check_tower(tower: Mapping[str, Any]) -> None:
    """A description of a CLIP vision tower, before anything is built of it; ValueError or AttributeError when it is none."""
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
            f"{tower['hidden_size']} channels do not divide into {tower.get('num_attention_heads', 12)} heads"
        )
    if (
        tower["patch_size"] > tower["image_size"]
        or (tower["image_size"] // tower["patch_size"]) ** 2 > 1 << 16
    ):
        raise ValueError(
            f"a picture of {tower['image_size']} pixels has no patches of {tower['patch_size']}"
        )


class VisionTower(nn.Module):
    """CLIP's vision transformer up to its penultimate layer: what lies behind that is not held, so nothing is frozen."""

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
        self.model.embeddings.position_ids = torch.arange(tokens, device="cpu")[
            None
        ]  # no weight, so real on the meta device too

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
        self.to_k = nn.ModuleDict(
            {"_".join(map(str, b)): nn.Linear(w, c, bias=False) for b, c in config.layers}
        )
        self.to_v = nn.ModuleDict(
            {"_".join(map(str, b)): nn.Linear(w, c, bias=False) for b, c in config.layers}
        )

    def features(self, penultimate: Tensor) -> Tensor:
        """Penultimate tokens [b m d] -> F [b m w]."""
        return self.mlp(penultimate)

    def keys_values(self, features: Tensor) -> KeysValues:
        """F [b m w] -> (k, v) [b m c] of every layer."""
        names = {block: "_".join(map(str, block)) for block, _ in self.config.layers}
        return {
            block: (self.to_k[name](features), self.to_v[name](features))
            for block, name in names.items()
        }

    def forward(self, pixels: Tensor) -> KeysValues:
        """[b 3 size size] -> (k, v) [b m c] of every layer. ValueError without a tower."""
        if self.tower is None:
            raise ValueError(
                "This concept encoder holds no CLIP tower, so it reads penultimate tokens and not pictures: "
                "connect CLIP Vision to Concept Encoder Load."
            )
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
        weights = {
            name: value.detach().to("cpu", dtype).contiguous()
            for name, value in sorted(self.state_dict().items())
            if value.is_floating_point()
        }
        with whole(path, weights.values()) as partial:
            save_file(weights, partial, self.config.metadata())


def load_concept_encoder(path: Path, device: torch.device | str = "cpu") -> ConceptEncoder:
    """A Kindred concept encoder, or IP-Adapter full-face weights (merge "add", no tower), in float32.

    Raises ValueError that names the file, what is wrong and what to do: a pickle, a torn or foreign file, another version.
    """
    check_safetensors(path)
    try:
        with safe_open(path, "pt") as file:
            metadata, views = (
                file.metadata() or {},
                {name: file.get_slice(name) for name in file.keys()},
            )
            shapes, kinds = (
                {name: f(view) for name, view in views.items()}
                for f in (shape_of, lambda view: view.get_dtype())
            )
    except OSError as error:
        raise unread(path, error) from error
    except (SafetensorError, RuntimeError) as error:
        raise torn(path, error) from error
    if FORMAT in metadata:
        config, names = read_description(path, metadata[FORMAT]), {name: name for name in shapes}
    else:
        config, names = read_full_face(path, shapes)
    with torch.device("meta"):  # sizes alone: a file that lies about them gets no memory
        encoder = ConceptEncoder(config)
    expected = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    found = {own: shapes[theirs] for own, theirs in names.items()}
    if expected != found:
        name = next(
            n for n in sorted(expected.keys() | found.keys()) if expected.get(n) != found.get(n)
        )
        raise ValueError(
            f"{path.name}: {name:.80} is {str(found.get(name, 'missing')):.80}, but its description says "
            f"{expected.get(name, 'that there is none')}. Copy or download it again."
        )
    whole_numbers = next(
        (theirs for theirs in names.values() if kinds[theirs] not in ("F16", "BF16", "F32", "F64")),
        None,
    )
    if whole_numbers:
        raise ValueError(
            f"{path.name}: {whole_numbers} is stored as {kinds[whole_numbers]}. Use a file of 16 or 32 bit floats."
        )
    try:
        with safe_open(path, "pt") as file:
            weights = {
                own: file.get_tensor(theirs).to(device, torch.float32)
                for own, theirs in names.items()
            }
    except OSError as error:
        raise unread(path, error) from error
    except SafetensorError as error:
        raise torn(path, error) from error
    bad = next(
        (
            name
            for name, value in weights.items()
            if value.numel() and not (value.abs().max() <= GREATEST)
        ),
        None,
    )
    if bad:
        raise ValueError(
            f"{path.name}: {bad} holds NaN or infinite values, or some beyond {GREATEST:g}. Copy it again, or train with a "
            "lower learning rate."
        )
    encoder.load_state_dict(weights, assign=True)
    return encoder.to(device).eval().requires_grad_(False)


def shape_of(view: Any) -> tuple[int, ...]:
    """Of a tensor that still lies in its file."""
    return tuple(view.get_shape())


def read_description(path: Path, description: str) -> ConceptConfig:
    """The metadata's entry -> configuration; ValueError for a damaged one and for another version."""
    try:
        told = json.loads(description)
        version = number(told["version"], 1, 1 << 31, "version")
        config = ConceptConfig.read(told) if version == VERSION else None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path.name}: its description is damaged ({error!r:.200}). Copy or download it again."
        ) from error
    if config is None:
        raise ValueError(
            f"{path.name} is a concept encoder of format {version}, but this Kindred reads format {VERSION}. "
            "Update Kindred, or train the encoder again."
        )
    return config


def check_safetensors(path: Path) -> None:
    """Refuse what safetensors would misread or execute: ValueError for a pickle, an empty or cut file, a header that cannot be.

    OSError where the system does not give it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head, brace = file.read(8), file.read(1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unread(path, error) from error
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if brace == b"{" and 0 < length <= min(
        MOST_HEADER, size - 8
    ):  # a length may begin with a pickle's bytes too
        return
    if head[:2] == b"PK" or head[:1] == b"\x80":
        raise ValueError(
            f"{path.name} is a pickle (.bin, .pt, .ckpt), which can run programs when it is opened, so Kindred does not. "
            "Use the .safetensors form of it."
        )
    raise ValueError(
        f"{path.name} is torn or no .safetensors ({size} bytes). Copy or download it again."
    )


def read_full_face(
    path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[ConceptConfig, dict[str, str]]:
    """IP-Adapter full-face tensors -> configuration, and their names by ours; ValueError for any other file."""
    given = {name for name in shapes if name.startswith("image_proj.")}
    mlp = {f"image_proj.proj.{i}.{kind}" for i in (0, 2, 3) for kind in ("weight", "bias")}
    if given != mlp or not all(shapes[name] for name in mlp):
        raise ValueError(
            f"{path.name} is {kind_of(given)}. Choose a file that Concept Encoder Train or tools/train_concept_encoder.py "
            "made, or IP-Adapter full-face weights."
        )
    tower_width, width = (
        shapes["image_proj.proj.0.weight"][0],
        shapes["image_proj.proj.3.weight"][0],
    )
    family, stages = {
        768: ("SD15", SD_STAGES),
        1024: ("SD20", SD_STAGES),
        2048: ("SDXL", XL_STAGES),
    }.get(width, (None, {}))
    numbered: list[BlockId] = [
        (stage, i, d)
        for stage, blocks in stages.items()
        for i, depth in blocks.items()
        for d in range(depth)
    ]
    theirs = [f"ip_adapter.{2 * n + 1}.to_" for n in range(len(numbered))]
    layered = {name for name in shapes if name.startswith("ip_adapter.")}
    if family is None or layered != {f"{name}{half}_ip.weight" for name in theirs for half in "kv"}:
        raise ValueError(
            f"{path.name} is IP-Adapter full-face weights for a base model Kindred does not know: text width {width}, "
            f"{sum(n.endswith('to_k_ip.weight') for n in layered)} layers. Use weights for SD1.5 (768 and 16), SD2.x "
            "(1024 and 16) or SDXL (2048 and 70)."
        )
    names = {"mlp." + name.removeprefix("image_proj.proj."): name for name in mlp}
    for block, name in zip(numbered, theirs):
        own = "_".join(map(str, block))
        names[f"to_k.{own}.weight"], names[f"to_v.{own}.weight"] = (
            name + "k_ip.weight",
            name + "v_ip.weight",
        )
    channels = {
        block: math.prod(shapes[name + "k_ip.weight"][:1]) for block, name in zip(numbered, theirs)
    }
    if (
        tower_width > SIZES["hidden_size"][1] or max(channels.values()) > 65536
    ):  # an empty tensor may claim any size
        raise torn(
            path,
            ValueError(
                f"tokens of width {tower_width}, layers of {max(channels.values())} channels"
            ),
        )
    layers = sorted(channels.items(), key=lambda layer: (UNET_STAGES.index(layer[0][0]), layer[0]))
    config = ConceptConfig(
        family,
        tuple(layers),
        width,
        tower_width,
        merge=Merge.ADD,
        training={"source": "IP-Adapter full-face"},
    )
    return config, names


def kind_of(image_proj: set[str]) -> str:
    """What a file without a description of ours is, by the names of its image projection."""
    if "image_proj.proj.weight" in image_proj:
        kind = "IP-Adapter (the plain kind), which reads one token of a picture"
    elif any(name.startswith("image_proj.perceiver_resampler.") for name in image_proj):
        kind = "IP-Adapter FaceID Plus, which reads a face recognition model"
    elif "image_proj.latents" in image_proj:
        kind = "IP-Adapter Plus, which picks 16 tokens"
    elif "image_proj.proj.0.weight" in image_proj and "image_proj.norm.weight" in image_proj:
        kind = "IP-Adapter FaceID, which reads a face recognition model"
    else:
        kind = "IP-Adapter of an unknown kind" if image_proj else "no concept encoder"
    return kind + (" (only full-face has one token per patch)" if image_proj else "")


def check_layers(
    config: ConceptConfig, family: str, layers: Sequence[tuple[BlockId, int]], width: int, node: str
) -> None:
    """An encoder's layers against a UNet's, [(block, channels)] and the width of its text; ValueError names both."""
    own, given = dict(config.layers), dict(layers)
    if config.width != width or own != given:
        first = next((b for b in {**own, **given} if own.get(b) != given.get(b)), None)
        where = (
            first
            and f"; {block_name(first)} has {own.get(first, 'no')} channels there and {given.get(first, 'none')} here"
            or ""
        )
        raise ValueError(
            f"{node}: the concept encoder was trained for {config.family} ({len(own)} cross-attention layers, text width "
            f"{config.width}), but the model given is {family} ({len(given)} layers, text width {width}){where}. "
            f"Use an encoder trained for {family}, or a {config.family} checkpoint."
        )
