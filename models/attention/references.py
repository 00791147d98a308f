"""Attention that reads reference tokens beside its own, in one softmax.

A: attention injection, arXiv 2403.11284, section 2.2, eq. 1-3 (the text gives W_S as "a weight to
adjust the output size of the softmax", so what it does is a choice: WeightMode). B: ConsiStory,
arXiv 2402.03286, eq. 2-3 (log M added to the logits).
Axes: b batch, h heads, n query tokens, m key tokens, d head width; (h d) means the heads are not
split, as the host has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import Attend, FusedAttend
from .weights import LOG_ZERO, WeightMode, log_of


@dataclass(frozen=True, eq=False)
class ReferenceTokens:
    """Projected tokens of one reference and how loudly they speak.

    A weight of 0, or no tokens, makes the reference silent: attention does not touch it. Raises
    ValueError if shapes do not fit or the weight is below 0.
    """

    k: Tensor  # [1|b m (h d)]
    v: Tensor  # [1|b m (h d)]
    weight: float = 1.0  # >= 0
    mode: WeightMode = WeightMode.LOGIT_BIAS
    log_mask: Tensor | None = (
        # [m] or [1|b m], added to the logits: log of a soft mask, -log R to share, log r for
        # repeats
        None
    )
    # where text and picture share a softmax: it takes of the text's share too
    dims_text: bool = False
    # what the queries [b n (h d)] are for these tokens alone; None: as they are passed
    query_turn: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.k.ndim != 3 or self.k.shape != self.v.shape:
            raise ValueError(
                f"Reference tokens: keys and values must both be [b m (h d)]; got "
                f"{list(self.k.shape)} and {list(self.v.shape)}."
            )
        if self.log_mask is not None and self.log_mask.shape[-1] != self.k.shape[1]:
            raise ValueError(
                f"Reference tokens: the mask weighs {self.log_mask.shape[-1]} tokens, but the "
                f"reference has {self.k.shape[1]}."
            )
        if not self.weight >= 0:
            raise ValueError(f"Reference tokens: the weight must be 0 or more; got {self.weight}.")

    @property
    def silent(self) -> bool:
        """True when attention may leave this reference out exactly."""
        return self.k.shape[1] == 0 or self.weight == 0

    @property
    def even(self) -> bool:
        """True when one known number says how loud all of its tokens are."""
        return self.log_mask is None


def attend_with_references(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    references: Sequence[ReferenceTokens],
    heads: int,
) -> Tensor:
    """q [b n (h d)] reads its own k v [b m (h d)] and every reference in ONE softmax ->
    [b n (h d)].

    Order is irrelevant; silent references are left out exactly; without a bias the call carries no
    mask (every fast kernel takes it). R equal references of LOGIT_BIAS weight W/R are one of weight
    W.

    OUTPUT_BLEND references come in by weight, loudest first. With weights w1 >= w2 >= ... and A_j
    the attention over own
    tokens, all references of the other modes and the j loudest blended ones, the result is
        (1 - w1) A_0 + (w1 - w2) A_1 + ... + w_R A_R
    (the Lovasz extension of "attend to this set"): the table's formula for one reference,
    symmetric, convex for weights up
    to 1, the joint softmax when all are 1. Cost: one attend for each distinct weight, and one for
    A_0 unless w1 is 1.
    """
    return read_in_levels(
        references, lambda members: _attend_joint(attend, q, k, v, members, heads)
    )


def read_in_levels(
    references: Sequence[ReferenceTokens], read: Callable[[Sequence[ReferenceTokens]], Tensor]
) -> Tensor:
    """`read` says what is attended to beside some of the references, [b n (h d)]; here OUTPUT_BLEND
    ones come in by weight.

    The formula and the cost are attend_with_references'.
    """
    active = [ref for ref in references if not ref.silent]
    held = [ref for ref in active if ref.mode is not WeightMode.OUTPUT_BLEND]
    blended = [ref for ref in active if ref.mode is WeightMode.OUTPUT_BLEND]
    blended.sort(key=lambda ref: ref.weight, reverse=True)

    # (weight, the references read at it), each level holding those before it
    levels = [(1.0, held)]
    for weight, group in groupby(blended, lambda ref: ref.weight):
        levels.append((weight, [*levels[-1][1], *group]))

    out = read(levels[-1][1])
    for (outer, members), (inner, _) in zip(
        reversed(levels[:-1]), reversed(levels[1:]), strict=True
    ):
        share = inner if outer == 1.0 else inner / outer
        if share != 1.0:
            out = torch.lerp(read(members), out, share)
    return out


def blend_queries(plain: Tensor, injected: Tensor, query_mask: Tensor) -> Tensor:
    """Let only some queries see the reference: plain, injected [b n c], query_mask [1|b n] in 0..1
    -> [b n c].

    Exactly `plain` where the mask is 0 and exactly `injected` where it is 1 (both finite). The
    generated side's mask is our extension of A: the paper masks the reference side alone.
    """
    return torch.lerp(plain, injected, query_mask.to(plain)[..., None])


def _attend_joint(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    references: Sequence[ReferenceTokens],
    heads: int,
) -> Tensor:
    """One attend over [own; references]."""
    if not references:
        return attend(q, k, v, heads)
    if isinstance(attend, FusedAttend) and _weighs(references) and attend.joins(q, k, heads):
        return _joined_by_sums(attend, q, k, v, references, heads)
    if any(ref.query_turn for ref in references):
        return _attend_side_by_side(attend, q, k, v, references, heads)
    k_ref, v_ref = _joined_tokens(references)
    both = (k, k_ref.expand(k.shape[0], -1, -1), v, v_ref.expand(v.shape[0], -1, -1))
    keys, values = torch.cat(both, 1).chunk(2, 1)  # one kernel instead of two
    bias = _bias_beside(k.shape[1], references, q.dtype)
    if bias is None:
        return attend(q, keys, values, heads)
    mask = bias[:, None, None]  # [1|b 1 1 m]: never one bias per query
    return attend(q, keys, values, heads, mask=mask)


def _loudness(ref: ReferenceTokens) -> float:
    """What is added to all of its logits."""
    return log_of(ref.weight) if ref.mode is WeightMode.LOGIT_BIAS else 0.0


def _weighs(references: Sequence[ReferenceTokens]) -> bool:
    """Whether a reference has a bias or queries of its own, and none has a bias for each token."""
    return all(ref.even for ref in references) and any(map(_apart, references))


def _apart(ref: ReferenceTokens) -> bool:
    """Whether it cannot stand among the own tokens as it is."""
    return ref.query_turn is not None or bool(_loudness(ref))


def _joined_by_sums(
    attend: FusedAttend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    references: Sequence[ReferenceTokens],
    heads: int,
) -> Tensor:
    """The joint softmax from one of each loudness: outputs in the shares of their sums, sum_j W_j
    exp(s_j) (method.md 4, I11).
    """
    quiet = [ref for ref in references if not _apart(ref)]
    if quiet:
        k, v = (
            torch.cat((own, ref.expand(k.shape[0], -1, -1)), 1)
            for own, ref in zip((k, v), _joined_tokens(quiet))
        )
    own = attend.with_sums(q, k, v, heads)
    return join_by_sums(attend, q, own, [ref for ref in references if _apart(ref)], heads).flatten(
        2
    )


def _attend_side_by_side(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    references: Sequence[ReferenceTokens],
    heads: int,
) -> Tensor:
    """The joint softmax where references are read by queries of their own: queries stand side by
    side in wider heads, and a key has zeros beside the one that reads it.

    The heads are as many times wider as there are kinds of queries.
    """
    kinds = [None, *dict.fromkeys(ref.query_turn for ref in references if ref.query_turn)]

    def beside(x: Tensor, place: int) -> Tensor:
        """x [b m (h d)] in the heads' part of this number -> [b m (h kinds d)]."""
        apart = x.unflatten(-1, (heads, 1, -1))
        wide = apart.new_zeros(*apart.shape[:3], len(kinds), apart.shape[-1])
        wide[:, :, :, place] = apart[:, :, :, 0]
        return wide.flatten(2)

    scale = len(kinds) ** 0.5  # attention divides by the root of the width
    queries = sum(beside(q if f is None else f(q), i) for i, f in enumerate(kinds)) * scale
    placed = [
        replace(
            ref, k=beside(ref.k, kinds.index(ref.query_turn)), v=beside(ref.v, 0), query_turn=None
        )
        for ref in references
    ]
    out = _attend_joint(attend, queries, beside(k, 0), beside(v, 0), placed, heads)
    return out.unflatten(-1, (heads, len(kinds), -1))[..., 0, :].flatten(2)


