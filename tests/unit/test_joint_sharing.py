"""Pictures of a batch that share their subject where text and picture are in one softmax: small tensors against the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kindred.models.attention.engine import read
from kindred.models.attention.sharing import Gathers, Sharing
from kindred.models.network.call import AttnCall, Joint, Part, Role
from kindred.models.network.sites import BlockSite
from kindred.models.story.matching import match
from kindred.models.story.plan import Schedule, StorySettings, shared_groups
from kindred.models.story.step import Gated, Step
from kindred.models.subject.correspondence import MASSIVE, correspond, telling_channels
from kindred.models.subject.maps import apart_masks, word_masks
from small_attention import TIGHT, rand, sdpa_attend
from small_joint import LAW, SIDES, WAYS, C, D, H, P, all_sides, both_ways, logits
from torch import Tensor

GRID, PICTURES = (2, 3), 4
BLOCK = ("double", 0, 0)
SITE = BlockSite(None, 1)
CPU = torch.device("cpu")
ROLES = (Role.UNCOND, Role.COND)


def call_of(sides: str, roles: tuple = ROLES, mask: Tensor | None = None) -> AttnCall:
    before, _ = SIDES[sides]
    joint = Joint(slice(before, before + P), mask)
    parts = tuple(Part(role) for role in roles)
    return AttnCall(BLOCK, GRID, parts, GRID, joint=joint)


def batch(sides: str, parts: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """The pictures' queries [b P c], all keys and values [b T+P c]."""
    m = sum(SIDES[sides]) + P
    return tuple(rand(parts * PICTURES, n, C, seed=s) for n, s in ((P, 1), (m, 2), (m, 3)))


def sharing(anchors: int, shared: tuple[int, ...], weight: float = 1.0, **more: bool) -> tuple:
    """A Sharing, and what each group of pictures reads: other lengths for every group."""
    groups = shared_groups(PICTURES, anchors)
    order = torch.randperm(PICTURES * P, generator=torch.Generator().manual_seed(5))
    reads = {who: order[: 3 + i] for i, (who, others) in enumerate(groups) if others}
    gather = Gathers(PICTURES, weight, CPU).of(
        GRID, len(shared), [who for who, _ in groups], reads, torch.float64
    )
    return Sharing(shared, gather, weight, **more), reads


