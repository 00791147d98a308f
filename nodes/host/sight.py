"""What a concept encoder without a tower sees of a picture: the host's CLIP Vision, and SigLIP's
pooling head where an adapter reads through it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ...models.concept.config import ConceptConfig, Kind
from ...models.concept.siglip import PoolingHead, load_pooling_head

VISION = "clip_vision"  # the host's folder of towers
SIGLIP = "SigLIP so400m (patch 14, 384 pixels)"
TOWERS = {Kind.SHAKKER: SIGLIP, Kind.TIMED: SIGLIP, Kind.XLABS: "CLIP ViT-L"}


def vision_files() -> list[str]:
    return folder_paths.get_filename_list(VISION)


def pooling_head(name: str, vision: Any) -> PoolingHead:
    """SigLIP's pooling head from the file that the wired CLIP Vision was loaded from."""
    path = Path(folder_paths.get_full_path_or_raise(VISION, name))
    return load_pooling_head(
        path, vision.config["hidden_size"], vision.config["num_attention_heads"]
    )


def tower_of(config: ConceptConfig) -> str:
    """The tower that an encoder without one reads, in the user's words."""
    if config.adapter is not None:
        return TOWERS[config.adapter.kind]
    return "ViT-H" if config.tower_width == 1280 else "its"


def require_sight(config: ConceptConfig, vision: Any, file: str, node: str) -> None:
    """ValueError where an adapter's CLIP Vision is of another kind or width than it reads."""
    kind, width = config.adapter.kind, vision.config.get("hidden_size")
    wanted = "clip_vision_model" if kind is Kind.XLABS else "siglip_vision_model"
    if kind is Kind.XLABS:
        width = vision.config.get("projection_dim")
    if vision.model_type != wanted or width != config.tower_width:
        raise ValueError(
            f"{node}: {file} is an {kind.value} and reads {TOWERS[kind]}, {config.tower_width} "
            f"wide, but the CLIP Vision wired is a {vision.model_type}, {width} wide. Wire "
            f"{TOWERS[kind]} into clip_vision (Load CLIP Vision)."
        )


def sight(
    config: ConceptConfig, vision: Any, head: PoolingHead | None, image: Tensor | None
) -> Tensor:
    """What an encoder reads of a picture [Y X c]: tokens [1 n d], or one vector [1 d]; None: of no
    picture, which is one of zero pixels, and zero tokens for a timed adapter.
    """
    kind = config.adapter and config.adapter.kind
    last, penultimate, projected = _outputs(vision, image, crop=kind in (None, Kind.XLABS))
    if kind is Kind.XLABS:
        return projected
    if kind is Kind.SHAKKER:
        return head(last.float().cpu())
    return penultimate * 0 if kind is Kind.TIMED and image is None else penultimate


def _outputs(vision: Any, image: Tensor | None, crop: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The tower's last tokens, the penultimate ones and the projected vector."""
    if image is not None:
        seen = vision.encode_image(image[None], crop=crop)
        names = ("last_hidden_state", "penultimate_hidden_states", "image_embeds")
        last, penultimate, projected = (seen[name] for name in names)
        return last, penultimate, projected
    comfy.model_management.load_models_gpu([vision.patcher])
    size, device = vision.image_size, vision.load_device
    zeros = torch.zeros(1, 3, size, size, device=device)
    last, penultimate, projected = vision.model(pixel_values=zeros, intermediate_output=-2)[:3]
    return last, penultimate, projected
