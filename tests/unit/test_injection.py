"""Laws of one attention call with references: who reads what, whatever the order and the split of the batch (I5, I7-I9, I13, I36, I40)."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from kindred.models.attention.parts import References, gather_parts, take_parts
from kindred.models.attention.references import ReferenceTokens
from kindred.models.attention.weights import WeightMode
from kindred.models.network.call import AttnCall, Half, Part, Role, is_resized
from kindred.models.network.sites import BlockSite
from kindred.models.reference.bank import ReferencePrompt
from kindred.models.reference.recorder import Recorder
from kindred.models.run import Run, Said
from kindred.models.subject.masks import token_map
from kindred.models.subject.target import TargetMask
from kindred.models.subject.words import SubjectTokens
from small_attention import sdpa_attend
from torch import Tensor, nn

B, N, M, HEADS, C = 2, 6, 4, 2, 8
BLOCK = ("middle", 0, 0)
COND, UNCOND, OTHER = Role.COND, Role.UNCOND, Role.OTHER


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def call(*roles: Role) -> AttnCall:
    return AttnCall(BLOCK, (2, 3), tuple(map(Part, roles)), (4, 6))


def reference(
    seed: int, weight: float = 1.0, mode: WeightMode = WeightMode.LOGIT_BIAS, m: int = M
) -> ReferenceTokens:
    return ReferenceTokens(rand(1, m, C, seed=seed), rand(1, m, C, seed=seed + 1), weight, mode)


class Reads:
    """An injection with fixed references."""

    def __init__(
        self, by_role: dict[Role, ReferenceTokens] | None, query_mask: Tensor | None = None
    ) -> None:
        self.given = None if by_role is None else References(by_role, query_mask)

    node, wants = "a test", True

    def begin_step(self, sigma: float) -> None:
        pass

    def concerns(self, call: AttnCall) -> bool:
        return True

    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> list[References]:
        return [self.given] if self.given else []


class Counted:
    """An attend that counts its calls."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
    ) -> Tensor:
        self.rows.append(q.shape[0])
        return sdpa_attend(q, k, v, heads, mask)


def attend(
    roles: tuple[Role, ...],
    *active: Reads,
    own: tuple[Tensor, ...] | None = None,
    kernel=sdpa_attend,
) -> Tensor:
    run = Run(sites={BLOCK: BlockSite(nn.Identity(), 2)}, active=list(active))
    return run.attend(call(*roles), kernel, *(own or rows(roles)), HEADS)


def part(role: Role) -> tuple[Tensor, ...]:
    """q, k, v [b n c] of one part, the same whatever its place."""
    return tuple(rand(B, N, C, seed=10 * i + list(Role).index(role)) for i in range(1, 4))


def rows(roles: tuple[Role, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(x) for x in zip(*(part(role) for role in roles)))


def alone(role: Role, *references: ReferenceTokens) -> Tensor:
    """The part by itself, keys written side by side: what every batching of it has to give (weight 1 and log W as a mask)."""
    q, k, v = part(role)
    keys = torch.cat((k, *(r.k.expand(B, -1, -1) for r in references)), 1)
    values = torch.cat((v, *(r.v.expand(B, -1, -1) for r in references)), 1)
    bias = torch.cat(
        [torch.zeros(N, dtype=torch.float64)]
        + [
            torch.full((r.k.shape[1],), r.weight, dtype=torch.float64).log()
            + (0 if r.log_mask is None else r.log_mask[0])
            for r in references
        ]
    )
    return sdpa_attend(q, keys, values, HEADS, mask=bias[None])


# who reads -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "active", [[], [Reads(None)], [Reads({})], [Reads({UNCOND: reference(50)})]]
)
def test_nobody_reads_is_the_plain_call(active) -> None:
    kernel, own = Counted(), rows((COND, OTHER))
    assert torch.equal(
        attend((COND, OTHER), *active, own=own, kernel=kernel), sdpa_attend(*own, HEADS)
    )
    assert kernel.rows == [2 * B]


