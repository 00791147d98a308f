"""A joint softmax in small: text and picture from a seed, ways to attend, and the formula of the text's kept share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kindred.models.attention.attend import Attend, FusedAttend, ReferenceTokens, sdpa_attend
from kindred.models.attention.joint import TextShare
from small_attention import rand
from torch import Tensor

B, H, D, P, T, F = 2, 3, 8, 6, 5, 4
C = H * D
LAW = pytest.mark.parametrize
KEPT, PLAIN = TextShare
SIDES = {"text first": (T, 0), "text last": (0, T), "text around": (2, 3), "no text": (0, 0)}
WEIGHTS = [1e-30, 0.3, 1.0, 3.0, 1e30]
BOUND = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}


class Plain:
    """An attend of the host that tells no sums."""

    def __call__(self, *args: object, **more: object) -> Tensor:
        return sdpa_attend(*args, **more)


WAYS: dict[str, Attend] = {"by sums": FusedAttend(sdpa_attend), "by calls": Plain()}
both_ways = LAW("way", WAYS)
all_sides = LAW("sides", SIDES)


def own(sides: str = "text first", dtype: torch.dtype = torch.float64, batch: int = B) -> tuple:
    """The picture's queries [b P c], all keys and values [b T+P c], and where the picture stands."""
    before, after = SIDES[sides]
    m = before + P + after
    q, k, v = (rand(batch, n, C, seed=seed, dtype=dtype) for n, seed in ((P, 1), (m, 2), (m, 3)))
    return q, k, v, slice(before, before + P)


def ref(weight: float | Tensor = 1.0, seed: int = 4, rows: int = 1, **more: object):
    tokens = (rand(rows, F, C, seed=seed + i) for i in range(2))
    return ReferenceTokens(*tokens, weight, **more)


def itself(k: Tensor, v: Tensor, picture: slice, weight: float = 1.0) -> ReferenceTokens:
    return ReferenceTokens(k[:, picture], v[:, picture], weight)


def cast(tokens: ReferenceTokens, dtype: torch.dtype) -> ReferenceTokens:
    return replace(tokens, k=tokens.k.to(dtype), v=tokens.v.to(dtype))


def logits(q: Tensor, k: Tensor) -> Tensor:
    q, k = (x.unflatten(-1, (H, D)).transpose(1, 2) for x in (q, k))
    return q @ k.mT * D**-0.5


def logs(tokens: ReferenceTokens) -> Tensor:
    """What LOGIT_BIAS adds to a reference's logits, [1|b F]."""
    bias = torch.as_tensor(tokens.weight, dtype=torch.float64).log().reshape(-1, 1).expand(-1, F)
    return bias if tokens.log_mask is None else bias + tokens.log_mask


def formula(q, k, v, picture, tokens: ReferenceTokens, mask: Tensor | None = None) -> Tensor:
    """D (3) as it is written: c_i added to the picture's and the reference's logits, one softmax; [b n m] for LOGIT_BIAS."""
    m = k.shape[1]
    scores = logits(q, torch.cat((k, tokens.k.expand(len(k), -1, -1)), 1))
    scores[..., m:] += logs(tokens)[:, None, None]
    if mask is not None:
        scores[..., :m] += mask
    text = torch.ones(m + F, dtype=torch.bool)
    text[picture], text[m:] = False, False
    own_picture = scores[..., picture].logsumexp(-1, keepdim=True)
    c = own_picture - scores[..., ~text].logsumexp(-1, keepdim=True)
    weights = (scores + c * ~text).softmax(-1)
    values = torch.cat((v, tokens.v.expand(len(v), -1, -1)), 1)
    return (weights @ values.unflatten(-1, (H, D)).transpose(1, 2)).transpose(1, 2).flatten(2)


SETS = {
    "a weight": ref(2.0),
    "weight 1": ref(1.0),
    "rows of its own": ref(0.4, rows=B),
    "a mask": ref(2.0, log_mask=torch.linspace(-3, 1, F).double()),
    "a tensor": ref(torch.tensor(2.0).double()),
    "a weight a row": ref(torch.tensor([0.3, 2.0]).double()),
}
