"""Laws of the drawings over a reference's pictures: nothing else is touched, cells stand where they are, equal parts look equal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kindred.models.overlay import (
    ALPHA,
    OUTLINE,
    draw_heat,
    draw_masks,
    draw_matches,
    heat_colours,
    oklch,
    place_colours,
)

SIZES = [
    ((48, 80), (6, 10)),
    ((64, 64), (16, 16)),
    ((37, 53), (5, 7)),
    ((9, 200), (3, 40)),
    ((3, 4), (6, 9)),
    ((5, 5), (1, 1)),
]
LAW = pytest.mark.parametrize


def pictures(b, size, seed=1):
    return torch.rand(b, *size, 3, generator=torch.Generator().manual_seed(seed))


def numbers(*shape, seed=2):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def matches(b, n, seed=3):
    generator = torch.Generator().manual_seed(seed)
    subjects, keep = (torch.rand(b, n, generator=generator) < 0.6 for _ in range(2))
    return subjects, torch.randint(0, n, (b, n), generator=generator), keep & subjects


def cell(size, grid):
    """The cell [Y X] that each pixel's centre lies in, as y * columns + x."""
    y = [int((i + 0.5) * grid[0] / size[0]) for i in range(size[0])]
    x = [int((i + 0.5) * grid[1] / size[1]) for i in range(size[1])]
    return torch.tensor([[a * grid[1] + b for b in x] for a in y])


def drawings(images, grid, seed=5):
    """All three, with random contents."""
    b, n = len(images), grid[0] * grid[1]
    maps = numbers(b, *grid, seed=seed)
    subjects, source, keep = matches(b, n, seed)
    return {
        "masks": (draw_masks, (images, maps > 0.5)),
        "heat": (draw_heat, (images, maps)),
        "matches": (draw_matches, (images, grid, subjects, source, keep)),
    }


@LAW("size, grid", SIZES)
@LAW("kind", ["masks", "heat", "matches"])
def test_a_drawing_is_a_picture_of_the_same_size_and_changes_no_input(kind, size, grid):
    images = pictures(3, size)
    draw, told = drawings(images, grid)[kind]
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in told]
    out = draw(*told)
    assert out.shape == images.shape and out.dtype == images.dtype
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(out, images) == (
        kind == "heat" and grid == (1, 1)
    )  # a map of one cell is constant
    assert all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(told, before)
    )
    assert torch.equal(draw(*told), out)


@LAW("kind", ["masks", "heat", "matches"])
@LAW("value", [0.0, 1.0])
def test_black_and_white_stay_within_the_range(kind, value):
    draw, told = drawings(torch.full((2, 30, 20, 3), value), (6, 4))[kind]
    out = draw(*told)
    assert out.min() >= 0 and out.max() <= 1


@LAW("kind", ["masks", "heat"])
def test_pictures_do_not_see_each_other(kind):
    draw, (images, drawn) = drawings(pictures(4, (24, 40)), (3, 5))[kind]
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(draw(images[order], drawn[order]), draw(images, drawn)[order])


# masks ---------------------------------------------------------------------------------------------------------------------


@LAW("size, grid", SIZES)
def test_everything_in_the_mask_is_the_picture_and_nothing_in_it_is_grey(size, grid):
    images = pictures(2, size)
    assert torch.equal(draw_masks(images, torch.ones(2, *grid, dtype=torch.bool)), images)
    none = draw_masks(images, torch.zeros(2, *grid, dtype=torch.bool))
    assert (
        torch.equal(none[..., 0], none[..., 1])
        and torch.equal(none[..., 0], none[..., 2])
        and none.mean() < 0.6 * images.mean()
    )


@LAW("size, grid", SIZES[:4])
def test_a_masks_cells_are_untouched_and_a_line_runs_around_them(size, grid):
    images, where = pictures(1, size), cell(size, grid)
    for k in range(grid[0] * grid[1]):
        mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
        mask[k] = True
        out = draw_masks(images, mask.view(1, *grid))[0]
        inside = where == k
        assert torch.equal(out[inside], images[0][inside])
        line = (out == torch.tensor(OUTLINE)).all(-1)
        assert line.any() and not (line & inside).any()
        touched = (
            torch.nn.functional.max_pool2d(inside[None].float(), 3, 1, 1)[0] > 0
        )  # the line leaves no gap
        assert line[touched & ~inside].all()
        rest = out[~inside & ~line]
        assert torch.equal(rest[:, 0], rest[:, 1]) and torch.equal(rest[:, 0], rest[:, 2])


