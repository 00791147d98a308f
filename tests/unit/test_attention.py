"""Laws of attention with references: method invariants I1-I5, I7-I12, I42, on small CPU tensors, most in float64."""

from __future__ import annotations

from math import log

import pytest
import torch
from checkout import ROOT
from torch import Tensor

from kindred.models.attention import (
    CONCEPT_ODDS,
    LOG_ZERO,
    SELF_ODDS,
    STORY_ODDS,
    ReferenceTokens,
    WeightMode,
    attend_with_references,
    biased_by_channel,
    blend_queries,
    concat_references,
    dial,
    reference_attention,
    sdpa_attend,
    without_channel,
)

B, H, N, M, D = 2, 3, 10, 7, 5
C = H * D
MODES = tuple(WeightMode)
TIGHT = {"rtol": 0.0, "atol": 1e-12}


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def split(x: Tensor, heads: int = H) -> Tensor:
    """[b n (h d)] -> [b h n d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """The reference softmax, written out: [b h n m]."""
    return torch.softmax(split(q) @ split(k).transpose(-1, -2) / D**0.5, -1)


def read(p: Tensor, v: Tensor) -> Tensor:
    return (p @ split(v)).transpose(1, 2).flatten(2)


class Recorder:
    """An attend that keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        self.calls.append((q, k, v, mask))
        return sdpa_attend(q, k, v, heads, mask)


@pytest.fixture
def own() -> tuple[Tensor, Tensor, Tensor]:
    return rand(B, N, C, seed=1), rand(B, N, C, seed=2), rand(B, N, C, seed=3)


@pytest.fixture
def ref() -> tuple[Tensor, Tensor]:
    return rand(1, M, C, seed=4), rand(1, M, C, seed=5)


def test_sdpa_attend_is_softmax_attention(own) -> None:
    q, k, v = own
    torch.testing.assert_close(sdpa_attend(q, k, v, H), read(probabilities(q, k), v), **TIGHT)


# I1, I2: silence is exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_zero_is_the_plain_call(own, ref, mode, dtype) -> None:
    q, k, v = (x.to(dtype) for x in own)
    k_ref, v_ref = (x.to(dtype) for x in ref)
    attend = Recorder()
    out = reference_attention(attend, q, k, v, k_ref, v_ref, H, weight=0.0, mode=mode, log_mask=torch.zeros(M))
    assert torch.equal(out, sdpa_attend(q, k, v, H))
    (call,) = attend.calls
    assert call[0] is q and call[1] is k and call[2] is v and call[3] is None  # not one operation more


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens_is_the_plain_call(own, mode) -> None:
    attend = Recorder()
    none = torch.zeros(1, 0, C, dtype=torch.float64)
    assert torch.equal(reference_attention(attend, *own, none, none, H, weight=2.0, mode=mode), sdpa_attend(*own, H))
    assert len(attend.calls) == 1 and attend.calls[0][1] is own[1]


def test_a_mask_of_zeros_is_no_reference(own, ref) -> None:
    out = reference_attention(
        sdpa_attend, *own, *ref, H, weight=1.0, mode=WeightMode.LOGIT_BIAS, log_mask=torch.full((M,), -torch.inf)
    )
    torch.testing.assert_close(out, sdpa_attend(*own, H), **TIGHT)


def test_silent_references_leave_the_others_alone(own, ref) -> None:
    heard = ReferenceTokens(*ref, 1.5)
    mute = ReferenceTokens(rand(1, 3, C, seed=8), rand(1, 3, C, seed=9), 0.0, WeightMode.POST_SOFTMAX)
    a = attend_with_references(sdpa_attend, *own, [mute, heard], H)
    assert torch.equal(a, attend_with_references(sdpa_attend, *own, [heard], H))


