"""Attention that reads reference tokens beside its own, in one softmax.

A: attention injection, arXiv 2403.11284, section 2.2, eq. 1-3 (the text gives W_S as "a weight to adjust the output size of
the softmax", so what it does is a choice: WeightMode). B: ConsiStory, arXiv 2402.03286, eq. 2-3 (log M added to the logits).
Axes: b batch, h heads, n query tokens, m key tokens, d head width; (h d) means the heads are not split, as the host has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import groupby
from math import log
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# attend(q [b n (h d)], k [b m (h d)], v [b m (h d)], heads, mask=None | float, broadcastable to [b h n m]) -> [b n (h d)]
Attend = Callable[..., Tensor]
BiasVia = Literal["mask", "channel"]

# Stands for log 0: fits float16, exp() of it is exactly 0 even in float64, and a row of nothing else is still no NaN.
LOG_ZERO = -1e4
CHANNEL_MULTIPLE = 8  # head widths of the fused kernels
# Of dial, measured on the miniature: dev.py evaluate --count 6 --first 500 --steps 25 --variant "a: weight=.1", and so on
SELF_ODDS = 2.0  # identity .17 .23 .27 .38 .52 .66 .70 at W .02 .05 .1 .2 .4 .7 1; plain .16 (the fit gives 1.8)
CONCEPT_ODDS = 300.0  # .22 .23 .28 .36 .46 .53 .65 .68 at W .00003 .0001 .0003 .001 .003 .01 .1 1; plain .17 (the fit gives 480, but
# its steps are .33 .11 .12 .44 on eight others: --table dials)
# --task story, 4 sets: .27 .75 .91 of the likeness at strength .25 .5 .75 with odds 0, .05 .45 .78 with odds 2, so between them
STORY_ODDS = 1.0


class WeightMode(str, Enum):
    """What the weight W of a reference does (method table of eq. 3; W = 1 is the plain concatenation in every mode)."""

    LOGIT_BIAS = (
        "logit bias"  # probabilities of the reference times W, then renormalised: rows stay convex
    )
    POST_SOFTMAX = (
        "post softmax"  # the same without renormalising; done as W * v_ref, which is equal
    )
    KEY_SCALE = "key scale"  # W * k_ref: a temperature on the reference's logits
    OUTPUT_BLEND = (
        "output blend"  # (1 - W) * attention without the reference + W * attention with it
    )


def dial(strength: float, node: str, odds: float = 0.0) -> float:
    """A node's `strength` 0..1 -> the share of its weight that is heard: 0 -> 0, 1 -> 1, rising, so that likeness rises evenly.

    In a softmax whose weight-1 reference stands to the own tokens as `odds` to 1, a weight W gives it the part W odds / (1 + W odds)
    of the whole; this is that solved for W, as a share of the part at weight 1. Odds 0, for what is added or blended, are the
    straight line. ValueError for a strength outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"{node}: strength is {strength}. Give a number from 0 (the plain picture) to 1 (all of the likeness)."
        )
    return strength / (1 + odds * (1 - strength))


