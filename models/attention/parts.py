"""What the parts of an attention call read, and how it joins what they read anyway (method.md
section 4).

Axes: b rows of a call = parts x pictures, n query tokens, m reference tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import combinations
from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .fused import Attend
from .joint import PictureReader, TextShare
from .references import ReferenceTokens, attend_with_references, blend_queries
from .sharing import Sharing
from .weights import WeightMode

if TYPE_CHECKING:
    from ..network.call import AttnCall, Role


# How a call reads references: attend_with_references, or in a joint softmax a PictureReader
# (attend, q, k, v, references, heads)
Read = Callable[[Attend, Tensor, Tensor, Tensor, Sequence[ReferenceTokens], int], Tensor]


class Merge(str, Enum):
    """How references join what the attention reads anyway (method.md 2.2 eq. 7-9, I42)."""

    CONCAT = "concat"  # one softmax over both: paper A
    # W times an attention of their own, added: decoupled cross-attention, arXiv 2308.06721
    ADD = "add"


@dataclass(frozen=True)
class References:
    """What one injection adds to an attention call: tokens per role (k v [1|rows m c]) and who may
    look at them.
    """

    by_role: Mapping[Role, ReferenceTokens]
    query_mask: Tensor | None = None  # [parts 1|b n] in 0..1, 1 = may look
    merge: Merge = Merge.CONCAT
    # for parts of one role that read different tokens
    by_part: Mapping[int, ReferenceTokens] = field(default_factory=dict)
    # only the pictures first <= i < last of every part read them; None: all
    pictures: tuple[int, int] | None = None
    # those of by_role in its order, as the rows of one tensor
    by_row: ReferenceTokens | None = None

    def read_by(self, call: AttnCall, part: int) -> ReferenceTokens | None:
        return self.by_part.get(part) or self.by_role.get(call.texts[part].role)

    def covers(self, first: int, last: int) -> bool:
        return self.pictures is None or self.pictures[0] <= first and last <= self.pictures[1]

    def quieter(self, share: float) -> References:
        """The same where a query sees only this share of its own keys; what is added beside the
        softmax is as loud as ever.
        """
        if self.merge is Merge.ADD:
            return self
        copies: dict[int, ReferenceTokens] = {}  # roles that share their tokens go on sharing them

        def of(t: ReferenceTokens) -> ReferenceTokens:
            return copies.setdefault(id(t), quieter(t, share))

        return replace(
            self,
            by_role={k: of(t) for k, t in self.by_role.items()},
            by_part={k: of(t) for k, t in self.by_part.items()},
            by_row=self.by_row and of(self.by_row),
        )

    def cut(self, first: int, last: int, rows: int) -> References:
        """What the pictures first <= i < last of `rows` read; tokens that all rows share stay as
        they are.
        """
        copies: dict[int, ReferenceTokens] = {}  # roles that share their tokens go on sharing them

        def of(t: ReferenceTokens) -> ReferenceTokens:
            if id(t) not in copies:
                # else made for these pictures alone
                copies[id(t)] = t if self.pictures is not None else row_of(t)
            return copies[id(t)]

        def row_of(t: ReferenceTokens) -> ReferenceTokens:
            def some(x: Tensor) -> Tensor:
                return x[first:last] if x.shape[0] == rows > 1 else x

            log_mask = t.log_mask
            if log_mask is not None and log_mask.ndim > 1:
                log_mask = some(log_mask)
            return replace(t, k=some(t.k), v=some(t.v), log_mask=log_mask)

        mask = self.query_mask
        if mask is not None and mask.shape[1] == rows > 1:
            mask = mask[:, first:last]
        return replace(
            self,
            by_role={k: of(t) for k, t in self.by_role.items()},
            by_part={k: of(t) for k, t in self.by_part.items()},
            query_mask=mask,
            pictures=None,
        )


def quieter(tokens: ReferenceTokens, share: float) -> ReferenceTokens:
    """Tokens whose share of the softmax is as large beside `share` of the own tokens as it was
    beside all of them: log `share` more.
    """
    if tokens.mode is WeightMode.LOGIT_BIAS:
        return replace(tokens, weight=tokens.weight * share)
    less = tokens.k.new_full((tokens.k.shape[1],), log(share), dtype=torch.float32)
    return replace(tokens, log_mask=less if tokens.log_mask is None else tokens.log_mask + less)


def attend_sharing(
    call: AttnCall, attend: Attend, q: Tensor, k: Tensor, v: Tensor, heads: int, sharing: Sharing
) -> Tensor:
    """Attention where a story alone is read; parts that do not share stay the host's own."""
    shared = sharing.attend(attend, [take_parts(call, t, sharing.parts) for t in (q, k, v)], heads)
    alone = [p for p in range(len(call.texts)) if p not in sharing.parts]
    plain = (
        attend(*(take_parts(call, t, alone) for t in (q, k, v)), heads).chunk(len(alone))
        if alone
        else ()
    )
    of_part = dict(zip(sharing.parts, shared)) | {part: [out] for part, out in zip(alone, plain)}
    return torch.cat([piece for part in range(len(call.texts)) for piece in of_part[part]])


