"""Laws of what is done with a correspondence: injection (method invariants I22, I28) and AdaIN of keys (I31)."""

from __future__ import annotations

import pytest
import torch
from kindred.models.subject.correspondence import adain, correspond, inject
from small_tokens import all_of, everywhere, order, randn, some
from torch import Tensor

ALPHAS = [0.25, 0.5, 0.8, 1.0]


def others(masks: Tensor) -> list[Tensor]:
    """For each picture of masks [b n]: the subject tokens of all other pictures, flat."""
    seen = [masks.clone() for _ in masks]
    for i, mask in enumerate(seen):
        mask[i] = False
    return [mask.flatten().nonzero().flatten() for mask in seen]


# injection: eq. 6, I28, I22 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_injection_moves_its_targets_and_no_other_bit(alpha, dtype) -> None:
    x, snapshot = randn(2, 10, 6, seed=1, dtype=dtype), randn(15, 6, seed=2, dtype=dtype)
    targets, rows = torch.tensor([3, 19, 0, 11]), torch.tensor([14, 2, 2, 7])
    before, source = x.clone(), snapshot.clone()
    out = inject(x, snapshot, rows, targets, alpha)
    assert (
        torch.equal(x, before) and torch.equal(snapshot, source) and out.data_ptr() != x.data_ptr()
    )
    assert out.dtype == dtype and out.shape == x.shape
    moved = torch.zeros(20, dtype=torch.bool)
    moved[targets] = True
    moved = moved.view(2, 10)
    assert torch.equal(out[~moved], x[~moved])
    want = (1 - alpha) * before.flatten(0, 1)[targets].double() + alpha * source[rows].double()
    torch.testing.assert_close(
        out.flatten(0, 1)[targets].double(),
        want,
        rtol=0,
        atol=1e-6 if dtype == torch.float32 else 4e-3,
    )
    assert alpha < 1 or torch.equal(out.flatten(0, 1)[targets], snapshot[rows])


def test_injection_of_nothing_is_the_same_tensor() -> None:
    x, none = randn(2, 10, 6, seed=1), torch.arange(0)
    assert inject(x, x.flatten(0, 1), torch.arange(5), torch.arange(5), 0.0) is x
    assert inject(x, x.flatten(0, 1), none, none, 0.8) is x
    assert inject(x, x[0, :0], none, none, 0.8) is x


@pytest.mark.parametrize("alpha", ALPHAS)
def test_injection_of_oneself_is_the_identity(alpha) -> None:
    x = randn(1, 24, 6, seed=1)
    at = correspond(x, everywhere(1, 24), x, [all_of(x)]).source[0]
    assert torch.equal(inject(x, x.flatten(0, 1), at, torch.arange(24), alpha), x)


def test_injection_reads_a_bank_of_another_precision_and_layout() -> None:
    x, bank = randn(2, 6, 10, seed=1).transpose(1, 2), randn(15, 6, seed=2).half()
    at, rows = torch.tensor([3, 19]), torch.tensor([4, 9])
    assert torch.equal(
        inject(x, bank, rows, at, 0.8), inject(x.contiguous(), bank.float(), rows, at, 0.8)
    )


def shared_injection(features: Tensor, x: Tensor, masks: Tensor, alpha: float) -> Tensor:
    """One round all to all, as a layer does it: everyone reads a snapshot taken before anyone is written."""
    match = correspond(features, masks, features, others(masks))
    at = match.keep.flatten().nonzero().flatten()
    return inject(x, x.flatten(0, 1), match.source.flatten()[at], at, alpha)


def injection_one_by_one(features: Tensor, x: Tensor, masks: Tensor, alpha: float) -> Tensor:
    """The same, but each picture reads what stands there by then (quirk Q1)."""
    match = correspond(features, masks, features, others(masks))
    for i, (keep, source) in enumerate(zip(match.keep, match.source, strict=True)):
        at = keep.nonzero().flatten()
        x = inject(x, x.flatten(0, 1), source[at], at + i * x.shape[1], alpha)
    return x


