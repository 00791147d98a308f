"""Rows of the matrix together: those that have hurt other packs, and with KINDRED_LONG=1 every two rows that go together."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from columns import (
    COLUMNS,
    FURTHER,
    MODEL,
    NODES,
    SHARED,
    STORIES,
    STORY,
    kept,
    leaving_nothing,
    mark,
    story,
)
from matrix import NOTHING, ROWS, Setting, conditioning, draw, latent, seeded
from studio import capture, counted, differs, invert

# what failed or was left behind by one of the other packs, and what goes badly with it
HURT = (
    ("CFG 1", "batch of 3", "sampler uni_pc"),
    ("batch of 3", "136x120 pixels", "negative longer than prompt", "cond and uncond in two calls"),
    ("sampler euler_ancestral", "scheduler karras", "KSamplerAdvanced in two segments", "CFG 1"),
    ("masked prompts", "batch of 3", "CFG 7", "lengths that fit no common call"),
    (
        "area prompt beside a whole one",
        "inpaint mask",
        "sampler dpm_2",
        "prompt longer than negative",
    ),
    (
        "hires second pass",
        "prompts with timestep ranges",
        "batch of 1",
        "read in both halves of CFG",
    ),
)
SMALL = {(16, 24): (4, 6), (15, 17): (5, 7), (8, 64): (2, 16)}


def together(rows: tuple[str, ...]) -> Setting:
    """The rows' settings in one; in the long form the pictures are as wide and as odd, and smaller."""
    s = Setting(**{name: value for row in rows for name, value in ROWS[row].items()})
    return s if rows in HURT else replace(s, size=SMALL.get(s.size, s.size))


def goes_together(a: str, b: str) -> bool:
    return not ROWS[a].keys() & ROWS[b].keys() - {"steps"}


def plan() -> list[tuple[tuple[str, ...], str]]:
    """Few cells in which every two rows that go together meet, and every row meets every column."""
    rows = [row for row, how in ROWS.items() if how and "graph" not in how]
    left = {frozenset(pair) for pair in combinations(rows, 2) if goes_together(*pair)} | {
        frozenset(p) for p in product(rows, COLUMNS)
    }
    cells = []
    while left:
        column = max(COLUMNS, key=lambda c: sum(c in pair for pair in left))
        chosen: list[str] = []
        while free := [row for row in rows if all(goes_together(row, other) for other in chosen)]:

            def gain(row: str, met: tuple[str, ...] = (*chosen, column)) -> tuple[int, int]:
                return sum(frozenset((row, other)) in left for other in met), sum(
                    row in pair for pair in left
                )

            chosen.append(max(free, key=gain))
        met = {frozenset(pair) for pair in combinations((*chosen, column), 2)}
        if not met & left:  # no better company is found for what is left: a cell of its own
            pair = tuple(min(left, key=sorted))
            chosen, column = (
                [x for x in pair if x in ROWS],
                next((x for x in pair if x in COLUMNS), column),
            )
            met = {frozenset(pair)}
        left -= met
        cells.append((tuple(chosen), column))
    return cells


PLAN = plan() if os.environ.get("KINDRED_LONG") == "1" else []
CELLS = [(rows, column) for rows in HURT for column in COLUMNS] + PLAN


@pytest.fixture(scope="module")
def before() -> Iterator[dict]:
    """Plain pictures before anything of the pack runs in this file."""
    yield {
        "nothing": seeded(MODEL, NOTHING),
        **{rows: seeded(MODEL, together(rows)) for rows in HURT},
    }
    gc.unfreeze()


def refused(rows: tuple[str, ...], column: str) -> str:
    """What is said of further pictures where their anchors cannot be read; empty where they can."""
    if column != FURTHER:
        return ""
    if {"CFG 1", "read in both halves of CFG"} <= {
        *rows
    }:  # at CFG 1 anchors leave one half, and the next sampler may have another CFG
        return "halves is 'both', but the reference holds only the cond half.*a CFG above 1, or choose 'cond only'"
    if {"sampler dpm_adaptive", "hires second pass"} & {*rows}:
        return "which the anchors do not have.*Take the sampler, scheduler and steps"
    return ""