@dataclass(frozen=True, eq=False)
class ReferenceTokens:
    """Projected tokens of one reference and how loudly they speak.

    A float weight 0, or no tokens, makes the reference silent: attention does not touch it. A weight held in a tensor is
    never read back (that would stall the GPU), so its zeros only reach the plain result to rounding, and only in the modes
    whose limit it is (LOGIT_BIAS, OUTPUT_BLEND). Raises ValueError if shapes do not fit or a float weight is below 0.
    """

    k: Tensor  # [1|b m (h d)]
    v: Tensor  # [1|b m (h d)]
    weight: float | Tensor = 1.0  # >= 0; a tensor is [] or [b]
    mode: WeightMode = WeightMode.LOGIT_BIAS
    log_mask: Tensor | None = (
        None  # [m] or [1|b m], added to the logits: log of a soft mask, -log R to share, log r for repeats
    )

    def __post_init__(self) -> None:
        if self.k.ndim != 3 or self.k.shape != self.v.shape:
            raise ValueError(
                f"Reference tokens: keys and values must both be [b m (h d)]; got {list(self.k.shape)} and {list(self.v.shape)}."
            )
        if self.log_mask is not None and self.log_mask.shape[-1] != self.k.shape[1]:
            raise ValueError(
                f"Reference tokens: the mask weighs {self.log_mask.shape[-1]} tokens, but the reference has {self.k.shape[1]}."
            )
        if not isinstance(self.weight, Tensor) and not self.weight >= 0:
            raise ValueError(f"Reference tokens: the weight must be 0 or more; got {self.weight}.")

    @property
    def silent(self) -> bool:
        """True when attention may leave this reference out exactly."""
        return self.k.shape[1] == 0 or (not isinstance(self.weight, Tensor) and self.weight == 0)

    @property
    def even(self) -> bool:
        """True when one known number says how loud all of its tokens are."""
        return self.log_mask is None and not isinstance(self.weight, Tensor)