# heat ----------------------------------------------------------------------------------------------------------------------


@LAW("value", [0.0, 1e-30, 0.3, 1.0, 7e4, -2.0])
def test_a_constant_map_leaves_its_picture(value):
    """And only that one: its neighbour is drawn. What rounding leaves of it is no heat."""
    images, maps = pictures(2, (24, 40)), numbers(2, 3, 5)
    maps[0] = value * (1 + 3e-7 * maps[0])
    out = draw_heat(images, maps)
    assert torch.equal(out[0], images[0]) and torch.equal(out[1:], draw_heat(images[1:], maps[1:]))


@given(st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_heat_is_from_least_to_greatest_whatever_the_scale(scale, shift):
    images, maps = pictures(2, (24, 40)), numbers(2, 3, 5).double()
    torch.testing.assert_close(
        draw_heat(images, maps * scale + shift), draw_heat(images, maps), rtol=0, atol=2e-2
    )


def test_heat_reads_half_precision():
    images, maps = pictures(1, (24, 40)), (1000 * numbers(1, 3, 5)).half()
    assert torch.equal(draw_heat(images, maps), draw_heat(images, maps.float()))


@LAW("size, grid", SIZES[:4])
def test_one_hot_cell_is_the_lightest_place(size, grid):
    """On a plain picture the greatest lightness stands at that cell's centre, and the coldest is everywhere far from it."""
    images, where = torch.full((1, *size, 3), 0.5), cell(size, grid)
    coldest = heat_colours(torch.zeros(()))
    for k in range(grid[0] * grid[1]):
        hot = torch.zeros(grid[0] * grid[1])
        hot[k] = 1
        out = draw_heat(images, hot.view(1, *grid))[0]
        assert where.flatten()[out.sum(-1).argmax()] == k
        if grid[0] > 3:
            far = (where // grid[1] - k // grid[1]).abs() > 1
            torch.testing.assert_close(
                out[far], torch.lerp(images[0][far], coldest, ALPHA), rtol=0, atol=1e-6
            )


def test_hotter_is_lighter_all_along_the_ramp():
    ramp = heat_colours(torch.linspace(0, 1, 101)) ** 2.2
    assert (ramp @ torch.tensor([0.2126, 0.7152, 0.0722])).diff().min() > 0
    assert (heat_colours(torch.tensor([0.0, 0.5, 1.0])).diff(dim=0).norm(dim=-1) > 0.3).all()


# matches -------------------------------------------------------------------------------------------------------------------


@LAW("size, grid", SIZES)
def test_identity_matches_give_identical_drawings(size, grid):
    n = grid[0] * grid[1]
    images = pictures(1, size).expand(3, -1, -1, -1)
    subject = (numbers(n) < 0.7).expand(3, -1)
    out = draw_matches(images, grid, subject, torch.arange(n).expand(3, -1), subject)
    assert torch.equal(out[1], out[0]) and torch.equal(out[2], out[0])


def test_the_permutation_of_tokens_permutes_their_colours():
    """On black, with one pixel per token, a drawing is a table of colours."""
    grid, n = (5, 7), 35
    subjects, source, keep = matches(3, n)
    black, order = torch.zeros(3, *grid, 3), torch.randperm(n)
    once = draw_matches(black, grid, subjects, source, keep).flatten(1, 2)
    moved = draw_matches(
        black,
        grid,
        torch.cat([subjects[:1], subjects[1:, order]]),
        torch.cat([source[:1], source[1:, order]]),
        torch.cat([keep[:1], keep[1:, order]]),
    ).flatten(1, 2)
    assert (
        torch.equal(moved[0], once[0])
        and torch.equal(moved[1:], once[1:, order])
        and not torch.equal(once[1:, order], once[1:])
    )


def test_a_kept_token_has_the_colour_of_its_source_and_no_other():
    grid, n = (5, 7), 35
    subjects, source, keep = (
        torch.ones(2, n, dtype=torch.bool),
        torch.arange(n).flip(0).expand(2, -1),
        torch.zeros(2, n, dtype=torch.bool),
    )
    keep[1, ::2] = True
    out = draw_matches(torch.zeros(2, *grid, 3), grid, subjects, source, keep).flatten(1, 2)
    assert torch.equal(out[1, keep[1]], out[0].flip(0)[keep[1]])
    torch.testing.assert_close(
        out[1, ~keep[1]], torch.full((17, 3), 0.5 * ALPHA), rtol=0, atol=1e-6
    )
    assert len(out[0].unique(dim=0)) == n  # every place has a colour of its own
    other = draw_matches(
        torch.zeros(2, *grid, 3), grid, subjects, source.where(keep, 10**6), keep
    ).flatten(1, 2)
    assert torch.equal(other, out)  # what is not kept is not read


def test_colours_do_not_depend_on_the_pictures_beneath():
    """Grey is laid under them, or a red cat and a blue one could not match."""
    grid = (4, 6)
    everywhere = torch.ones(2, 24, dtype=torch.bool)
    images = torch.stack(
        [
            torch.tensor([0.7152, 0, 0]).expand(8, 12, 3),
            torch.tensor([0, 0.2126, 0]).expand(8, 12, 3),
        ]
    )
    out = draw_matches(images, grid, everywhere, torch.arange(24).expand(2, -1), everywhere)
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-6)


def test_outside_of_every_subject_is_dim_and_grey():
    subjects = torch.zeros(2, 24, dtype=torch.bool)
    subjects[:, 7:9] = True
    images = pictures(2, (8, 12))
    out = draw_matches(images, (4, 6), subjects, torch.arange(24).expand(2, -1), subjects)
    outside = out[
        ~subjects[0].view(1, 4, 6).repeat_interleave(2, 1).repeat_interleave(2, 2).expand(2, -1, -1)
    ]
    assert (
        torch.equal(outside[:, 0], outside[:, 1])
        and torch.equal(outside[:, 0], outside[:, 2])
        and outside.max() < 0.5
    )
    assert out[0, 2, 2].max() - out[0, 2, 2].min() > 0.1  # and the subject is not


def test_no_subject_in_the_first_picture_is_no_failure():
    none = torch.zeros(2, 24, dtype=torch.bool)
    out = draw_matches(
        pictures(2, (8, 12)), (4, 6), none, torch.zeros(2, 24, dtype=torch.int64), none
    )
    assert torch.equal(out[..., 0], out[..., 1])


def test_places_are_told_by_hue_across_and_lightness_down():
    """Over the box of the subject, wherever it stands; the two ends of a row differ, for the hue runs short of a circle."""
    subject = torch.zeros(9, 12, dtype=torch.bool)
    subject[2:7, 3:11] = True
    colours = place_colours(subject)[2:7, 3:11]
    moved = place_colours(subject.roll((2, -3), (0, 1)))[4:9, 0:8]
    assert torch.equal(moved, colours)
    luma = colours.mean(-1)
    assert (luma[:-1] - luma[1:] > 0.02).all()
    flat = colours.flatten(0, 1)
    assert (torch.cdist(flat, flat) + torch.eye(len(flat)) > 0.04).all()
    assert (colours[:, 0] - colours[:, -1]).norm(dim=-1).min() > 0.15


def test_a_subject_of_one_row_column_or_cell_has_colours():
    for rows, columns in ((1, 5), (5, 1), (1, 1)):
        subject = torch.zeros(6, 6, dtype=torch.bool)
        subject[:rows, :columns] = True
        assert place_colours(subject).isfinite().all()


def test_oklch_is_what_it_says():
    """White, black, grey, and the published coordinates of sRGB's own corners."""
    given = torch.tensor(
        [
            [1.0, 0, 0],
            [0, 0, 0],
            [0.62796, 0.25768, 29.234],
            [0.86644, 0.29483, 142.495],
            [0.45201, 0.31321, 264.052],
        ]
    )
    want = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(oklch(given), want, rtol=0, atol=5e-3)


# what does not fit ---------------------------------------------------------------------------------------------------------


def test_counts_and_shapes_that_do_not_fit_are_named():
    images = pictures(3, (8, 12))
    for draw in (draw_masks, draw_heat):
        with pytest.raises(ValueError, match=r"\[3, 8, 12, 3\].*\[1, 4, 6\]"):
            draw(images, torch.ones(1, 4, 6))
    subjects, source, keep = matches(3, 24)
    with pytest.raises(ValueError, match="4x5 has 20 tokens"):
        draw_matches(images, (4, 5), subjects, source, keep)
    with pytest.raises(ValueError, match="position 24; the first picture has 24"):
        draw_matches(images, (4, 6), subjects, source.where(~keep, 24), keep)