def beside_others(sharing: Sharing, call: AttnCall, k: Tensor, v: Tensor) -> list[References]:
    """The same where other injections or a text are read too, k v [b m c] -> one per group of
    pictures.
    """
    k, v = call.of_picture(k), call.of_picture(v)
    by_part = {i: dict(sharing.tokens(call.parts(k)[i], call.parts(v)[i])) for i in sharing.parts}
    groups = next(iter(by_part.values()))
    return [
        References({}, by_part={i: tokens[who] for i, tokens in by_part.items()}, pictures=who)
        for who in groups
    ]


def reader(call: AttnCall, parts: Sequence[int], references: Sequence[References]) -> Read:
    """How the listed parts of a call read references: beside all keys, or in a joint softmax beside
    the picture's.
    """
    if call.joint is None:
        return attend_with_references
    return PictureReader(call.joint.picture, TextShare.KEPT, call.joint.mask).of(
        lambda rows: take_parts(call, rows, parts)
    )


def attend_group(
    call: AttnCall,
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    references: Sequence[References],
    parts: Sequence[int],
    read: Read = attend_with_references,
) -> Tensor:
    """Attention of the listed parts, q [b n c], k v [b m c], all of which read all of `references`
    -> [b n c].
    """
    rows = q.shape[0] // len(parts)
    joined = [(gather_parts(r, call, parts, rows), _region(r, parts, rows), r) for r in references]
    concat = [(tokens, mask) for tokens, mask, r in joined if r.merge is Merge.CONCAT]
    free = [tokens for tokens, mask in concat if mask is None]
    masked = [(tokens, mask) for tokens, mask in concat if mask is not None]
    mixed = read(attend, q, k, v, free, heads)
    # where target masks overlap, a query reads all of their references
    for size in range(1, len(masked) + 1):
        for chosen in combinations(masked, size):
            seen = torch.stack([mask for _, mask in chosen]).prod(0)
            tokens = [*free, *(t for t, _ in chosen)]
            mixed = blend_queries(mixed, read(attend, q, k, v, tokens, heads), seen)
    for tokens, mask, r in joined:
        if r.merge is Merge.ADD and not tokens.silent:
            keys, values = (x.expand(len(q), -1, -1) for x in (tokens.k, tokens.v))
            beside = attend(q, keys, values, heads) * tokens.weight
            mixed = mixed + (beside if mask is None else beside * mask.to(beside)[..., None])
    return mixed


def _region(references: References, parts: Sequence[int], rows: int) -> Tensor | None:
    """The query mask of each row of the listed parts, [b n]."""
    mask = references.query_mask
    return None if mask is None else torch.cat([mask[p].expand(rows, -1) for p in parts])


def take_parts(call: AttnCall, x: Tensor, parts: Sequence[int]) -> Tensor:
    """The rows of the listed parts; x itself where they are all of it, a view where it is one."""
    if len(parts) == len(call.texts):
        return x
    views = call.parts(x)
    return views[parts[0]] if len(parts) == 1 else torch.cat([views[p] for p in parts])


def log_masks(tokens: Sequence[ReferenceTokens], rows: int) -> Tensor | None:
    """Their log masks one after another, [rows of all m]; None where none has one."""
    if all(t.log_mask is None for t in tokens):
        return None
    masks = [
        torch.zeros_like(t.k[:1, :, 0]) if t.log_mask is None else torch.atleast_2d(t.log_mask)
        for t in tokens
    ]
    return torch.cat([m.expand(rows, -1) for m in masks])


def gather_parts(
    references: References, call: AttnCall, parts: Sequence[int], rows: int
) -> ReferenceTokens:
    """The tokens each row of the listed parts reads; one shared copy where all parts read the same.

    A text that stands r times in the keys weighs r times as much, so what stands beside it gets log
    r (method.md 2.3, I12).
    """
    tokens = [references.read_by(call, p) for p in parts]
    first = tokens[0]
    if not all(t is first for t in tokens):
        if (
            rows == 1
            and references.by_row
            and not references.by_part
            and [call.texts[p].role for p in parts] == list(references.by_role)
        ):
            first = references.by_row
        else:
            first = replace(
                first,
                k=torch.cat([t.k.expand(rows, -1, -1) for t in tokens]),
                v=torch.cat([t.v.expand(rows, -1, -1) for t in tokens]),
                log_mask=log_masks(tokens, rows),
            )
    if not call.repeats:
        return first
    repeats = [call.repeats[p][i % len(call.repeats[p])] for p in parts for i in range(rows)]
    repeats = repeats[:1] if len(set(repeats)) == 1 else repeats
    # filled on the device: a copy from here would make it wait
    m, device = (
        first.k.shape[1],
        first.k.device,
    )
    logs = torch.cat(
        [torch.full((1, m), log(r), dtype=torch.float32, device=device) for r in repeats]
    )
    return replace(first, log_mask=logs if first.log_mask is None else logs + first.log_mask)
