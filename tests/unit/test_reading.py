"""Laws of what an attention call reads beside its own keys: louder or quieter, and cut to some of the pictures."""

from __future__ import annotations

from math import log

import pytest
import torch
from kindred.models.attention.attend import (
    ReferenceTokens,
    WeightMode,
    attend_with_references,
    sdpa_attend,
)
from kindred.models.attention.parts import Merge, References, quieter
from kindred.models.injection import Role
from small_attention import TIGHT, B, C, H, M, rand

SOFT = (WeightMode.LOGIT_BIAS, WeightMode.POST_SOFTMAX, WeightMode.KEY_SCALE)
KEYS, VALUES = rand(1, M, C, seed=4), rand(1, M, C, seed=5)


@pytest.mark.parametrize("mode", SOFT)
@pytest.mark.parametrize("masked", [False, True])
def test_a_quarter_of_the_own_keys_leaves_a_references_share(
    mode: WeightMode, masked: bool
) -> None:
    """Own tokens that are all alike, all of them or a quarter: the same picture, with and without a mask of the reference's own."""
    q, own = rand(B, 8, C, seed=1), rand(B, 1, C, seed=2)
    mask = torch.linspace(-1, 0.5, M, dtype=torch.float64) if masked else None
    tokens = ReferenceTokens(KEYS, VALUES, 1.7, mode, mask)
    whole, less = own.expand(-1, 8, -1), own.expand(-1, 2, -1)
    meant = attend_with_references(sdpa_attend, q, whole, whole, [tokens], H)
    found = attend_with_references(sdpa_attend, q, less, less, [quieter(tokens, 2 / 8)], H)
    torch.testing.assert_close(
        found, meant, rtol=0, atol=1e-6
    )  # the log of a share is kept in float32


def test_what_is_added_beside_the_softmax_is_as_loud_as_ever() -> None:
    tokens = ReferenceTokens(KEYS, VALUES, 1.7)
    added = References({Role.COND: tokens}, merge=Merge.ADD)
    assert added.quieter(0.25) is added
    soft = References(
        {Role.COND: tokens, Role.UNCOND: tokens}, by_part={1: tokens}, by_row=tokens
    ).quieter(0.25)
    made = soft.by_role[Role.COND]
    assert made.weight == 1.7 * 0.25 and made.k is tokens.k
    assert (
        soft.by_role[Role.UNCOND] is soft.by_part[1] is soft.by_row is made
    )  # one tensor on the device, read by all


def test_some_of_the_pictures_read_what_is_theirs() -> None:
    """Tokens, weights, masks of a row each are cut; what all rows share stays one."""
    rows = 4
    keys, weight = rand(rows, M, C, seed=6), torch.arange(1.0, rows + 1)
    row_mask, one_mask = rand(rows, M, seed=7), torch.full((M,), log(2))
    own = ReferenceTokens(keys, keys + 1, weight, log_mask=row_mask)
    shared = ReferenceTokens(KEYS, VALUES, 2.0, log_mask=one_mask)
    region = rand(2, rows, 6, seed=8)
    found = References({Role.COND: own, Role.UNCOND: shared}, region).cut(1, 3, rows)
    cut, kept = found.by_role[Role.COND], found.by_role[Role.UNCOND]
    for had, have in (
        (keys, cut.k),
        (keys + 1, cut.v),
        (weight, cut.weight),
        (row_mask, cut.log_mask),
    ):
        torch.testing.assert_close(have, had[1:3], **TIGHT)
    assert kept.k is KEYS and kept.v is VALUES and kept.weight == 2.0 and kept.log_mask is one_mask
    assert torch.equal(found.query_mask, region[:, 1:3]) and found.pictures is None
    one = rand(2, 1, 6, seed=9)
    assert References({Role.COND: own}, one).cut(1, 3, rows).query_mask is one
    alone = References({Role.COND: own}, pictures=(1, 3)).cut(
        1, 3, rows
    )  # made for these pictures alone
    assert alone.by_role[Role.COND] is own and alone.pictures is None


@pytest.mark.parametrize(
    "first, last, covered",
    [(1, 3, True), (2, 3, True), (0, 3, False), (1, 4, False), (2, 4, False)],
)
def test_a_groups_references_are_read_by_its_pictures(first: int, last: int, covered: bool) -> None:
    assert References({}, pictures=(1, 3)).covers(first, last) is covered
    assert References({}).covers(first, last)