@pytest.mark.parametrize(
    ("rows", "column"), CELLS, ids=[" + ".join((*rows, column)) for rows, column in CELLS]
)
def test_rows_together_draw_and_leave_nothing(rows, column, before):
    s = together(rows)
    none, state = before.get(rows) or seeded(MODEL, s)
    said = refused(rows, column)
    with nullcontext() if not said else suppress(ValueError):
        NODES[column](MODEL, s)  # what it reads is made here, once
    with leaving_nothing(before):
        if said:
            with pytest.raises(ValueError, match=said):
                draw(NODES[column](MODEL, s), s, mark)
        else:
            model = NODES[column](MODEL, s)
            out, left = seeded(model, s, mark)
            assert torch.isfinite(out).all() and left == state
            stays = (
                s.prompts == "area alone"
                and column in STORIES
                or s.batch == 1
                and column in (SHARED, STORY)
            )
            assert (
                torch.equal(out, none)
                if stays
                else min(map(differs, out.split(1), none.split(1))) > 1e-3
            )
            del model
    again, state_again = seeded(MODEL, s)
    assert torch.equal(again, none) and state_again == state


def keep_an_injection(held: list) -> None:
    held.append(NODES[STORY](MODEL, Setting()))


def change_the_model(held: list) -> None:
    MODEL.model_options["of a test"] = 1


def change_the_plain_picture(held: list) -> None:
    MODEL.model.model_sampling.sigma_data = 1.5


@pytest.mark.parametrize("left", [keep_an_injection, change_the_model, change_the_plain_picture])
def test_what_every_cell_goes_through_sees_what_is_left(left, before):
    """An object of the pack, an entry in the MODEL's options, and something of the host that only shows in a plain picture."""
    held, data = [], MODEL.model.model_sampling.sigma_data
    try:
        with pytest.raises(AssertionError), leaving_nothing(before):
            left(held)
    finally:
        MODEL.model_options.pop("of a test", None)
        MODEL.model.model_sampling.sigma_data = data
    with leaving_nothing(before):
        pass


# what makes references, and what it refuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", ["combined", "area", "area alone", "masked", "ranged"])
@pytest.mark.parametrize("node", [capture, invert])
def test_references_are_made_from_one_plain_prompt(node, prompts):
    """Two reasons to refuse: several prompts, and one that is not for the whole picture or the whole time."""
    positive, _ = conditioning(Setting(batch=1, prompts=prompts), (0,), mark)
    with (
        counted(MODEL) as rows,
        pytest.raises(
            ValueError,
            match=f"must be one plain prompt.*{len(positive)} prompts were given.*"
            "Wire Subject Prompts",
        ),
    ):
        node(MODEL, positive=positive)
    assert not rows


@pytest.mark.parametrize("sampler", ["dpm_fast", "dpm_adaptive"])
def test_anchors_of_samplers_that_choose_their_own_noise_levels(sampler):
    """Refused where they would be made, before the first call."""
    s = Setting(sampler=sampler, cfg=1.0)
    with (
        torch.inference_mode(),
        counted(MODEL) as rows,
        pytest.raises(ValueError, match=f"the sampler {sampler} passes over levels"),
    ):
        kept(story(feature_injection=0.0, query_blend=0.0), s, latent(s, (0, 1)), 1.0)
    assert not rows


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("area alone", "no whole picture passed through the model.*Remove"),
        ("late alone", "no whole picture passed through the model.*Remove.* a timestep range"),
    ],
)
def test_anchors_need_their_prompt_at_every_step_and_for_the_whole_picture(prompts, said):
    """Known only once the sampler has run."""
    s = Setting(prompts=prompts)
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=f"ConsiStory Anchor Sampler: .*{said}"),
    ):
        kept(story(), s, latent(s, (0, 1)), 1.0)
