"""Laws of what a reference's weight does, and of the dial that turns it: method invariants I3-I5, I9, I10."""

from __future__ import annotations

from math import log

import pytest
import torch
from checkout import ROOT
from kindred.models.attention.references import ReferenceTokens, attend_with_references
from kindred.models.attention.weights import CONCEPT_ODDS, SELF_ODDS, STORY_ODDS, WeightMode, dial
from small_attention import (
    MODES,
    TIGHT,
    B,
    C,
    H,
    M,
    N,
    Recorder,
    chain,
    probabilities,
    rand,
    read,
    reference_attention,
    sdpa_attend,
)
from torch import Tensor


@pytest.fixture
def own() -> tuple[Tensor, Tensor, Tensor]:
    return rand(B, N, C, seed=1), rand(B, N, C, seed=2), rand(B, N, C, seed=3)


@pytest.fixture
def ref() -> tuple[Tensor, Tensor]:
    return rand(1, M, C, seed=4), rand(1, M, C, seed=5)


# I3, I4, I5: what the weight does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_weight_one_is_plain_concat_without_a_mask(own, ref, mode) -> None:
    q, k, v = own
    k_ref, v_ref = ref
    attend = Recorder()
    out = reference_attention(attend, q, k, v, k_ref, v_ref, H, weight=1.0, mode=mode)
    keys, values = (
        torch.cat((k, k_ref.expand(B, -1, -1)), 1),
        torch.cat((v, v_ref.expand(B, -1, -1)), 1),
    )
    torch.testing.assert_close(out, read(probabilities(q, keys), values), **TIGHT)
    assert len(attend.calls) == 1 and attend.calls[0][3] is None


@pytest.mark.parametrize("weight", [0.2, 0.5, 1.7, 3.0])
def test_logit_bias_scales_the_probabilities_and_renormalises(own, ref, weight) -> None:
    q, k, v = own
    k_ref, v_ref = (x.expand(B, -1, -1) for x in ref)
    p = probabilities(q, torch.cat((k, k_ref), 1))
    p = torch.cat((p[..., :N], weight * p[..., N:]), -1)
    p = p / p.sum(-1, keepdim=True)
    out = reference_attention(
        sdpa_attend, q, k, v, *ref, H, weight=weight, mode=WeightMode.LOGIT_BIAS
    )
    torch.testing.assert_close(out, read(p, torch.cat((v, v_ref), 1)), **TIGHT)


@pytest.mark.parametrize("weight", [0.2, 1.7])
def test_post_softmax_scales_the_probabilities_only(own, ref, weight) -> None:
    q, k, v = own
    k_ref, v_ref = (x.expand(B, -1, -1) for x in ref)
    p = probabilities(q, torch.cat((k, k_ref), 1))
    p = torch.cat((p[..., :N], weight * p[..., N:]), -1)
    out = reference_attention(
        sdpa_attend, q, k, v, *ref, H, weight=weight, mode=WeightMode.POST_SOFTMAX
    )
    torch.testing.assert_close(out, read(p, torch.cat((v, v_ref), 1)), **TIGHT)


@pytest.mark.parametrize("weight", [0.2, 1.7])
def test_key_scale_scales_the_logits(own, ref, weight) -> None:
    q, k, v = own
    k_ref, v_ref = (x.expand(B, -1, -1) for x in ref)
    out = reference_attention(
        sdpa_attend, q, k, v, *ref, H, weight=weight, mode=WeightMode.KEY_SCALE
    )
    p = probabilities(q, torch.cat((k, weight * k_ref), 1))
    torch.testing.assert_close(out, read(p, torch.cat((v, v_ref), 1)), **TIGHT)


@pytest.mark.parametrize("weight", [0.3, 0.9, 2.0])
def test_output_blend_is_a_lerp(own, ref, weight) -> None:
    full = reference_attention(sdpa_attend, *own, *ref, H, weight=1.0, mode=WeightMode.OUTPUT_BLEND)
    plain = sdpa_attend(*own, H)
    out = reference_attention(
        sdpa_attend, *own, *ref, H, weight=weight, mode=WeightMode.OUTPUT_BLEND
    )
    torch.testing.assert_close(out, (1 - weight) * plain + weight * full, **TIGHT)


