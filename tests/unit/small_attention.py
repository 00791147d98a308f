"""Attention in small and written out: queries, keys and values from a seed, and what was asked of an attention."""

from __future__ import annotations

import torch
from kindred.models.attention.attend import ReferenceTokens, WeightMode, sdpa_attend
from torch import Tensor

B, H, N, M, D = 2, 3, 10, 7, 5
C = H * D
MODES = tuple(WeightMode)
TIGHT = {"rtol": 0.0, "atol": 1e-12}


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def split(x: Tensor, heads: int = H) -> Tensor:
    """[b n (h d)] -> [b h n d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """The reference softmax, written out: [b h n m]."""
    return torch.softmax(split(q) @ split(k).transpose(-1, -2) / D**0.5, -1)


def read(p: Tensor, v: Tensor) -> Tensor:
    return (p @ split(v)).transpose(1, 2).flatten(2)


class Recorder:
    """An attend that keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
    ) -> Tensor:
        self.calls.append((q, k, v, mask))
        return sdpa_attend(q, k, v, heads, mask)


def chain(weights: dict[WeightMode, float]) -> list[ReferenceTokens]:
    return [
        ReferenceTokens(
            rand(1, 3 + i, C, seed=20 + i), rand(1, 3 + i, C, seed=30 + i), weight, mode
        )
        for i, (mode, weight) in enumerate(weights.items())
    ]
