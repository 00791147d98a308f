"""Where the tokens of a reference stand (laws I40, I46, I52 to I55)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kindred.models.attention.fused import FusedAttend
from kindred.models.attention.joint import TextShare, attend_picture
from kindred.models.attention.references import ReferenceTokens
from kindred.models.attention.weights import WeightMode
from kindred.models.network.rope import Positions, Turn, rotated
from kindred.models.reference.placing import Place, Placing
from small_attention import rand, sdpa_attend
from small_joint import Plain
from small_rope import B, D, H, PAIRINGS, T, placed, turn
from torch import Tensor

LAW = pytest.mark.parametrize
C = H * D
GRIDS = LAW("reference, picture", [((3, 4), (3, 4)), ((2, 5), (3, 4)), ((5, 3), (4, 7)), ((1, 1), (3, 3))])  # fmt: skip
LAYOUTS = {
    "from a corner": {},
    "about the middle": {"along": lambda n: torch.arange(n) - n // 2},
    "over the picture": {"along": lambda n: torch.linspace(0, 16, n)},
    "half a step": {"along": lambda n: torch.arange(n) * 0.5},
    "far away": {"first": (9.0, 9.0, 9.0)},
}
layouts = LAW("layout", LAYOUTS)
WAYS = {"by sums": FusedAttend(sdpa_attend, shortest=1), "by calls": Plain()}
both_ways = LAW("way", WAYS)
BOUND = 1e-12
SHARES = LAW("share", list(TextShare))


def count(grid: tuple[int, int]) -> int:
    return math.prod(grid)


def laid(layout: str, halves: bool = False) -> Turn:
    return turn(halves, (1.0, 0.0, 0.0), **LAYOUTS[layout])


@PAIRINGS
@layouts
@GRIDS
@LAW("where", list(Positions))
def test_placed_keys_are_those_made_there(halves, layout, reference, picture, where) -> None:
    """I46: whatever the layout, kept tokens of two photos are as if they had been rotated by where they stand."""
    code, kept = laid(layout, halves), torch.arange(0, 2 * count(reference), 2)
    bare = rand(1, 2 * count(reference), C, seed=1)
    stood = code.places(reference, 5).repeat(2, 1)
    come = placed(bare, stood, halves)[:, kept]
    place = Place.of(code, reference, picture, (5, 7))
    found = Placing(where, 2).keys(come, code, place, kept)
    each = [code.placed(where, reference, picture, 7, number) for number in (0, 1)]
    wanted = bare if where is Positions.NONE else placed(bare, torch.cat(each), halves)
    assert (found - wanted[:, kept]).abs().max() <= BOUND


@layouts
@GRIDS
def test_where_each_place_is(layout, reference, picture) -> None:
    """I52: a step from token to token is the picture's own, on any size; aside begins where the picture ends."""
    code = laid(layout)
    own, theirs = code.places(picture, 7), code.places(reference, 7)
    down, step = own[picture[1], 1] - own[0, 1], own[1, 2] - own[0, 2]
    by_row = {
        where: code.placed(where, reference, picture, 7).unflatten(0, reference)
        for where in (Positions.OWN, Positions.CENTRED, Positions.ASIDE, Positions.APART)
    }
    assert torch.equal(by_row[Positions.OWN].flatten(0, 1), theirs)
    apart = theirs + torch.tensor([code.step, 0, 0])
    assert torch.equal(by_row[Positions.APART].flatten(0, 1), apart)
    for where in (Positions.CENTRED, Positions.ASIDE):
        laid_out = by_row[where]
        steps = laid_out[:, 1:, 2] - laid_out[:, :-1, 2]
        assert torch.allclose(steps, step.expand_as(steps), atol=1e-6)
    aside = by_row[Positions.ASIDE]
    assert torch.allclose(aside[:, 0, 2], own[-1, 2] + step, atol=1e-5)
    middle = by_row[Positions.CENTRED].flatten(0, 1)[:, 1:].mean(0) - own[:, 1:].mean(0)
    assert (middle.abs() <= torch.stack((down, step)) / 2 + 1e-5).all()


@layouts
def test_of_one_size_own_and_centred_are_one_place(layout) -> None:
    code = laid(layout)
    own, centred = (
        code.placed(where, (3, 5), (3, 5), 4) for where in (Positions.OWN, Positions.CENTRED)
    )
    assert torch.allclose(own, centred, atol=1e-6)


def test_further_photos_stand_further() -> None:
    code = laid("from a corner")
    aside = [code.placed(Positions.ASIDE, (2, 3), (2, 5), 0, n)[0, 2].item() for n in range(3)]
    apart = [code.placed(Positions.APART, (2, 3), (2, 5), 0, n)[0, 0].item() for n in range(3)]
    assert aside == [5, 8, 11] and apart == [1, 2, 3]


def test_without_a_time_axis_apart_is_aside() -> None:
    code = Turn((0.0, 0.0), lambda p: p, plane=0)
    apart, aside = (
        code.placed(where, (2, 3), (3, 4), 0) for where in (Positions.APART, Positions.ASIDE)
    )
    assert torch.equal(apart, aside) and not code.timed


