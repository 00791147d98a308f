"""Laws of a whole ConsiStory run on a UNet in small: stages and feature injection (eq. 5-6; I19, I20, I22-I24, I26-I29, I36, I37)."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kindred.models.network.call import Halves, Part
from kindred.models.story import step
from kindred.models.story.anchors import AnchorRecorder
from kindred.models.story.plan import dropped
from kindred.models.story.story import Story
from kindred.models.subject.correspondence import smooth
from kindred.models.subject.masks import otsu_threshold
from small_unet import (
    COARSE,
    COND,
    ENCODER,
    FINE,
    GRID,
    MIDDLE,
    NOISE,
    SIGMAS,
    TEXTS,
    UNCOND,
    C,
    Studio,
    attn,
    close,
    differs,
    made,
    rand,
    spots,
    told,
)
from torch import Tensor

# whole runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "story",
    [
        {"weight": 0.0, "injection": 0.0},
        {"dropout": 1.0, "injection": 0.0},
        {"masks": torch.zeros(1, *GRID)},
    ],
)
def test_a_story_that_shares_nothing_is_no_story(story) -> None:
    """I20, I21, I28: bit for bit; and the parts of it each do something."""
    assert torch.equal(made([0, 1, 2], told(3, **story)), made([0, 1, 2], None))


def test_one_picture_stays_plain() -> None:
    """I19: bit for bit, through both stages."""
    assert torch.equal(made([0], told(1)), made([0], None))


def test_each_part_of_a_story_changes_all_that_read() -> None:
    rows, outs = [0, 1, 2], {}
    for name, changed in {
        "all": {},
        "no blending": {"blend": (0.0, 0.0)},
        "no injection": {"injection": 0.0},
        "no sharing": {"weight": 0.0},
        "cond only": {"halves": Halves.COND},
    }.items():
        outs[name] = made(rows, told(3, **changed))
    outs["plain"] = made(rows, None)
    for a in outs:
        assert all(differs(outs[a], outs[b]) for b in outs if b != a), a


def test_the_order_of_the_pictures_changes_nothing(monkeypatch) -> None:
    """I22: all read all, injection is from a snapshot, dropout goes with its picture."""
    order, out = [2, 0, 3, 1], made([0, 1, 2, 3], told(4, anchors=0))
    monkeypatch.setattr(step, "dropped", lambda seed, i, *rest: dropped(seed, order[i], *rest))
    close(made(order, told(4, anchors=0)), out[order])


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 4], [0, 1, 3, 2]])
def test_anchors_and_extras_do_not_depend_on_extras(rows) -> None:
    """I23, I24: through masks, sharing, correspondence and injection."""
    close(made(rows, told(len(rows))), made([0, 1, 2, 3, 4], told(5))[rows])


def test_equal_pictures_stay_plain() -> None:
    """I26, I29: whole masks and no dropout; each finds itself in the others."""
    rows = [0, 0, 0]
    close(made(rows, told(3, masks=torch.ones(1, *GRID), dropout=0.0, anchors=0)), made(rows, None))
    assert differs(
        made(rows, told(3, masks=torch.eye(4, 6)[None], dropout=0.0, anchors=0)), made(rows, None)
    )


@pytest.mark.parametrize("calls", [((COND, UNCOND),), ((UNCOND,), (COND,)), ((COND,), (UNCOND,))])
def test_cond_and_uncond_in_one_call_or_in_two(calls) -> None:
    """I36."""
    close(made([0, 1, 2], told(3), calls=calls), made([0, 1, 2], told(3)))


def test_every_level_asked_twice_and_runs_in_a_row() -> None:
    """I37, I39."""
    out = made([0, 1, 2], told(3))
    assert torch.equal(made([0, 1, 2], told(3), times=2), out) and torch.equal(
        made([0, 1, 2], told(3)), out
    )


@pytest.mark.parametrize("official", [False, True])
def test_what_the_first_stage_answered_need_not_be_asked_again(official) -> None:
    """The calls are those of the schedule, plain ones in the blend's window only."""
    runs = [
        Studio(NOISE[:3], TEXTS[:3], told(3, official=official), replay=replay)
        for replay in (True, False)
    ]
    close(runs[0].sample(), runs[1].sample())
    first = [10.0, 6.0, 6.0, 4.0, 2.5, 1.5] + [
        0.8,
        0.3,
    ] * official  # no plain pass while no mask is known
    assert runs[0].asked == first + [6.0, 6.0, 4.0, 2.5, 1.5, 0.8, 0.3]
    one = Studio(NOISE[:3], TEXTS[:3], told(3, injection=0.0))
    one.sample()
    assert one.asked == [10.0, 6.0, 6.0, 4.0, 2.5, 1.5, 0.8, 0.3]


