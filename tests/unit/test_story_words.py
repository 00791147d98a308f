"""Laws of where a story's subject is: masks from its words, steps before (arXiv 2402.03286, eq. 7; I13, I32, I36, I37)."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from kindred.models.network.call import Part
from kindred.models.story.story import Story
from kindred.models.subject.maps import subject_masks
from kindred.models.subject.masks import token_map
from kindred.models.subject.words import SubjectTokens
from small_story import (
    AREA,
    BLOCK,
    CAT,
    COND,
    GRID,
    HEADS,
    MAP,
    OTHER,
    TEXT,
    UNCOND,
    C,
    attend,
    call,
    own,
    rand,
    spots,
    told,
)
from torch import Tensor


def look(
    story: Story, *parts: Part, seed: int = 60, text: Tensor | None = None, sigma: float = 2.0
) -> None:
    """A step before: the cross-attention that tells where the words are."""
    story.begin_step(sigma)
    rows = story.pictures * len(parts)
    text = rand(rows, TEXT, C, seed=seed + 1) if text is None else text
    story.cross(
        call(*parts, block=MAP, grid=(2, 3), cross=True),
        4 * rand(rows, 6, C, seed=seed),
        text,
        HEADS,
    )


def test_masks_come_from_the_word_in_the_cond_half() -> None:
    """Eq. 7: of the steps before, never of this one; each picture's row has positions of its own."""
    subject = SubjectTokens(
        ("cat",), ((2,), (1, 3))
    )  # two rows for four pictures: the host repeats them
    part, q, k = (
        replace(COND, subject=subject),
        4 * rand(16, 6, C, seed=1),
        rand(16, TEXT, C, seed=2),
    )
    story, cross = (
        told(4, None, 10.0),
        call(UNCOND, AREA, part, OTHER, block=MAP, grid=(2, 3), cross=True),
    )
    story.cross(cross, q, k, HEADS)
    story.cross(replace(cross, block=BLOCK), 9 * q, k, HEADS)  # not a block that is asked
    assert story.step.masks(GRID) is None and story.step.kept(GRID)[0].numel() == 0
    wanted = token_map(q[8:12], k[8:12], [(2,), (1, 3), (2,), (1, 3)], HEADS).unflatten(
        1, (1, 2, 3)
    )
    for sigma in (5.0, 2.0):
        story.begin_step(sigma)
        assert (
            torch.equal(story.step.masks(GRID), subject_masks(wanted, GRID))
            and story.step.masks(GRID).flatten(1).any(1).all()
        )
        story.cross(cross, q, k, HEADS)
    story = told(4, None, 10.0, threshold=0.7)
    story.cross(cross, q, k, HEADS)
    story.begin_step(5.0)
    assert torch.equal(story.step.masks(GRID), subject_masks(wanted, GRID, 0.7))


def test_several_words_are_located_apart_and_united() -> None:
    """I32: in any order."""
    where = {"cat": ((2,),), "dog": ((1,), (3,), (1,)), "hat": ((4,),)}
    found = {}
    for words in [*permutations(where), *((w,) for w in where)]:
        subject = SubjectTokens(
            words, ((2, 1, 4),), tuple(where[w] for w in words) if len(words) > 1 else ()
        )
        story = told(3, None, 2.0)
        look(
            story,
            replace(
                COND, subject=subject if len(words) > 1 else SubjectTokens(words, where[words[0]])
            ),
        )
        story.begin_step(1.0)
        found[words] = story.step.masks(GRID)
    united = torch.stack([found[w,] for w in where]).any(0)
    assert all(
        torch.equal(found[words], united) for words in permutations(where)
    ) and not torch.equal(found["cat",], united)


@pytest.mark.parametrize("repeats, appended", [(1, 0), (2, 0), (3, 0), (1, 3), (2, 4)])
def test_repeated_text_is_the_same_text_and_appended_keys_are_none(repeats, appended) -> None:
    """I13: the host repeats the shorter of two prompts; what another pack appends is not the word."""
    text = rand(3, TEXT, C, seed=5)
    keys = torch.cat((text.repeat(1, repeats, 1), rand(3, appended, C, seed=6)), 1)
    story = told()
    look(story, COND, text=keys)
    found = story.words.maps.at(2.0)
    positions = [2 + TEXT * i for i in range(repeats)]
    torch.testing.assert_close(
        found,
        token_map(4 * rand(3, 6, C, seed=60), keys, [positions], HEADS).unflatten(1, (1, 2, 3)),
    )


