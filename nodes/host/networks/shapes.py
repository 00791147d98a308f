"""Every layout in which the host's networks call attention, as the one that the methods are written
for: [b n (h d)].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

LAYOUT = ("skip_reshape", "skip_output_reshape", "enable_gqa")  # what says how a call is laid out


def plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of a call's options once its tokens are [b n (h d)] with as many key heads as
    query heads.
    """
    return {name: value for name, value in kwargs.items() if name not in LAYOUT}


def flat(out: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """A call's answer as its caller asked for it -> [b n (h d)]."""
    return out.transpose(1, 2).flatten(2) if kwargs.get("skip_output_reshape") else out


def joined(
    q: Tensor, k: Tensor, v: Tensor, heads: int, kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """A call as an `optimized_attention_override` gets it -> q [b n (h d)], k v [b m (h d)], and
    what gives the answer its form back.

    Grouped keys (enable_gqa) are repeated, so that a token is as wide in every block and kernel.
    The call with the results is func(q, k, v, heads, mask=..., **plain(kwargs)) -> [b n (h d)];
    equal to the bit to the call that was asked for.
    """
    if kwargs.get("skip_reshape"):  # [b h n d]
        width = q.shape[-1]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # -> [b n h d]
    else:
        width = q.shape[-1] // heads
        # SD3's v has its heads apart
        q, k, v = (t if t.ndim == 4 else t.unflatten(-1, (-1, width)) for t in (q, k, v))
    if kwargs.get("enable_gqa"):
        k, v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (k, v))

    def restored(out: Tensor) -> Tensor:
        """[b n (h d)] -> as the caller asked for it."""
        return (
            out.unflatten(-1, (heads, -1)).transpose(1, 2)
            if kwargs.get("skip_output_reshape")
            else out
        )

    return q.flatten(2), k.flatten(2), v.flatten(2), restored
