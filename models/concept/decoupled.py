"""A concept read beside the softmax of a transformer's block: D (10) of docs/method.md 4.1.

The picture's queries, before any position is put on them, read keys and values of their own; what
they read is added to what the block's attention gives (decoupled cross-attention, arXiv
2308.06721). Text queries, and the rows of no half that reads, are not touched.
Axes: b rows of a call = parts x pictures, n the picture's queries, m concept tokens, h heads, d
head width; (h d) means heads not split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..attention.fused import Attend
from ..attention.parts import References
from ..network.blocks import BlockId
from ..network.call import AttnCall, Half, Halves, Role
from ..network.sites import BlockSite
from ..subject.target import TargetMask

NODE = "Cross-Attn Detail Inject"
KEYS_EPS = 1e-5  # of the norm that InstantX's FLUX adapter puts on keys and values


class Place(str, Enum):
    """Where what is read of a concept is added."""

    ATTENTION = "attention"  # to what the block's attention gives, before it is projected
    STREAM = "stream"  # to the picture's tokens, once the block is done (XLabs)


class Beside(Protocol):
    """What the picture's queries of one block read beside their own attention."""

    def read(self, attend: Attend, q: Tensor, own: tuple[Tensor, Tensor], heads: int) -> Tensor:
        """q [b n (h d)], the picture's own keys and values [b n (h d)] -> [b n (h d)]."""


@dataclass(frozen=True, eq=False)
class Decoupled:
    """Keys and values alone: Attn(q, K_c, V_c). k v [1|b m (h d)].

    normed: both are divided by the root mean square of each head, as InstantX's FLUX adapter does.
    """

    k: Tensor
    v: Tensor
    normed: bool = False

    def read(self, attend: Attend, q: Tensor, own: tuple[Tensor, Tensor], heads: int) -> Tensor:
        k, v = self.k, self.v
        if self.normed:
            k, v = (rms_normed(t, heads, KEYS_EPS) for t in (k, v))
        return attend(q, *(t.to(q).expand(len(q), -1, -1) for t in (k, v)), heads)


def rms_normed(x: Tensor, heads: int, eps: float, weight: Tensor | None = None) -> Tensor:
    """x [b l (h d)] over the root mean square of each head, times weight [d]; in float32."""
    apart = x.float().unflatten(-1, (heads, -1))
    apart = apart * torch.rsqrt(apart.square().mean(-1, keepdim=True) + eps)
    return (apart if weight is None else apart * weight.float()).flatten(-2).to(x)


# the tokens of each block, per half, at a noise level
TokensAt = Callable[[float], Mapping[Half, Mapping[BlockId, Beside]]]


@dataclass
class ActiveDecoupled:
    """A decoupled concept during one run, an ActiveInjection that is read beside every softmax and
    in none.
    """

    tokens_at: TokensAt
    window: tuple[float, ...]  # sigmas: from, until
    weight: float = 1.0  # W_C
    halves: Halves = Halves.BOTH
    place: Place = Place.ATTENTION
    target: TargetMask | None = None
    now: Mapping[Half, Mapping[BlockId, Beside]] = field(default_factory=dict)
    node: str = NODE
    nothing: ClassVar[tuple[References, ...]] = ()

    @property
    def wants(self) -> bool:
        return bool(self.now)

    def concerns(self, call: AttnCall) -> bool:
        return False

    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> Iterable[References]:
        return self.nothing

    def begin_step(self, sigma: float) -> None:
        inside = self.window[1] <= sigma <= self.window[0]
        self.now = self.tokens_at(sigma) if inside else {}

    def reads(self, block: BlockId) -> bool:
        """Whether the picture of a block reads it at this step."""
        return any(block in blocks for blocks in self.now.values())

    def added(
        self, call: AttnCall, q: Tensor, own: tuple[Tensor, Tensor], heads: int, attend: Attend
    ) -> Tensor | None:
        """What the queries q [b n (h d)] of a call have added, W_C Attn(q, K_c, V_c) ->
        [b n (h d)]; None where no part of it reads.

        own: the picture's own keys and values [b n (h d)]. Parts that do not read have 0 added.
        """
        by_part = [self._of(role, call.block) for role in call.roles]
        if not any(by_part):
            return None
        mask = self.target(call, q) if self.target else None
        parts = zip(by_part, call.parts(q), *map(call.parts, own))
        read = [
            torch.zeros_like(part) if tokens is None else tokens.read(attend, part, (k, v), heads)
            for tokens, part, k, v in parts
        ]
        answer = torch.cat(read) * self.weight
        return answer if mask is None else answer * _by_row(mask, len(q)).to(answer)[..., None]

    def _of(self, role: Role, block: BlockId) -> Beside | None:
        """What the rows of a role read in a block."""
        half = role.half and self.halves.source(role.half)
        return self.now.get(half, {}).get(block) if half else None


def _by_row(mask: Tensor, rows: int) -> Tensor:
    """A target mask [parts 1|b n] -> [rows n]."""
    return mask.expand(-1, rows // len(mask), -1).flatten(0, 1)
