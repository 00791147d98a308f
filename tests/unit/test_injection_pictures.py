"""Laws of references that only some pictures of a call read: the split is the pictures one by one (models/attention/engine.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kindred.models.attention.parts import Merge, References
from kindred.models.attention.references import ReferenceTokens
from kindred.models.attention.weights import WeightMode
from kindred.models.network.call import AttnCall, Part, Role
from kindred.models.network.sites import BlockSite
from kindred.models.run import Run
from small_attention import sdpa_attend
from torch import Tensor, nn

B, N, M, HEADS, C = 4, 6, 5, 2, 8
BLOCK = ("middle", 0, 0)
ROLES = (Role.UNCOND, Role.COND, Role.OTHER)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(rows: int = 1, seed: int = 50, m: int = M, **given) -> ReferenceTokens:
    return ReferenceTokens(rand(rows, m, C, seed=seed), rand(rows, m, C, seed=seed + 1), **given)


@dataclass
class Reads:
    given: list[References]

    node, wants = "a test", True

    def begin_step(self, sigma: float) -> None:
        pass

    def concerns(self, call: AttnCall) -> bool:
        return True

    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> list[References]:
        return self.given


def call(repeats: tuple[tuple[int, ...], ...] = ()) -> AttnCall:
    return AttnCall(BLOCK, (2, 3), tuple(map(Part, ROLES)), (4, 6), repeats=repeats)


def own() -> list[Tensor]:
    return [rand(3 * B, N, C, seed=i) for i in range(3)]


def attend(
    given: list[References],
    qkv: list[Tensor],
    repeats: tuple[tuple[int, ...], ...] = (),
    kernel=sdpa_attend,
) -> Tensor:
    return Run(sites={BLOCK: BlockSite(nn.Identity(), 2)}, active=[Reads(given)]).attend(
        call(repeats), kernel, *qkv, HEADS
    )


def one(x: Tensor | float | None, i: int) -> Tensor | float | None:
    """What picture i of B has: its row, or what all share."""
    return x[i : i + 1] if isinstance(x, Tensor) and x.ndim and x.shape[0] == B else x


def alone(
    given: list[References], qkv: list[Tensor], i: int, repeats: tuple[tuple[int, ...], ...]
) -> Tensor:
    """Picture i of every part, called by itself -> [parts n c]."""
    reads = []
    for r in given:
        if r.pictures is not None and not r.pictures[0] <= i < r.pictures[1]:
            continue

        def of(t: ReferenceTokens) -> ReferenceTokens:
            mask = t.log_mask if t.log_mask is None or t.log_mask.ndim == 1 else one(t.log_mask, i)
            return (
                t
                if r.pictures
                else replace(
                    t, k=one(t.k, i), v=one(t.v, i), weight=one(t.weight, i), log_mask=mask
                )
            )

        seen = (
            r.query_mask
            if r.query_mask is None or r.query_mask.shape[1] == 1
            else r.query_mask[:, i : i + 1]
        )
        reads.append(
            replace(
                r,
                by_role={k: of(t) for k, t in r.by_role.items()},
                by_part={k: of(t) for k, t in r.by_part.items()},
                query_mask=seen,
                pictures=None,
            )
        )
    rows = [x.unflatten(0, (3, B))[:, i] for x in qkv]
    return attend(reads, rows, tuple((part[i % len(part)],) for part in repeats))


STORY = [
    References({}, by_part={0: tokens(seed=10), 1: tokens(seed=20)}, pictures=(0, 1)),
    References(
        {},
        by_part={0: tokens(seed=30, m=3, weight=2.0), 1: tokens(seed=40, m=3, weight=2.0)},
        pictures=(2, 4),
    ),
]
MASKS = (torch.rand((3, B, N), generator=torch.Generator().manual_seed(7)) < 0.5).double()
BESIDE = {
    "nothing": [],
    "shared": [References({Role.COND: tokens()})],
    "rows": [References({Role.COND: tokens(B), Role.UNCOND: tokens(B, 60)})],
    "a mask": [References({Role.COND: tokens()}, MASKS[:, :1])],
    "masks": [References({Role.COND: tokens(B)}, MASKS)],
    "log mask": [References({Role.COND: tokens(log_mask=rand(M, seed=8))})],
    "log mask of as many tokens as pictures": [
        References({Role.COND: tokens(m=B, log_mask=rand(B, seed=8))})
    ],
    "log mask row": [References({Role.COND: tokens(log_mask=rand(1, M, seed=8))})],
    "log masks": [References({Role.COND: tokens(log_mask=rand(B, M, seed=8))})],
    "a weight": [References({Role.COND: tokens(weight=2.0, mode=WeightMode.KEY_SCALE)})],
    "added": [References({Role.COND: tokens(B, weight=0.7)}, merge=Merge.ADD)],
    "parts": [References({Role.COND: tokens()}, by_part={0: tokens(B, 70), 1: tokens(B, 80)})],
    "two": [
        References({Role.COND: tokens(B)}, MASKS),
        References({Role.COND: tokens(seed=60), Role.UNCOND: tokens(seed=60)}),
    ],
}


@pytest.mark.parametrize(
    "repeats",
    [(), ((1,), (2,), (1,)), ((1, 3), (2, 1, 1, 4), (1,))],
    ids=["once", "repeated", "by row"],
)
@pytest.mark.parametrize("beside", BESIDE)
def test_the_split_is_the_pictures_one_by_one(beside, repeats) -> None:
    """With a second, ordinary reference beside those of the pictures; in whichever order."""
    qkv, given = own(), [*STORY, *BESIDE[beside]]
    for order in (given, given[::-1]):
        out = attend(order, qkv, repeats).unflatten(0, (3, B))
        for i in range(B):
            torch.testing.assert_close(out[:, i], alone(order, qkv, i, repeats), rtol=0, atol=1e-12)


def test_pictures_and_parts_that_read_nothing_keep_every_bit() -> None:
    qkv = own()
    out, plain = (x.unflatten(0, (3, B)) for x in (attend(STORY, qkv), sdpa_attend(*qkv, HEADS)))
    assert torch.equal(out[2], plain[2]) and torch.equal(out[:, 1], plain[:, 1])
    assert all(
        (out[part, i] - plain[part, i]).abs().max() > 1e-3 for part in (0, 1) for i in (0, 2, 3)
    )


def test_neighbours_that_read_the_same_share_a_call() -> None:
    sizes = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        sizes.append((len(q), k.shape[1]))
        return sdpa_attend(q, k, v, heads, mask)

    attend(STORY, own(), kernel=kernel)
    assert sorted(sizes) == sorted([(2, N + M), (1, N), (3, N), (4, N + 3), (2, N)])
    sizes.clear()
    attend([replace(STORY[0], pictures=(0, B))], own(), kernel=kernel)
    assert sorted(sizes) == [(B, N), (2 * B, N + M)]


def test_overlapping_ranges_of_two_injections() -> None:
    """Each is read where it is meant to be, and both where they meet."""
    qkv, given = own(), [replace(STORY[0], pictures=(0, 3)), replace(STORY[1], pictures=(1, 4))]
    out = attend(given, qkv).unflatten(0, (3, B))
    for i in range(B):
        torch.testing.assert_close(out[:, i], alone(given, qkv, i, ()), rtol=0, atol=1e-12)


def test_a_part_reads_what_is_its_own_before_what_is_its_roles() -> None:
    mine, roles = tokens(seed=10), tokens(seed=20)
    reads = References({Role.COND: roles, Role.UNCOND: roles}, by_part={1: mine})
    assert [reads.read_by(call(), part) for part in range(3)] == [roles, mine, None]
