"""A concept beside a transformer's softmax, D (10): what is added, to whose rows, and when."""

from __future__ import annotations

import math

import pytest
import torch
from kindred.models.concept.decoupled import KEYS_EPS, ActiveDecoupled, Decoupled
from kindred.models.network.call import AttnCall, Half, Halves, Joint, Part, Role
from kindred.models.subject.target import TargetMask
from small_attention import sdpa_attend
from torch import Tensor

PICTURES, GRID, M, HEADS, D = 2, (2, 3), 4, 2, 5
N, C = GRID[0] * GRID[1], HEADS * D
BLOCK, OTHER_BLOCK = ("double", 0, 0), ("single", 3, 0)
ROLES = (Role.UNCOND, Role.COND, Role.OTHER)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attn(q, k, v) of one row [n c], head by head."""
    heads = []
    for h in range(HEADS):
        own = slice(h * D, (h + 1) * D)
        shares = (q[:, own] @ k[:, own].T / math.sqrt(D)).exp()
        heads.append(shares / shares.sum(1, keepdim=True) @ v[:, own])
    return torch.cat(heads, 1)


def call() -> AttnCall:
    parts = tuple(Part(role) for role in ROLES)
    return AttnCall(BLOCK, GRID, parts, GRID, joint=Joint(slice(0, N)))


TOKENS = {
    half: (rand(1, M, C, seed=seed), rand(1, M, C, seed=seed + 1))
    for half, seed in ((Half.COND, 2), (Half.UNCOND, 4))
}
Q = rand(len(ROLES) * PICTURES, N, C, seed=1)
OWN = (rand(*Q.shape, seed=7), rand(*Q.shape, seed=8))


def active(
    halves: Halves, target: TargetMask | None = None, normed: bool = False
) -> ActiveDecoupled:
    now = {half: {BLOCK: Decoupled(k, v, normed)} for half, (k, v) in TOKENS.items()}
    return ActiveDecoupled(lambda s: now, (0.9, 0.2), 0.7, halves, target=target, now=now)


@pytest.mark.parametrize("halves", list(Halves))
def test_each_part_reads_its_halfs_tokens_and_all_others_have_nothing_added(halves) -> None:
    added = active(halves).added(call(), Q, OWN, HEADS, sdpa_attend)
    for part, role in enumerate(ROLES):
        source = role.half and halves.source(role.half)
        for row in range(part * PICTURES, (part + 1) * PICTURES):
            if source is None:
                assert not added[row].any()
            else:
                k, v = (t[0] for t in TOKENS[source])
                torch.testing.assert_close(added[row], 0.7 * by_hand(Q[row], k, v))


def test_only_the_target_mask_reads() -> None:
    mask = torch.zeros(1, *GRID)
    mask[0, 1] = 1.0
    whole = active(Halves.BOTH).added(call(), Q, OWN, HEADS, sdpa_attend)
    part = active(Halves.BOTH, TargetMask(mask, "test")).added(call(), Q, OWN, HEADS, sdpa_attend)
    assert not part[:, : GRID[1]].any()
    assert torch.equal(part[:, GRID[1] :], whole[:, GRID[1] :]) and whole[:, : GRID[1]].any()


def test_keys_and_values_may_be_normed_head_by_head() -> None:
    added = active(Halves.COND, normed=True).added(call(), Q, OWN, HEADS, sdpa_attend)
    k, v = (
        (t / (t.square().mean(-1, keepdim=True) + KEYS_EPS).sqrt()).flatten(-2)
        for t in (t[0].unflatten(-1, (HEADS, D)) for t in TOKENS[Half.COND])
    )
    row = ROLES.index(Role.COND) * PICTURES
    torch.testing.assert_close(added[row], 0.7 * by_hand(Q[row], k, v), atol=1e-6, rtol=1e-6)


def test_it_is_read_within_its_window_and_in_its_blocks() -> None:
    one = active(Halves.BOTH)
    for sigma, inside in ((0.95, False), (0.9, True), (0.2, True), (0.1, False)):
        one.begin_step(sigma)
        assert one.wants is inside and one.reads(BLOCK) is inside
        assert not one.reads(OTHER_BLOCK)
    assert one.added(call(), Q, OWN, HEADS, sdpa_attend) is None