def row_by_formula(
    q: Tensor, k: Tensor, v: Tensor, picture: slice, kr: Tensor, vr: Tensor, weight: float,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """D (3) of one row [1 n c] that reads tokens kr vr [1 l c], as it is written; mask [m] on own keys."""
    m = k.shape[1]
    scores = logits(q, torch.cat((k, kr), 1))
    scores[..., m:] += torch.tensor(weight).double().log()
    if mask is not None:
        scores[..., :m] += mask
    text = torch.ones(scores.shape[-1], dtype=torch.bool)
    text[picture], text[m:] = False, False
    if text.any():
        plain = scores[..., picture].logsumexp(-1, keepdim=True)
        scores = scores + (plain - scores[..., ~text].logsumexp(-1, keepdim=True)) * ~text
    values = torch.cat((v, vr), 1).unflatten(-1, (H, D)).transpose(1, 2)
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


def by_formula(call, shared, reads, q, k, v, weight, mask=None) -> Tensor:
    """Every row by itself; parts that do not share are the host's own."""
    out = []
    for part in range(len(call.texts)):
        own = slice(part * PICTURES, (part + 1) * PICTURES)
        keys, values = (call.of_picture(t[own]).flatten(0, 1) for t in (k, v))
        for i in range(PICTURES):
            row = slice(own.start + i, own.start + i + 1)
            index = [at for (first, last), at in reads.items() if first <= i < last]
            here = None if mask is None else mask[row.start]
            if part not in shared or not index:
                bias = None if here is None else here[None, None, None]
                out.append(sdpa_attend(q[row], k[row], v[row], H, bias))
                continue
            lent = keys[index[0]][None], values[index[0]][None]
            tokens = (q[row], k[row], v[row], call.joint.picture, *lent, weight, here)
            out.append(row_by_formula(*tokens))
    return torch.cat(out)


@both_ways
@all_sides
@LAW("anchors", [0, 2])
@LAW("shared", [(0, 1), (1,)])
def test_each_picture_reads_what_its_group_reads_and_the_text_keeps_its_share(
    way, sides, anchors, shared
) -> None:
    call, (q, k, v) = call_of(sides), batch(sides)
    told, reads = sharing(anchors, shared, 2.0)
    out = read(call, [told], SITE, WAYS[way], q, k, v, H)
    torch.testing.assert_close(out, by_formula(call, shared, reads, q, k, v, 2.0), **TIGHT)


@both_ways
@LAW("form", ["(b,1,m)", "(b,1,1,m)", "(b,1,n,m)", "(1,1,m)"])
@LAW("anchors", [0, 2])
def test_each_rows_own_mask_is_obeyed(way, form, anchors) -> None:
    """Groups of pictures are cut out of a call, and the host's mask with them."""
    sides = "text first"
    before = SIDES[sides][0]
    mask = torch.zeros(2 * PICTURES, before + P).double()
    for row in range(len(mask)):
        mask[row, : 1 if form == "(1,1,m)" else row % before] = -torch.inf
    forms = {
        "(b,1,m)": mask[:, None],
        "(b,1,1,m)": mask[:, None, None],
        "(b,1,n,m)": mask[:, None, None].expand(-1, -1, P, -1),
        "(1,1,m)": mask[:1, None],
    }
    call, (q, k, v) = call_of(sides, mask=forms[form]), batch(sides)
    told, reads = sharing(anchors, (0, 1))
    out = read(call, [told], SITE, WAYS[way], q, k, v, H)
    torch.testing.assert_close(out, by_formula(call, (0, 1), reads, q, k, v, 1.0, mask), **TIGHT)


@both_ways
def test_told_to_the_text_is_dimmed(way) -> None:
    """One softmax over all, as of references that dim it."""
    call, (q, k, v) = call_of("text first", (Role.COND,)), batch("text first", 1)
    told, reads = sharing(0, (0,), dims_text=True)
    out = read(call, [told], SITE, WAYS[way], q, k, v, H)
    keys, values = (call.of_picture(t).flatten(0, 1) for t in (k, v))
    for i in range(PICTURES):
        index = next(at for (first, last), at in reads.items() if first <= i < last)
        both = (torch.cat((t[i], lent[index]))[None] for t, lent in ((k, keys), (v, values)))
        torch.testing.assert_close(out[i : i + 1], sdpa_attend(q[i : i + 1], *both, H), **TIGHT)


@both_ways
def test_equal_pictures_that_read_one_another_whole_stay_as_they_are(way) -> None:
    """I26, beside a text that keeps its share, at every weight."""
    call = call_of("text around", (Role.COND,))
    q, k, v = (t[:1].expand(PICTURES, -1, -1).contiguous() for t in batch("text around", 1))
    groups = shared_groups(PICTURES, 0)
    reads = {who: torch.cat([torch.arange(P) + j * P for j in others]) for who, others in groups}
    for weight in (0.3, 1.0, 5.0):
        gather = Gathers(PICTURES, weight, CPU).of(GRID, 1, [*reads], reads, torch.float64)
        out = read(call, [Sharing((0,), gather, weight)], SITE, WAYS[way], q, k, v, H)
        torch.testing.assert_close(out, sdpa_attend(q, k, v, H), **TIGHT)


@both_ways
@LAW("parts", [(0, 1), (1,)])
def test_each_of_two_subjects_is_read_by_its_like_alone(way, parts) -> None:
    """A token of the one reads the one, of both both, of none both too."""
    call, (q, k, v) = call_of("text first"), batch("text first")
    words = torch.rand(PICTURES, 2, P, generator=torch.Generator().manual_seed(1)) < 0.5
    words[0, :, :3] = torch.tensor([[True, False, True], [True, True, False]])
    gates = words | ~words.any(1, keepdim=True)
    who = [(0, 1), (1, PICTURES)]
    reads = [{w: torch.arange(4) + 2 * n + i for i, w in enumerate(who)} for n in range(2)]
    settings = StorySettings(frozenset({BLOCK}), (), weight=2.0)
    gated = [Gated([*r.items()], gates[:, n]) for n, r in enumerate(reads)]
    told = [each for g in gated for each in g.references(call, k, v, parts, settings)]
    out = read(call, told, SITE, WAYS[way], q, k, v, H)
    for part in range(2):
        own = slice(part * PICTURES, (part + 1) * PICTURES)
        keys, values = (call.of_picture(t[own]).flatten(0, 1) for t in (k, v))
        for i in range(PICTURES):
            row, group = own.start + i, who[min(i, 1)]
            for n in range(P):
                heard = [reads[w][group] for w in range(2) if gates[i, w, n] and part in parts]
                at = torch.cat([torch.zeros(0, dtype=torch.long), *heard])
                tokens = (t[row : row + 1] for t in (k, v))
                lent = (keys[at][None], values[at][None])
                one = q[row : row + 1, n : n + 1]
                want = row_by_formula(one, *tokens, call.joint.picture, *lent, 2.0)
                torch.testing.assert_close(out[row : row + 1, n : n + 1], want, **TIGHT)


@LAW("grid", [(4, 6), (8, 12)])
def test_no_token_is_of_two_subjects(grid) -> None:
    """I58: together they are what the words' masks are together; the same word twice is the first alone."""
    soft = rand(3, 2, 4, 6, seed=7).float().exp()
    masks, apart = word_masks(soft, grid), apart_masks(soft, grid)
    assert torch.equal(apart.any(1), masks.any(1)) and not (apart[:, 0] & apart[:, 1]).any()
    assert (masks[:, 0] & masks[:, 1]).any() and not (apart & ~masks).any()
    twice = apart_masks(
        soft[:, :1].expand(-1, 2, -1, -1) * torch.tensor([1.0, 4.0])[:, None, None], grid
    )
    assert torch.equal(twice[:, 0], masks[:, 0]) and not twice[:, 1].any()


# matching ---------------------------------------------------------------------------------------------------------------------


def test_a_subject_is_read_by_its_like_and_by_what_is_no_subject() -> None:
    """Of two subjects on a picture's left and right and nothing between: never the other's tokens."""
    settings = StorySettings(frozenset({BLOCK}), (), anchors=0, dropout=0.0)
    schedule = Schedule((1.0, 0.5), (999.0, 500.0), settings)
    soft = torch.zeros(2, 2, 1, 3)
    soft[:, 0, :, 0] = soft[:, 1, :, 2] = 1.0
    step = Step(settings, schedule, 2, CPU, sigma=1.0, soft=soft)
    left, right = step.gated((1, 3))
    assert left.gate.tolist() == [[True, True, False]] * 2
    assert right.gate.tolist() == [[False, True, True]] * 2
    reads = [[(who, index.tolist()) for who, index in one.reads] for one in (left, right)]
    assert reads == [[((0, 1), [3]), ((1, 2), [0])], [((0, 1), [5]), ((1, 2), [2])]]


def test_where_two_subjects_lie_the_nearer_match_counts() -> None:
    """Both subjects claim token 0; the second one's source is its very like."""
    features = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.0, 1.0]]])
    sources = torch.tensor([[[0.9, 0.2], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    mask = torch.tensor([[[True, False, False, False]]])
    for order in ((0, 1), (1, 0)):
        candidates = [[torch.tensor([source])] for source in order]
        targets, rows = match(features, [mask, mask], sources, candidates)
        assert targets.tolist() == [0] and rows.tolist() == [1]


def test_massive_channels_do_not_count() -> None:
    """I58: a channel that is as great in every token is left out, so that whatever is added to it changes no match."""
    features = rand(2, 12, 7, seed=1).float()
    features[..., 3] = 500.0 + 0.1 * features[..., 3]
    telling = telling_channels(features)
    assert telling.tolist() == [n != 3 for n in range(7)]
    moved = features.clone()
    moved[..., 3] += 1000.0
    assert torch.equal(telling_channels(moved), telling)
    masks, kept = torch.ones(2, 12, dtype=torch.bool), [torch.arange(12, 24), torch.arange(12)]

    def places(x: Tensor) -> Tensor:
        return correspond(x, masks, x, kept).source

    assert torch.equal(places(features[..., telling]), places(moved[..., telling]))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    copied = torch.stack([features[0], features[0][order]])
    matched = correspond(copied[..., telling], masks, copied[..., telling], kept)
    assert torch.equal(matched.source[0], 12 + order.argsort())


def test_where_all_channels_are_massive_all_count() -> None:
    assert telling_channels(torch.full((2, 5, 3), 2.0)).all() and MASSIVE > 1


# windows in a flow's noise levels ---------------------------------------------------------------------------------------------

# where blending ends, injection begins and ends, as the node comes
MOMENTS = (0.12, 0.1, 0.32)


def flow(steps: int, shift: float) -> Schedule:
    """A `simple` schedule of a shifted flow, its windows the node's own."""

    def sigma(percent: float) -> float:
        return shift * (1 - percent) / (1 + (shift - 1) * (1 - percent))

    sigmas = tuple(sigma(step / steps) for step in range(steps))
    until, *inject = map(sigma, MOMENTS)
    settings = StorySettings(frozenset(), (), blend_until=until, inject=tuple(inject))
    return Schedule(sigmas, tuple(1000 * s for s in sigmas), settings, ends=True)


@pytest.mark.parametrize("shift", [1.0, 3.0, 3.16, 7.5, 12.0])
@pytest.mark.parametrize("steps", [4, 5, 6, 8, 9, 16, 20, 28, 50])
def test_the_windows_of_a_few_steps_hold_some(steps: int, shift: float) -> None:
    """From 4 steps on, however the schedule is shifted: features are injected at 10 to 32 % of the steps and compared behind."""
    s = flow(steps, shift)
    inside = [i for i, sigma in enumerate(s.sigmas) if s.injects(sigma)]
    assert inside == [i for i in range(steps) if 0.1 <= i / steps <= 0.32]
    assert s.first_injection == s.sigmas[inside[0]] > s.features_at
    assert s.blend(s.sigmas[0]) == 0.9


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_of_fewer_steps_sharing_is_left(steps: int) -> None:
    assert flow(steps, 3.0).first_injection is None


def test_a_flow_that_stops_before_compares_nothing() -> None:
    """The first of two samplers, which hands over pictures that are noise still."""
    whole = flow(20, 3.0)
    first = replace(whole, sigmas=whole.sigmas[:10], timesteps=whole.timesteps[:10], ends=False)
    assert first.first_injection is None
