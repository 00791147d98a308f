"""Where the nodes of a shipped workflow stand: in the order of reading, none on another, as large on the screen as they can be."""

from __future__ import annotations

from itertools import combinations

import pytest
from layout import COLLAPSED, GAP, TITLE, best, form, forms, lay_out, measure, scale


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
    chosen = scale(*measure(best(groups)))
    for one in groups[0]:
        for other in groups[1]:
            assert chosen >= scale(*measure([[one], [other]]))
            assert chosen >= scale(*measure([[one, other]]))


def test_a_collapsed_node_takes_its_title_alone():
    placed = nodes((300, 200), (300, 200))
    open_ = form(((0, 1),), placed)
    placed[1]["flags"] = {"collapsed": True}
    closed = form(((0, 1),), placed)
    assert open_.height - closed.height == 200 and closed.width == open_.width
    assert form(((1,),), placed).width < open_.width and COLLAPSED < 300 and GAP > 0
