"""Laws of target masks in cross-attention: where concept tokens are read, and what is refused."""

from __future__ import annotations

from math import log

import pytest
import torch
from kindred.models.attention.parts import Merge
from kindred.models.network.call import AttnCall, Part
from kindred.models.subject.target import TargetMask
from small_attention import sdpa_attend
from small_cross_attention import (
    BLOCK,
    BOTH,
    COND,
    HEADS,
    UNCOND,
    B,
    C,
    N,
    Reads,
    attend,
    by_hand,
    close,
    cross_call,
    part,
    rows_of,
    tokens,
)
from torch import Tensor


def halves_of(latent: tuple[int, int] = (4, 6)) -> Tensor:
    """White on the left half: [1 y x]."""
    mask = torch.zeros(1, *latent)
    mask[..., : latent[1] // 2] = 1
    return mask


@BOTH
def test_a_target_mask_is_where(merge) -> None:
    """Bit for bit the plain call outside, and the unmasked one inside. Grid (2, 3): the middle column is half white, so black."""
    own, call = rows_of((UNCOND, COND)), cross_call(UNCOND, COND)
    inside = torch.tensor([True, False, False] * 2)
    read, plain = {COND: tokens(50), UNCOND: tokens(60)}, sdpa_attend(*own, HEADS)
    out = attend(call, own, Reads(read, merge, TargetMask(halves_of(), "Node")))
    assert torch.equal(out[:, ~inside], plain[:, ~inside])
    close(out[:, inside], attend(call, own, Reads(read, merge))[:, inside])
    assert (out - plain)[:, inside].abs().amax(-1).min() > 1e-4


@BOTH
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mask_of_one_colour(merge, value) -> None:
    own, call = rows_of((UNCOND, COND)), cross_call(UNCOND, COND)
    out = attend(
        call,
        own,
        Reads({COND: tokens(50)}, merge, TargetMask(torch.full((1, 8, 12), value), "Node")),
    )
    close(
        out,
        attend(call, own, Reads({COND: tokens(50)}, merge)) if value else sdpa_attend(*own, HEADS),
    )


def test_a_soft_mask_is_part_of_it() -> None:
    """query_mask in between: of the added attention, or of the step from plain to concatenated."""
    own, soft = part(COND), torch.full((1, 1, N), 0.25, dtype=torch.float64)
    for merge in Merge:
        plain, full = (
            sdpa_attend(*own, HEADS),
            attend(cross_call(COND), own, Reads({COND: tokens(50)}, merge)),
        )
        close(
            attend(cross_call(COND), own, Reads({COND: tokens(50)}, merge, soft)),
            plain + 0.25 * (full - plain),
        )


def test_masks_of_concat_and_add_overlap() -> None:
    """Two people: A left (concat), B right (add), both in the middle column; and a third everywhere."""
    left, right = (
        torch.zeros(1, 1, N, dtype=torch.float64),
        torch.zeros(1, 1, N, dtype=torch.float64),
    )
    left.view(2, 3)[:, :2], right.view(2, 3)[:, 1:] = 1, 1
    q, k, v = part(COND)
    a, b, c = tokens(50, 0.7), tokens(60, 2.0), tokens(70)
    out = attend(
        cross_call(COND),
        (q, k, v),
        Reads({COND: a}, Merge.CONCAT, left),
        Reads({COND: b}, Merge.ADD, right),
        Reads({COND: c}),
    )
    with_a = by_hand(q, (k, v, 0.0), (c.k, c.v, 0.0), (a.k, a.v, log(0.7)))[0]
    without = by_hand(q, (k, v, 0.0), (c.k, c.v, 0.0))[0]
    beside = 2.0 * by_hand(q, (b.k, b.v, 0.0))[0]
    column = torch.arange(N) % 3
    for x, expected in enumerate((with_a, with_a + beside, without + beside)):
        close(out[:, column == x], expected[:, column == x])


def test_a_target_mask_in_an_area_is_cut_with_it() -> None:
    """An area prompt is a crop of the latent, (height, width, y, x): its queries are those cells."""
    mask, q = torch.zeros(1, 4, 8), torch.zeros(3, 4, C)
    mask[0, :2, 4:] = 1
    areas = (2, 4, 0, 4), (2, 4, 2, 4), (4, 4, 0, 2)
    call = AttnCall(BLOCK, (2, 2), tuple(Part(COND, area) for area in areas), (4, 8), True)
    got = TargetMask(mask, "Node")(call, q)
    assert got.shape == (3, 1, 4) and got.tolist() == [
        [[1, 1, 1, 1]],
        [[0, 0, 0, 0]],
        [[0, 1, 0, 0]],
    ]


def test_a_target_mask_is_made_once_per_grid() -> None:
    target, q = (
        TargetMask(torch.stack((halves_of()[0], 1 - halves_of()[0])), "Node"),
        torch.zeros(2 * B, N, C, dtype=torch.float16),
    )
    call = cross_call(UNCOND, COND)
    first = target(call, q)
    assert first.shape == (2, B, N) and first.dtype == torch.float16 and target(call, q) is first
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0, 0], first[0, 1])
    other = target(
        AttnCall(BLOCK, (4, 6), (Part(UNCOND), Part(COND)), (4, 6), True),
        torch.zeros(2 * B, 24, C),
    )
    assert other.shape == (2, B, 24) and target(call, q) is first


def test_target_masks_that_cannot_be() -> None:
    target, call = (
        TargetMask(torch.ones(3, 4, 6), "Cross-Attn Detail Inject"),
        cross_call(UNCOND, COND),
    )
    with pytest.raises(
        ValueError, match="Cross-Attn Detail Inject: 3 target masks for 2 pictures. Wire one mask"
    ):
        target(call, torch.zeros(2 * B, N, C))
    with pytest.raises(ValueError, match="Cross-Attn Detail Inject: .*HyperTile.*Remove"):
        target(call, torch.zeros(2 * B, N // 2, C))
