"""Joint calls as the host makes them: its masks, whose queries read, what it costs, several references (method.md 4.1)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from counting import Counting
from kindred.models.attention.fused import FusedAttend, product_attend
from kindred.models.attention.joint import PictureReader, TextShare, attend_picture, attend_rows
from kindred.models.attention.parts import References, attend_group
from kindred.models.attention.references import ReferenceTokens, attend_with_references
from kindred.models.network.call import AttnCall, Part, Role
from small_attention import TIGHT, Recorder, rand, sdpa_attend
from small_joint import (
    KEPT,
    LAW,
    PLAIN,
    SETS,
    WAYS,
    B,
    C,
    D,
    F,
    H,
    P,
    T,
    both_ways,
    formula,
    logs,
    own,
    ref,
)
from torch import Tensor
from torch.nn.functional import pad

# the host's own mask ------------------------------------------------------------------------------


def host_masks() -> dict[str, Tensor]:
    """Shapes that the host's transformers were seen to give; the last two text tokens are pads, in one row of the batch or in all."""
    pads = torch.zeros(B, T + P).double()
    pads[0, T - 2 : T] = -torch.inf
    every = pads[:1].expand(B, -1).contiguous()
    rows = every[:, None].expand(B, P, -1).clone()
    rows[:, 0, T] = -1.5
    return {
        "(b,1,1,m)": pads[:, None, None],
        "(b,1,m)": pads[:, None],
        "(1,1,m)": every[:1, None],
        "(n,m)": rows[0],
        "(b,1,n,m)": rows[:, None],
        "(b,n,m)": rows,
        "bool": (pads == 0)[:, None, None],
        "least": pads.clamp(min=torch.finfo(torch.float32).min)[:, None],
    }


def four(mask: Tensor) -> Tensor:
    """[b 1 n m] as the host reads it."""
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)
    mask = mask[None] if mask.ndim == 2 else mask
    return mask[:, None] if mask.ndim == 3 else mask


@both_ways
@LAW("name", host_masks())
@LAW("tokens", SETS)
def test_a_mask_of_the_hosts_is_obeyed(way, name, tokens) -> None:
    q, k, v, picture = own()
    mask, tokens = host_masks()[name], SETS[tokens]
    kept = attend_picture(WAYS[way], q, k, v, H, picture, [tokens], KEPT, mask)
    torch.testing.assert_close(kept, formula(q, k, v, picture, tokens, four(mask)), **TIGHT)
    plain = attend_picture(WAYS[way], q, k, v, H, picture, [tokens], PLAIN, mask)
    bias = pad(logs(tokens)[:, None, None], (T + P, 0))
    keys, values = (
        torch.cat((x, y.expand(B, -1, -1)), 1) for x, y in ((k, tokens.k), (v, tokens.v))
    )
    wanted = sdpa_attend(q, keys, values, H, pad(four(mask), (0, F)) + bias)
    torch.testing.assert_close(plain, wanted, **TIGHT)


@LAW("attend", [*WAYS.values(), product_attend], ids=[*WAYS, "written out"])
@LAW("least", [-torch.inf, -1e4])
def test_a_text_of_pads_alone_is_no_text(attend, least) -> None:
    """Written out, a softmax over nothing but -inf is NaN, which no share of 0 takes away."""
    q, k, v, picture = own()
    mask = torch.zeros(1, 1, T + P).double()
    mask[..., :T] = least
    found = attend_picture(attend, q, k, v, H, picture, [ref(2.0)], KEPT, mask)
    wanted = attend_with_references(sdpa_attend, q, k[:, picture], v[:, picture], [ref(2.0)], H)
    torch.testing.assert_close(found, wanted, **TIGHT)


def test_what_does_not_fit_is_told_with_both_numbers() -> None:
    q, k, v, picture = own()
    with pytest.raises(ValueError, match=r"11.*9 keys"):
        attend_picture(sdpa_attend, q, k[:, :9], v[:, :9], H, picture, [ref()], KEPT)
    with pytest.raises(ValueError, match=r"\[1, 1, 4\].*6 .*11"):
        attend_picture(sdpa_attend, q, k, v, H, picture, [ref()], KEPT, torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match=r"\[1, 11, 11\].*6 .*11"):
        attend_picture(sdpa_attend, q, k, v, H, picture, [ref()], KEPT, torch.zeros(1, 11, 11))


