"""Laws of attention with references: method invariants I1, I2, I7, I8, I11, I12, I42, on small CPU tensors, most in float64."""

from __future__ import annotations

from math import log

import pytest
import torch
from kindred.models.attention.attend import (
    LOG_ZERO,
    ReferenceTokens,
    WeightMode,
    attend_with_references,
    biased_by_channel,
    blend_queries,
    concat_references,
    reference_attention,
    sdpa_attend,
    without_channel,
)
from small_attention import (
    MODES,
    TIGHT,
    B,
    C,
    D,
    H,
    M,
    N,
    Recorder,
    chain,
    probabilities,
    rand,
    read,
    split,
)
from torch import Tensor


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
    out = reference_attention(
        attend, q, k, v, k_ref, v_ref, H, weight=0.0, mode=mode, log_mask=torch.zeros(M)
    )
    assert torch.equal(out, sdpa_attend(q, k, v, H))
    (call,) = attend.calls
    assert (
        call[0] is q and call[1] is k and call[2] is v and call[3] is None
    )  # not one operation more


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens_is_the_plain_call(own, mode) -> None:
    attend = Recorder()
    none = torch.zeros(1, 0, C, dtype=torch.float64)
    assert torch.equal(
        reference_attention(attend, *own, none, none, H, weight=2.0, mode=mode),
        sdpa_attend(*own, H),
    )
    assert len(attend.calls) == 1 and attend.calls[0][1] is own[1]


def test_a_mask_of_zeros_is_no_reference(own, ref) -> None:
    out = reference_attention(
        sdpa_attend,
        *own,
        *ref,
        H,
        weight=1.0,
        mode=WeightMode.LOGIT_BIAS,
        log_mask=torch.full((M,), -torch.inf),
    )
    torch.testing.assert_close(out, sdpa_attend(*own, H), **TIGHT)


def test_silent_references_leave_the_others_alone(own, ref) -> None:
    heard = ReferenceTokens(*ref, 1.5)
    mute = ReferenceTokens(
        rand(1, 3, C, seed=8), rand(1, 3, C, seed=9), 0.0, WeightMode.POST_SOFTMAX
    )
    a = attend_with_references(sdpa_attend, *own, [mute, heard], H)
    assert torch.equal(a, attend_with_references(sdpa_attend, *own, [heard], H))


# I7, I8: masks and order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_via", ["mask", "channel"])
@pytest.mark.parametrize("mode", MODES)
def test_minus_infinity_equals_gathering_and_multiplying_does_not(own, ref, mode, bias_via) -> None:
    keep = torch.tensor([True, False, True, True, False, False, True])
    k_ref, v_ref = ref
    gathered = reference_attention(
        sdpa_attend,
        *own,
        k_ref[:, keep],
        v_ref[:, keep],
        H,
        weight=0.7,
        mode=mode,
        bias_via=bias_via,
    )
    masked = reference_attention(
        sdpa_attend,
        *own,
        k_ref,
        v_ref,
        H,
        weight=0.7,
        mode=mode,
        log_mask=keep.double().log(),
        bias_via=bias_via,
    )
    torch.testing.assert_close(masked, gathered, **TIGHT)
    zeroed = keep.double()[:, None]
    multiplied = reference_attention(
        sdpa_attend, *own, k_ref * zeroed, v_ref * zeroed, H, weight=0.7, mode=mode
    )
    assert (multiplied - gathered).abs().max() > 1e-2  # zeroed keys still take exp(0)


@pytest.mark.parametrize("weight", [1.0, 2.0, torch.zeros(()), torch.tensor([0.0, 1.0])])
def test_no_bias_is_infinite(own, ref, weight) -> None:
    """A kernel's row of -inf alone would be a NaN, and -inf times the zero of a padded channel is one."""
    for log_mask in (None, torch.full((M,), -torch.inf)):
        attend = Recorder()
        reference_attention(
            attend, *own, *ref, H, weight=weight, mode=WeightMode.LOGIT_BIAS, log_mask=log_mask
        )
        for bias in (
            attend.calls[0][3],
            concat_references([ReferenceTokens(*ref, weight, log_mask=log_mask)])[2],
        ):
            assert bias is None or (bias.isfinite().all() and bias.min() >= LOG_ZERO)


def test_a_mask_per_row_reads_its_own_row(own, ref) -> None:
    soft = rand(B, M, seed=6).sigmoid()
    out = reference_attention(
        sdpa_attend, *own, *ref, H, weight=2.0, mode=WeightMode.LOGIT_BIAS, log_mask=soft.log()
    )
    for i in range(B):
        row = reference_attention(
            sdpa_attend,
            *(x[i : i + 1] for x in own),
            *ref,
            H,
            weight=2.0,
            mode=WeightMode.LOGIT_BIAS,
            log_mask=soft[i].log(),
        )
        torch.testing.assert_close(out[i : i + 1], row, **TIGHT)