@pytest.mark.parametrize(
    "roles", [(UNCOND, COND), (COND, UNCOND), (UNCOND, COND, OTHER), (COND, OTHER, UNCOND, COND)]
)
def test_cond_only_leaves_the_other_rows_bit_for_bit(roles) -> None:
    own = rows(roles)
    out, plain = (
        x.chunk(len(roles))
        for x in (attend(roles, Reads({COND: reference(50)}), own=own), sdpa_attend(*own, HEADS))
    )
    for i, role in enumerate(roles):
        if role is COND:
            close(out[i], alone(COND, reference(50)))
            assert (out[i] - plain[i]).abs().max() > 1e-3
        else:
            assert torch.equal(out[i], plain[i])


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_shared_gives_both_halves_the_same_tokens_in_one_call(weight) -> None:
    kernel, shared = Counted(), reference(50, weight)
    out = attend((UNCOND, COND), Reads({COND: shared, UNCOND: shared}), kernel=kernel).chunk(2)
    close(out[0], alone(UNCOND, shared))
    close(out[1], alone(COND, shared))
    assert kernel.rows == [2 * B]


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_both_gives_each_half_its_own_in_one_call(weight) -> None:
    kernel, cond, uncond = Counted(), reference(50, weight), reference(60, weight)
    out = attend((UNCOND, COND), Reads({COND: cond, UNCOND: uncond}), kernel=kernel).chunk(2)
    close(out[0], alone(UNCOND, uncond))
    close(out[1], alone(COND, cond))
    assert kernel.rows == [2 * B]


@pytest.mark.parametrize("mode", list(WeightMode))
@pytest.mark.parametrize("by_role", [(COND,), (COND, UNCOND)])
def test_order_and_split_of_the_parts_change_nothing(mode, by_role) -> None:
    """I36: cond and uncond in one call, in either order, or in two."""
    active = Reads({role: reference(50 + 10 * i, 2.0, mode) for i, role in enumerate(by_role)})
    split = {role: attend((role,), active) for role in Role}
    for roles in permutations(Role):
        for role, out in zip(roles, attend(roles, active).chunk(3)):
            close(out, split[role])


def test_two_parts_of_one_role_read_alike() -> None:
    """Regional prompts: the host runs [uncond, cond, cond]."""
    out = attend((UNCOND, COND, COND), Reads({COND: reference(50)})).chunk(3)
    assert torch.equal(out[1], out[2])
    close(out[1], alone(COND, reference(50)))


def test_other_parts_pass_through() -> None:
    """An extra pass of another node, with conds that we never saw, is the host's own."""
    own = rows((OTHER,))
    assert torch.equal(
        attend((OTHER,), Reads({COND: reference(50), UNCOND: reference(60)}), own=own),
        sdpa_attend(*own, HEADS),
    )


# several references --------------------------------------------------------------------------------------------------------


def test_two_chained_references_share_one_softmax() -> None:
    one, two = reference(50, 0.7), reference(60, 2.0, m=7)
    a = attend((UNCOND, COND), Reads({COND: one}), Reads({COND: two}))
    close(a.chunk(2)[1], alone(COND, one, two))
    close(a, attend((UNCOND, COND), Reads({COND: two}), Reads({COND: one})))


@pytest.mark.parametrize("count", [2, 4])
def test_equal_references_share_their_weight(count) -> None:
    """I9: R of weight W/R are one of weight W."""
    one = attend((COND,), Reads({COND: reference(50, 3.0)}))
    close(attend((COND,), *(Reads({COND: reference(50, 3.0 / count)}) for _ in range(count))), one)


def test_parts_that_read_different_injections() -> None:
    """Cond reads two, uncond one of them."""
    both, cond = reference(50, 2.0), reference(60)
    out = attend(
        (UNCOND, COND, OTHER), Reads({COND: both, UNCOND: both}), Reads({COND: cond})
    ).chunk(3)
    close(out[0], alone(UNCOND, both))
    close(out[1], alone(COND, both, cond))
    assert torch.equal(out[2], sdpa_attend(*part(OTHER), HEADS))


@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0])
def test_a_reference_of_one_self_changes_nothing(weight) -> None:
    """I5: the reference's tokens are the picture's own."""
    q, k, v = (x[:1] for x in part(COND))
    run = Run(
        sites={BLOCK: BlockSite(nn.Identity(), 2)},
        active=[Reads({COND: ReferenceTokens(k, v, weight)})],
    )
    close(run.attend(call(COND), sdpa_attend, q, k, v, HEADS), sdpa_attend(q, k, v, HEADS))


# who may look --------------------------------------------------------------------------------------------------------------


def test_only_masked_queries_look() -> None:
    mask = torch.zeros(2, 1, N, dtype=torch.float64)  # [parts 1|b n]
    mask[:, :, :2] = 1
    own = rows((UNCOND, COND))
    out = attend((UNCOND, COND), Reads({COND: reference(50)}, mask), own=own).chunk(2)
    plain = sdpa_attend(*own, HEADS).chunk(2)
    assert torch.equal(out[0], plain[0]) and torch.equal(out[1][:, 2:], plain[1][:, 2:])
    close(out[1][:, :2], alone(COND, reference(50))[:, :2])


