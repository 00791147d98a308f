"""Laws of concept tokens in cross-attention: concatenated (method.md 2.2 eq. 7-9) or added, repeated texts, pictures, chains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from math import log
from uuid import uuid4

import pytest
import torch
from kindred.models.attention.parts import Merge, References, gather_parts
from kindred.models.attention.references import ReferenceTokens
from kindred.models.attention.weights import WeightMode
from kindred.models.network.call import Part, Role
from kindred.models.network.sites import BlockSite
from kindred.models.run import Run, Said
from small_attention import sdpa_attend
from small_cross_attention import (
    BLOCK,
    BOTH,
    COND,
    HEADS,
    OTHER,
    UNCOND,
    B,
    C,
    M,
    N,
    Reads,
    W,
    attend,
    by_hand,
    close,
    cross_call,
    part,
    rand,
    rows_of,
    split,
    tokens,
)
from torch import Tensor, nn

# concat and add (I42) --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.1, 1.0, 3.0])
def test_concatenation_is_a_mixture(weight) -> None:
    """I42: (1 - a) A_text + a A_img with a(q) in (0, 1), for every head and query."""
    q, k, v = part(COND)
    ref = tokens(50, weight)
    text, image = by_hand(q, (k, v, 0.0))[0], by_hand(q, (ref.k, ref.v, 0.0))[0]
    _, p = by_hand(q, (k, v, 0.0), (ref.k, ref.v, log(weight)))
    a = p[..., W:].sum(-1, keepdim=True)
    assert (a > 0).all() and (a < 1).all()
    mixed = ((1 - a) * split(text) + a * split(image)).transpose(1, 2).flatten(2)
    close(attend(cross_call(COND), (q, k, v), Reads({COND: ref})), mixed)


@pytest.mark.parametrize("mode", list(WeightMode))
@pytest.mark.parametrize("weight", [0.1, 1.0, 3.0])
def test_addition_is_a_sum(weight, mode) -> None:
    """I42: A_text + s A_img; the weight mode is the softmax's business and there is none to share."""
    q, k, v = part(COND)
    ref = tokens(50, weight, mode)
    expected = by_hand(q, (k, v, 0.0))[0] + weight * by_hand(q, (ref.k, ref.v, 0.0))[0]
    close(attend(cross_call(COND), (q, k, v), Reads({COND: ref}, Merge.ADD)), expected)


