"""Laws of weighted references read through the log-sum-exp of torch's fused attention."""

from __future__ import annotations

import pytest
import torch
from kindred.models.attention import attend as attention
from kindred.models.attention.attend import (
    FusedAttend,
    ReferenceTokens,
    WeightMode,
    attend_with_references,
    sdpa_attend,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

B, H, N, M, D = 2, 3, 10, 7, 8
LAW = pytest.mark.parametrize
FUSED = FusedAttend(sdpa_attend, N)
BOUND = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def own(dtype: torch.dtype = torch.float32, batch: int = B) -> list[Tensor]:
    return [rand(batch, N, H * D, seed=seed, dtype=dtype) for seed in (1, 2, 3)]


def ref(
    weight: float, seed: int = 4, dtype: torch.dtype = torch.float32, batch: int = 1, **more: object
) -> ReferenceTokens:
    return ReferenceTokens(
        *(rand(batch, M, H * D, seed=seed + i, dtype=dtype) for i in range(2)), weight, **more
    )


class Seen(TorchDispatchMode):
    """What was run and made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.masks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.names.append(func.overloadpacket.__name__)
        self.masks += (kwargs or {}).get("attn_mask") is not None
        if isinstance(out, Tensor) and not func.is_view:
            self.shapes.append(tuple(out.shape))
        return out


SETS = {
    "one": lambda d: [ref(2.0, dtype=d)],
    "quiet beside": lambda d: [ref(1.0, dtype=d), ref(0.3, 6, d)],
    "two of one": lambda d: [ref(3.0, dtype=d), ref(3.0, 6, d)],
    "three": lambda d: [ref(w, 4 + 2 * i, d) for i, w in enumerate((4.0, 0.2, 2.0))],
    "rows of their own": lambda d: [ref(2.0, dtype=d, batch=B), ref(0.5, 6, d)],
    "modes": lambda d: [
        ref(2.0, dtype=d),
        ref(1.5, 6, d, mode=WeightMode.POST_SOFTMAX),
        ref(0.5, 8, d, mode=WeightMode.KEY_SCALE),
    ],
    "blended": lambda d: [ref(2.0, dtype=d), ref(0.4, 6, d, mode=WeightMode.OUTPUT_BLEND)],
    "silent": lambda d: [ref(2.0, dtype=d), ref(0.0, 6, d)],
}


@LAW("dtype", BOUND, ids=str)
@LAW("name", SETS)
def test_it_is_the_joint_softmax(name, dtype) -> None:
    """Against the same in float64 with a mask."""
    found = attend_with_references(FUSED, *own(dtype), SETS[name](dtype), H)
    exact = [t.double() for t in own(dtype)]
    tokens = [
        ReferenceTokens(t.k.double(), t.v.double(), t.weight, t.mode) for t in SETS[name](dtype)
    ]
    wanted = attend_with_references(sdpa_attend, *exact, tokens, H)
    assert found.dtype is dtype and (found.double() - wanted).abs().max() <= BOUND[dtype]


@LAW("weight", [1e-30, 1e-4, 0.999, 1.001, 1e4, 1e30])
def test_any_weight_is_finite_and_right(weight) -> None:
    found = attend_with_references(FUSED, *own(), [ref(weight)], H)
    wanted = attend_with_references(
        sdpa_attend,
        *(t.double() for t in own()),
        [ReferenceTokens(*(rand(1, M, H * D, seed=seed).double() for seed in (4, 5)), weight)],
        H,
    )
    assert torch.isfinite(found).all() and (found - wanted).abs().max() <= 2e-6


def test_a_weight_takes_no_mask_and_copies_no_own_keys() -> None:
    with Seen() as seen, torch.inference_mode():
        attend_with_references(FUSED, *own(), [ref(2.0)], H)
    assert (
        seen.masks == 0
        and "cat" not in seen.names
        and not any(N + M in shape for shape in seen.shapes)
    )
    assert seen.names.count("_scaled_dot_product_flash_attention_for_cpu") == 2


def test_weight_1_is_one_call_of_the_hosts_own() -> None:
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs.get("mask"))
        return sdpa_attend(*args, **kwargs)

    found = attend_with_references(FusedAttend(counted, N), *own(), [ref(1.0)], H)
    assert calls == [None] and torch.equal(
        found, attend_with_references(sdpa_attend, *own(), [ref(1.0)], H)
    )


@LAW(
    "told",
    [
        ReferenceTokens(
            rand(1, M, H * D, seed=4),
            rand(1, M, H * D, seed=5),
            2.0,
            log_mask=torch.linspace(-1, 0, M),
        ),
        ReferenceTokens(rand(1, M, H * D, seed=4), rand(1, M, H * D, seed=5), torch.tensor(2.0)),
    ],
    ids=["a mask", "a tensor"],
)
def test_what_weighs_each_token_goes_by_mask(told) -> None:
    assert torch.equal(
        attend_with_references(FUSED, *own(), [told], H),
        attend_with_references(sdpa_attend, *own(), [told], H),
    )


def wrong(q, k, v, heads):
    out = sdpa_attend(q, k, v, heads).unflatten(-1, (heads, -1))
    return out, torch.zeros(*out.shape[:-1], 1)


def missing(q, k, v, heads):
    raise RuntimeError("no kernel of this name")


@LAW("kernel", [wrong, missing])
def test_a_kernel_that_tells_wrong_is_not_asked(monkeypatch, kernel) -> None:
    monkeypatch.setattr(FusedAttend, "with_sums", staticmethod(kernel))
    attention._kernel_tells.cache_clear()
    try:
        found = attend_with_references(FUSED, *own(), [ref(2.0)], H)
    finally:
        attention._kernel_tells.cache_clear()
    assert torch.equal(found, attend_with_references(sdpa_attend, *own(), [ref(2.0)], H))


def test_a_short_call_goes_by_mask() -> None:
    short = attend_with_references(FusedAttend(sdpa_attend, N + 1), *own(), [ref(2.0)], H)
    assert torch.equal(short, attend_with_references(sdpa_attend, *own(), [ref(2.0)], H))


def test_what_is_trained_through_goes_by_mask() -> None:
    """The kernel's sum has no gradient."""
    q, k, v = own()
    q.requires_grad_()
    attend_with_references(FUSED, q, k, v, [ref(2.0)], H).sum().backward()
    with_mask = own()[0].requires_grad_()
    attend_with_references(sdpa_attend, with_mask, k, v, [ref(2.0)], H).sum().backward()
    assert torch.equal(q.grad, with_mask.grad)