@GRIDS
def test_a_planted_token_lands_where_it_was_centred(reference, picture) -> None:
    """I40 beside another size: a query that looks for one place finds the token that stands there."""
    code = laid("from a corner")
    places = code.placed(Positions.CENTRED, reference, picture, 0)
    for token, place in enumerate(places.tolist()):
        row, column = divmod(token, reference[1])
        start = [(p - r) // 2 for p, r in zip(picture, reference)]
        assert place == [0.0, row + start[0], column + start[1]]


# read by no position -------------------------------------------------------------------------------


def bare_picture(grid: tuple[int, int] = (3, 4), text: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of a picture and keys and values of text and picture, none of them rotated."""
    n = count(grid)
    return rand(B, n, C, seed=1), rand(B, text + n, C, seed=2), rand(B, text + n, C, seed=3)


def own_of(code: Turn, grid: tuple[int, int], shift: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same, rotated by where they stand; shift: how far all of them are moved."""
    q, k, v = bare_picture(grid)
    places = code.places(grid, T) + torch.tensor([shift, 0, 0])
    text = torch.zeros(T, 3) + shift
    text[:, 1:] = 0
    q = placed(q, places, code.halves)
    return q, placed(k, torch.cat((text, places)), code.halves), v


def read(way: str, own: tuple, tokens: list[ReferenceTokens], share: TextShare) -> Tensor:
    q, k, v = own
    return attend_picture(WAYS[way], q, k, v, H, slice(T, k.shape[1]), tokens, share)


def unplaced(code: Turn, grid: tuple[int, int], **more) -> ReferenceTokens:
    """A reference without positions; its queries lose theirs."""
    query_turn = code.out_of_place(grid, T, torch.device("cpu"))
    return ReferenceTokens(
        rand(1, 5, C, seed=4),
        rand(1, 5, C, seed=5),
        query_turn=query_turn,
        **({"weight": 1.0} | more),
    )


SETS = {
    "weight 1": {},
    "a weight": {"weight": 2.5},
    "a mask": {"log_mask": torch.linspace(-3, 1, 5).double()},
    "key scale": {"weight": 0.5, "mode": WeightMode.KEY_SCALE},
    "post softmax": {"weight": 0.5, "mode": WeightMode.POST_SOFTMAX},
    "output blend": {"weight": 0.5, "mode": WeightMode.OUTPUT_BLEND},
}


def formula(code: Turn, own: tuple, tokens: ReferenceTokens) -> Tensor:
    """One softmax over own keys, read where queries stand, and the reference's, read by queries that stand nowhere."""
    q, k, v = own

    def scores(queries: Tensor, keys: Tensor) -> Tensor:
        queries, keys = (x.unflatten(-1, (H, D)).transpose(1, 2) for x in (queries, keys))
        return queries @ keys.mT * D**-0.5

    bare = bare_picture()[0]
    bias = torch.full((5,), tokens.weight, dtype=torch.float64).log()
    bias = bias if tokens.log_mask is None else bias + tokens.log_mask
    theirs = scores(bare, tokens.k.expand(B, -1, -1)) + bias
    weights = torch.cat((scores(q, k), theirs), -1).softmax(-1)
    values = torch.cat((v, tokens.v.expand(B, -1, -1)), 1).unflatten(-1, (H, D)).transpose(1, 2)
    return (weights @ values).transpose(1, 2).flatten(2)


@both_ways
@PAIRINGS
@LAW("kind", ["weight 1", "a weight", "a mask"])
def test_a_reference_without_positions_is_read_by_what_it_holds(way, halves, kind) -> None:
    """I53: its logits are those of bare queries and keys, in one softmax with the rotated ones."""
    code = laid("from a corner", halves)
    own, tokens = own_of(code, (3, 4)), unplaced(code, (3, 4), **SETS[kind])
    found = read(way, own, [tokens], TextShare.PLAIN)
    assert (found - formula(code, own, tokens)).abs().max() <= BOUND
    assert (
        read(way, own, [replace(tokens, query_turn=None)], TextShare.PLAIN) - found
    ).abs().max() > 1e-2


@SHARES
@PAIRINGS
@LAW("kind", SETS)
def test_both_ways_of_reading_it_are_one(share, halves, kind) -> None:
    code = laid("from a corner", halves)
    own, tokens = own_of(code, (3, 4)), unplaced(code, (3, 4), **SETS[kind])
    beside = ReferenceTokens(rand(1, 3, C, seed=6), rand(1, 3, C, seed=7), 1.5)
    by_sums, by_calls = (read(way, own, [tokens, beside], share) for way in WAYS)
    assert (by_sums - by_calls).abs().max() <= BOUND
    assert (read("by sums", own, [beside, tokens], share) - by_sums).abs().max() <= BOUND


@both_ways
@SHARES
def test_it_does_not_know_where_the_picture_stands(way, share) -> None:
    """I53: text and picture moved alike change nothing, where a reference that stays behind is another."""
    code = laid("from a corner")
    here, moved = own_of(code, (3, 4)), own_of(code, (3, 4), shift=6)
    tokens = unplaced(code, (3, 4))
    back = code.between(code.places((3, 4), T + 6), None, torch.device("cpu"))
    of_moved = replace(tokens, query_turn=lambda q: rotated(q, back))
    assert (
        read(way, moved, [of_moved], share) - read(way, here, [tokens], share)
    ).abs().max() <= BOUND
    stays = replace(tokens, query_turn=None)
    assert (read(way, moved, [stays], share) - read(way, here, [stays], share)).abs().max() > 1e-3


@both_ways
def test_half_of_it_twice_is_it_once(way) -> None:
    """I9 without positions, the queries taken off once for both."""
    code = laid("from a corner")
    own, tokens = own_of(code, (3, 4)), unplaced(code, (3, 4))
    halved = replace(tokens, weight=0.5)
    twice = read(way, own, [halved, halved], TextShare.PLAIN)
    assert (twice - read(way, own, [tokens], TextShare.PLAIN)).abs().max() <= BOUND
    assert code.out_of_place((3, 4), T, torch.device("cpu")) is tokens.query_turn


@both_ways
@SHARES
def test_silent_it_is_the_plain_attention(way, share) -> None:
    code = laid("from a corner")
    own, tokens = own_of(code, (3, 4)), unplaced(code, (3, 4), weight=0.0)
    assert torch.equal(read(way, own, [tokens], share), sdpa_attend(*own, H))


# read where it is put ------------------------------------------------------------------------------


@SHARES
@PAIRINGS
@LAW("where", [Positions.OWN, Positions.CENTRED, Positions.ASIDE, Positions.APART])
def test_keys_appended_before_the_code_are_keys_turned_behind_it(share, halves, where) -> None:
    """I54: tokens appended unrotated with positions of their own, rotated by hand, or turned where they come rotated."""
    code, reference, picture = laid("from a corner", halves), (2, 5), (3, 4)
    bare_k, v = rand(1, count(reference), C, seed=4), rand(1, count(reference), C, seed=5)
    own, stands = own_of(code, picture), code.placed(where, reference, picture, T)
    come, place = placed(bare_k, code.places(reference, 2), halves), Place.of(code, reference, picture, (2, T))  # fmt: skip
    kept = torch.arange(count(reference))
    turned = ReferenceTokens(Placing(where, 1).keys(come, code, place, kept), v, 2.0)
    by_hand = ReferenceTokens(placed(bare_k, stands, halves), v, 2.0)
    for way in WAYS:
        found, wanted = (read(way, own, [tokens], share) for tokens in (turned, by_hand))
        assert (found - wanted).abs().max() <= BOUND
    q, k, own_v = own
    _, bare_own, _ = bare_picture(picture)
    text = torch.zeros(T, 3)
    ids = torch.cat((text, code.places(picture, T), stands))  # one longer code for all
    keys = placed(torch.cat((bare_own, bare_k.expand(B, -1, -1)), 1), ids, halves)
    values = torch.cat((own_v, v.expand(B, -1, -1)), 1)
    if share is TextShare.PLAIN:
        bias = torch.zeros(keys.shape[1]).double()
        bias[k.shape[1] :] = math.log(2.0)
        longer = sdpa_attend(q, keys, values, H, mask=bias[None, None, None])
        assert (read("by sums", own, [turned], share) - longer).abs().max() <= BOUND


@PAIRINGS
def test_a_shuffled_copy_put_back_in_order_is_the_picture(halves) -> None:
    """I55: where each token of a shuffled picture is put where its like stands, a picture that reads it stays; where they stood, not."""
    code, grid = laid("from a corner", halves), (3, 4)
    q, k, v = own_of(code, grid)
    order = torch.randperm(count(grid), generator=torch.Generator().manual_seed(3))
    places = code.places(grid, T)
    shuffled = placed(bare_picture(grid)[1][:, T:][:, order], places, halves)
    put = rotated(shuffled, code.between(places, places[order], k.device), halves)
    assert (put - k[:, T:][:, order]).abs().max() <= BOUND
    plain = sdpa_attend(q, k, v, H)

    def reads(keys: Tensor) -> Tensor:
        tokens = ReferenceTokens(keys, v[:, T:][:, order], 3.0)
        return read("by sums", (q, k, v), [tokens], TextShare.KEPT)

    assert (reads(put) - plain).abs().max() <= BOUND and (
        reads(shuffled) - plain
    ).abs().max() > 1e-2


def test_what_is_needed_once_is_made_once() -> None:
    """Matrices are remembered for the layers and steps of a run."""
    made: list[int] = []
    code = laid("from a corner")
    rotation = code.rotation
    code = replace(code, rotation=lambda p: made.append(len(p)) or rotation(p))
    placing, kept = Placing(Positions.ASIDE, 1), torch.arange(6)
    place = Place.of(code, (2, 3), (2, 3), (T, T))
    for _ in range(3):
        placing.keys(rand(1, 6, C, seed=1), code, place, kept)
        code.out_of_place((2, 3), T, torch.device("cpu"))
    assert len(made) == 3