def join_by_sums(
    attend: FusedAttend,
    q: Tensor,
    own: tuple[Tensor, Tensor],
    references: Sequence[ReferenceTokens],
    heads: int,
) -> Tensor:
    """`own`, an answer of with_sums, joined with what q [b n (h d)] reads in `even` references ->
    [b n h d].
    """
    out, sums = own
    groups = _read_together(references)
    for number, ((query_turn, loudness), group) in enumerate(groups.items(), 1):
        queries = q if query_turn is None else query_turn(q)
        beside, theirs = attend.with_sums(
            queries, *(x.expand(q.shape[0], -1, -1) for x in _joined_tokens(group)), heads
        )
        theirs = theirs + loudness
        out = torch.lerp(out, beside, torch.sigmoid(theirs - sums).to(out))
        sums = torch.logaddexp(sums, theirs) if number < len(groups) else sums
    return out


def _read_together(references: Sequence[ReferenceTokens]) -> dict[tuple[Any, float], list]:
    """Those that are read by the same queries and equally loud, the quietest first."""
    groups: dict[tuple[Any, float], list] = {}
    for ref in sorted(references, key=_loudness):
        groups.setdefault((ref.query_turn, _loudness(ref)), []).append(ref)
    return groups


def _joined_tokens(references: Sequence[ReferenceTokens]) -> tuple[Tensor, Tensor]:
    """Keys and values of all references on one token axis, [1|b m (h d)] each, their weight in them
    where the mode says so.
    """
    keys = [_scaled(ref.k, ref, WeightMode.KEY_SCALE) for ref in references]
    values = [_scaled(ref.v, ref, WeightMode.POST_SOFTMAX) for ref in references]
    b = max(x.shape[0] for x in (*keys, *values))
    return _joined([x.expand(b, -1, -1) for x in keys]), _joined(
        [x.expand(b, -1, -1) for x in values]
    )


