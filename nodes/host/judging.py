"""CLIP as a judge of pictures: the host's own towers, text encoders and projections into
one space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.sd1_clip import SDClipModel
from torch import Tensor

from .learning import progress

# times as long as wide: the tower enlarges the whole picture before it cuts its centre
LONGEST = 16
SIZES = {768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H", 1664: "ViT-bigG"}
# spread of a trained one's weights, generously; what was never loaded is zero or leftover memory
PROJECTION = (
    1e-3,
    0.5,
)


def tower_title(vision: Any) -> str:
    """A CLIP_VISION by its kind, size and pixels, such as "CLIP ViT-L, 224 px"."""
    width = vision.config.get("hidden_size", 0)
    kind = (
        f"CLIP {SIZES.get(width, f'of width {width}')}"
        if vision.model_type == "clip_vision_model"
        else vision.model_type
    )
    return f"{kind}, {vision.image_size} px"


def picture_embeddings(vision: Any, images: Sequence[Tensor], node: str) -> Tensor:
    """Pictures [Y X 3] in 0..1 -> float64 [b c]: the tower's projected picture vectors, in CLIP's
    common space where it has one.
    """
    rows, tell = [], progress(len(images))
    for done, image in enumerate(images):
        tell(done)
        most = LONGEST * min(image.shape[:2])
        top, left = (max(n - most, 0) // 2 for n in image.shape[:2])
        row = vision.encode_image(image[None, top : top + most, left : left + most])["image_embeds"]
        if row.ndim != 2:
            raise ValueError(
                f"{node}: {tower_title(vision)} gives {list(row.shape[1:])} numbers for a picture, "
                f"not one vector. Wire a "
                "CLIP Vision that has one, such as CLIP ViT-L or ViT-H, or DINOv2."
            )
        if not row.isfinite().all():
            raise ValueError(
                f"{node}: {tower_title(vision)} gave NaN or infinite values for picture {done + 1} "
                f"of {len(images)}. Start "
                "ComfyUI with --fp32-text-enc, or use another CLIP Vision."
            )
        rows.append(row.double().cpu())
    tell(len(images))
    return torch.cat(rows)


def text_towers(clip: Any) -> dict[int, tuple[str, SDClipModel]]:
    """The text encoders of a CLIP that reach a space shared with pictures: by that space's width,
    an encoder's name and itself.
    """
    towers: dict[int, tuple[str, SDClipModel]] = {}
    for name, part in clip.cond_stage_model.named_children():
        if isinstance(part, SDClipModel) and hasattr(part.transformer, "text_projection"):
            towers.setdefault(part.transformer.text_projection.weight.shape[0], (name, part))
    return towers


def text_embeddings(clip: Any, width: int, texts: Sequence[str], node: str) -> Tensor:
    """Texts -> float64 [b width]: projected vectors of that text encoder of a CLIP (SDXL has two)
    whose width fits the pictures'.

    Of a long text the first 77 tokens count, as in CLIP. ValueError where no encoder fits, or its
    projection was never loaded (checkpoints of SD1.5 leave it out).
    """
    model, towers = clip.cond_stage_model, text_towers(clip)
    if width not in towers:
        raise ValueError(
            f"{node}: the CLIP Vision gives pictures as {width} numbers, but the CLIP wired gives "
            f"texts as "
            f"{' or '.join(map(str, towers)) or 'no vector at all'}. The two must be halves of one "
            f"CLIP: 768 is "
            "ViT-L (clip_l, Load CLIP), 1024 ViT-H (SD2.x), 1280 ViT-bigG (SDXL). Or unwire clip."
        )
    name, tower = towers[width]
    weight = tower.transformer.text_projection.weight.detach().float()
    if not (weight.isfinite().all() and PROJECTION[0] < float(weight.std()) < PROJECTION[1]):
        raise ValueError(
            f"{node}: the CLIP wired holds no text projection (its spread is "
            f"{float(weight.std()):.3g}; a trained one's lies "
            f"between {PROJECTION[0]} and {PROJECTION[1]}). Checkpoints of SD1.5 leave it out: "
            f"wire Load CLIP with the whole "
            "text encoder, such as clip_l.safetensors. Or unwire clip."
        )
    rows, device = [], clip.patcher.load_device
    try:
        for text in texts:
            tokens = clip.tokenize(text)
            model.reset_clip_options()
            clip.load_model(tokens)
            tower.set_clip_options({"execution_device": device, "projected_pooled": True})
            with comfy.model_management.cuda_device_context(device):
                rows.append(
                    tower.encode_token_weights(tokens[name.removeprefix("clip_")])[1].double().cpu()
                )
    finally:
        model.reset_clip_options()
    return torch.cat(rows)
