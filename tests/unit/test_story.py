"""Laws of ConsiStory's shared attention in one call of the UNet (arXiv 2402.03286, eq. 2-4; I19-I24, I26, I27, I36)."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from kindred.models.network.call import Halves, Role
from kindred.models.network.sites import BlockSite
from kindred.models.run import Run
from kindred.models.story import step
from kindred.models.story.plan import dropped
from kindred.models.story.sources import QueryRecorder
from kindred.models.story.story import Story
from small_attention import sdpa_attend
from small_story import (
    AREA,
    BLOCK,
    COND,
    GRID,
    HEADS,
    LATENT,
    MAP,
    OTHER,
    OUT,
    SIGMAS,
    TEXT,
    UNCOND,
    C,
    N,
    attend,
    call,
    close,
    own,
    rand,
    spots,
    told,
)
from torch import Tensor, nn


def dense(story: Story, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Eq. (2), (3) word by word: every picture over all b*n keys, log M (-inf) and log W on the others'. One part [b n c]."""
    b, s = len(q), story.settings
    count = s.anchors or b
    seen = torch.zeros(b, b, N, dtype=torch.float64)
    for i in range(b):
        for j in range(b):
            if i == j:
                seen[i, j] = 1
            elif j < count:
                drop = dropped(s.seed, j, story.schedule.step(story.sigma), GRID, s.dropout)
                seen[i, j] = s.weight * (story.step.masks(GRID)[j].flatten() & ~drop)
    heads = [x.unflatten(-1, (HEADS, -1)) for x in (q, k.flatten(0, 1), v.flatten(0, 1))]
    logits = (
        torch.einsum("bnhd,mhd->bhnm", heads[0], heads[1]) / (C // HEADS) ** 0.5
        + seen.flatten(1).log()[:, None, None]
    )
    return torch.einsum("bhnm,mhd->bnhd", logits.softmax(-1), heads[2]).flatten(2)


# shared attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("anchors", [0, 1, 2, 3, 4, 7])
def test_it_is_the_masked_attention_over_all_pictures(anchors, weight) -> None:
    story, qkv = told(4, spots(4), anchors=anchors, weight=weight, seed=5), own(4, 2)
    out, plain = attend(story, (UNCOND, COND), qkv).chunk(2), sdpa_attend(*qkv, HEADS).chunk(2)
    for half, was, x in zip(out, plain, zip(*(t.chunk(2) for t in qkv))):
        close(half, dense(story, *x))
        assert [bool((half[i] - was[i]).abs().max() > 1e-3) for i in range(4)] == [
            anchors != 1 or i > 0 for i in range(4)
        ]


def test_every_step_and_seed_drops_others() -> None:
    qkv = own(3, 1)
    outs = [
        attend(told(3, spots(3), sigma, seed=seed), (COND,), qkv)
        for sigma, seed in ((1.0, 0), (0.5, 0), (1.0, 1))
    ]
    assert all((a - b).abs().max() > 1e-3 for a, b in permutations(outs, 2))
    assert torch.equal(
        attend(told(3, spots(3), 0.7, seed=0), (COND,), qkv), outs[0]
    )  # of the same step


@pytest.mark.parametrize(
    "parts", [(UNCOND, COND), (COND, UNCOND, OTHER), (COND, AREA, UNCOND), (OTHER, COND, COND)]
)
@pytest.mark.parametrize("halves", [Halves.BOTH, Halves.COND])
def test_parts_that_do_not_share_keep_every_bit(parts, halves) -> None:
    """Areas hold other places, other nodes' passes are not ours, and the uncond half shares only where it is to."""
    story, qkv = told(3, spots(3), halves=halves), own(3, len(parts))
    out, plain = (
        attend(story, parts, qkv).chunk(len(parts)),
        sdpa_attend(*qkv, HEADS).chunk(len(parts)),
    )
    for i, part in enumerate(parts):
        if part is COND or (part is UNCOND and halves is Halves.BOTH):
            close(out[i], dense(story, *(t.chunk(len(parts))[i] for t in qkv)))
        else:
            assert torch.equal(out[i], plain[i])


@pytest.mark.parametrize(
    "story",
    [
        told(1, spots(1)),
        told(3, spots(3), dropout=1.0),
        told(3, spots(3), weight=0.0),
        told(3, 0 * spots(3)),
        told(3, sigma=10.0),
        told(1, spots(1), anchors=1),
        told(3, spots(3) * torch.tensor([1.0, 0, 0])[:, None, None], anchors=1, dropout=1.0),
    ],
    ids=[
        "one picture",
        "all dropped",
        "weight 0",
        "empty masks",
        "no masks yet",
        "one anchor",
        "an anchor that is all dropped",
    ],
)
def test_nothing_to_read_is_the_hosts_own_call(story) -> None:
    """I19, I20, I21 and Q11: bit for bit, in one call of the kernel; nor does it ask for a plain pass."""
    rows, qkv = [], own(story.pictures, 2)

    def kernel(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        rows.append((len(q), k.shape[1], mask))
        return sdpa_attend(q, k, v, heads, mask)

    assert torch.equal(attend(story, (UNCOND, COND), qkv, kernel), sdpa_attend(*qkv, HEADS))
    assert rows == [(2 * story.pictures, N, None)]
    story.begin_step(5.0)
    assert not story.shares and not story.wants_vanilla((UNCOND, COND))


def test_weight_one_needs_no_mask_and_no_token_that_nobody_reads() -> None:
    """Gathered, and the others of one call; log W is a bias per key, never per query."""
    shapes: list[tuple[int, ...]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        shapes.append((len(q), k.shape[1], None if mask is None else mask.shape[-2]))
        return sdpa_attend(q, k, v, heads, mask)

    story = told(5, spots(5), anchors=2)
    lengths = [len(i) for i in story.step.kept(GRID)]
    attend(story, (UNCOND, COND), own(5, 2), kernel)
    assert shapes == [
        (2, N + lengths[1], None),
        (2, N + lengths[0], None),
        (6, N + sum(lengths), None),
    ]
    shapes.clear()
    attend(told(5, spots(5), anchors=2, weight=2.0), (UNCOND, COND), own(5, 2), kernel)
    assert shapes == [(2, N + lengths[1], 1), (2, N + lengths[0], 1), (6, N + sum(lengths), 1)]


def test_no_dropout_keeps_the_whole_mask() -> None:
    """I20."""
    masks = spots(3)
    wanted = [(masks[i].flatten().nonzero().squeeze(1) + i * N).tolist() for i in range(3)]
    assert [k.tolist() for k in told(3, masks, dropout=0.0).step.kept(GRID)] == wanted


def test_only_pictures_with_something_to_read_change() -> None:
    """One anchor's mask is empty: it still reads the other's, which in turn reads nobody."""
    masks, qkv = spots(3) * torch.tensor([1.0, 0, 1])[:, None, None], own(3, 1)
    out, plain = (
        attend(told(3, masks, anchors=2, dropout=0.0), (COND,), qkv),
        sdpa_attend(*qkv, HEADS),
    )
    assert torch.equal(out[0], plain[0])
    close(out, dense(told(3, masks, anchors=2, dropout=0.0), *qkv))
    assert all((out[i] - plain[i]).abs().max() > 1e-3 for i in (1, 2))


# whose batch it is ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_order_of_the_pictures_changes_nothing(monkeypatch, dropout) -> None:
    """I22: where dropout goes with its picture."""
    masks, qkv = spots(3), own(3, 1)
    out = attend(told(3, masks, dropout=dropout), (COND,), qkv)
    for order in permutations(range(3)):
        monkeypatch.setattr(step, "dropped", lambda seed, i, *rest: dropped(seed, order[i], *rest))
        close(
            attend(
                told(3, masks[list(order)], dropout=dropout), (COND,), [t[list(order)] for t in qkv]
            ),
            out[list(order)],
        )


def test_anchors_and_extras_do_not_depend_on_extras() -> None:
    """I23, I24: neither on what they are nor on how many."""
    masks, qkv = spots(5), own(5, 1)
    out = attend(told(5, masks, anchors=2), (COND,), qkv)
    for rows in ([0, 1], [0, 1, 4], [0, 1, 3, 2]):
        found = attend(told(len(rows), masks[rows], anchors=2), (COND,), [t[rows] for t in qkv])
        close(found, out[rows])
    masks[3], others = 1, [torch.cat((t[:3], rand(1, N, C, seed=7), t[4:])) for t in qkv]
    found = attend(told(5, masks, anchors=2), (COND,), others)
    assert torch.equal(found[[0, 1, 2, 4]], out[[0, 1, 2, 4]])


def test_equal_pictures_that_see_all_of_one_another_stay_plain() -> None:
    """I26: all keys stand there equally often; with a part of them it differs."""
    qkv = [t.expand(3, -1, -1) for t in own(1, 1)]
    close(
        attend(told(3, torch.ones(1, *LATENT), dropout=0.0), (COND,), qkv), sdpa_attend(*qkv, HEADS)
    )
    out = attend(told(3, spots(1), dropout=0.0), (COND,), qkv)
    assert (out - sdpa_attend(*qkv, HEADS)).abs().max() > 1e-3


def test_cond_and_uncond_in_one_call_or_in_two() -> None:
    """I36: masks, attention and blending; in either order."""
    qkv, split = own(3, 1), {}
    both = {
        part.role: [rand(3, N, C, seed=10 * i + len(part.role.value)) for i in range(3)]
        for part in (COND, UNCOND)
    }
    steps = {
        "together": [(UNCOND, COND)],
        "swapped": [(COND, UNCOND)],
        "apart": [(COND,), (UNCOND,)],
        "late": [(UNCOND,), (COND,)],
    }
    for name, calls in steps.items():
        story = told(3, sigma=10.0)
        text, image = rand(3, TEXT, C, seed=1), rand(3, 6, C, seed=2)
        for parts in calls:
            story.cross(
                call(*parts, block=MAP, grid=(2, 3), cross=True),
                image.repeat(len(parts), 1, 1) * 4,
                torch.cat([text if p is COND else -text for p in parts]),
                HEADS,
            )
        story.begin_step(5.0)
        out = {}
        for parts in calls:
            assert story.wants_vanilla(parts)
            n = torch.cat([both[p.role][0] for p in parts])
            story.vanilla = {BLOCK: torch.cat([both[p.role][1] for p in parts])}
            q = story.self_tokens(call(*parts), n)
            mixed = attend(
                story,
                parts,
                [q, torch.cat([qkv[1]] * len(parts)), torch.cat([qkv[2]] * len(parts))],
            )
            out |= dict(zip((p.role for p in parts), mixed.chunk(len(parts))))
        split[name] = out
    for name, out in split.items():
        for role, rows in out.items():
            close(rows, split["together"][role])
    assert (split["apart"][Role.COND] - split["apart"][Role.UNCOND]).abs().max() > 1e-3


# query blending ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blend, nus",
    [((0.9, 0.818), (0.9, 0.818)), ((1.0, 0.25), (1.0, 0.25)), ((0.0, 1.0), (0.0, 0.0))],
)
def test_queries_are_mixed_with_the_plain_passs(blend, nus) -> None:
    """I27, eq. 4: nu 0 keeps them, nu 1 takes the plain pass's, exactly; only in parts that share."""
    parts, n, vanilla = (UNCOND, OTHER, COND, AREA), rand(12, N, C, seed=1), rand(12, N, C, seed=2)
    for sigma, nu in zip(SIGMAS, (*nus, 0, 0)):
        story = told(3, spots(3), sigma, blend=blend)
        assert story.wants_vanilla(parts) == bool(nu)
        assert (
            story.self_tokens(call(*parts), n) is n
        )  # in the plain pass, and where there was none
        story.vanilla = {BLOCK: vanilla}
        mixed = story.self_tokens(call(*parts), n).chunk(4)
        for i in range(4):
            x, v = n.chunk(4)[i], vanilla.chunk(4)[i]
            assert torch.equal(
                mixed[i], {0: x, 1: v}.get(nu, torch.lerp(x, v, nu)) if i in (0, 2) else x
            )
        assert torch.equal(story.self_tokens(call(UNCOND, COND), n), torch.lerp(n, vanilla, nu))
        assert story.self_tokens(call(*parts, block=OUT), n) is n


def test_a_plain_pass_is_asked_for_where_it_changes_something() -> None:
    story = told(3, spots(3), 5.0)
    assert (
        story.wants_vanilla((UNCOND, COND))
        and story.wants_vanilla((COND,))
        and story.wants_vanilla((UNCOND,))
    )
    assert not story.wants_vanilla((OTHER, AREA)) and not told(3, spots(3), 2.0).wants_vanilla(
        (COND,)
    )
    assert not told(3, spots(3), 5.0, halves=Halves.COND).wants_vanilla((UNCOND,))
    assert not told(3, spots(3), 5.0, dropout=1.0).wants_vanilla((COND,)) and not told(
        3, None, 10.0
    ).wants_vanilla((COND,))


def test_the_plain_pass_leaves_the_tokens_of_the_shared_blocks() -> None:
    watcher, n = QueryRecorder(frozenset({BLOCK})), rand(3, N, C, seed=1)
    assert (
        watcher.self_tokens(call(COND), n) is n
        and watcher.self_tokens(call(COND, block=OUT), 2 * n) is not n
    )
    assert list(watcher.tokens) == [BLOCK] and watcher.tokens[BLOCK] is n


# what it refuses -----------------------------------------------------------------------------------------------------------


def test_pictures_that_are_split_or_cut_are_refused_with_both_numbers() -> None:
    """Context windows, HyperTile, token merging: positions would mean other things."""
    story = told(4, spots(4))
    for rows in (2, 8):
        with pytest.raises(ValueError, match=rf"\b{rows} pictures .*\b4\b"):
            attend(story, (COND,), own(rows, 1))
    q, k, v = own(4, 1)
    for tokens in ((q[:, :18], k, v), (q, k[:, :18], v[:, :18])):
        with pytest.raises(ValueError, match=r"\b18 (tokens|keys) .*\b4x6\b"):
            attend(story, (COND,), list(tokens))
    run = Run(sites={BLOCK: BlockSite(nn.Identity(), 1)}, active=[story])
    with pytest.raises(ValueError, match=r"\b24 tokens \(3x8\) .*\b4x6\b"):
        run.attend(call(COND, grid=(3, 8)), sdpa_attend, q, k, v, HEADS)
    for rows, tokens, words in ((2, 6, r"\b2 pictures .*\b4\b"), (4, 3, r"\b3 tokens .*\b2x3\b")):
        with pytest.raises(ValueError, match=words):
            told(4).cross(
                call(COND, block=MAP, grid=(2, 3), cross=True),
                rand(rows, tokens, C, seed=1),
                rand(rows, TEXT, C, seed=2),
                HEADS,
            )
    assert torch.equal(
        attend(story, (AREA, OTHER), own(2, 2)), sdpa_attend(*own(2, 2), HEADS)
    )  # nothing of ours