def _joined_bias(references: Sequence[ReferenceTokens]) -> Tensor | None:
    """What is added to the logits of all references, [1|b m]; None where nothing is."""
    biases = [_log_bias(ref) for ref in references]
    if all(bias is None for bias in biases):
        return None
    biases = [
        _filled(ref.k, 0.0) if bias is None else bias
        for ref, bias in zip(references, biases, strict=True)
    ]
    rows = max(bias.shape[0] for bias in biases)
    return _joined([bias.expand(rows, -1) for bias in biases])


def _bias_beside(
    own: int, references: Sequence[ReferenceTokens], dtype: torch.dtype
) -> Tensor | None:
    """0 for the own tokens, then the references' bias: [1|b own+m]; made once where it is the same
    in every layer and step.
    """
    if not all(ref.even for ref in references):
        bias = _joined_bias(references)
        return None if bias is None else F.pad(bias, (own, 0)).to(dtype)
    logs = tuple((ref.k.shape[1], _loudness(ref)) for ref in references)
    return (
        _constant_bias(own, logs, dtype, references[0].k.device, torch.is_inference_mode_enabled())
        if any(w for _, w in logs)
        else None
    )


@lru_cache(maxsize=64)
def _constant_bias(
    own: int,
    logs: tuple[tuple[int, float], ...],
    dtype: torch.dtype,
    device: torch.device,
    inference: bool,
) -> Tensor:
    """[1 own+m], at most a few dozen kilobytes; what inference mode made is for inference mode
    alone.
    """
    parts = [torch.zeros(1, own, dtype=dtype, device=device)]
    return torch.cat(
        [*parts, *(torch.full((1, m), value, dtype=dtype, device=device) for m, value in logs)], 1
    )


def _log_bias(ref: ReferenceTokens) -> Tensor | None:
    """Log bias [1|b m] of one reference, at least LOG_ZERO; None where nothing is added to its
    logits.
    """
    weight = ref.weight if ref.mode is WeightMode.LOGIT_BIAS else 1.0
    bias = None if weight == 1.0 else _filled(ref.k, log_of(weight))
    if ref.log_mask is None:
        return bias
    mask = torch.atleast_2d(ref.log_mask)
    return (mask if bias is None else mask + bias).clamp(min=LOG_ZERO)


def _filled(k: Tensor, value: float) -> Tensor:
    """[1 m] of one value, never coarser than float32."""
    return torch.full(
        (1, k.shape[1]), value, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device
    )


def _scaled(x: Tensor, ref: ReferenceTokens, mode: WeightMode) -> Tensor:
    """x [1|b m c] times the reference's weight, if that is what its mode does."""
    return x if ref.mode is not mode or ref.weight == 1.0 else x * ref.weight


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate on the token axis; a single part is passed on uncopied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
