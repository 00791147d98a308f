"""A rotary code in small: positions of rows and columns behind a time axis, and what it does to keys by complex numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kindred.models.network.rope import Turn
from torch import Tensor

B, H, D, P, T = 2, 3, 8, 6, 4
AXES = (4, 2, 2)  # channels of each axis
PAIRINGS = pytest.mark.parametrize("halves", [False, True])
PRECISIONS = pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-12), (torch.float32, 3e-6)]
)
ALONG = (1.0, 0.0, 0.5)


def angles(positions: Tensor) -> Tensor:
    """[l a] -> [l d/2] in float64."""
    each = [
        positions[:, i, None].double() * 100.0 ** -(torch.arange(n // 2).double() / (n // 2))
        for i, n in enumerate(AXES)
    ]
    return torch.cat(each, -1)


def rotation(positions: Tensor) -> Tensor:
    a = angles(positions)
    return torch.stack((a.cos(), -a.sin(), a.sin(), a.cos()), -1).unflatten(-1, (2, 2))


def placed(x: Tensor, positions: Tensor, halves: bool) -> Tensor:
    """R(p) x by complex numbers, x [b l (h d)]: another way than the one that is tested."""
    heads = x.double().unflatten(-1, (H, D))
    real, imaginary = heads.chunk(2, -1) if halves else (heads[..., ::2], heads[..., 1::2])
    moved = (
        torch.complex(real, imaginary)
        * torch.polar(torch.ones(()).double(), angles(positions))[:, None]
    )
    back = (
        torch.cat((moved.real, moved.imag), -1)
        if halves
        else torch.stack((moved.real, moved.imag), -1).flatten(-2)
    )
    return back.flatten(-2).to(x.dtype)


def at(*first: float, count: int = P) -> Tensor:
    """Positions (t, y, x) of a row of tokens."""
    return (
        torch.tensor(first).double()
        + torch.arange(count).double()[:, None] * torch.tensor([0.0, 0.0, 1.0]).double()
    )


def turn(
    halves: bool,
    axes: tuple[float, ...] = ALONG,
    by: Callable[[Tensor], Tensor] = rotation,
    **laid: Any,
) -> Turn:
    return Turn(axes, by, halves, **laid)
