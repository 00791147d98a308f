"""Keys that are kept without positions, of a code whose two channels of a pair turn by angles of their own."""

from __future__ import annotations

import pytest
import torch
from kindred.models.network.rope import Turn, turned
from kindred.models.network.unplaced import placed
from small_attention import rand
from torch import Tensor

B, H, D, P = 2, 3, 8, 6
PRECISIONS = pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-12), (torch.float32, 3e-6)]
)


def angles(seed: int) -> Tensor:
    """[l d/2] in float64."""
    return 3 * rand(P, D // 2, seed=seed, dtype=torch.float64)


def matrices(upper: Tensor, lower: Tensor) -> Tensor:
    """[l d/2 2 2]: the first channel of a pair by one angle, the second by another."""
    parts = upper.cos(), -upper.sin(), lower.sin(), lower.cos()
    return torch.stack(parts, -1).unflatten(-1, (2, 2))


def by_sums(k: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """The same as a sum of two products, for k [b l (h d)]: another way than the one that is tested."""
    first, second = k.double().unflatten(-1, (H, D)).chunk(2, -1)
    upper, lower = upper[:, None], lower[:, None]
    one = first * upper.cos() - second * upper.sin()
    other = first * lower.sin() + second * lower.cos()
    return torch.cat((one, other), -1).flatten(-2).to(k.dtype)


@PRECISIONS
def test_each_key_is_placed_by_its_own_matrix(dtype, bound) -> None:
    k, upper, lower = rand(B, P, H * D, seed=1, dtype=dtype), angles(2), angles(3)
    found = placed(k, matrices(upper, lower))
    assert found.dtype is dtype and (found - by_sums(k, upper, lower)).abs().max() <= bound


@PRECISIONS
def test_where_both_angles_are_one_it_is_turning(dtype, bound) -> None:
    k, by = rand(B, P, H * D, seed=1, dtype=dtype), angles(2)[:1]
    turn = Turn((1.0,), lambda positions: matrices(by, by), halves=True)
    same = placed(k, matrices(by, by).expand(P, -1, -1, -1))
    assert (same - turned(k, turn, 1.0)).abs().max() <= bound


def test_no_turn_leads_from_one_place_to_another() -> None:
    """Why keys are kept before: the map between two places is another one for every token, and sometimes none."""
    one, other = matrices(angles(2), angles(3)), matrices(angles(2) + 0.5, angles(3) + 0.25)
    between = other @ torch.linalg.inv(one)
    assert (between - between[:1]).abs().max() > 0.1
    upper, lower = torch.zeros(P, D // 2), torch.full((P, D // 2), torch.pi / 2)
    assert torch.linalg.det(matrices(upper, lower)).abs().max() < 1e-6


def test_channels_that_are_no_whole_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="keys of 20 channels are no whole number of heads of 8"):
        placed(torch.zeros(1, P, 20), matrices(angles(2), angles(3)))
