"""Where the nodes of a workflow stand: groups in columns, groups over and beside one another, so
that all of it is read at once.

ComfyUI opens a template fitted to the screen, and draws no letters below a scale of 0.571 (8 pixels
of 14). So a graph may be as wide and as high as SCREEN divided by that, and where it is larger it
is as little too large as its groups allow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

READABLE = 8 / 14
SCREEN = (0.75 * 1600, 0.75 * 850)  # what the page fills of a window of 1600 x 900
MARGIN = 20  # around the nodes that the page fits
GAP, BETWEEN, PADDING, TITLE, GROUP_TITLE = 20, 20, 14, 30, 40
MOST_COLUMNS = 5
COLLAPSED = 240
COLOURS = (
    "#3f789e",
    "#88A",
    "#8A8",
    "#b58b2a",
    "#a1309b",
    "#b06634",
)  # the host's own group colours, in turn
Node = dict[str, Any]
Columns = tuple[tuple[int, ...], ...]  # node ids, from left to right and from top to bottom


@dataclass(frozen=True)
class Form:
    """A group in so many columns, with its title and paddings, in pixels."""

    columns: Columns
    width: int
    height: int


def extent(node: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height below the title; a collapsed node is its title."""
    if node.get("flags", {}).get("collapsed"):
        return COLLAPSED, 0
    return node["size"][0], node["size"][1]


def consecutive(items: Sequence[Any], parts: int) -> Iterator[tuple[tuple[Any, ...], ...]]:
    """Every way to cut a row into so many pieces, none empty."""
    for cuts in itertools.combinations(range(1, len(items)), parts - 1):
        ends = (0, *cuts, len(items))
        yield tuple(tuple(items[a:b]) for a, b in itertools.pairwise(ends))


def form(columns: Columns, nodes: Mapping[int, Node]) -> Form:
    """The group that these columns make."""
    width = sum(max(extent(nodes[key])[0] for key in column) for column in columns)
    tallest = max(sum(TITLE + extent(nodes[key])[1] + GAP for key in column) for column in columns)
    return Form(
        columns,
        width + GAP * (len(columns) - 1) + 2 * PADDING,
        GROUP_TITLE + tallest - GAP + PADDING,
    )


def forms(ids: Sequence[int], nodes: Mapping[int, Node]) -> list[Form]:
    """A group in one column, in two ..., the lowest of each."""
    counts = range(1, min(MOST_COLUMNS, len(ids)) + 1)
    layouts = [[form(columns, nodes) for columns in consecutive(ids, count)] for count in counts]
    return [min(each, key=lambda form: (form.height, form.width)) for each in layouts]


def scale(width: float, high: float) -> float:
    """At which the page opens groups of this size; it fits the nodes, not their groups."""
    return min(
        SCREEN[0] / (width - 2 * PADDING + MARGIN),
        SCREEN[1] / (high - GROUP_TITLE - PADDING + MARGIN),
    )


def measure(stacks: Sequence[Sequence[Form]]) -> tuple[int, int]:
    """Width and height of groups over one another, beside one another."""
    width = sum(max(form.width for form in stack) + BETWEEN for stack in stacks) - BETWEEN
    heights = [sum(form.height + BETWEEN for form in stack) - BETWEEN for stack in stacks]
    return width, max(heights)


def best(groups: Sequence[Sequence[Form]]) -> tuple[tuple[Form, ...], ...]:
    """The choice of forms, stacked in the order of reading, that is read at the largest scale; of
    equals the smallest.
    """
    chosen = {}
    for forms_ in itertools.product(*groups):
        for count in range(1, len(forms_) + 1):
            for stacks in consecutive(forms_, count):
                width, high = measure(stacks)
                chosen.setdefault((-scale(width, high), width * high), stacks)
    return chosen[min(chosen)]


def lay_out(groups: Mapping[str, Sequence[int]], nodes: Mapping[int, Node]) -> list[dict[str, Any]]:
    """Give the nodes their places; the groups as the canvas draws them, in the order of reading:
    down, then to the right.
    """
    stacks = best([forms(ids, nodes) for ids in groups.values()])
    titles, boxes, left = iter(groups), [], 0
    for stack in stacks:
        top, width = 0, max(form.width for form in stack)
        for form_ in stack:
            place(form_.columns, nodes, left + PADDING, top + GROUP_TITLE + TITLE)
            boxes.append(group(len(boxes), next(titles), (left, top, width, form_.height)))
            top += form_.height + BETWEEN
        left += width + BETWEEN
    return boxes


def place(columns: Columns, nodes: Mapping[int, Node], left: int, top: int) -> None:
    """Give the nodes of a group their places; top: of the first one, below its title."""
    for column in columns:
        y = top
        for key in column:
            nodes[key]["pos"] = [left, y]
            y += extent(nodes[key])[1] + TITLE + GAP
        left += max(extent(nodes[key])[0] for key in column) + GAP


def group(count: int, title: str, bounding: Sequence[int]) -> dict[str, Any]:
    """A group of the canvas: x, y, width and height, in the next of the host's colours."""
    return {
        "id": count + 1,
        "title": title,
        "bounding": list(bounding),
        "color": COLOURS[count % len(COLOURS)],
        "font_size": 24,
        "flags": {},
    }
