"""IP-Adapter's full-face weights (arXiv 2308.06721) as a concept encoder: they have the
same form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..attention.parts import Merge
from ..files import torn
from ..network.blocks import UNET_STAGES, BlockId
from .config import ConceptConfig
from .tower import SIZES

# full-face files number their layers input, output, middle (arXiv 2308.06721's code), the middle
# last
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
FAMILIES = {768: ("SD15", SD_STAGES), 1024: ("SD20", SD_STAGES), 2048: ("SDXL", XL_STAGES)}


def read_full_face(
    path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[ConceptConfig, dict[str, str]]:
    """IP-Adapter full-face tensors -> configuration, and their names by ours; ValueError for any
    other file.
    """
    projection = {name for name in shapes if name.startswith("image_proj.")}
    mlp = {f"image_proj.proj.{i}.{kind}" for i in (0, 2, 3) for kind in ("weight", "bias")}
    if projection != mlp or not all(shapes[name] for name in mlp):
        raise ValueError(
            f"{path.name} is {kind_of(projection)}. Choose a file that Concept Encoder Train or "
            f"tools/workshop/train_concept_encoder.py "
            "made, or IP-Adapter full-face weights."
        )
    tower_width = shapes["image_proj.proj.0.weight"][0]
    width = shapes["image_proj.proj.3.weight"][0]
    family, stages = FAMILIES.get(width, (None, {}))
    theirs = {block: f"ip_adapter.{2 * n + 1}.to_" for n, block in enumerate(numbered(stages))}
    require_known_model(path, shapes, family, width, theirs.values())
    names = {"mlp." + name.removeprefix("image_proj.proj."): name for name in mlp}
    channels: dict[BlockId, int] = {}
    for block, name in theirs.items():
        own = "_".join(map(str, block))
        names[f"to_k.{own}.weight"] = name + "k_ip.weight"
        names[f"to_v.{own}.weight"] = name + "v_ip.weight"
        channels[block] = math.prod(shapes[name + "k_ip.weight"][:1])
    widest = max(channels.values())
    if tower_width > SIZES["hidden_size"][1] or widest > 65536:
        # an empty tensor may claim any size
        claim = f"tokens of width {tower_width}, layers of {widest} channels"
        raise torn(path, ValueError(claim))
    layers = sorted(channels.items(), key=lambda layer: (UNET_STAGES.index(layer[0][0]), layer[0]))
    source = {"source": "IP-Adapter full-face"}
    config = ConceptConfig(
        family, tuple(layers), width, tower_width, merge=Merge.ADD, training=source
    )
    return config, names


def require_known_model(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    family: str | None,
    width: int,
    layers: Iterable[str],
) -> None:
    """ValueError where the layers are not those of the family that this text width belongs to;
    layers: the beginnings of their names.
    """
    layered = {name for name in shapes if name.startswith("ip_adapter.")}
    wanted = {f"{name}{half}_ip.weight" for name in layers for half in "kv"}
    if family is None or layered != wanted:
        raise ValueError(
            f"{path.name} is IP-Adapter full-face weights for a base model Kindred does not know: "
            f"text width {width}, "
            f"{sum(n.endswith('to_k_ip.weight') for n in layered)} layers. Use weights for SD1.5 "
            f"(768 and 16), SD2.x "
            "(1024 and 16) or SDXL (2048 and 70)."
        )


def numbered(stages: Mapping[str, Mapping[int, int]]) -> list[BlockId]:
    """The cross-attention layers in the order of a full-face file; stages: per block how many it
    has.
    """
    layers: list[BlockId] = []
    for stage, blocks in stages.items():
        for i, depth in blocks.items():
            layers += [(stage, i, d) for d in range(depth)]
    return layers


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