@pytest.mark.parametrize("roles", [(UNCOND, COND), (COND, UNCOND, OTHER)])
def test_a_mask_of_ones_is_no_mask_and_one_of_zeros_no_reference(roles) -> None:
    own, read = rows(roles), {COND: reference(50, 2.0)}
    ones = torch.ones(len(roles), 1, N, dtype=torch.float64)
    assert torch.equal(
        attend(roles, Reads(read, ones), own=own), attend(roles, Reads(read), own=own)
    )
    assert torch.equal(attend(roles, Reads(read, 0 * ones), own=own), sdpa_attend(*own, HEADS))


def test_a_mask_per_picture() -> None:
    mask = torch.zeros(1, B, N, dtype=torch.float64)
    mask[0, 1] = 1
    out = attend((COND,), Reads({COND: reference(50)}, mask))
    assert torch.equal(out[0], sdpa_attend(*part(COND), HEADS)[0])
    close(out[1], alone(COND, reference(50))[1])


def test_each_part_has_a_mask_of_its_own() -> None:
    """Parts of one call may be crops of different areas: the mask belongs to the part, not to the role."""
    mask = torch.zeros(2, 1, N, dtype=torch.float64)
    mask[0, 0, :3] = mask[1, 0, 3:] = 1
    out = attend((COND, COND), Reads({COND: reference(50)}, mask)).chunk(2)
    full, plain = alone(COND, reference(50)), sdpa_attend(*part(COND), HEADS)
    close(out[0], torch.cat((full[:, :3], plain[:, 3:]), 1))
    close(out[1], torch.cat((plain[:, :3], full[:, 3:]), 1))


def test_a_masked_reference_beside_a_free_one() -> None:
    """Where the mask is 0 the free one is read alone, where it is 1 both, in one softmax."""
    mask = torch.zeros(1, 1, N, dtype=torch.float64)
    mask[0, 0, :3] = 1
    free, masked = reference(50, 0.7), reference(60, 2.0)
    for order in permutations((Reads({COND: free}), Reads({COND: masked}, mask))):
        out = attend((COND,), *order)
        close(out[:, :3], alone(COND, free, masked)[:, :3])
        close(out[:, 3:], alone(COND, free)[:, 3:])


@pytest.mark.parametrize("tokens", [M, M + 3])
def test_parts_with_unlike_references_each_read_their_own(tokens) -> None:
    """Other lengths (a subject in three pictures, nothing in one) and other masks: neither half's token counts bend the other's."""
    photo = replace(reference(50, 2.0, m=tokens), log_mask=rand(1, tokens, seed=7))
    nothing = reference(60, 2.0)
    for order in ((UNCOND, COND), (COND, UNCOND), (OTHER, COND, UNCOND)):
        out = dict(
            zip(order, attend(order, Reads({COND: photo, UNCOND: nothing})).chunk(len(order)))
        )
        close(out[COND], alone(COND, photo))
        close(out[UNCOND], alone(UNCOND, nothing))


def test_two_subjects_side_by_side_do_not_mix() -> None:
    """Two references with masks that do not touch: each region reads its own."""
    left, right = (
        torch.zeros(1, 1, N, dtype=torch.float64),
        torch.zeros(1, 1, N, dtype=torch.float64),
    )
    left[..., :3], right[..., 3:] = 1, 1
    one, two = reference(50), reference(60)
    out = attend((COND,), Reads({COND: one}, left), Reads({COND: two}, right))
    close(out[:, :3], alone(COND, one)[:, :3])
    close(out[:, 3:], alone(COND, two)[:, 3:])


# HyperTile -----------------------------------------------------------------------------------------------------------------


def test_where_masks_overlap_all_of_their_references_are_read() -> None:
    """Two masks of ones are no masks, in either order; a shared border belongs to both."""
    ones, left, right = (torch.zeros(1, 1, N, dtype=torch.float64) for _ in range(3))
    ones[:], left[0, 0, :4], right[0, 0, 2:] = 1, 1, 1
    a, b = reference(50, 0.7), reference(60, 2.0)
    for order in permutations((Reads({COND: a}, ones), Reads({COND: b}, ones))):
        close(attend((COND,), *order), alone(COND, a, b))
    for order in permutations((Reads({COND: a}, left), Reads({COND: b}, right))):
        out = attend((COND,), *order)
        close(out[:, :2], alone(COND, a)[:, :2])
        close(out[:, 2:4], alone(COND, a, b)[:, 2:4])
        close(out[:, 4:], alone(COND, b)[:, 4:])


