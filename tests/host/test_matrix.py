"""The matrix: every feature of the host (matrix.py) with every inject node (columns.py), and what each cell leaves behind.

A cell is named "row - column". Its pictures are compared with the plain ones of another process, a host without the pack.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import matrix
import pytest
import torch
from columns import (
    ALL,
    BETWEEN,
    CACHED,
    CELLS,
    CROSS,
    FURTHER,
    LIVE,
    MODEL,
    NODES,
    SHARED,
    STORY,
    anchors_again,
    entry,
    leaving_nothing,
    mark,
    of_options,
    story,
    table,
    with_concept,
    with_photo,
    with_photo_live,
)
from matrix import BASE, ROWS, draw, first_pass, second_pass, seed_all, seeded, setting, states
from studio import counted, differs
from torch import Tensor

TIGHT, FELT = (
    1e-4,
    1e-2,
)  # float32 through a run, relative to the pictures' spread; an effect that cannot be rounding


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> dict[str, tuple[Tensor, str]]:
    """Every row's plain pictures and the random states they leave, from a process that never saw the pack."""
    file = tmp_path_factory.mktemp("matrix") / "plain.pt"
    done = subprocess.run(
        [sys.executable, matrix.__file__, os.environ["KINDRED_HOST"], str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    assert not done.returncode, done.stderr[-2000:]
    return torch.load(file)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What lives before a cell is not searched for what it left."""
    yield
    gc.unfreeze()


@cache
def base(column: str) -> Tensor:
    """A column's pictures in the first row."""
    return draw(built(BASE, column), setting(BASE), mark)


def halved(node, model, s):
    """Twice the same node at half of its weight."""
    return node(node(model, s, weight=1.0), s, weight=1.0)


def chained(node, seeds, model, s):
    for seed in seeds:
        model = node(model, s, seed=seed)
    return model


PHOTOS, SUBJECTS = (3, 8), (7, 9)
TWICE = {
    CACHED: partial(halved, with_photo),
    LIVE: partial(halved, with_photo_live),
    CROSS: partial(halved, with_concept),
    ALL: lambda model, s: halved(
        with_concept, halved(with_photo, story(model, query_blend=0.0), s), s
    ),
}
OTHERS = {
    CACHED: partial(chained, with_photo, PHOTOS),
    LIVE: partial(chained, with_photo_live, PHOTOS),
    CROSS: partial(chained, with_concept, SUBJECTS),
    ALL: lambda model, s: chained(
        with_concept, SUBJECTS, chained(with_photo, PHOTOS, story(model, query_blend=0.0), s), s
    ),
}
BACKWARDS = {
    CACHED: partial(chained, with_photo, PHOTOS[::-1]),
    LIVE: partial(chained, with_photo_live, PHOTOS[::-1]),
    CROSS: partial(chained, with_concept, SUBJECTS[::-1]),
    ALL: lambda model, s: story(
        chained(with_photo, PHOTOS[::-1], chained(with_concept, SUBJECTS[::-1], model, s), s),
        query_blend=0.0,
    ),
}


def built(row: str, column: str):
    """The column's MODEL under the row's setting."""
    s, node = setting(row), NODES[column]
    if s.graph in ("twice", "two references"):
        node = (TWICE if s.graph == "twice" else OTHERS).get(
            column, lambda model, s: NODES[STORY](NODES[column](model, s), s)
        )
    return node(MODEL, s)


# what a row promises beyond an effect ------------------------------------------------------------------------------------------


def same_in_any_company(column, model, s, out):
    """A picture does not depend on how many are drawn beside it; one alone has no story, and so nothing of it."""
    n = min(s.batch, 2)
    if s.batch > 1 or column not in (SHARED, STORY, ALL):
        assert differs(out[:n], base(column)[:n]) < TIGHT


def same_as_base(column, model, s, out):
    assert differs(out, base(column)) < TIGHT


def same_in_segments(column, model, s, out):
    """A photo or a concept is read at a noise level; a story counts its steps, and each segment is a story of its own."""
    if column in (CACHED, LIVE, CROSS):
        assert differs(out, draw(model, replace(s, way="KSampler"), mark)) < TIGHT


def same_by_custom_sampler(column, model, s, out):
    assert torch.equal(out, base(column))


def other_than_base(column, model, s, out):
    if (column, s.halves) != (CROSS, "both"):  # as the node does it unless told otherwise
        assert differs(out, base(column)) > 1e-3


def same_after_another_sampler(column, model, s, out):
    """The second sampler of the graph has another batch, size, guidance and seed, and its own effect."""
    other = replace(s, batch=3, size=(9, 11), cfg=1.0, seed=2)
    assert differs(draw(model, other, mark), draw(MODEL, other, mark)) > 1e-3
    assert torch.equal(draw(model, s, mark), out)


def same_beside_a_branch(column, model, s, out):
    """A node behind this one draws its own, and what hangs on this one stays as it was."""
    branch = with_photo(model, s, seed=8) if column != CACHED else with_concept(model, s)
    assert differs(draw(branch, s, mark), out) > FELT
    assert torch.equal(draw(model, s, mark), out)


def both_references_in_any_order(column, model, s, out):
    assert differs(out, base(column)) > FELT
    assert differs(draw(BACKWARDS[column](MODEL, s), s, mark), out) < TIGHT


LAWS = {
    "batch of 3": same_in_any_company,
    "batch of 1": same_in_any_company,
    "KSamplerAdvanced in two segments": same_in_segments,
    "SamplerCustomAdvanced": same_by_custom_sampler,
    "cond and uncond in two calls": same_as_base,
    "two samplers in one graph": same_after_another_sampler,
    "two branches of one chain": same_beside_a_branch,
    "the same node twice": same_as_base,
    "two different references": both_references_in_any_order,
    "read in both halves of CFG": other_than_base,
    "cond's features in both halves": other_than_base,
}


# the cells ---------------------------------------------------------------------------------------------------------------------


UNMATCHED = (
    "KSamplerAdvanced in two segments",
    "area prompts alone",
)  # a story does not come to compare its pictures


def how_it_was_read(row: str, column: str, said: str) -> None:
    """The log tells the way a photo was read, and that a story had both of its stages."""
    ways = {way for way in ("cached", "live") if f"the reference is read {way}" in said}
    if column in (CACHED, LIVE):
        assert (
            ways == {"live"}
            if column == LIVE
            else ways >= {"cached"} and (ways == {"cached"} or row in BETWEEN)
        )
    if (
        column in (STORY, FURTHER, ALL)
        and row not in UNMATCHED
        and (row, column) not in (("batch of 1", STORY), ("batch of 1", ALL))
    ):
        assert "found their like" in said


def refuse(words: tuple[str, ...], act, calls: int = 0) -> None:
    with counted(MODEL) as rows, pytest.raises(ValueError) as refused:
        act()
    assert all(word in str(refused.value) for word in words) and len(rows) <= calls, (
        str(refused.value),
        rows,
    )


def cells(wanted) -> pytest.MarkDecorator:
    """The cells whose entry is wanted; a failure is named "row - column"."""
    chosen = [c for c in CELLS if wanted(entry(*c))]
    return pytest.mark.parametrize(("row", "column"), chosen, ids=[" - ".join(c) for c in chosen])


@cells(lambda entry: not (entry.refused or entry.absent))
def test_a_cell_draws_what_is_documented_and_leaves_nothing(row, column, fresh, caplog):
    """Finite and felt in each picture, or plain bit for bit where the table says so; the random states are those of the plain run."""
    s, law = setting(row), LAWS.get(row)
    none, state = fresh[row]
    built(row, column)  # what it reads is made here, once
    if law:
        (
            base(column),
            (
                with_photo(with_concept(MODEL, s), s, seed=8),
                BACKWARDS.get(column, NODES[column])(MODEL, s),
            ),
        )
    with leaving_nothing(fresh):
        seed_all()
        before = states()
        model = built(row, column)
        assert states() == before
        carrying = of_options(model)
        caplog.clear()
        caplog.set_level("INFO")
        with counted(MODEL) as rows:
            out, left = seeded(model, s, mark)
        assert torch.isfinite(out).all() and left == state
        assert (
            torch.equal(out, none)
            if entry(row, column).plain
            else min(map(differs, out.split(1), none.split(1))) > FELT
        )
        if row in (BASE, "cond and uncond in two calls"):
            assert max(rows) == s.batch * (2 - s.split)
        how_it_was_read(row, column, caplog.text)
        if law:
            law(column, model, s, out)
        assert of_options(model) == carrying
        del model


@cells(lambda entry: entry.refused)
def test_a_refused_cell_says_both_values_and_the_remedy(row, column, fresh):
    """Before the first call of the model, but for a sampler that alone knows where it will ask."""
    s = setting(row)
    words = entry(row, column).refused
    model = None if s.graph != "one sampler" else built(row, column)
    with leaving_nothing(fresh):
        if model is None:
            refuse(words, lambda: built(row, column))
        elif s.begins == "hires":
            given = first_pass(model, s, s.who, mark)
            refuse(words, lambda: second_pass(model, s, given, s.who, mark))
        else:
            refuse(words, lambda: draw(model, s, mark), calls=s.steps)


def test_anchors_of_its_own_serve_a_second_pass():
    """The remedy that the refusal names."""
    s = setting("hires second pass")
    given = first_pass(NODES[FURTHER](MODEL, s), s, s.who, mark)
    out, none = (
        second_pass(m, s, given, s.who, mark)["samples"] for m in (anchors_again(s), MODEL)
    )
    assert differs(out, none) > FELT


@pytest.mark.parametrize("row", ROWS)
def test_after_all_cells_the_plain_pictures_are_those_of_a_fresh_process(row, fresh):
    out, state = seeded(MODEL, setting(row), mark)
    assert torch.equal(out, fresh[row][0]) and state == fresh[row][1]


def test_the_table_in_the_docs_is_this_matrix(root):
    page = (root / "docs" / "compatibility.md").read_text("utf-8")
    assert table() in page, f"docs/compatibility.md should hold:\n{table()}"
