"""Laws of picture queries that read references beside text and own picture (method.md 4.1)."""

from __future__ import annotations

from dataclasses import replace

import torch
from kindred.models.attention.attend import (
    FusedAttend,
    ReferenceTokens,
    WeightMode,
    attend_with_references,
    sdpa_attend,
)
from kindred.models.attention.joint import TextShare, attend_picture
from small_attention import TIGHT, Recorder
from small_joint import (
    BOUND,
    KEPT,
    LAW,
    PLAIN,
    SETS,
    WAYS,
    WEIGHTS,
    B,
    C,
    D,
    F,
    H,
    P,
    T,
    all_sides,
    both_ways,
    cast,
    formula,
    itself,
    logits,
    own,
    ref,
)
from torch import Tensor

# what it is ---------------------------------------------------------------------------------------


@both_ways
@all_sides
@LAW("name", SETS)
def test_the_kept_share_is_its_formula(way, sides, name) -> None:
    q, k, v, picture = own(sides)
    found = attend_picture(WAYS[way], q, k, v, H, picture, [SETS[name]], KEPT)
    torch.testing.assert_close(found, formula(q, k, v, picture, SETS[name]), **TIGHT)


@all_sides
@LAW("name", SETS)
def test_plain_is_one_softmax_over_all(sides, name) -> None:
    q, k, v, picture = own(sides)
    found = attend_picture(sdpa_attend, q, k, v, H, picture, [SETS[name]], PLAIN)
    assert torch.equal(found, attend_with_references(sdpa_attend, q, k, v, [SETS[name]], H))


@both_ways
@LAW("mode", WeightMode)
@LAW("others", [[], [ref(0.7, 8)], [ref(0.5, 8, mode=WeightMode.OUTPUT_BLEND)]], ids=str)
def test_a_weight_means_what_it_means_in_a_picture_alone(way, mode, others) -> None:
    """D (4): outside the text's share the picture and its references are attended to as if there were no text."""
    q, k, v, picture = own()
    tokens = [ref(0.6, mode=mode), *others]
    alone = attend_with_references(sdpa_attend, q, k[:, picture], v[:, picture], tokens, H)
    text = sdpa_attend(q, k[:, :T], v[:, :T], H)
    share = logits(q, k).softmax(-1)[..., :T].sum(-1).transpose(1, 2)[..., None]
    wanted = share * text.unflatten(-1, (H, D)) + (1 - share) * alone.unflatten(-1, (H, D))
    found = attend_picture(WAYS[way], q, k, v, H, picture, tokens, KEPT)
    torch.testing.assert_close(found, wanted.flatten(2), **TIGHT)


@both_ways
@LAW("dtype", BOUND, ids=str)
@LAW("weight", WEIGHTS)
@LAW("scale", [1.0, 30.0])
def test_any_precision_is_close_and_any_weight_finite(way, dtype, weight, scale) -> None:
    """Queries 30 times as large make one token of each softmax hold nearly all."""
    q, k, v, picture = own(dtype=dtype)
    q, tokens = q * scale, cast(ref(weight), dtype)
    found = attend_picture(WAYS[way], q, k, v, H, picture, [tokens], KEPT)
    wanted = formula(*(x.double() for x in (q, k, v)), picture, cast(tokens, torch.float64))
    assert found.dtype is dtype and torch.isfinite(found).all()
    assert (found.double() - wanted).abs().max() <= BOUND[dtype] * (
        scale if dtype != torch.float64 else 1
    )


# I1, I21: nothing heard ---------------------------------------------------------------------------


SILENT = {
    "no bank": [],
    "weight 0": [ref(0.0)],
    "no tokens": [ReferenceTokens(torch.zeros(1, 0, C).double(), torch.zeros(1, 0, C).double())],
}


@both_ways
@LAW("share", TextShare)
@LAW("name", SILENT)
@LAW("masked", [False, True])
def test_nothing_heard_is_the_hosts_own_call(way, share, name, masked) -> None:
    q, k, v, picture = own()
    mask = torch.ones(1, 1, T + P, dtype=torch.bool) if masked else None
    calls = Recorder()
    attend = FusedAttend(calls) if way == "by sums" else calls
    found = attend_picture(attend, q, k, v, H, picture, SILENT[name], share, mask)
    (called,) = calls.calls
    assert torch.equal(found, sdpa_attend(q, k, v, H, mask))
    assert all(x is y for x, y in zip(called, (q, k, v, mask), strict=True))


@both_ways
@LAW("share", TextShare)
def test_a_silent_reference_leaves_the_others_alone(way, share) -> None:
    q, k, v, picture = own()
    one, more = [ref(2.0)], [ref(0.0, 8), ref(2.0), *SILENT["no tokens"]]
    found = [attend_picture(WAYS[way], q, k, v, H, picture, t, share) for t in (one, more)]
    assert torch.equal(*found)


