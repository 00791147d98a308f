"""Joint attention through the host's own attention functions and masks: laws I48 and I49 hold in each of them."""

from __future__ import annotations

import pytest
import torch
from comfy.ldm.modules import attention
from kindred.models.attention.attend import ReferenceTokens
from kindred.models.attention.joint import TextShare, attend_picture
from torch import Tensor

B, H, D, P, T, F = 2, 3, 64, 96, 20, 30
C = H * D
PICTURE = slice(T, T + P)
KERNELS = ["attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic"]
BOUND = 3e-6  # float32


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def own() -> tuple[Tensor, Tensor, Tensor]:
    return randn(B, P, C, seed=1), randn(B, T + P, C, seed=2), randn(B, T + P, C, seed=3)


def mask_of(name: str) -> Tensor | None:
    """Shapes of the host's own; the last three text tokens are pads."""
    pads = torch.zeros(B, 1, 1, T + P)
    pads[..., T - 3 : T] = -torch.inf
    rows = pads.expand(B, 1, P, -1).clamp(min=-1e4).contiguous()
    masks = {"(b,1,1,m)": pads, "(b,1,m)": pads[:, 0], "(1,1,m)": pads[:1, 0], "(b,1,n,m)": rows}
    return {"none": None, "bool": pads == 0, **masks}[name]


MASKS = ["none", "(b,1,1,m)", "(b,1,m)", "(1,1,m)", "(b,1,n,m)", "bool"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weight", [0.3, 1.0, 3.0])
def test_the_picture_as_its_own_reference_changes_nothing(kernel, mask, weight) -> None:
    q, k, v = own()
    tokens = ReferenceTokens(k[:, PICTURE], v[:, PICTURE], weight)
    found = attend_picture(
        getattr(attention, kernel), q, k, v, H, PICTURE, [tokens], TextShare.KEPT, mask_of(mask)
    )
    plain = attention.attention_pytorch(q, k, v, H, mask=mask_of(mask))
    assert (found - plain).abs().max() <= BOUND


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("share", TextShare)
def test_every_kernel_gives_one_answer(kernel, mask, share) -> None:
    q, k, v = own()
    tokens = ReferenceTokens(randn(1, F, C, seed=4), randn(1, F, C, seed=5), 2.0)
    found, wanted = (
        attend_picture(f, q, k, v, H, PICTURE, [tokens], share, mask_of(mask))
        for f in (getattr(attention, kernel), attention.attention_pytorch)
    )
    assert (found - wanted).abs().max() <= BOUND
    assert (found - attention.attention_pytorch(q, k, v, H, mask=mask_of(mask))).abs().max() > 1e-2
