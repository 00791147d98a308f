"""Cross-attention in small: texts, tokens of pictures, an injection that reads them, and the softmax by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from kindred.models.attention.parts import Merge, References
from kindred.models.attention.references import ReferenceTokens
from kindred.models.attention.weights import WeightMode
from kindred.models.network.call import AttnCall, Part, Role
from kindred.models.network.sites import BlockSite
from kindred.models.run import Run
from kindred.models.subject.target import TargetMask
from small_attention import sdpa_attend
from torch import Tensor, nn

B, N, M, W, HEADS, C = (
    2,
    6,
    4,
    5,
    2,
    8,
)  # pictures, queries, tokens of a picture, words, heads, channels
BLOCK = ("middle", 0, 0)
COND, UNCOND, OTHER = Role.COND, Role.UNCOND, Role.OTHER
BOTH = pytest.mark.parametrize("merge", list(Merge))


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def split(x: Tensor) -> Tensor:
    """[b n (h d)] -> [b h n d]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def by_hand(q: Tensor, *keys: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor]:
    """Softmax over (k, v, log weight), each [b m c]: the output [b n c] and the probabilities [b h n m]."""
    d = C // HEADS
    logits = torch.cat(
        [split(q) @ split(k.expand(len(q), -1, -1)).mT / d**0.5 + bias for k, _, bias in keys], -1
    )
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    v = torch.cat([split(v.expand(len(q), -1, -1)) for _, v, _ in keys], 2)
    return (p @ v).transpose(1, 2).flatten(2), p


def tokens(
    seed: int,
    weight: float = 1.0,
    mode: WeightMode = WeightMode.LOGIT_BIAS,
    m: int = M,
    mask: Tensor | None = None,
):
    return ReferenceTokens(
        rand(1, m, C, seed=seed), rand(1, m, C, seed=seed + 1), weight, mode, mask
    )


class Reads:
    """An injection with fixed references, in cross-attention or in self-attention."""

    def __init__(
        self,
        by_role,
        merge: Merge = Merge.CONCAT,
        mask: Tensor | TargetMask | None = None,
        cross: bool = True,
    ) -> None:
        self.by_role, self.merge, self.mask, self.cross = by_role, merge, mask, cross

    node, wants = "a test", True

    def begin_step(self, sigma: float) -> None:
        pass

    def concerns(self, call: AttnCall) -> bool:
        return True

    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> list[References]:
        if call.cross is not self.cross:
            return []
        return [
            References(
                self.by_role,
                self.mask(call, q) if isinstance(self.mask, TargetMask) else self.mask,
                self.merge,
            )
        ]


def cross_call(
    *roles: Role, repeats: tuple = (), cross: bool = True, areas: tuple | None = None
) -> AttnCall:
    parts = tuple(map(Part, roles, areas or (None,) * len(roles)))
    return AttnCall(BLOCK, (2, 3), parts, (4, 6), cross, repeats)


def part(role: Role, rows: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """q [b n c], and the text's k v [b w c], of one part."""
    i = list(Role).index(role)
    return (
        rand(rows, N, C, seed=10 + i),
        rand(rows, W, C, seed=20 + i),
        rand(rows, W, C, seed=30 + i),
    )


def rows_of(roles: Sequence[Role]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(x) for x in zip(*(part(role) for role in roles)))


def attend(call: AttnCall, own: tuple[Tensor, ...], *active: Reads, kernel=sdpa_attend) -> Tensor:
    return Run(sites={BLOCK: BlockSite(nn.Identity(), 2)}, active=list(active)).attend(
        call, kernel, *own, HEADS
    )