def test_permuting_the_batch_permutes_the_injection() -> None:
    shape = randn(1, 40, 8, seed=1)
    features, x, masks = (
        shape + 0.5 * randn(4, 40, 8, seed=2),
        randn(4, 40, 6, seed=3),
        some(4, 40, seed=4),
    )
    out = shared_injection(features, x, masks, 0.8)
    assert (out != x).any((1, 2)).all()  # every picture is written
    written_first = injection_one_by_one(features, x, masks, 0.8)
    assert not torch.equal(written_first, out)
    for seed in (1, 2, 3):
        to = order(4, seed=seed)
        assert not torch.equal(to, torch.arange(4))
        assert torch.equal(shared_injection(features[to], x[to], masks[to], 0.8), out[to])
        assert not torch.equal(
            injection_one_by_one(features[to], x[to], masks[to], 0.8), written_first[to]
        )


# AdaIN of keys: I31 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift, scale", [(0, 1), (5, 0.1), (-2, 30)])
def test_adain_to_oneself_is_the_identity(shift, scale) -> None:
    x = shift + scale * randn(2, 40, 6, seed=1)
    torch.testing.assert_close(adain(x, x), x, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("spread", [1e-4, 1.0, 50.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_adain_takes_the_mean_and_the_spread_of_each_channel(rows, spread) -> None:
    x = spread * (randn(rows, 25, 6, seed=1) * torch.arange(1, 7) + torch.arange(6))
    like = randn(3, 40, 6, seed=2) * torch.arange(6, 0, -1) - 4
    out = adain(x, like)
    assert out.shape == (3, 25, 6)
    for b in range(3):
        for c in range(6):
            assert abs(out[b, :, c].double().mean() - like[b, :, c].double().mean()) < 1e-4
            assert (
                abs(
                    out[b, :, c].double().std(correction=0)
                    - like[b, :, c].double().std(correction=0)
                )
                < 1e-4
            )
            order_in, order_out = x[b % rows, :, c].argsort(), out[b, :, c].argsort()
            assert torch.equal(
                order_in, order_out
            )  # a stretch and a shift: no token overtakes another
    torch.testing.assert_close(out, adain(x.expand(3, -1, -1), like))


def test_adain_of_one_token_is_the_mean() -> None:
    like = randn(3, 40, 6, seed=2)
    out = adain(randn(1, 1, 6, seed=1), like)
    torch.testing.assert_close(out, like.mean(1, keepdim=True), rtol=0, atol=1e-6)
    rounding = torch.tensor([1.0, 1 + 2**-23, 1 - 2**-24]).repeat(3)[None, :, None]
    still = adain(
        3.3 * rounding.expand(1, 9, 6), like
    )  # so is a channel that never changes: its rounding is not blown up
    torch.testing.assert_close(still, like.mean(1, keepdim=True).expand(3, 9, 6), rtol=0, atol=0.05)
    assert torch.equal(adain(torch.zeros(1, 4, 6), like[:, :1]), like[:, :1].expand(3, 4, 6))


def test_adain_of_or_to_no_token_is_no_failure() -> None:
    x, like = randn(1, 5, 6, seed=1), randn(3, 4, 6, seed=2)
    assert adain(x[:, :0], like).shape == (3, 0, 6)
    assert torch.equal(adain(x, like[:, :0]), x.expand(3, 5, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adain_is_done_in_single_precision_and_given_back_as_it_came(dtype) -> None:
    x, like = (
        300 * randn(2, 30, 6, seed=s, dtype=dtype) for s in (1, 2)
    )  # squares overflow in float16
    before = x.clone()
    out = adain(x, like)
    assert out.dtype == dtype and out.isfinite().all() and torch.equal(x, before)
    assert torch.equal(out, adain(x.float(), like.float()).to(dtype))
    assert torch.equal(out, adain(x, like.float()))
