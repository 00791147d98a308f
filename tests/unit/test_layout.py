"""Where the nodes of a shipped workflow stand: in the order of reading, none on another, as large on the screen as they can be."""

from __future__ import annotations

from itertools import combinations

import pytest
from layout import (
    BETWEEN,
    COLLAPSED,
    GAP,
    READABLE,
    TITLE,
    beside,
    best,
    form,
    forms,
    lay_out,
    over,
    scale,
    sliced,
    stacked,
)


def nodes(*sizes):
    return {key: {"size": list(size)} for key, size in enumerate(sizes)}


def boxes(placed):
    """Left, top, right and bottom of each, its title included."""
    return [
        (x, y - TITLE, x + node["size"][0], y + node["size"][1])
        for node in placed.values()
        for x, y in [node["pos"]]
    ]


def apart(one, other):
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


@pytest.mark.parametrize("groups", [{"a": [0, 1, 2], "b": [3], "c": [4, 5, 6, 7]}, {"a": [0]}])
def test_nothing_lies_on_anything_and_every_node_lies_in_its_group(groups):
    placed = nodes((300, 500), (260, 90), (320, 190), (400, 560), *[(270, 270)] * 4)
    placed = {key: placed[key] for ids in groups.values() for key in ids}
    drawn = lay_out(groups, placed)
    assert [group["title"] for group in drawn] == list(groups)
    assert all(apart(one, other) for one, other in combinations(boxes(placed), 2))
    for group in drawn:
        x, y, width, height = group["bounding"]
        inside = [
            (left, top)
            for left, top, right, bottom in boxes({k: placed[k] for k in groups[group["title"]]})
            if left >= x and top >= y and right <= x + width and bottom <= y + height
        ]
        assert len(inside) == len(groups[group["title"]])


def test_no_other_choice_is_read_at_a_larger_scale():
    """Of two groups every number of columns, beside and over one another."""
    placed = nodes(*[(300, 200)] * 3, *[(400, 500)] * 2)
    groups = [forms([0, 1, 2], placed), forms([3, 4], placed)]
    chosen = best(groups)
    for one in groups[0]:
        for other in groups[1]:
            for width, high in (
                (one.width + BETWEEN + other.width, max(one.height, other.height)),
                (max(one.width, other.width), one.height + BETWEEN + other.height),
            ):
                assert scale(chosen.width, chosen.height) >= scale(width, high)


def sizes(parts):
    return {(part.width, part.height) for part in parts}


def test_stacks_stand_beside_one_another_and_slices_also_over():
    """Three groups of one form: a row over a group is a slice and no stack."""
    placed = nodes((300, 200), (300, 200), (620, 200))
    (one,), (two,), (wide,) = groups = [forms([key], placed) for key in placed]
    rows = over(beside(one, two), wide)
    assert (rows.width, rows.height) in sizes(sliced(groups)) - sizes(stacked(groups))
    assert sizes([beside(over(one, two), wide)]) < sizes(stacked(groups))


@pytest.mark.parametrize("many", [2, 6])
def test_each_group_is_right_of_or_below_those_before_it(many):
    """Also where stacks are not readable, and none lies on another."""
    placed = nodes(*[(260 + 90 * key, 640 - 70 * key) for key in range(many)])
    drawn = lay_out({str(key): [key] for key in placed}, placed)
    for (x, y, width, height), (left, top, _, _) in combinations(
        [group["bounding"] for group in drawn], 2
    ):
        assert left >= x + width or top >= y + height


def test_stacks_are_kept_where_they_are_readable():
    placed = nodes((300, 200), (300, 200), (620, 200))
    groups = [forms([key], placed) for key in placed]
    chosen = best(groups)
    assert scale(chosen.width, chosen.height) >= READABLE
    assert sizes([chosen]) < sizes(stacked(groups))


def test_a_collapsed_node_takes_its_title_alone():
    placed = nodes((300, 200), (300, 200))
    open_ = form(((0, 1),), placed)
    placed[1]["flags"] = {"collapsed": True}
    closed = form(((0, 1),), placed)
    assert open_.height - closed.height == 200 and closed.width == open_.width
    assert form(((1,),), placed).width < open_.width and COLLAPSED < 300 and GAP > 0