# stages --------------------------------------------------------------------------------------------------------------------


def at(
    story: Story, sigma: float, h: Tensor | None = None, parts: tuple[Part, ...] = (UNCOND, COND)
) -> Story:
    story.begin_step(sigma)
    if h is not None:
        story.output_block(1, h, parts)
    return story


@pytest.mark.parametrize(
    "parts, mine",
    [
        ((UNCOND, COND), 1),
        ((COND, UNCOND), 0),
        ((Part(), replace(COND, area=(4, 6, 0, 0)), COND), 2),
    ],
)
def test_features_are_read_once_from_the_cond_half(parts, mine) -> None:
    """Of the tap alone, at the level nearest t = 261, smoothed, in float32; a copy."""
    story, h = told(3, masks=spots(3)), rand(3 * len(parts), C, *GRID, seed=1)
    for sigma in (10.0, 2.5):
        assert at(story, sigma, h, parts).comparison.features is None and not story.first_stage_ends
    story.begin_step(1.5)
    story.output_block(0, h, parts)
    story.output_block(1, h[:3], (UNCOND,))
    assert story.comparison.features is None and story.comparison.sigma is None
    story.output_block(1, h, parts)
    assert story.first_stage_ends
    wanted = smooth(h.chunk(len(parts))[mine].float()).flatten(2).mT
    h.zero_()
    story.output_block(1, h + 1, parts)  # another node's extra pass at the same level
    assert (
        torch.equal(story.comparison.features, wanted)
        and story.comparison.features.dtype == torch.float32
    )
    at(story, 0.8, h, parts)
    assert torch.equal(story.comparison.features, wanted) and story.comparison.sigma == 1.5


@pytest.mark.parametrize(
    "sigma, tapped", [(1.5 * (1 + 1e-6), True), (1.49, True), (0.2, True), (1.6, False)]
)
def test_samplers_that_ask_between_the_levels(sigma, tapped) -> None:
    """The first level at or below the one nearest t = 261."""
    story = at(told(3, masks=spots(3)), sigma, rand(6, C, *GRID, seed=1))
    assert (story.comparison.features is not None) == tapped and story.comparison.sigma == (
        sigma if tapped else None
    )


def test_one_stage_is_enough_without_injection() -> None:
    story = at(told(3, masks=spots(3), injection=0.0), 1.5, rand(6, C, *GRID, seed=1))
    assert story.stage == 0 and story.comparison.features is None and not story.first_stage_ends
    out = rand(6, 24, C, seed=2)
    assert story.self_output(attn(), out) is out


def matched(pictures: int, h: Tensor, masks: Tensor, source=None, **changed) -> Story:
    story = at(told(pictures, source, masks, **changed), 1.5, torch.cat((h, h)))
    story.begin_second_stage()
    return story


def injected(h: Tensor, x: Tensor, masks: Tensor, anchors: int, alpha: float) -> Tensor:
    """Eq. 5, 6, 8, 9 and the gate, token by token. h [b c y x], x [b n c] of the cond half."""
    d, b, found = F.normalize(smooth(h.float()).double().flatten(2).mT, dim=-1), len(x), x.clone()
    for i in range(b):
        sources = [
            (j, q)
            for j in range(anchors or b)
            if j != i
            for q in range(24)
            if masks[j].flatten()[q]
        ]
        if not sources:
            continue
        distances = torch.stack([1 - d[i] @ d[j, q] for j, q in sources], 1)
        nearest, best = distances.min(1)
        for p in range(24):
            if masks[i].flatten()[p] and nearest[p] < otsu_threshold(nearest, 1):
                j, q = sources[int(best[p])]
                found[i, p] = (1 - alpha) * x[i, p] + alpha * x[j, q]
    return found