# I3, I4, I5: what the weight does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_weight_one_is_plain_concat_without_a_mask(own, ref, mode) -> None:
    q, k, v = own
    k_ref, v_ref = ref
    attend = Recorder()
    out = reference_attention(attend, q, k, v, k_ref, v_ref, H, weight=1.0, mode=mode)
    keys, values = torch.cat((k, k_ref.expand(B, -1, -1)), 1), torch.cat((v, v_ref.expand(B, -1, -1)), 1)
    torch.testing.assert_close(out, read(probabilities(q, keys), values), **TIGHT)
    assert len(attend.calls) == 1 and attend.calls[0][3] is None


@pytest.mark.parametrize("weight", [0.2, 0.5, 1.7, 3.0])
@pytest.mark.parametrize("bias_via", ["mask", "channel"])
def test_logit_bias_scales_the_probabilities_and_renormalises(own, ref, weight, bias_via) -> None:
    q, k, v = own
    k_ref, v_ref = (x.expand(B, -1, -1) for x in ref)
    p = probabilities(q, torch.cat((k, k_ref), 1))
    p = torch.cat((p[..., :N], weight * p[..., N:]), -1)
    p = p / p.sum(-1, keepdim=True)
    out = reference_attention(
        sdpa_attend, q, k, v, *ref, H, weight=weight, mode=WeightMode.LOGIT_BIAS, bias_via=bias_via
    )
    torch.testing.assert_close(out, read(p, torch.cat((v, v_ref), 1)), **TIGHT)


@pytest.mark.parametrize("weight", [0.2, 1.7])
def test_post_softmax_scales_the_probabilities_only(own, ref, weight) -> None:
    q, k, v = own
    k_ref, v_ref = (x.expand(B, -1, -1) for x in ref)
    p = probabilities(q, torch.cat((k, k_ref), 1))
    p = torch.cat((p[..., :N], weight * p[..., N:]), -1)
    out = reference_attention(sdpa_attend, q, k, v, *ref, H, weight=weight, mode=WeightMode.POST_SOFTMAX)
    torch.testing.assert_close(out, read(p, torch.cat((v, v_ref), 1)), **TIGHT)


@pytest.mark.parametrize("weight", [0.2, 1.7])
def test_key_scale_scales_the_logits(own, ref, weight) -> None:
    q, k, v = own
    k_ref, v_ref = (x.expand(B, -1, -1) for x in ref)
    out = reference_attention(sdpa_attend, q, k, v, *ref, H, weight=weight, mode=WeightMode.KEY_SCALE)
    p = probabilities(q, torch.cat((k, weight * k_ref), 1))
    torch.testing.assert_close(out, read(p, torch.cat((v, v_ref), 1)), **TIGHT)


@pytest.mark.parametrize("weight", [0.3, 0.9, 2.0])
def test_output_blend_is_a_lerp(own, ref, weight) -> None:
    full = reference_attention(sdpa_attend, *own, *ref, H, weight=1.0, mode=WeightMode.OUTPUT_BLEND)
    plain = sdpa_attend(*own, H)
    out = reference_attention(sdpa_attend, *own, *ref, H, weight=weight, mode=WeightMode.OUTPUT_BLEND)
    torch.testing.assert_close(out, (1 - weight) * plain + weight * full, **TIGHT)


@pytest.mark.parametrize("weight", [0.1, 0.5, 2.0, 3.0])
def test_an_identical_reference(own, weight) -> None:
    q, k, v = own
    plain = sdpa_attend(q, k, v, H)
    out = {mode: reference_attention(sdpa_attend, q, k, v, k, v, H, weight=weight, mode=mode) for mode in MODES}
    torch.testing.assert_close(out[WeightMode.LOGIT_BIAS], plain, **TIGHT)
    torch.testing.assert_close(out[WeightMode.OUTPUT_BLEND], plain, **TIGHT)
    torch.testing.assert_close(out[WeightMode.POST_SOFTMAX], plain * (1 + weight) / 2, **TIGHT)
    assert (out[WeightMode.KEY_SCALE] - plain).abs().max() > 1e-2