# I50: who reads -----------------------------------------------------------------------------------


@LAW("share", TextShare)
@LAW("mask", [None, "rows"])
def test_text_queries_are_the_hosts_own_and_are_not_passed_to_a_reference(share, mask) -> None:
    _, k, v, picture = own("text around")
    m = k.shape[1]
    q = rand(B, m, C, seed=9)
    mask = None if mask is None else rand(1, m, m, seed=10)
    seen: list[Tensor] = []

    def read(queries: Tensor, theirs: Tensor | None) -> Tensor:
        seen.append(queries)
        return attend_picture(sdpa_attend, queries, k, v, H, picture, [ref(3.0)], share, theirs)

    found = attend_rows(sdpa_attend, q, k, v, H, picture, read, mask)
    plain = sdpa_attend(q, k, v, H, None if mask is None else mask[:, None])
    (queries,) = seen
    assert torch.equal(queries, q[:, picture]) and found.shape == plain.shape
    text = torch.ones(m, dtype=torch.bool)
    text[picture] = False
    torch.testing.assert_close(found[:, text], plain[:, text], **TIGHT)
    assert (found - plain)[:, picture].abs().amax((0, 2)).min() > 1e-3


def test_a_picture_alone_is_read_without_a_copy() -> None:
    q = rand(B, P, C, seed=9)
    assert attend_rows(sdpa_attend, q, q, q, H, slice(0, P), lambda queries, mask: queries) is q


def test_a_reader_takes_the_mask_of_some_rows() -> None:
    q, k, v, picture = own()
    reader = PictureReader(picture, KEPT, host_masks()["(b,1,m)"])
    whole = reader(sdpa_attend, q, k, v, [ref(2.0)], H)
    second = reader.of(lambda rows: rows[1:])(sdpa_attend, q[1:], k[1:], v[1:], [ref(2.0)], H)
    torch.testing.assert_close(second, whole[1:], **TIGHT)
    assert PictureReader(picture, KEPT, host_masks()["(1,1,m)"]).of(
        lambda rows: rows[:0]
    ).mask.shape == (1, 1, T + P)


# I49: what it costs -------------------------------------------------------------------------------


def test_by_calls_it_is_three_without_a_row_of_masks() -> None:
    q, k, v, picture = own("text around")
    calls = Recorder()
    attend_picture(calls, q, k, v, H, picture, [ref()], KEPT)
    assert [(c[0].shape[1], c[1].shape[1], c[3]) for c in calls.calls] == [
        (P, T, None),
        (P, T + P, None),
        (P, P + F, None),
    ]


def test_by_sums_the_host_is_not_asked() -> None:
    q, k, v, picture = own()
    calls = Recorder()
    attend_picture(FusedAttend(calls), q, k, v, H, picture, [ref(2.0), ref(1.0, 8)], KEPT)
    assert not calls.calls


@LAW("sides", [(512, 0), (0, 512), (300, 212)])
@LAW("count", [1, 3])
def test_by_sums_it_costs_the_tokens_it_reads_and_copies_nothing(sides, count) -> None:
    """At FLUX's size: n (T + P + F), no mask, no longer keys, nothing larger than one output."""
    heads, d, p, f = 24, 128, 4096, 1000
    m = p + sum(sides)
    q, k, v = (torch.empty(1, n, heads * d, dtype=torch.bfloat16, device="meta") for n in (p, m, m))
    tokens = [
        ReferenceTokens(
            *(torch.empty(1, f, heads * d, dtype=q.dtype, device="meta") for _ in "kv"), 0.5 + i
        )
        for i in range(count)
    ]
    with Counting() as plain:
        sdpa_attend(q, k, v, heads)
    with Counting() as kept:
        attend_picture(
            FusedAttend(sdpa_attend), q, k, v, heads, slice(sides[0], sides[0] + p), tokens, KEPT
        )
    assert kept.flops / plain.flops == pytest.approx((m + count * f) / m, rel=0.01)
    assert (
        not kept.ops["cat"]
        and not kept.ops["clone"]
        and kept.largest <= q.numel() * q.element_size()
    )
    assert not any(p in shape and m in shape for shape in kept.shapes)