def sdpa_attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attend with torch's fused attention, scale 1/sqrt(d). Shapes as Attend."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class FusedAttend:
    """The host's own `attend` where that is torch's fused attention, whose kernel also tells the log-sum-exp of its softmax.

    With it a weighted reference is read beside the own tokens and joined after, which needs no mask (a mask takes every flash
    kernel away) and no copy of the own keys (method.md 4). Shorter calls take the mask: there the join's five operations
    cost more.
    """

    attend: Attend
    shortest: int = 2048  # own keys: of SD1.5 at 512 pixels and SDXL at 1024 the finest layers

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
    ) -> Tensor:
        return self.attend(q, k, v, heads, mask=mask)

    def joins(self, q: Tensor, k: Tensor, heads: int) -> bool:
        """Whether a call with a weighted reference, q [b n (h d)], k [b m (h d)], is to be joined by sums."""
        return k.shape[1] >= self.shortest and self.tells(q, k, heads)

    @staticmethod
    def tells(q: Tensor, k: Tensor, heads: int) -> bool:
        """Whether a kernel of this device takes such a call, q [b n (h d)], k [b m (h d)], and tells the right number.

        It has no gradient, and takes no keys of fewer heads than the queries'.
        """
        d = q.shape[-1] // heads
        return (
            not q.requires_grad
            and k.shape[-1] == q.shape[-1]
            and _kernel_tells(q.device, q.dtype, d)
        )

    @staticmethod
    def with_sums(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """q [b n (h d)], k v [b m (h d)] -> out [b n h d] and the log of each softmax's sum [b n h 1] in float32."""
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        if q.device.type in ("cpu", "meta"):
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums, *_ = kernel(q, k, v)
        return out.transpose(1, 2), sums.transpose(1, 2)[..., None]


@lru_cache(maxsize=64)
def _kernel_tells(device: torch.device, dtype: torch.dtype, d: int) -> bool:
    """These kernels have no public name, so each is tried on a few numbers before it is believed."""
    if device.type == "meta":
        return True
    with torch.inference_mode():
        q, k = (
            torch.linspace(-2, 3, n * 2 * d, device=device).sin().view(1, n, 2 * d).to(dtype)
            for n in (5, 9)
        )
        try:
            _, sums = FusedAttend.with_sums(q, k, k, 2)
            logits = (
                torch.einsum("bnhd,bmhd->bnhm", *(x.float().unflatten(-1, (2, d)) for x in (q, k)))
                * d**-0.5
            )
            right = torch.allclose(sums.float(), logits.logsumexp(-1, keepdim=True), atol=1e-2)
        except (RuntimeError, AttributeError, TypeError, ValueError):
            return False
    return right


def product_attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    """The same in plain matrix products, whose backward pass is the faster one on a CPU. Shapes as Attend."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    weights = (logits if mask is None else logits + mask).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def reference_attention(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    heads: int,
    *,
    weight: float | Tensor,
    mode: WeightMode,
    log_mask: Tensor | None = None,
    bias_via: BiasVia = "mask",
) -> Tensor:
    """A, eq. 1-3: q [b n (h d)], k v [b m (h d)], k_ref v_ref [1|b m (h d)] -> [b n (h d)].

    One reference; attend_with_references says the rest. Weight 0 or an empty reference is attend(q, k, v, heads) itself.
    """
    reference = ReferenceTokens(k_ref, v_ref, weight, mode, log_mask)
    return attend_with_references(attend, q, k, v, (reference,), heads, bias_via=bias_via)


def attend_with_references(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    references: Sequence[ReferenceTokens],
    heads: int,
    *,
    bias_via: BiasVia = "mask",
) -> Tensor:
    """q [b n (h d)] reads its own k v [b m (h d)] and every reference in ONE softmax -> [b n (h d)].

    Order is irrelevant; silent references are left out exactly; without a bias the call carries no mask (every fast kernel
    takes it). R equal references of LOGIT_BIAS weight W/R are one of weight W.

    OUTPUT_BLEND references come in by weight, loudest first. With weights w1 >= w2 >= ... and A_j the attention over own
    tokens, all references of the other modes and the j loudest blended ones, the result is
        (1 - w1) A_0 + (w1 - w2) A_1 + ... + w_R A_R
    (the Lovasz extension of "attend to this set"): the table's formula for one reference, symmetric, convex for weights up
    to 1, the joint softmax when all are 1. Cost: one attend for each distinct weight, and one for A_0 unless w1 is 1.
    Raises ValueError if several references blend and one of the weights is a tensor, as tensors cannot be ranked unread.
    """
    return read_in_levels(
        references, lambda members: _attend_joint(attend, q, k, v, members, heads, bias_via)
    )


def read_in_levels(
    references: Sequence[ReferenceTokens], read: Callable[[Sequence[ReferenceTokens]], Tensor]
) -> Tensor:
    """`read` says what is attended to beside some of the references, [b n (h d)]; here OUTPUT_BLEND ones come in by weight.

    The formula, the cost and the error are attend_with_references'.
    """
    heard = [ref for ref in references if not ref.silent]
    held = [ref for ref in heard if ref.mode is not WeightMode.OUTPUT_BLEND]
    blended = [ref for ref in heard if ref.mode is WeightMode.OUTPUT_BLEND]
    if len(blended) > 1 and any(isinstance(ref.weight, Tensor) for ref in blended):
        raise ValueError(
            f"Output blend: {len(blended)} references are blended and a weight is a tensor; give float weights, or blend one."
        )
    blended.sort(key=_weight, reverse=True)

    levels = [
        (1.0, held)
    ]  # (weight, the references heard at it), each level holding those before it
    for weight, group in groupby(blended, _weight):
        levels.append((weight, [*levels[-1][1], *group]))

    out = read(levels[-1][1])
    for (outer, members), (inner, _) in zip(
        reversed(levels[:-1]), reversed(levels[1:]), strict=True
    ):
        share = inner if outer == 1.0 else inner / outer
        if isinstance(share, Tensor) or share != 1.0:
            share = share.to(out).reshape(-1, 1, 1) if isinstance(share, Tensor) else share
            out = torch.lerp(read(members), out, share)
    return out


def concat_references(
    references: Sequence[ReferenceTokens],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Join references on the token axis -> k, v [1|b m (h d)] and their log bias [1|b m] (None: no bias at all).

    KEY_SCALE and POST_SOFTMAX weights are already multiplied in; the bias holds log W of LOGIT_BIAS and every log_mask, at
    least LOG_ZERO; a batch of 1 stays 1 (stride 0) when all agree. An OUTPUT_BLEND weight is not the softmax's business and
    has no effect here. Raises ValueError (from expand) if two batches differ and none is 1.
    """
    return *_joined_tokens(references), _joined_bias(references)


def biased_by_channel(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry a bias per key in one more head channel, for kernels that take no mask.

    q [b n (h d)], k v [b m (h d)], bias [1|b m] -> q', k', v' [b n|m (h d')] with d' > d a multiple of 8. As attend scales by
    1/sqrt(d'): q' = [q sqrt(d'/d), sqrt(d'), 0..], k' = [k, bias, 0..], v' = [v, 0..] give exactly q.k/sqrt(d) + bias. Take
    the result through without_channel. Kernels that quantise keys lose them beside a bias near LOG_ZERO: drop tokens
    instead of masking them there.
    """
    d = q.shape[-1] // heads
    wide = (d // CHANNEL_MULTIPLE + 1) * CHANNEL_MULTIPLE
    q, k, v = (x.unflatten(-1, (heads, d)) for x in (q, k, v))
    one = q.new_full((*q.shape[:-1], 1), wide**0.5)
    carried = bias.to(k.dtype)[:, :, None, None].expand(*k.shape[:-1], 1)
    q = torch.cat((q * (wide / d) ** 0.5, one), -1)
    k = torch.cat((k, carried), -1)
    return tuple(F.pad(x, (0, wide - x.shape[-1])).flatten(2) for x in (q, k, v))


def without_channel(out: Tensor, heads: int, d: int) -> Tensor:
    """Undo the widening of biased_by_channel: out [b n (h d')] -> [b n (h d)]."""
    return out.unflatten(-1, (heads, -1))[..., :d].flatten(2)


def blend_queries(plain: Tensor, injected: Tensor, query_mask: Tensor) -> Tensor:
    """Let only some queries see the reference: plain, injected [b n c], query_mask [1|b n] in 0..1 -> [b n c].

    Exactly `plain` where the mask is 0 and exactly `injected` where it is 1 (both finite). The generated side's mask is our
    extension of A: the paper masks the reference side alone.
    """
    return torch.lerp(plain, injected, query_mask.to(plain)[..., None])


def _attend_joint(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    references: Sequence[ReferenceTokens],
    heads: int,
    bias_via: BiasVia,
) -> Tensor:
    """One attend over [own; references]."""
    if not references:
        return attend(q, k, v, heads)
    if isinstance(attend, FusedAttend) and _weighs(references) and attend.joins(q, k, heads):
        return _joined_by_sums(attend, q, k, v, references, heads)
    k_ref, v_ref = _joined_tokens(references)
    both = (k, k_ref.expand(k.shape[0], -1, -1), v, v_ref.expand(v.shape[0], -1, -1))
    keys, values = torch.cat(both, 1).chunk(2, 1)  # one kernel instead of two
    bias = _bias_beside(k.shape[1], references, q.dtype)
    if bias is None:
        return attend(q, keys, values, heads)
    if bias_via == "mask":
        return attend(
            q, keys, values, heads, mask=bias[:, None, None]
        )  # [1|b 1 1 m]: never one bias per query
    return without_channel(
        attend(*biased_by_channel(q, keys, values, bias, heads), heads), heads, q.shape[-1] // heads
    )


def _loudness(ref: ReferenceTokens) -> float:
    """What is added to all of its logits."""
    return log_of(ref.weight) if ref.mode is WeightMode.LOGIT_BIAS else 0.0


def _weighs(references: Sequence[ReferenceTokens]) -> bool:
    """Whether a reference has a bias, and none has one of its own for each token."""
    return all(ref.even for ref in references) and any(map(_loudness, references))


def _joined_by_sums(
    attend: FusedAttend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    references: Sequence[ReferenceTokens],
    heads: int,
) -> Tensor:
    """The joint softmax from one of each loudness: outputs in the shares of their sums, sum_j W_j exp(s_j) (method.md 4, I11)."""
    quiet = [ref for ref in references if not _loudness(ref)]
    if quiet:
        k, v = (
            torch.cat((own, ref.expand(k.shape[0], -1, -1)), 1)
            for own, ref in zip((k, v), _joined_tokens(quiet))
        )
    own = attend.with_sums(q, k, v, heads)
    return join_by_sums(
        attend, q, own, [ref for ref in references if _loudness(ref)], heads
    ).flatten(2)


def join_by_sums(
    attend: FusedAttend,
    q: Tensor,
    own: tuple[Tensor, Tensor],
    references: Sequence[ReferenceTokens],
    heads: int,
) -> Tensor:
    """`own`, an answer of with_sums, joined with what q [b n (h d)] reads in `even` references -> [b n h d]."""
    out, sums = own
    by_loudness = sorted(references, key=_loudness)
    for loudness, group in groupby(by_loudness, _loudness):
        beside, theirs = attend.with_sums(
            q, *(x.expand(q.shape[0], -1, -1) for x in _joined_tokens(list(group))), heads
        )
        theirs = theirs + loudness
        out = torch.lerp(out, beside, torch.sigmoid(theirs - sums).to(out))
        sums = torch.logaddexp(sums, theirs) if loudness != _loudness(by_loudness[-1]) else sums
    return out


def _joined_tokens(references: Sequence[ReferenceTokens]) -> tuple[Tensor, Tensor]:
    keys = [
        _scaled(ref.k, ref.weight if ref.mode is WeightMode.KEY_SCALE else 1.0)
        for ref in references
    ]
    values = [
        _scaled(ref.v, ref.weight if ref.mode is WeightMode.POST_SOFTMAX else 1.0)
        for ref in references
    ]
    b = max(
        x.shape[0] for x in (*keys, *values)
    )  # after scaling: a weight [b] spreads a shared reference over the batch
    return _joined([x.expand(b, -1, -1) for x in keys]), _joined(
        [x.expand(b, -1, -1) for x in values]
    )


def _joined_bias(references: Sequence[ReferenceTokens]) -> Tensor | None:
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
    """0 for the own tokens, then the references' bias: [1|b own+m]; made once where it is the same in every layer and step."""
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
    """[1 own+m], at most a few dozen kilobytes; what inference mode made is for inference mode alone."""
    parts = [torch.zeros(1, own, dtype=dtype, device=device)]
    return torch.cat(
        [*parts, *(torch.full((1, m), value, dtype=dtype, device=device) for m, value in logs)], 1
    )


def log_of(weight: float) -> float:
    """log W, at least LOG_ZERO."""
    return max(log(weight), LOG_ZERO)


def _log_bias(ref: ReferenceTokens) -> Tensor | None:
    """Log bias [1|b m] of one reference, at least LOG_ZERO; None where nothing is added to its logits."""
    weight = ref.weight if ref.mode is WeightMode.LOGIT_BIAS else 1.0
    if isinstance(weight, Tensor):
        bias = weight.reshape(-1, 1).log().clamp(min=LOG_ZERO).expand(-1, ref.k.shape[1])
    elif weight != 1.0:
        bias = _filled(ref.k, log_of(weight))
    else:
        bias = None
    if ref.log_mask is None:
        return bias
    mask = torch.atleast_2d(ref.log_mask)
    return (mask if bias is None else mask + bias).clamp(min=LOG_ZERO)


def _filled(k: Tensor, value: float) -> Tensor:
    """[1 m] of one value, never coarser than float32."""
    return torch.full(
        (1, k.shape[1]), value, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device
    )


def _weight(ref: ReferenceTokens) -> float | Tensor:
    return ref.weight


def _scaled(x: Tensor, weight: float | Tensor) -> Tensor:
    """x [1|b m c] times a weight (float, [] or [b])."""
    if isinstance(weight, Tensor):
        return x * weight.to(x).reshape(-1, 1, 1)
    return x if weight == 1.0 else x * weight


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate on the token axis; a single part is passed on uncopied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
