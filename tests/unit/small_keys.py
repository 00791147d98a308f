"""Keys of models in small: as many weights as a real one carries."""

from __future__ import annotations

import torch
from kindred.models.identity import ModelKey, Parts, Sketch, cells, held_as
from torch import Tensor


def weights(seed: int = 0, n: int = 2048, spread: float = 0.03) -> Tensor:
    return spread * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def sketch(values: Tensor, digest: str = "shapes", layers: int = 0) -> Sketch:
    """As of 64 tensors."""
    kept = [cells(part.float(), held_as(part.float(), part.dtype)) for part in values.split(32)]
    return Sketch(digest, torch.cat(kept, 1), layers)


def key(
    own: Tensor,
    name: str = "SD15 0a",
    lora: Tensor | None = None,
    sampling: str = "EPS",
    modules: tuple[str, ...] = (),
) -> ModelKey:
    patches = Sketch("", torch.zeros(2, 0)) if lora is None else sketch(lora, "lora", 3)
    return ModelKey(name, Parts(sketch(own), patches, sampling, modules))