def test_what_is_trained_through_goes_by_calls() -> None:
    """The kernel's sum has no gradient."""
    q, k, v, picture = own()
    grads = []
    for made in (
        lambda x: attend_picture(WAYS["by sums"], x, k, v, H, picture, [ref(2.0)], KEPT),
        lambda x: formula(x, k, v, picture, ref(2.0)),
    ):
        x = q.clone().requires_grad_()
        made(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, **TIGHT)


def test_fewer_heads_of_keys_than_of_queries() -> None:
    """Grouped heads (Omnigen2, Boogu): the host's attend repeats them; no kernel of ours is asked."""
    q = torch.cat([rand(B, P, C, seed=s) for s in (1, 7)], -1)
    _, k, v, picture = own()

    def grouped(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        k, v = (x.unflatten(-1, (H, D)).repeat_interleave(2, 2).flatten(2) for x in (k, v))
        return sdpa_attend(q, k, v, heads, mask)

    found = attend_picture(FusedAttend(grouped), q, k, v, 2 * H, picture, [ref(2.0)], KEPT)
    whole = [
        x.unflatten(-1, (H, D)).repeat_interleave(2, 2).flatten(2) for x in (k, v, ref().k, ref().v)
    ]
    wanted = attend_picture(
        sdpa_attend, q, *whole[:2], 2 * H, picture, [ReferenceTokens(*whole[2:], 2.0)], KEPT
    )
    torch.testing.assert_close(found, wanted, **TIGHT)


# several references -------------------------------------------------------------------------------


@LAW("way", WAYS)
@LAW("masked", [False, True])
def test_target_masks_join_as_in_a_picture_alone(way, masked) -> None:
    """A query reads the references whose masks it lies in; outside all of them it is the host's own, bit for bit."""
    q, k, v, picture = own()
    mask = host_masks()["(b,1,1,m)"] if masked else None
    heard = [ref(2.0), ref(0.5, 8)]
    regions = torch.zeros(2, 1, 1, P)
    regions[0, ..., 1:4], regions[1, ..., 3:5] = 1, 1
    given = [References({Role.COND: t}, region) for t, region in zip(heard, regions)]
    call = AttnCall(("middle", 0, 0), (2, 3), (Part(Role.COND),), (4, 6))
    reader = PictureReader(picture, KEPT, mask)
    found = attend_group(call, WAYS[way], q, k, v, H, given, [0], reader)
    plain = sdpa_attend(q, k, v, H, mask)
    assert torch.equal(found[:, [0, 5]], plain[:, [0, 5]])
    for queries, seen in (([1, 2], heard[:1]), ([3], heard), ([4], heard[1:])):
        wanted = attend_picture(WAYS[way], q, k, v, H, picture, seen, KEPT, mask)
        assert torch.equal(found[:, queries], wanted[:, queries])


def test_a_reference_that_dims_the_text_does_so_only_where_it_is_read() -> None:
    """Queries that read the first of two references keep the text's share; those that read the second too do not."""
    q, k, v, picture = own()
    first, second = ref(2.0), ref(0.5, seed=8)
    dims = replace(second, dims_text=True)
    attend = WAYS["by calls"]
    reads = PictureReader(picture, KEPT)
    plain = PictureReader(picture, PLAIN)
    for passed, as_plain in (([first], []), ([dims], [second]), ([first, dims], [first, second])):
        expected = (plain if as_plain else reads)(attend, q, k, v, as_plain or passed, H)
        assert torch.equal(reads(attend, q, k, v, passed, H), expected)
    assert not torch.equal(reads(attend, q, k, v, [dims], H), reads(attend, q, k, v, [second], H))