@pytest.mark.parametrize("mode", MODES)
def test_order_of_tokens_is_irrelevant(own, ref, mode) -> None:
    order = torch.randperm(M, generator=torch.Generator().manual_seed(7))
    soft = rand(M, seed=6).sigmoid().log()
    a = reference_attention(sdpa_attend, *own, *ref, H, weight=0.6, mode=mode, log_mask=soft)
    b = reference_attention(
        sdpa_attend,
        *own,
        ref[0][:, order],
        ref[1][:, order],
        H,
        weight=0.6,
        mode=mode,
        log_mask=soft[order],
    )
    torch.testing.assert_close(a, b, **TIGHT)


def test_order_of_references_is_irrelevant_in_a_mixed_chain(own) -> None:
    refs = chain(dict(zip(MODES, (0.4, 1.3, 0.8, 0.6), strict=True)))
    refs.append(
        ReferenceTokens(
            rand(B, 4, C, seed=41), rand(B, 4, C, seed=42), 0.9, WeightMode.OUTPUT_BLEND
        )
    )
    a = attend_with_references(sdpa_attend, *own, refs, H)
    b = attend_with_references(sdpa_attend, *own, refs[::-1], H)
    torch.testing.assert_close(a, b, **TIGHT)


def test_blended_references_compose_by_weight(own) -> None:
    loud = ReferenceTokens(
        rand(1, 4, C, seed=50), rand(1, 4, C, seed=51), 0.8, WeightMode.OUTPUT_BLEND
    )
    soft = ReferenceTokens(
        rand(1, 4, C, seed=60), rand(1, 4, C, seed=61), 0.3, WeightMode.OUTPUT_BLEND
    )
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
    halves = [
        ReferenceTokens(ref[0][:, s], ref[1][:, s], 0.4, WeightMode.OUTPUT_BLEND)
        for s in (slice(0, 3), slice(3, None))
    ]
    whole = ReferenceTokens(*ref, 0.4, WeightMode.OUTPUT_BLEND)
    torch.testing.assert_close(
        attend_with_references(sdpa_attend, *own, halves, H),
        attend_with_references(sdpa_attend, *own, [whole], H),
        **TIGHT,
    )


def test_one_reference_is_the_chain_of_one(own, ref) -> None:
    for mode in MODES:
        a = reference_attention(sdpa_attend, *own, *ref, H, weight=0.6, mode=mode)
        assert torch.equal(
            a, attend_with_references(sdpa_attend, *own, [ReferenceTokens(*ref, 0.6, mode)], H)
        )


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
    first, last = (
        slice(0, 5),
        slice(5, None),
    )  # two softmaxes merged by the sigmoid of their log sums
    parts = [torch.softmax(logits[..., s], -1) @ split(v, 2)[:, :, s] for s in (first, last)]
    share = torch.sigmoid(logits[..., last].logsumexp(-1) - logits[..., first].logsumexp(-1))[
        ..., None
    ]
    merged = torch.lerp(parts[0], parts[1], share).transpose(1, 2).flatten(2)
    torch.testing.assert_close(masked, merged, **TIGHT)