def test_queries_cut_into_tiles_each_read_the_whole_reference() -> None:
    """HyperTile cuts only q; the kernels view k and v by q's rows. Tile for tile: own keys and the reference."""
    q, k, v = rows((UNCOND, COND))
    tiled = q.unflatten(1, (2, N // 2)).flatten(0, 1)
    run = Run(sites={BLOCK: BlockSite(nn.Identity(), 2)}, active=[Reads({COND: reference(50)})])
    out = run.attend(call(UNCOND, COND), sdpa_attend, tiled, k, v, HEADS).chunk(2)
    k, v = (t.reshape(tiled.shape[0], -1, C) for t in (k, v))
    close(out[0], sdpa_attend(*(t.chunk(2)[0] for t in (tiled, k, v)), HEADS))
    ref = reference(50)
    longer = (
        torch.cat((t.chunk(2)[1], r.expand(2 * B, -1, -1)), 1) for t, r in ((k, ref.k), (v, ref.v))
    )
    close(out[1], sdpa_attend(tiled.chunk(2)[1], *longer, HEADS))


# the pieces ----------------------------------------------------------------------------------------------------------------


def test_take_parts_copies_only_what_it_must() -> None:
    x, c = rand(3 * B, N, C, seed=1), call(UNCOND, COND, COND)
    assert take_parts(c, x, [0, 1, 2]) is x
    assert take_parts(c, x, [1]).data_ptr() == x[B:].data_ptr()
    assert torch.equal(take_parts(c, x, [0, 2]), torch.cat((x[:B], x[2 * B :])))


def test_gather_parts_shares_one_copy() -> None:
    shared, other = reference(50), reference(60)
    assert (
        gather_parts(References({COND: shared, UNCOND: shared}), call(UNCOND, COND), [0, 1], B)
        is shared
    )
    apart = gather_parts(References({COND: shared, UNCOND: other}), call(UNCOND, COND), [0, 1], B)
    assert torch.equal(apart.k, torch.cat((other.k.expand(B, -1, -1), shared.k.expand(B, -1, -1))))


def test_rows_of_one_tensor_are_taken_where_they_are_what_is_read() -> None:
    """One picture, the parts in the order of the rows: no copy. Where a part reads its own, or in another order, what each reads."""
    first, second, own = reference(2), reference(3), reference(4)
    both = ReferenceTokens(torch.cat((first.k, second.k)), torch.cat((first.v, second.v)))
    found = References({UNCOND: first, COND: second}, by_row=both)
    assert gather_parts(found, call(UNCOND, COND), [0, 1], 1) is both
    close(gather_parts(found, call(COND, UNCOND), [0, 1], 1).k, torch.cat((second.k, first.k)))
    close(
        gather_parts(replace(found, by_part={1: own}), call(UNCOND, COND), [0, 1], 1).k,
        torch.cat((first.k, own.k)),
    )


def test_a_call_knows_its_parts_by_their_names() -> None:
    run = Run(latent=(4, 6))
    run.expect({"a": Part(COND), "b": Part(COND, (2, 3, 0, 1)), "c": Part(UNCOND)})
    seen = run.call(Said(("a", "b", "c", "a stranger"), block=("output", 4, 1), grid=(5, 7)))
    assert seen.roles == (COND, COND, UNCOND, OTHER)
    assert [part.area for part in seen.texts] == [None, (2, 3, 0, 1), None, None]
    assert seen.block == ("output", 4, 1) and seen.grid == (5, 7) and seen.latent == (4, 6)


def test_a_closed_run_holds_nothing() -> None:
    run = Run(
        [Recorder([BLOCK])],
        {BLOCK: BlockSite(nn.Identity(), 2)},
        {1: (COND, None)},
        (4, 6),
        [Reads(None)],
        call(COND),
    )
    run.close()
    assert not (run.watchers or run.sites or run.parts or run.active or run.turn)


# recording -----------------------------------------------------------------------------------------------------------------


def test_tokens_are_recorded_by_half_and_block() -> None:
    recorder, n = Recorder([BLOCK]), rand(3 * B, N, C, seed=1)
    recorder.self_tokens(call(UNCOND, OTHER, COND), n)
    recorder.self_tokens(
        AttnCall(("output", 1, 0), (2, 3), call(UNCOND, OTHER, COND).texts, (4, 6)), n
    )
    assert torch.equal(recorder.of(Half.COND)[BLOCK], n[2 * B :]) and torch.equal(
        recorder.of(Half.UNCOND)[BLOCK], n[:B]
    )
    assert list(recorder.of(Half.COND)) == [BLOCK]


def test_recording_twice_is_recording_once() -> None:
    """I37: a second evaluation at the same point replaces the first."""
    prompt = ReferencePrompt("", rand(1, 5, C, seed=3), subject=SubjectTokens(("cat",), ((2,),)))
    recorder, (q, k, _) = Recorder([BLOCK], [BLOCK], prompt), part(COND)
    for _ in range(2):
        recorder.self_tokens(call(COND), q)
        recorder.cross(call(COND), q, k[:, :5], HEADS)
    once = token_map(q, k[:, :5], [(2,)], HEADS).unflatten(1, (2, 3))
    assert torch.equal(recorder.word_map(), once.float())


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_the_word_map_is_the_same_when_the_host_repeats_the_text(repeats) -> None:
    """I13, and the part of the batch is the cond one."""
    prompt = ReferencePrompt(
        "", rand(1, 5, C, seed=3), subject=SubjectTokens(("red cat",), ((1, 2),))
    )
    recorder, q, k = (
        Recorder([], [BLOCK], prompt),
        rand(2 * B, N, C, seed=1),
        rand(2 * B, 5, C, seed=2),
    )
    recorder.self_tokens(call(UNCOND, COND), q)
    recorder.cross(call(UNCOND, COND), q, k.repeat(1, repeats, 1), HEADS)
    torch.testing.assert_close(
        recorder.word_map(), token_map(q[B:], k[B:], [(1, 2)], HEADS).unflatten(1, (2, 3))
    )


def test_tokens_that_another_pack_appends_to_the_text_are_no_repeat() -> None:
    prompt = ReferencePrompt("", rand(1, 5, C, seed=3), subject=SubjectTokens(("cat",), ((4,),)))
    recorder, q, k = Recorder([], [BLOCK], prompt), rand(B, N, C, seed=1), rand(B, 8, C, seed=2)
    recorder.self_tokens(call(COND), q)
    recorder.cross(call(COND), q, k, HEADS)
    torch.testing.assert_close(
        recorder.word_map(), token_map(q, k, [(4,)], HEADS).unflatten(1, (2, 3))
    )


def test_the_uncond_half_has_no_word_map() -> None:
    prompt = ReferencePrompt("", rand(1, 5, C, seed=3), subject=SubjectTokens(("cat",), ((2,),)))
    recorder, (q, k, _) = Recorder([], [BLOCK], prompt), part(UNCOND)
    recorder.self_tokens(call(UNCOND), q)
    recorder.cross(call(UNCOND), q, k, HEADS)
    assert recorder.word_map() is None


def test_maps_of_several_grids_meet_at_the_finest() -> None:
    """I40: a spot that both grids see stays where it is, on pictures that are not square."""
    recorder, fine = Recorder([]), ("input", 1, 0)
    recorder.grids = {BLOCK: (2, 3), fine: (4, 6)}
    recorder.maps = {BLOCK: torch.zeros(1, 6), fine: torch.zeros(1, 24)}
    recorder.maps[BLOCK][0, 1 * 3 + 2] = 1  # (y, x) = (1, 2) of (2, 3)
    recorder.maps[fine][0, 3 * 6 + 5] = 1  # (3, 5) of (4, 6)
    found = recorder.word_map()
    assert found.shape == (1, 4, 6) and int(found.argmax()) == 3 * 6 + 5


@pytest.mark.parametrize(
    ("whole", "size", "same"),
    [
        ((16, 16), (8, 8), True),
        ((16, 16), (20, 20), True),
        ((17, 9), (8, 4), True),
        ((13, 9), (16, 11), True),
        ((16, 16), (16, 16), True),
        ((16, 16), (8, 16), False),
        ((16, 16), (16, 24), False),
        ((8, 8), (4, 8), False),
    ],
)
def test_a_resized_picture_keeps_the_ratio_of_its_sides_to_a_cell(whole, size, same):
    assert is_resized(whole, size) == same


def test_a_target_mask_is_cut_anew_for_every_size_that_the_sampler_asks_for():
    """Of 15 and 16 cells a layer has 8 both times, but they are not the same cells."""
    drawn = torch.zeros(1, 240, 240)
    drawn[:, :, :105] = 1
    target, x = TargetMask(drawn, "a test"), torch.zeros(1, 64, C)
    at = {
        n: target(AttnCall(BLOCK, (8, 8), (Part(COND),), (n, n)), x).view(8, 8)[0] for n in (16, 15)
    }
    for n, found in at.items():
        alone = TargetMask(drawn, "a test")(AttnCall(BLOCK, (8, 8), (Part(COND),), (n, n)), x).view(
            8, 8
        )[0]
        assert torch.equal(found, alone)
    assert not torch.equal(at[16], at[15])