@pytest.mark.parametrize("weight", [0.1, 0.5, 2.0, 3.0])
def test_an_identical_reference(own, weight) -> None:
    q, k, v = own
    plain = sdpa_attend(q, k, v, H)
    out = {
        mode: reference_attention(sdpa_attend, q, k, v, k, v, H, weight=weight, mode=mode)
        for mode in MODES
    }
    torch.testing.assert_close(out[WeightMode.LOGIT_BIAS], plain, **TIGHT)
    torch.testing.assert_close(out[WeightMode.OUTPUT_BLEND], plain, **TIGHT)
    torch.testing.assert_close(out[WeightMode.POST_SOFTMAX], plain * (1 + weight) / 2, **TIGHT)
    assert (out[WeightMode.KEY_SCALE] - plain).abs().max() > 1e-2


# I9, I10: mass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5])
def test_equal_references_share_one_weight(own, ref, count) -> None:
    one = attend_with_references(sdpa_attend, *own, [ReferenceTokens(*ref, 1.6)], H)
    many = attend_with_references(
        sdpa_attend, *own, [ReferenceTokens(*ref, 1.6 / count)] * count, H
    )
    torch.testing.assert_close(many, one, **TIGHT)
    shares = torch.full((M,), -log(count))
    by_mask = attend_with_references(
        sdpa_attend, *own, [ReferenceTokens(*ref, 1.6, log_mask=shares.double())] * count, H
    )
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
    assert (out <= rows.amax(1, keepdim=True) + 1e-12).all() and (
        out >= rows.amin(1, keepdim=True) - 1e-12
    ).all()


def test_a_heavy_weight_tends_to_the_reference_alone(own, ref) -> None:
    out = reference_attention(sdpa_attend, *own, *ref, H, weight=1e14, mode=WeightMode.LOGIT_BIAS)
    alone = sdpa_attend(own[0], *(x.expand(B, -1, -1) for x in ref), H)
    torch.testing.assert_close(out, alone, rtol=0.0, atol=1e-10)


# the dial ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odds", [0.0, SELF_ODDS, STORY_ODDS, CONCEPT_ODDS])
def test_the_dial_goes_from_nothing_to_all_and_never_back(odds):
    turned = [dial(i / 100, "a node", odds) for i in range(101)]
    assert turned[0] == dial(0, "a node", odds) == 0 and turned[100] == dial(1, "a node", odds) == 1
    assert all(a < b for a, b in zip(turned, turned[1:]))


@pytest.mark.parametrize("odds", [0.0, SELF_ODDS, STORY_ODDS, CONCEPT_ODDS])
def test_past_1_the_dial_is_the_strength_itself_and_up_to_1_as_without_a_past(odds):
    assert [dial(s, "a node", odds, 2.0) for s in (1, 1.25, 1.5, 2)] == [1, 1.25, 1.5, 2]
    for i in range(101):
        assert dial(i / 100, "a node", odds, 2.0) == dial(i / 100, "a node", odds)


@pytest.mark.parametrize("strength", [-0.01, 2.01, float("nan")])
def test_a_dial_past_1_has_an_end_too(strength):
    with pytest.raises(ValueError, match=f"strength is {strength}. Give a number from 0 .* to 2;"):
        dial(strength, "a node", CONCEPT_ODDS, 2.0)


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
        return reference_attention(
            sdpa_attend,
            q,
            0 * k,
            0 * v,
            ref,
            ref + 1,
            H,
            weight=weight,
            mode=WeightMode.LOGIT_BIAS,
            log_mask=log_mask,
        )

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
    with pytest.raises(
        ValueError, match=f"a node: strength is {strength}. Give a number from 0 .* to 1"
    ):
        dial(strength, "a node")