# I7, I8: masks and order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_via", ["mask", "channel"])
@pytest.mark.parametrize("mode", MODES)
def test_minus_infinity_equals_gathering_and_multiplying_does_not(own, ref, mode, bias_via) -> None:
    keep = torch.tensor([True, False, True, True, False, False, True])
    k_ref, v_ref = ref
    gathered = reference_attention(
        sdpa_attend, *own, k_ref[:, keep], v_ref[:, keep], H, weight=0.7, mode=mode, bias_via=bias_via
    )
    masked = reference_attention(
        sdpa_attend, *own, k_ref, v_ref, H, weight=0.7, mode=mode, log_mask=keep.double().log(), bias_via=bias_via
    )
    torch.testing.assert_close(masked, gathered, **TIGHT)
    zeroed = keep.double()[:, None]
    multiplied = reference_attention(sdpa_attend, *own, k_ref * zeroed, v_ref * zeroed, H, weight=0.7, mode=mode)
    assert (multiplied - gathered).abs().max() > 1e-2  # zeroed keys still take exp(0)


@pytest.mark.parametrize("weight", [1.0, 2.0, torch.zeros(()), torch.tensor([0.0, 1.0])])
def test_no_bias_is_infinite(own, ref, weight) -> None:
    """A kernel's row of -inf alone would be a NaN, and -inf times the zero of a padded channel is one."""
    for log_mask in (None, torch.full((M,), -torch.inf)):
        attend = Recorder()
        reference_attention(attend, *own, *ref, H, weight=weight, mode=WeightMode.LOGIT_BIAS, log_mask=log_mask)
        for bias in (attend.calls[0][3], concat_references([ReferenceTokens(*ref, weight, log_mask=log_mask)])[2]):
            assert bias is None or (bias.isfinite().all() and bias.min() >= LOG_ZERO)


def test_a_mask_per_row_reads_its_own_row(own, ref) -> None:
    soft = rand(B, M, seed=6).sigmoid()
    out = reference_attention(sdpa_attend, *own, *ref, H, weight=2.0, mode=WeightMode.LOGIT_BIAS, log_mask=soft.log())
    for i in range(B):
        row = reference_attention(
            sdpa_attend, *(x[i : i + 1] for x in own), *ref, H, weight=2.0, mode=WeightMode.LOGIT_BIAS, log_mask=soft[i].log()
        )
        torch.testing.assert_close(out[i : i + 1], row, **TIGHT)


@pytest.mark.parametrize("mode", MODES)
def test_order_of_tokens_is_irrelevant(own, ref, mode) -> None:
    order = torch.randperm(M, generator=torch.Generator().manual_seed(7))
    soft = rand(M, seed=6).sigmoid().log()
    a = reference_attention(sdpa_attend, *own, *ref, H, weight=0.6, mode=mode, log_mask=soft)
    b = reference_attention(
        sdpa_attend, *own, ref[0][:, order], ref[1][:, order], H, weight=0.6, mode=mode, log_mask=soft[order]
    )
    torch.testing.assert_close(a, b, **TIGHT)


def chain(weights: dict[WeightMode, float]) -> list[ReferenceTokens]:
    return [
        ReferenceTokens(rand(1, 3 + i, C, seed=20 + i), rand(1, 3 + i, C, seed=30 + i), weight, mode)
        for i, (mode, weight) in enumerate(weights.items())
    ]


def test_order_of_references_is_irrelevant_in_a_mixed_chain(own) -> None:
    refs = chain(dict(zip(MODES, (0.4, 1.3, 0.8, 0.6), strict=True)))
    refs.append(ReferenceTokens(rand(B, 4, C, seed=41), rand(B, 4, C, seed=42), 0.9, WeightMode.OUTPUT_BLEND))
    a = attend_with_references(sdpa_attend, *own, refs, H)
    b = attend_with_references(sdpa_attend, *own, refs[::-1], H)
    torch.testing.assert_close(a, b, **TIGHT)


