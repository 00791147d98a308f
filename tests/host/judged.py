"""What the judges are shown, and the judges: pictures of known identities, noise, random CLIP models of the host's own classes."""

from __future__ import annotations

import math
from functools import cache

import comfy.clip_vision
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import torch
from kindred.miniature.world import held_out_identity, render
from kindred.nodes.comparison import ComparisonGrid
from studio import TOWER
from torch import Tensor

SCENES = ("beach", "snow", "forest", "night")


@cache
def world(*who: int, kind: str = "cat", seed: int = 7) -> Tensor:
    """IMAGE of these held-out identities, each in the next scene."""
    drawn = [
        render(held_out_identity(w), kind, SCENES[i % 4], seed + i).image for i, w in enumerate(who)
    ]
    return torch.stack([torch.tensor(image) for image in drawn]).float() / 255


def noise(pictures: int = 3, y: int = 40, x: int = 56, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(pictures, y, x, channels, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def grid(*batches: Tensor, **more) -> Tensor:
    return ComparisonGrid.execute(
        {f"image{i}": batch for i, batch in enumerate(batches)}, **more
    ).result[0]


def randomized(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        drawn = torch.randn(p.shape, generator=generator)
        p.data = (
            drawn / p[0].numel() ** 0.5
            if p.ndim > 1
            else torch.full(p.shape, float("weight" in name))
        )


@cache
def vision(**more) -> comfy.clip_vision.ClipVisionModel:
    """A random CLIP_VISION of the host's own class, 24 pixels, into a common space of 16 numbers unless told otherwise."""
    made = comfy.clip_vision.ClipVisionModel(TOWER | {"model_type": "clip_vision_model"} | more)
    randomized(made.model, 1)
    return made


@cache
def clip(width: int = 16, kind: str = "sd") -> comfy.sd.CLIP:
    """A random CLIP of the host's own classes: SD1.5's one encoder or SDXL's two, the second of 24 numbers."""

    def told(n: int) -> dict:
        return {
            "hidden_size": n,
            "intermediate_size": 2 * n,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        }

    target = comfy.supported_models_base.ClipTarget(
        *(
            (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
            if kind == "sd"
            else (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
        )
    )
    target.params["model_options"] = {
        "clip_l_model_config": told(width),
        "clip_g_model_config": told(24),
    }
    made = comfy.sd.CLIP(target, model_options=target.params["model_options"])
    randomized(made.cond_stage_model, 2)
    return made


def cosine(a: Tensor, b: Tensor) -> float:
    return float(
        torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)
    )


LINES = ("a cat", "a dog", "a cat")
PHOTOS = (noise(1, 30, 30, seed=5)[0], noise(1, 20, 44, seed=6)[0])


def nan_like(values: list[float]) -> bool:
    return all(map(math.isnan, values))


class Finder(torch.nn.Module):
    """A detector: a face is where the red is; the crop is the picture at 8 x 8."""

    def forward(self, picture: Tensor) -> Tensor | None:
        if picture[..., 0].mean() < 0.1:
            return None
        return torch.nn.functional.interpolate(picture.movedim(2, 0)[None], (8, 8), mode="area")[0]


class Embedder(torch.nn.Module):
    """An embedder of random weights; counts the faces that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(192, 5), 0
        randomized(self.layer, 4)

    def forward(self, faces: Tensor) -> Tensor:
        self.seen += len(faces)
        return self.layer(faces.flatten(1))


def without_a_face(picture: Tensor) -> Tensor:
    return picture * torch.tensor([0.0, 1.0, 1.0])
