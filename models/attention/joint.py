"""Attention of a picture's queries in a softmax that holds text and picture: references are read
beside both.

Equations D (2) to D (4) of docs/method.md 4.1; keys come turned, D (1). Text queries stay the
host's: they are not passed to what reads references.
Axes: b rows, h heads, n the picture's queries, m all own keys of the call, d head width; (h d)
means heads not split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import Attend, FusedAttend
from .references import ReferenceTokens, attend_with_references, join_by_sums, read_in_levels
from .weights import LOG_ZERO


class TextShare(str, Enum):
    """What becomes of the text's share of a picture query's softmax when references come
    into it.
    """

    KEPT = "kept"  # it stays what it is without them, in every row and head: D (3), D (4)
    PLAIN = "plain"  # one softmax over all: references dim the text as they dim the picture


def attend_picture(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    picture: slice,
    references: Sequence[ReferenceTokens],
    share: TextShare,
    mask: Tensor | None = None,
) -> Tensor:
    """The picture's queries q [b n (h d)] read own keys k v [b m (h d)] and the references ->
    [b n (h d)].

    picture: which own keys are the picture's; "text" is all others, whatever stands there (pads,
    registers, references of the host's own). mask: the host's, on own keys, [n|1 m], [1|b n|1 m] or
    [1|b 1|h n|1 m], added or bool (True: read). With nothing active it is attend(q, k, v, heads,
    mask) itself. Weight modes are attend_with_references', and with KEPT they act within what the
    text leaves.

    Cost of KEPT in tokens read per query, for T text, P picture and F reference tokens: T + P + F
    where the kernel tells its sums (FusedAttend, no mask; P more if a reference is not `even`),
    else 2 T + 2 P + F in three calls of `attend`.
    Raises ValueError if the picture or the mask does not fit.
    """
    active = [ref for ref in references if not ref.silent]
    if not active:
        return attend(q, k, v, heads, mask=mask)
    rest = _others(picture, k.shape[1])
    bias = None if mask is None else as_bias(mask, q, k.shape[1])
    if share is TextShare.PLAIN or not rest:
        return attend_with_references(_masking(attend, bias), q, k, v, active, heads)
    if bias is None and isinstance(attend, FusedAttend) and attend.tells(q, k, heads):
        return _kept_by_sums(attend, q, k, v, heads, picture, rest, active)
    return _kept_by_calls(attend, q, k, v, heads, picture, rest, active, bias)


@dataclass(frozen=True, eq=False)
class PictureReader:
    """attend_picture in the form in which parts.attend_group asks for an attention with
    references.
    """

    picture: slice
    share: TextShare
    # the host's, on own keys, cut to the rows and queries that are passed
    mask: Tensor | None = None

    def __call__(
        self,
        attend: Attend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        references: Sequence[ReferenceTokens],
        heads: int,
    ) -> Tensor:
        dims = any(ref.dims_text for ref in references if not ref.silent)
        # one that dims it does so for all it is read with
        share = TextShare.PLAIN if dims else self.share
        return attend_picture(attend, q, k, v, heads, self.picture, references, share, self.mask)

    def of(self, take: Callable[[Tensor], Tensor]) -> PictureReader:
        """The reader of some rows; `take` picks them from a tensor [b ...]."""
        one_for_all = self.mask is None or self.mask.ndim == 2 or self.mask.shape[0] == 1
        return self if one_for_all else replace(self, mask=take(self.mask))


def attend_rows(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    picture: slice,
    read: Callable[[Tensor, Tensor | None], Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    """A whole call, q [b l (h d)] of which `picture` is the picture's -> [b l (h d)]: only its rows
    read references (D (2)).

    read: the picture's queries [b n (h d)] and their rows of the mask -> [b n (h d)], as
    attend_picture gives it. All other rows are the host's own attention; no mask of queries by keys
    is needed for it.
    """
    start, stop, _ = picture.indices(q.shape[1])
    parts = []
    for first, last in ((0, start), (start, stop), (stop, q.shape[1])):
        if first == last:
            continue
        rows = q[:, first:last] if last - first < q.shape[1] else q
        theirs = mask if mask is None or mask.shape[-2] == 1 else mask[..., first:last, :]
        reads = (first, last) == (start, stop)
        parts.append(read(rows, theirs) if reads else attend(rows, k, v, heads, mask=theirs))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _kept_by_sums(
    attend: FusedAttend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    picture: slice,
    rest: Sequence[slice],
    active: Sequence[ReferenceTokens],
) -> Tensor:
    """D (4) from one softmax over each of text, picture and references, joined by their
    log-sum-exps.
    """
    own_k, own_v = k[:, picture], v[:, picture]
    own = attend.with_sums(q, own_k, own_v, heads)
    if all(ref.even for ref in active):
        seen = read_in_levels(
            active, lambda members: join_by_sums(attend, q, own, members, heads).flatten(2)
        )
    else:  # the kernel takes no bias for each token
        seen = attend_with_references(attend, q, own_k, own_v, active, heads)
    text, sums = attend.with_sums(q, k[:, rest[0]], v[:, rest[0]], heads)
    for more in rest[1:]:
        beside, theirs = attend.with_sums(q, k[:, more], v[:, more], heads)
        text = torch.lerp(text, beside, torch.sigmoid(theirs - sums).to(text))
        sums = torch.logaddexp(sums, theirs)
    mass = torch.sigmoid(sums - own[1])  # the vanilla softmax's: references are not in it
    return torch.lerp(seen.unflatten(-1, (heads, -1)), text, mass.to(text)).flatten(2)


def _kept_by_calls(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    picture: slice,
    rest: Sequence[slice],
    active: Sequence[ReferenceTokens],
    bias: Tensor | None,
) -> Tensor:
    """D (4) from three calls of any attend: over the text, over all own keys for the text's mass,
    and over the others.
    """

    def columns(x: Tensor, dim: int) -> Tensor:
        cut = [x.narrow(dim, s.start, s.stop - s.start) for s in rest]
        return cut[0] if len(cut) == 1 else torch.cat(cut, dim)

    theirs = None if bias is None else columns(bias, -1).contiguous()
    text = attend(q, columns(k, 1), columns(v, 1), heads, mask=theirs)
    # values of 1 for text and 0 for the picture: what is read is the mass
    marks = v.new_zeros(1, *v.shape[1:])
    for s in rest:
        marks[:, s] = 1
    mass = attend(q, k, marks.expand_as(v), heads, mask=bias)
    own = None if bias is None else bias[..., picture]
    seen = attend_with_references(
        _masking(attend, own), q, k[:, picture], v[:, picture], active, heads
    )
    return torch.lerp(seen, text, mass)


def _others(picture: slice, m: int) -> list[slice]:
    """Where own keys stand that are not the picture's."""
    if not 0 <= picture.start < picture.stop <= m:
        raise ValueError(
            f"Kindred: the picture's tokens are {picture.start} to {picture.stop}, but the call "
            f"has {m} keys."
            " Another node may have merged or cut tokens: leave it out."
        )
    return [s for s in (slice(0, picture.start), slice(picture.stop, m)) if s.start < s.stop]


def as_bias(mask: Tensor, q: Tensor, m: int) -> Tensor:
    """The host's mask as something to add, [1|b 1|h 1|n m], at least LOG_ZERO: a text of pads alone
    makes no NaN then.
    """
    n = q.shape[1]
    if mask.ndim not in (2, 3, 4) or mask.shape[-1] != m or mask.shape[-2] not in (1, n):
        raise ValueError(
            f"Kindred: the network's attention mask is {list(mask.shape)}, which does not fit {n} "
            f"queries and {m} keys."
            " Another node may have changed their number: leave it out."
        )
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, LOG_ZERO)
    mask = mask.clamp(min=LOG_ZERO).to(q.dtype)
    mask = mask[None] if mask.ndim == 2 else mask
    return mask[:, None] if mask.ndim == 3 else mask  # as the host reads its shapes


def _masking(attend: Attend, bias: Tensor | None) -> Attend:
    """`attend` which adds the host's bias to the own keys, the first ones; what is appended to them
    has none.
    """
    if bias is None:
        return attend

    def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        own = F.pad(bias, (0, k.shape[1] - bias.shape[-1]))
        return attend(q, k, v, heads, mask=own if mask is None else own + mask)

    return attended