def test_blended_references_compose_by_weight(own) -> None:
    loud = ReferenceTokens(rand(1, 4, C, seed=50), rand(1, 4, C, seed=51), 0.8, WeightMode.OUTPUT_BLEND)
    soft = ReferenceTokens(rand(1, 4, C, seed=60), rand(1, 4, C, seed=61), 0.3, WeightMode.OUTPUT_BLEND)
    base = chain({WeightMode.LOGIT_BIAS: 0.7})
    attend = Recorder()
    out = attend_with_references(attend, *own, [soft, *base, loud], H)
    full = [ReferenceTokens(ref.k, ref.v) for ref in (loud, soft)]
    expected = (
        0.2 * attend_with_references(sdpa_attend, *own, base, H)
        + 0.5 * attend_with_references(sdpa_attend, *own, [*base, full[0]], H)
        + 0.3 * attend_with_references(sdpa_attend, *own, [*base, *full], H)
    )
    torch.testing.assert_close(out, expected, **TIGHT)
    assert len(attend.calls) == 3


def test_blended_references_of_one_weight_are_one_lerp(own, ref) -> None:
    halves = [ReferenceTokens(ref[0][:, s], ref[1][:, s], 0.4, WeightMode.OUTPUT_BLEND) for s in (slice(0, 3), slice(3, None))]
    whole = ReferenceTokens(*ref, 0.4, WeightMode.OUTPUT_BLEND)
    torch.testing.assert_close(
        attend_with_references(sdpa_attend, *own, halves, H), attend_with_references(sdpa_attend, *own, [whole], H), **TIGHT
    )


def test_one_reference_is_the_chain_of_one(own, ref) -> None:
    for mode in MODES:
        a = reference_attention(sdpa_attend, *own, *ref, H, weight=0.6, mode=mode)
        assert torch.equal(a, attend_with_references(sdpa_attend, *own, [ReferenceTokens(*ref, 0.6, mode)], H))


