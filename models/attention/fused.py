"""The host's attention as the methods call it, and the kernels that tell the sum of their softmax.

Axes: b batch, h heads, n query tokens, m key tokens, d head width; (h d) means the heads are not
split, as the host has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# attend(q [b n (h d)], k [b m (h d)], v [b m (h d)], heads, mask=None | float, broadcastable to
# [b h n m]) -> [b n (h d)]
Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class FusedAttend:
    """The host's own `attend` where that is torch's fused attention, whose kernel also tells the
    log-sum-exp of its softmax.

    With it a weighted reference is read beside the own tokens and joined after, which needs no mask
    (a mask takes every flash kernel away) and no copy of the own keys (method.md 4). Shorter calls
    take the mask: there the join's five operations cost more.
    """

    attend: Attend
    shortest: int = 2048  # own keys: of SD1.5 at 512 pixels and SDXL at 1024 the finest layers

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
    ) -> Tensor:
        return self.attend(q, k, v, heads, mask=mask)

    def joins(self, q: Tensor, k: Tensor, heads: int) -> bool:
        """Whether a call with a weighted reference, q [b n (h d)], k [b m (h d)], is to be joined
        by sums.
        """
        return k.shape[1] >= self.shortest and self.tells(q, k, heads)

    @staticmethod
    def tells(q: Tensor, k: Tensor, heads: int) -> bool:
        """Whether a kernel of this device takes such a call, q [b n (h d)], k [b m (h d)], and
        tells the right number.

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
        """q [b n (h d)], k v [b m (h d)] -> out [b n h d] and the log of each softmax's sum
        [b n h 1] in float32.
        """
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        if q.device.type in ("cpu", "meta"):
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums, *_ = kernel(q, k, v)
        return out.transpose(1, 2), sums.transpose(1, 2)[..., None]


@lru_cache(maxsize=64)
def _kernel_tells(device: torch.device, dtype: torch.dtype, d: int) -> bool:
    """These kernels have no public name, so each is tried on a few numbers before it is
    believed.
    """
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
    """The same in plain matrix products, whose backward pass is the faster one on a CPU. Shapes as
    Attend.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    weights = (logits if mask is None else logits + mask).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