@pytest.mark.parametrize("anchors", [0, 1, 2, 3])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_injection_mixes_in_the_best_match_of_another_picture(anchors, alpha) -> None:
    """Cond half alone, from a snapshot (Q1), in the window, in the feature layers; other tokens keep their bits (I28)."""
    h, masks, out = rand(4, C, *GRID, seed=1), spots(4), rand(8, 24, C, seed=2)
    story, wanted = (
        matched(4, h, masks, anchors=anchors, injection=alpha),
        injected(h, out[4:], masks, anchors, alpha),
    )
    assert (
        story.stage == 2 and story.comparison.features is None and not torch.equal(wanted, out[4:])
    )
    for sigma in (6.0, 4.0, 2.5):
        story.begin_step(sigma)
        before = out.clone()
        for block in (ENCODER, FINE):
            mixed = story.self_output(attn(block), out)
            close(mixed[4:], wanted)
            assert torch.equal(mixed[:4], out[:4]) and torch.equal(out, before)
            kept = (wanted == out[4:]).all(-1)
            assert kept.any() and torch.equal(mixed[4:][kept], out[4:][kept])
        area, other = replace(COND, area=(4, 6, 0, 0)), Part()
        assert torch.equal(story.self_output(attn(parts=(area, COND)), out), mixed)
        close(
            story.self_output(attn(parts=(COND, COND)), out.chunk(2)[1].repeat(2, 1, 1)),
            mixed[4:].repeat(2, 1, 1),
        )
        for parts in ((UNCOND, area), (UNCOND, other)):
            assert story.self_output(attn(parts=parts), out) is out
        assert story.self_output(attn(COARSE), out) is out
    for sigma in (10.0, 1.5, 0.3):
        story.begin_step(sigma)
        assert story.self_output(attn(), out) is out


def test_nothing_is_injected_without_targets_or_before_the_second_stage() -> None:
    h, out = rand(3, C, *GRID, seed=1), rand(6, 24, C, seed=2)
    alike = matched(
        3, h[:1].expand(3, -1, -1, -1), torch.ones(1, *GRID)
    )  # all at one distance: the gate keeps none
    for story in (matched(3, h, 0 * spots(3)), alike, told(3, masks=spots(3))):
        story.begin_step(4.0)
        assert story.self_output(attn(), out) is out


def test_the_second_stage_starts_from_what_came_before_the_injection(monkeypatch) -> None:
    """Masks of levels above the first injection stay, those below come anew; fast and official read the masks at other levels."""
    for official, last in ((False, 1.5), (True, 0.3)):
        story = told(3, official=official)
        for i, sigma in enumerate(SIGMAS):
            at(story, sigma, rand(6, C, *GRID, seed=9) if sigma >= 1.5 else None)
            story.words.maps.add(sigma, MIDDLE, 0, torch.rand(3, 1, 2, 3))
            assert story.first_stage_ends == (sigma <= 1.5 and not official)
        wanted = story.words.maps.mean(last, inclusive=True)
        seen = []
        monkeypatch.setattr(
            step.Step,
            "masks",  # what the match looks at
            lambda self, grid: seen.append(self.soft) or spots(3).bool(),
        )
        story.begin_second_stage()
        assert (
            torch.equal(seen[0], wanted) and story.words.maps.sigmas == [10.0] and story.stage == 2
        )


def test_a_run_that_cannot_compare_goes_on_without_injection(caplog) -> None:
    caplog.set_level(logging.WARNING)
    out, recorder = rand(6, 24, C, seed=2), AnchorRecorder()
    for story in (
        told(3, masks=spots(3)),
        at(told(3, recorder=recorder), 1.5, rand(6, C, *GRID, seed=1)),
    ):
        story.begin_second_stage()
        story.begin_step(4.0)
        assert story.comparison.targets is None and story.self_output(attn(), out) is out
    assert len(caplog.records) == 2 and "no features are injected" in caplog.text
    for block in (FINE, COARSE):
        with pytest.raises(ValueError, match=r"\b2 pictures .*\b3\b"):
            story.self_tokens(
                attn(block, grid=GRID if block == FINE else (2, 3)), rand(4, 24, C, seed=1)
            )
    story = matched(3, rand(3, C, *GRID, seed=1), spots(3))
    story.begin_step(4.0)
    with pytest.raises(ValueError, match=r"\b12 tokens .*\b4x6\b"):
        story.self_output(attn(), out[:, :12])


def test_a_model_that_answers_without_its_attention_is_told_once(caplog) -> None:
    """Nodes that skip calls, and models compiled before this node."""
    story = told(3)
    story.begin_step(10.0)
    story.self_tokens(attn(parts=(COND,)), rand(3, 24, C, seed=1))
    story.end_step()
    assert not caplog.messages
    for sigma in (6.0, 4.0):
        story.begin_step(sigma)
        story.end_step()
    assert (
        len(caplog.messages) == 1
        and "at sigma 6 the model answered without" in caplog.text
        and "behind this node" in caplog.text
    )