def test_the_two_agree_only_where_the_picture_is_not_read() -> None:
    """I42: no s makes them equal unless a = 0."""
    q, k, v = part(COND)
    text, image = by_hand(q, (k, v, 0.0))[0], by_hand(q, (tokens(50).k, tokens(50).v, 0.0))[0]
    for weight in (0.1, 1.0, 3.0):
        mixed = attend(cross_call(COND), (q, k, v), Reads({COND: tokens(50, weight)}))
        best = ((mixed - text) * image).sum() / image.square().sum()  # least squares over every s
        assert (mixed - text - best * image).abs().max() > 1e-3
    outs = [
        attend(cross_call(COND), (q, k, v), Reads({COND: tokens(50, 0.0)}, merge))
        for merge in Merge
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("weight", [0.25, 1.0, 7.0, 1000.0])
def test_rows_stay_in_the_convex_hull(weight) -> None:
    """I10: probabilities sum to 1, so that no channel leaves what the values of text and pictures span."""
    q, k, v = part(COND)
    ref, other = tokens(50, weight), tokens(60, weight / 2)
    out = attend(cross_call(COND), (q, k, v), Reads({COND: ref}), Reads({COND: other}))
    values = torch.cat((v, ref.v.expand(B, -1, -1), other.v.expand(B, -1, -1)), 1)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    assert ((out > low - 1e-12) & (out < high + 1e-12)).all()

    def ones(mode: WeightMode) -> Tensor:
        flat = ReferenceTokens(ref.k, torch.ones_like(ref.v), weight, mode)
        return attend(cross_call(COND), (q, k, torch.ones_like(v)), Reads({COND: flat}))

    close(ones(WeightMode.LOGIT_BIAS), torch.ones(B, N, C, dtype=torch.float64))
    assert (
        weight == 1 or (ones(WeightMode.POST_SOFTMAX) - 1).abs().max() > 0.01
    )  # the one that does not renormalise


# repeated texts (I12) --------------------------------------------------------------------------------------------------------


def run_of(
    *known: tuple[Role, int | None, tuple[int, ...]], active: Sequence[Reads] = ()
) -> tuple[Run, Said]:
    """A run that knows its parts, (role, tokens of the text, repeats per row), and what is said of a call with all of them."""
    run, names = (
        Run(sites={BLOCK: BlockSite(nn.Identity(), 2)}, latent=(4, 6), active=list(active)),
        [],
    )
    for role, text, repeats in known:
        names.append(uuid4())
        run.parts[names[-1]] = Part(role, None, text, repeats)
    return run, Said(tuple(names), block=BLOCK, grid=(2, 3))


def test_a_call_knows_its_repeats() -> None:
    run, said = run_of((COND, 3, (1, 2)), (UNCOND, 6, (1,)), (COND, 12, (1,)), (OTHER, None, (1,)))
    assert run.call(said, 12).repeats == ((4, 8), (2,), (1,), (1,))
    assert run.call(replace(said, names=said.names[2:]), 12).repeats == ()
    assert run.call(replace(said, names=(uuid4(),)), 12).repeats == () and run.call(said, 12).cross
    assert not run.call(said).cross and run.call(said).repeats == ()


@BOTH
@pytest.mark.parametrize("mode", list(WeightMode))
@pytest.mark.parametrize("halves", [(COND,), (COND, UNCOND)])
def test_a_repeated_text_weighs_as_one(merge, mode, halves) -> None:
    """I12: r repeats and log r are one, where parts and rows repeat differently and where pictures share a weight.

    The host repeats 3 words to 12 in one part and 12 / 6 in the other; Subject Prompts has already repeated row 1's three to six.
    """
    mask = torch.full((M,), -log(2.0))
    shared = tokens(50, 0.7, mode, mask=mask)
    active = [
        Reads(dict.fromkeys(halves, shared), merge),
        Reads({COND: tokens(60, 2.0, mode)}, merge),
    ]
    given = {UNCOND: (6, (1, 2)), COND: (3, (1,)), OTHER: (12, (1,))}
    run, options = run_of(*((role, *given[role]) for role in given), active=active)
    q, alone, keys, values = [], [], [], []
    for role, (text, repeats) in given.items():
        for i in range(B):
            words = text // repeats[i % len(repeats)]
            one = tuple(
                rand(1, n, C, seed=100 + 10 * i + 3 * list(Role).index(role) + j)
                for j, n in enumerate((N, words, words))
            )
            alone.append(attend(cross_call(role), one, *active))
            q.append(one[0])
            keys.append(one[1].repeat(1, 12 // words, 1))
            values.append(one[2].repeat(1, 12 // words, 1))
    own = tuple(map(torch.cat, (q, keys, values)))
    out = run.attend(run.call(options, 12), sdpa_attend, *own, HEADS)
    torch.testing.assert_close(out, torch.cat(alone), rtol=0, atol=1e-6)  # log r is held in float32
    blind = attend(cross_call(*given), own, *active)
    assert (
        merge is Merge.ADD or (blind - out).abs().max() > 1e-2
    )  # what the host's batching would have done


def test_log_r_is_added_once_per_row() -> None:
    shared = tokens(50, mask=torch.tensor([0.0, -1.0, -2.0, -3.0]))
    call = cross_call(UNCOND, COND, repeats=((1, 3), (2,)))
    got = gather_parts(References({COND: shared, UNCOND: shared}), call, [0, 1], B).log_mask
    torch.testing.assert_close(
        got, torch.tensor([1.0, 3.0, 2.0, 2.0]).log()[:, None] + shared.log_mask
    )
    got = gather_parts(References({COND: tokens(50)}), call, [1], B)
    torch.testing.assert_close(got.log_mask.expand(B, -1), torch.full((B, M), 2.0).log())
    assert gather_parts(References({COND: shared}), cross_call(COND), [0], B) is shared


# pictures --------------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("count", [2, 5])
def test_equal_pictures_are_one(merge, count) -> None:
    """I9: R pictures with -log R; for add the softmax over them does it."""
    one = tokens(50, 1.5)
    many = ReferenceTokens(
        one.k.repeat(1, count, 1),
        one.v.repeat(1, count, 1),
        1.5,
        log_mask=torch.full((M * count,), -log(count), dtype=torch.float64),
    )
    own, call = rows_of((UNCOND, COND)), cross_call(UNCOND, COND)
    close(
        attend(call, own, Reads({COND: many}, merge)), attend(call, own, Reads({COND: one}, merge))
    )
    chained = [Reads({COND: tokens(50, 1.5 / count)}, merge) for _ in range(count)]
    close(attend(call, own, *chained), attend(call, own, Reads({COND: one}, merge)))


def test_halves_may_read_different_numbers_of_pictures() -> None:
    """Three photos in the cond half and the one empty picture in the uncond half."""
    photos, empty = (
        tokens(50, 2.0, m=3 * M, mask=torch.full((3 * M,), -log(3), dtype=torch.float64)),
        tokens(60, 2.0),
    )
    roles = (UNCOND, COND, OTHER, UNCOND)
    for merge in Merge:
        active = Reads({COND: photos, UNCOND: empty}, merge)
        out = attend(cross_call(*roles), rows_of(roles), active).chunk(4)
        for role, rows in zip(roles, out):
            close(rows, attend(cross_call(role), part(role), active))


@BOTH
def test_halves_of_one_length_keep_their_own_masks(merge) -> None:
    masked, plain = tokens(50, mask=rand(M, seed=9)), tokens(60)
    for pair in ((masked, plain), (plain, masked), (masked, tokens(60, mask=rand(M, seed=8)))):
        active = Reads(dict(zip((COND, UNCOND), pair)), merge)
        for role, rows in zip(
            (UNCOND, COND),
            attend(cross_call(UNCOND, COND), rows_of((UNCOND, COND)), active).chunk(2),
        ):
            close(rows, attend(cross_call(role), part(role), active))


# nothing where nothing is asked (I2) -----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("mode", list(WeightMode))
def test_weight_zero_is_the_hosts_own(merge, mode) -> None:
    """I2, bit for bit."""
    roles = (UNCOND, COND)
    own = rows_of(roles)
    active = Reads(dict.fromkeys(roles, tokens(50, 0.0, mode)), merge)
    assert torch.equal(attend(cross_call(*roles), own, active), sdpa_attend(*own, HEADS))
    assert torch.equal(
        attend(cross_call(*roles, repeats=((2,), (1,))), own, active), sdpa_attend(*own, HEADS)
    )


@BOTH
@pytest.mark.parametrize("roles", [(UNCOND, COND), (COND, UNCOND), (COND, OTHER, UNCOND, COND)])
def test_the_half_that_reads_nothing_stays_bit_for_bit(merge, roles) -> None:
    own = rows_of(roles)
    plain = sdpa_attend(*own, HEADS).chunk(len(roles))
    for who in (COND, UNCOND):
        out = attend(cross_call(*roles), own, Reads({who: tokens(50)}, merge)).chunk(len(roles))
        for role, rows, before in zip(roles, out, plain):
            assert (
                torch.equal(rows, before) if role is not who else (rows - before).abs().max() > 1e-3
            )


@BOTH
@pytest.mark.parametrize("roles", [(UNCOND, COND), (COND, UNCOND), (COND, COND, OTHER)])
def test_one_call_or_several(merge, roles) -> None:
    """I36 with concepts."""
    active = [
        Reads({COND: tokens(50), UNCOND: tokens(60)}, merge),
        Reads({COND: tokens(70, 2.0)}, Merge.CONCAT),
    ]
    for role, rows in zip(
        roles, attend(cross_call(*roles), rows_of(roles), *active).chunk(len(roles))
    ):
        close(rows, attend(cross_call(role), part(role), *active))


# together --------------------------------------------------------------------------------------------------------------------


def test_self_and_cross_injections_do_not_meet() -> None:
    """Masked Self-Attn Inject reads in self-attention, the concept in cross-attention."""
    own, selves = part(COND), Reads({COND: tokens(90)}, cross=False)
    concepts = [Reads({COND: tokens(50)}), Reads({COND: tokens(60)}, Merge.ADD)]
    assert torch.equal(
        attend(cross_call(COND), own, selves, *concepts), attend(cross_call(COND), own, *concepts)
    )
    in_self = cross_call(COND, cross=False)
    assert torch.equal(attend(in_self, own, selves, *concepts), attend(in_self, own, selves))
    assert (attend(in_self, own, selves) - sdpa_attend(*own, HEADS)).abs().max() > 1e-3


def test_add_beside_concat() -> None:
    """The mixture over text and the concatenated, plus the added one's own attention."""
    q, k, v = part(COND)
    one, two, three = tokens(50, 0.7), tokens(60, 2.0), tokens(70, 0.4)
    expected = by_hand(q, (k, v, 0.0), (one.k, one.v, log(0.7)))[0]
    for ref in (two, three):
        expected = expected + ref.weight * by_hand(q, (ref.k, ref.v, 0.0))[0]
    close(
        attend(
            cross_call(COND),
            (q, k, v),
            Reads({COND: two}, Merge.ADD),
            Reads({COND: one}),
            Reads({COND: three}, Merge.ADD),
        ),
        expected,
    )


def test_the_order_of_a_chain_is_nothing() -> None:
    left, right = (
        torch.zeros(2, 1, N, dtype=torch.float64),
        torch.zeros(2, 1, N, dtype=torch.float64),
    )
    left[..., :4], right[..., 2:] = 1, 1
    chain = [
        Reads({COND: tokens(50, 0.7), UNCOND: tokens(55)}),
        Reads({COND: tokens(60, 2.0)}, Merge.CONCAT, left),
        Reads({COND: tokens(70)}, Merge.ADD, right),
        Reads({COND: tokens(80, 0.3), UNCOND: tokens(80)}, Merge.ADD),
        Reads({COND: tokens(90, 0.3)}, Merge.CONCAT, right),
    ]
    own, call = rows_of((UNCOND, COND)), cross_call(UNCOND, COND, repeats=((1,), (3,)))
    first = attend(call, own, *chain)
    for order in permutations(chain):
        close(attend(call, own, *order), first)
    for i in range(len(chain)):  # and each of them counts
        assert (attend(call, own, *chain[:i], *chain[i + 1 :]) - first).abs().max() > 1e-3