# I9, I10: mass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5])
def test_equal_references_share_one_weight(own, ref, count) -> None:
    one = attend_with_references(sdpa_attend, *own, [ReferenceTokens(*ref, 1.6)], H)
    many = attend_with_references(sdpa_attend, *own, [ReferenceTokens(*ref, 1.6 / count)] * count, H)
    torch.testing.assert_close(many, one, **TIGHT)
    shares = torch.full((M,), -log(count))
    by_mask = attend_with_references(sdpa_attend, *own, [ReferenceTokens(*ref, 1.6, log_mask=shares.double())] * count, H)
    torch.testing.assert_close(by_mask, one, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("weight", [0.05, 1.0, 40.0])
def test_logit_bias_stays_in_the_convex_hull(own, ref, weight) -> None:
    q, k, v = own
    refs = [ReferenceTokens(*ref, weight), *chain({WeightMode.LOGIT_BIAS: 2.0})]
    ones = [ReferenceTokens(r.k, torch.ones_like(r.v), r.weight) for r in refs]
    mass = attend_with_references(sdpa_attend, q, k, torch.ones_like(v), ones, H)
    torch.testing.assert_close(mass, torch.ones_like(mass), **TIGHT)
    out = attend_with_references(sdpa_attend, q, k, v, refs, H)
    rows = torch.cat((v, *(r.v.expand(B, -1, -1) for r in refs)), 1)
    assert (out <= rows.amax(1, keepdim=True) + 1e-12).all() and (out >= rows.amin(1, keepdim=True) - 1e-12).all()


def test_a_heavy_weight_tends_to_the_reference_alone(own, ref) -> None:
    out = reference_attention(sdpa_attend, *own, *ref, H, weight=1e14, mode=WeightMode.LOGIT_BIAS)
    alone = sdpa_attend(own[0], *(x.expand(B, -1, -1) for x in ref), H)
    torch.testing.assert_close(out, alone, rtol=0.0, atol=1e-10)


# I11: bias by mask, by channel, by merging log sums -----------------------------------------------------------------------


@pytest.mark.parametrize("d", [5, 8, 40, 63])
def test_channel_equals_mask_equals_merge(d) -> None:
    q, k, v = (rand(B, n, 2 * d, seed=s) for s, n in ((1, 4), (2, 9), (3, 9)))
    bias = rand(B, 9, seed=4)
    masked = sdpa_attend(q, k, v, 2, mask=bias[:, None, None])
    wide_q, wide_k, wide_v = biased_by_channel(q, k, v, bias, 2)
    wide = wide_q.shape[-1] // 2
    assert wide % 8 == 0 and d < wide <= d + 8 and wide_v.shape == wide_k.shape
    by_channel = sdpa_attend(wide_q, wide_k, wide_v, 2)
    assert by_channel.unflatten(-1, (2, -1))[..., d:].abs().max() == 0
    torch.testing.assert_close(without_channel(by_channel, 2, d), masked, **TIGHT)

    logits = split(q, 2) @ split(k, 2).transpose(-1, -2) / d**0.5 + bias[:, None, None]
    first, last = slice(0, 5), slice(5, None)  # two softmaxes merged by the sigmoid of their log sums
    parts = [torch.softmax(logits[..., s], -1) @ split(v, 2)[:, :, s] for s in (first, last)]
    share = torch.sigmoid(logits[..., last].logsumexp(-1) - logits[..., first].logsumexp(-1))[..., None]
    merged = torch.lerp(parts[0], parts[1], share).transpose(1, 2).flatten(2)
    torch.testing.assert_close(masked, merged, **TIGHT)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias_via", ["mask", "channel"])
def test_low_precision_stays_close(own, ref, dtype, atol, bias_via) -> None:
    keep = (torch.arange(M) % 3 > 0).float().log()
    wanted = reference_attention(sdpa_attend, *own, *ref, H, weight=2.0, mode=WeightMode.LOGIT_BIAS, log_mask=keep.double())
    low = [x.to(dtype) for x in (*own, *ref)]
    out = reference_attention(
        sdpa_attend, *low, H, weight=2.0, mode=WeightMode.LOGIT_BIAS, log_mask=keep.to(dtype), bias_via=bias_via
    )
    assert out.dtype == dtype and out.isfinite().all()
    torch.testing.assert_close(out.double(), wanted, rtol=0.0, atol=atol * wanted.abs().max().item())


def test_a_bias_never_grows_with_the_queries(own, ref) -> None:
    attend = Recorder()
    reference_attention(attend, *own, *ref, H, weight=2.0, mode=WeightMode.LOGIT_BIAS)
    assert attend.calls[0][3].shape == (1, 1, 1, N + M)
    per_row = torch.zeros(B, M).double()
    reference_attention(attend, *own, *ref, H, weight=2.0, mode=WeightMode.LOGIT_BIAS, log_mask=per_row)
    assert attend.calls[1][3].shape == (B, 1, 1, N + M)


# I12, I42: cross-attention, where own keys are text -----------------------------------------------------------------------


def test_repeated_text_is_undone_by_log_r(own, ref) -> None:
    q, text_k, text_v = own[0], own[1][:, :6], own[2][:, :6]
    once = reference_attention(sdpa_attend, q, text_k, text_v, *ref, H, weight=0.8, mode=WeightMode.LOGIT_BIAS)
    repeated = text_k.repeat(1, 3, 1), text_v.repeat(1, 3, 1)
    undone = torch.full((M,), log(3), dtype=torch.float64)
    out = reference_attention(sdpa_attend, q, *repeated, *ref, H, weight=0.8, mode=WeightMode.LOGIT_BIAS, log_mask=undone)
    torch.testing.assert_close(out, once, **TIGHT)
    wrong = reference_attention(sdpa_attend, q, *repeated, *ref, H, weight=0.8, mode=WeightMode.LOGIT_BIAS)
    assert (wrong - once).abs().max() > 1e-2


def test_concat_is_a_mix_of_the_two_attentions(own, ref) -> None:
    q, k, v = own
    k_ref, v_ref = (x.expand(B, -1, -1) for x in ref)
    share = probabilities(q, torch.cat((k, k_ref), 1))[..., N:].sum(-1, keepdim=True)
    assert ((share > 0) & (share < 1)).all()
    share = share.expand(-1, -1, -1, D).transpose(1, 2).flatten(2)
    mix = (1 - share) * sdpa_attend(q, k, v, H) + share * sdpa_attend(q, k_ref, v_ref, H)
    out = reference_attention(sdpa_attend, q, k, v, *ref, H, weight=1.0, mode=WeightMode.LOGIT_BIAS)
    torch.testing.assert_close(out, mix, **TIGHT)


# weights in tensors, joining, rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_per_row_equals_floats_row_by_row(own, ref, mode) -> None:
    weight = torch.tensor([0.3, 1.9], dtype=torch.float64)
    out = reference_attention(sdpa_attend, *own, *ref, H, weight=weight, mode=mode)
    for i in range(B):
        row = reference_attention(sdpa_attend, *(x[i : i + 1] for x in own), *ref, H, weight=weight[i].item(), mode=mode)
        torch.testing.assert_close(out[i : i + 1], row, **TIGHT)


@pytest.mark.parametrize("mode", [WeightMode.LOGIT_BIAS, WeightMode.OUTPUT_BLEND])
def test_a_tensor_weight_of_zero_reaches_the_plain_result(own, ref, mode) -> None:
    out = reference_attention(sdpa_attend, *own, *ref, H, weight=torch.zeros((), dtype=torch.float64), mode=mode)
    torch.testing.assert_close(out, sdpa_attend(*own, H), **TIGHT)


def test_joined_references_share_one_softmax(own) -> None:
    refs = chain({WeightMode.LOGIT_BIAS: 0.5, WeightMode.POST_SOFTMAX: 2.0, WeightMode.KEY_SCALE: 3.0})
    k, v, bias = concat_references(refs)
    torch.testing.assert_close(k, torch.cat((refs[0].k, refs[1].k, 3.0 * refs[2].k), 1), **TIGHT)
    torch.testing.assert_close(v, torch.cat((refs[0].v, 2.0 * refs[1].v, refs[2].v), 1), **TIGHT)
    torch.testing.assert_close(bias, torch.tensor([[log(0.5)] * 3 + [0.0] * 9], dtype=torch.float64), **TIGHT)
    out = attend_with_references(sdpa_attend, *own, refs, H)
    keys, values = torch.cat((own[1], k.expand(B, -1, -1)), 1), torch.cat((own[2], v.expand(B, -1, -1)), 1)
    bias = torch.cat((torch.zeros(1, N), bias), 1)[:, None, None]
    torch.testing.assert_close(out, sdpa_attend(own[0], keys, values, H, mask=bias), **TIGHT)


def test_a_single_reference_is_not_copied(ref) -> None:
    k, v, bias = concat_references([ReferenceTokens(*ref)])
    assert k.data_ptr() == ref[0].data_ptr() and v.data_ptr() == ref[1].data_ptr() and bias is None


def test_references_of_one_and_of_every_row_join(own, ref) -> None:
    shared, per_row = ReferenceTokens(*ref, 0.5), ReferenceTokens(rand(B, 4, C, seed=70), rand(B, 4, C, seed=71))
    out = attend_with_references(sdpa_attend, *own, [shared, per_row], H)
    for i in range(B):
        row = ReferenceTokens(per_row.k[i : i + 1], per_row.v[i : i + 1])
        alone = attend_with_references(sdpa_attend, *(x[i : i + 1] for x in own), [shared, row], H)
        torch.testing.assert_close(out[i : i + 1], alone, **TIGHT)


def test_the_batch_permutes(own, ref) -> None:
    a = reference_attention(sdpa_attend, *own, *ref, H, weight=0.6, mode=WeightMode.LOGIT_BIAS)
    b = reference_attention(sdpa_attend, *(x.flip(0) for x in own), *ref, H, weight=0.6, mode=WeightMode.LOGIT_BIAS)
    torch.testing.assert_close(a.flip(0), b, **TIGHT)


def test_inputs_are_not_written_to(own, ref) -> None:
    before = [x.clone() for x in (*own, *ref)]
    for mode in MODES:
        reference_attention(sdpa_attend, *own, *ref, H, weight=0.6, mode=mode, log_mask=torch.zeros(M).double())
    assert all(torch.equal(x, y) for x, y in zip(before, (*own, *ref), strict=True))


def test_query_mask_is_exact_at_both_ends() -> None:
    plain, injected = rand(B, N, C, seed=1, dtype=torch.float32), rand(B, N, C, seed=2, dtype=torch.float32)
    mask = (torch.arange(N) % 3 / 2)[None]
    out = blend_queries(plain, injected, mask)
    assert torch.equal(out[:, mask[0] == 0], plain[:, mask[0] == 0])
    assert torch.equal(out[:, mask[0] == 1], injected[:, mask[0] == 1])
    torch.testing.assert_close(out[:, 1], (plain[:, 1] + injected[:, 1]) / 2)


# refusals -----------------------------------------------------------------------------------------------------------------


def test_refusals_name_both_values(own, ref) -> None:
    with pytest.raises(ValueError, match=r"\[1, 7, 15\] and \[1, 6, 15\]"):
        ReferenceTokens(ref[0], ref[1][:, :6])
    with pytest.raises(ValueError, match="weighs 5 tokens, but the reference has 7"):
        ReferenceTokens(*ref, log_mask=torch.zeros(5))
    with pytest.raises(ValueError, match="0 or more; got -0.5"):
        ReferenceTokens(*ref, -0.5)
    with pytest.raises(ValueError, match="0 or more; got nan"):
        ReferenceTokens(*ref, float("nan"))
    blended = [ReferenceTokens(*ref, w, WeightMode.OUTPUT_BLEND) for w in (torch.tensor(0.3), 0.4)]
    with pytest.raises(ValueError, match="2 references are blended"):
        attend_with_references(sdpa_attend, *own, blended, H)


def test_log_zero_fits_half_precision() -> None:
    assert torch.tensor(LOG_ZERO, dtype=torch.float16).isfinite() and torch.tensor(LOG_ZERO, dtype=torch.float64).exp() == 0


# the dial ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odds", [0.0, SELF_ODDS, STORY_ODDS, CONCEPT_ODDS])
def test_the_dial_goes_from_nothing_to_all_and_never_back(odds):
    turned = [dial(i / 100, "a node", odds) for i in range(101)]
    assert turned[0] == dial(0, "a node", odds) == 0 and turned[100] == dial(1, "a node", odds) == 1
    assert all(a < b for a, b in zip(turned, turned[1:]))


def test_without_odds_the_dial_is_the_strength_itself():
    assert [dial(s, "a node") for s in (0.1, 0.35, 0.8)] == [0.1, 0.35, 0.8]


@pytest.mark.parametrize("odds", [0.5, 2.0, 280.0])
def test_half_the_dial_is_half_of_what_the_softmax_gives(own, odds):
    """Equal logits, as many tokens, each counted `odds` times: the reference stands to the own tokens as odds to 1."""
    q, k, v = own
    ref = torch.zeros(1, k.shape[1], C, dtype=k.dtype)
    log_mask = torch.full((k.shape[1],), log(odds), dtype=k.dtype)

    def heard(strength):
        weight = dial(strength, "a node", odds)
        return reference_attention(sdpa_attend, q, 0 * k, 0 * v, ref, ref + 1, H, weight=weight, mode=WeightMode.LOGIT_BIAS,
                                   log_mask=log_mask)
    for strength in (0.25, 0.5, 0.75):
        torch.testing.assert_close(heard(strength), strength * heard(1.0), **TIGHT)


@pytest.mark.parametrize("node", ["KindredMaskedSelfAttnInject", "KindredCrossAttnDetailInject"])
def test_a_page_that_promises_an_even_dial_names_what_it_was_measured_on(node):
    """The odds are the miniature's; only there is evenness a measurement."""
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text("utf-8")
    told = page.partition("- **strength**")[2].partition("\n- **")[0]
    assert "evenly" in told and "miniature" in told and "measured" in told


@pytest.mark.parametrize("strength", [-0.01, 1.01, float("nan"), float("inf")])
def test_the_dial_has_two_ends(strength):
    with pytest.raises(ValueError, match=f"a node: strength is {strength}. Give a number from 0 .* to 1"):
        dial(strength, "a node")