# I47, I48, I10: the text's share ------------------------------------------------------------------


@both_ways
@all_sides
@LAW("weight", WEIGHTS)
def test_the_picture_as_its_own_reference_changes_nothing(way, sides, weight) -> None:
    q, k, v, picture = own(sides)
    found = attend_picture(WAYS[way], q, k, v, H, picture, [itself(k, v, picture, weight)], KEPT)
    torch.testing.assert_close(found, sdpa_attend(q, k, v, H), **TIGHT)


def test_plain_concatenation_dims_the_text_and_only_the_text() -> None:
    """Why KEPT is there: the same differs beside a text and agrees without one."""
    q, k, v, picture = own()
    plain = attend_picture(sdpa_attend, q, k, v, H, picture, [itself(k, v, picture)], PLAIN)
    assert (plain - sdpa_attend(q, k, v, H)).abs().max() > 1e-2
    k, v, picture = k[:, picture], v[:, picture], slice(0, P)
    plain = attend_picture(sdpa_attend, q, k, v, H, picture, [itself(k, v, picture)], PLAIN)
    torch.testing.assert_close(plain, sdpa_attend(q, k, v, H), **TIGHT)


@both_ways
@all_sides
@LAW("mode", WeightMode)
@LAW("weight", [1e-6, 0.5, 1.0, 40.0])
def test_every_rows_text_keeps_its_mass(way, sides, mode, weight) -> None:
    q, k, v, picture = own(sides)
    marks = torch.ones_like(v)
    marks[:, picture] = 0
    tokens = replace(ref(weight, mode=mode), v=torch.zeros(1, F, C).double())
    mass = sdpa_attend(q, k, marks, H)
    found = attend_picture(WAYS[way], q, k, marks, H, picture, [tokens], KEPT)
    torch.testing.assert_close(found, mass, **TIGHT)
    if sides != "no text" and mode is not WeightMode.KEY_SCALE and weight >= 0.5:
        plain = attend_picture(WAYS[way], q, k, marks, H, picture, [tokens], PLAIN)
        assert mode is WeightMode.OUTPUT_BLEND and weight > 1 or (plain < mass - 1e-3).all()


@both_ways
@LAW("weight", WEIGHTS)
def test_no_channel_leaves_what_the_values_span(way, weight) -> None:
    q, k, v, picture = own()
    tokens = ref(weight)
    found = attend_picture(WAYS[way], q, k, v, H, picture, [tokens], KEPT)
    spanned = torch.cat((v, tokens.v.expand(B, -1, -1)), 1)
    assert (found <= spanned.amax(1, keepdim=True) + 1e-12).all()
    assert (found >= spanned.amin(1, keepdim=True) - 1e-12).all()


# I51, I8, I9 --------------------------------------------------------------------------------------


@both_ways
@LAW("share", TextShare)
def test_keys_scaled_to_0_are_still_read(way, share) -> None:
    """A key of zeros takes exp(0): scaling is no removal, and a scale of 1 no change."""
    q, k, v, picture = own()

    def read(**more: object) -> Tensor:
        return attend_picture(WAYS[way], q, k, v, H, picture, [ref(**more)], share)

    none = torch.tensor(0.0).double()
    zeroed = read(weight=none, mode=WeightMode.KEY_SCALE)
    assert (zeroed - sdpa_attend(q, k, v, H)).abs().max() > 1e-2
    assert torch.equal(read(mode=WeightMode.KEY_SCALE), read())


@both_ways
@LAW("share", TextShare)
def test_the_order_of_references_does_not_matter(way, share) -> None:
    q, k, v, picture = own()
    tokens = [
        ref(w, 10 + 2 * i, mode=m) for i, (w, m) in enumerate(zip((2.0, 0.5, 0.3, 0.6), WeightMode))
    ]
    tokens.append(ref(0.2, 30, mode=WeightMode.OUTPUT_BLEND))
    there, back = (
        attend_picture(WAYS[way], q, k, v, H, picture, t, share) for t in (tokens, tokens[::-1])
    )
    torch.testing.assert_close(there, back, **TIGHT)


@both_ways
@LAW("share", TextShare)
@LAW("count", [2, 5])
def test_equal_references_of_a_part_of_the_weight_are_one_of_all(way, share, count) -> None:
    q, k, v, picture = own()
    one = attend_picture(WAYS[way], q, k, v, H, picture, [ref(1.7)], share)
    parts = attend_picture(WAYS[way], q, k, v, H, picture, [ref(1.7 / count)] * count, share)
    torch.testing.assert_close(one, parts, **TIGHT)