@pytest.mark.parametrize(
    "dtype, atol", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("bias_via", ["mask", "channel"])
def test_low_precision_stays_close(own, ref, dtype, atol, bias_via) -> None:
    keep = (torch.arange(M) % 3 > 0).float().log()
    wanted = reference_attention(
        sdpa_attend, *own, *ref, H, weight=2.0, mode=WeightMode.LOGIT_BIAS, log_mask=keep.double()
    )
    low = [x.to(dtype) for x in (*own, *ref)]
    out = reference_attention(
        sdpa_attend,
        *low,
        H,
        weight=2.0,
        mode=WeightMode.LOGIT_BIAS,
        log_mask=keep.to(dtype),
        bias_via=bias_via,
    )
    assert out.dtype == dtype and out.isfinite().all()
    torch.testing.assert_close(
        out.double(), wanted, rtol=0.0, atol=atol * wanted.abs().max().item()
    )


def test_a_bias_never_grows_with_the_queries(own, ref) -> None:
    attend = Recorder()
    reference_attention(attend, *own, *ref, H, weight=2.0, mode=WeightMode.LOGIT_BIAS)
    assert attend.calls[0][3].shape == (1, 1, 1, N + M)
    per_row = torch.zeros(B, M).double()
    reference_attention(
        attend, *own, *ref, H, weight=2.0, mode=WeightMode.LOGIT_BIAS, log_mask=per_row
    )
    assert attend.calls[1][3].shape == (B, 1, 1, N + M)


# I12, I42: cross-attention, where own keys are text -----------------------------------------------------------------------


def test_repeated_text_is_undone_by_log_r(own, ref) -> None:
    q, text_k, text_v = own[0], own[1][:, :6], own[2][:, :6]
    once = reference_attention(
        sdpa_attend, q, text_k, text_v, *ref, H, weight=0.8, mode=WeightMode.LOGIT_BIAS
    )
    repeated = text_k.repeat(1, 3, 1), text_v.repeat(1, 3, 1)
    undone = torch.full((M,), log(3), dtype=torch.float64)
    out = reference_attention(
        sdpa_attend, q, *repeated, *ref, H, weight=0.8, mode=WeightMode.LOGIT_BIAS, log_mask=undone
    )
    torch.testing.assert_close(out, once, **TIGHT)
    wrong = reference_attention(
        sdpa_attend, q, *repeated, *ref, H, weight=0.8, mode=WeightMode.LOGIT_BIAS
    )
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


# joining, rows ----------------------------------------------------------------------------------------------------------


def test_joined_references_share_one_softmax(own) -> None:
    refs = chain(
        {WeightMode.LOGIT_BIAS: 0.5, WeightMode.POST_SOFTMAX: 2.0, WeightMode.KEY_SCALE: 3.0}
    )
    k, v, bias = concat_references(refs)
    torch.testing.assert_close(k, torch.cat((refs[0].k, refs[1].k, 3.0 * refs[2].k), 1), **TIGHT)
    torch.testing.assert_close(v, torch.cat((refs[0].v, 2.0 * refs[1].v, refs[2].v), 1), **TIGHT)
    torch.testing.assert_close(
        bias, torch.tensor([[log(0.5)] * 3 + [0.0] * 9], dtype=torch.float64), **TIGHT
    )
    out = attend_with_references(sdpa_attend, *own, refs, H)
    keys, values = (
        torch.cat((own[1], k.expand(B, -1, -1)), 1),
        torch.cat((own[2], v.expand(B, -1, -1)), 1),
    )
    bias = torch.cat((torch.zeros(1, N), bias), 1)[:, None, None]
    torch.testing.assert_close(out, sdpa_attend(own[0], keys, values, H, mask=bias), **TIGHT)


def test_a_single_reference_is_not_copied(ref) -> None:
    k, v, bias = concat_references([ReferenceTokens(*ref)])
    assert k.data_ptr() == ref[0].data_ptr() and v.data_ptr() == ref[1].data_ptr() and bias is None


def test_references_of_one_and_of_every_row_join(own, ref) -> None:
    shared, per_row = (
        ReferenceTokens(*ref, 0.5),
        ReferenceTokens(rand(B, 4, C, seed=70), rand(B, 4, C, seed=71)),
    )
    out = attend_with_references(sdpa_attend, *own, [shared, per_row], H)
    for i in range(B):
        row = ReferenceTokens(per_row.k[i : i + 1], per_row.v[i : i + 1])
        alone = attend_with_references(sdpa_attend, *(x[i : i + 1] for x in own), [shared, row], H)
        torch.testing.assert_close(out[i : i + 1], alone, **TIGHT)


def test_the_batch_permutes(own, ref) -> None:
    a = reference_attention(sdpa_attend, *own, *ref, H, weight=0.6, mode=WeightMode.LOGIT_BIAS)
    b = reference_attention(
        sdpa_attend, *(x.flip(0) for x in own), *ref, H, weight=0.6, mode=WeightMode.LOGIT_BIAS
    )
    torch.testing.assert_close(a.flip(0), b, **TIGHT)


def test_inputs_are_not_written_to(own, ref) -> None:
    before = [x.clone() for x in (*own, *ref)]
    for mode in MODES:
        reference_attention(
            sdpa_attend, *own, *ref, H, weight=0.6, mode=mode, log_mask=torch.zeros(M).double()
        )
    assert all(torch.equal(x, y) for x, y in zip(before, (*own, *ref), strict=True))


def test_query_mask_is_exact_at_both_ends() -> None:
    plain, injected = (
        rand(B, N, C, seed=1, dtype=torch.float32),
        rand(B, N, C, seed=2, dtype=torch.float32),
    )
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
    assert (
        torch.tensor(LOG_ZERO, dtype=torch.float16).isfinite()
        and torch.tensor(LOG_ZERO, dtype=torch.float64).exp() == 0
    )