def test_prompts_of_unlike_lengths_with_the_word_at_one_place() -> None:
    """One is repeated to the length of the other: their words stand at other places of the keys."""
    short, long, text = COND, replace(COND, text=2 * TEXT), rand(6, 2 * TEXT, C, seed=5)
    story = told()
    look(story, short, long, text=text)
    q = (4 * rand(6, 6, C, seed=60)).chunk(2)
    wanted = token_map(q[0], text[:3], [(2, 7)], HEADS) + token_map(q[1], text[3:], [(2,)], HEADS)
    torch.testing.assert_close(story.words.maps.at(2.0), wanted.unflatten(1, (1, 2, 3)) / 2)


def test_two_prompts_of_the_cond_half_in_one_call_or_in_two() -> None:
    """I36: regional prompts; which call a part comes in depends on the memory that is free."""
    one, two = COND, replace(COND, subject=SubjectTokens(("cat",), ((1,),)))
    q, k, found = 4 * rand(6, 6, C, seed=1), rand(6, TEXT, C, seed=2), []
    for calls in ([(one, two)], [(one,), (two,)], [(two,), (one,)]):
        story = told(3, None, 2.0)
        for parts in calls:
            rows = torch.cat([torch.arange(3) + 3 * (p is two) for p in parts])
            story.cross(call(*parts, block=MAP, grid=(2, 3), cross=True), q[rows], k[rows], HEADS)
        found.append(story.words.maps.at(2.0))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize(
    "parts",
    [
        (replace(COND, subject=None),),
        (replace(COND, text=None),),
        (replace(COND, text=TEXT + 1),),
        (UNCOND,),
        (replace(UNCOND, subject=CAT),),
        (AREA,),
        (OTHER,),
    ],
)
def test_prompts_that_do_not_tell(parts) -> None:
    """No word, no text, another pack's shorter keys, and the parts that are not whole pictures of the cond half."""
    story = told()
    look(story, *parts)
    story.begin_step(1.0)
    assert story.words.maps.sigmas == [] and story.step.masks(GRID) is None and not story.shares


def test_a_step_evaluated_twice_counts_once() -> None:
    """I37; the last answer counts, as samplers ask again with another input."""
    story, once = told(), told()
    for seed, sigma in ((1, 10.0), (2, 5.0)):
        look(once, UNCOND, COND, seed=seed, sigma=sigma)
        for again in (seed + 7, seed):
            look(story, UNCOND, COND, seed=again, sigma=sigma)
    once.begin_step(2.0)
    out = attend(once, (UNCOND, COND), own(3, 2))
    for _ in range(2):
        story.begin_step(2.0)
        assert torch.equal(attend(story, (UNCOND, COND), own(3, 2)), out)


def test_wired_masks_leave_the_words_unused() -> None:
    """I32: the result does not depend on the word; one mask serves all pictures, and each grid has it."""
    story, qkv = told(3, spots(1), 5.0), own(3, 1)
    look(story, COND, sigma=5.0)
    story.begin_step(2.0)
    assert story.words.maps.sigmas == [] and torch.equal(
        story.step.masks(GRID), spots(1).bool().expand(3, -1, -1)
    )
    assert torch.equal(
        attend(story, (COND,), qkv), attend(told(3, spots(1).expand(3, -1, -1), 2.0), (COND,), qkv)
    )


def test_a_word_that_lights_up_nowhere_is_told_once(caplog) -> None:
    """Q11: and nothing is shared."""
    caplog.set_level(logging.WARNING)
    story = told()
    for sigma in (5.0, 2.0, 1.0):
        look(story, COND, text=torch.zeros(3, TEXT, C, dtype=torch.float64), sigma=sigma)
        assert not story.shares and (
            story.step.masks(GRID) is None or not story.step.masks(GRID).any()
        )
    assert len(caplog.records) == 1 and "nothing is shared" in caplog.text
