"""Tokens, masks and orders of them from a seed: what the laws of the correspondence are said in."""

from __future__ import annotations

import torch
from torch import Tensor


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def some(*shape: int, seed: int, share: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def everywhere(b: int, n: int) -> Tensor:
    return torch.ones(b, n, dtype=torch.bool)


def all_of(sources: Tensor) -> Tensor:
    return torch.arange(sources.shape[0] * sources.shape[1])
