"""Where the nodes of a workflow stand: groups in columns, groups over and beside one another, so
that all of it is read at once.

ComfyUI opens a template fitted to the screen, and draws no letters below a scale of 0.571 (8 pixels
of 14). So a graph may be as wide and as high as SCREEN divided by that, and where it is larger it
is as little too large as its groups allow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

READABLE = 8 / 14
SCREEN = (0.75 * 1600, 0.75 * 866)  # what the page fills of a window of 1600 x 900
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
Box = tuple[int, int, int, int]  # left, top, width, height
Columns = tuple[tuple[int, ...], ...]  # node ids, from left to right and from top to bottom


@dataclass(frozen=True)
class Form:
    """A group in so many columns, with its title and paddings, in pixels."""

    columns: Columns
    width: int
    height: int


@dataclass(frozen=True)
class Block:
    """Two parts over or beside one another: their size, and the left and top of each."""

    width: int
    height: int
    parts: tuple[tuple[Part, int, int], tuple[Part, int, int]]


Part = Form | Block
Join = Callable[[Part, Part], Block]


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


def over(one: Part, other: Part) -> Block:
    """One over the other."""
    high = one.height + BETWEEN + other.height
    parts = ((one, 0, 0), (other, 0, one.height + BETWEEN))
    return Block(max(one.width, other.width), high, parts)


def beside(one: Part, other: Part) -> Block:
    """One left of the other."""
    width = one.width + BETWEEN + other.width
    parts = ((one, 0, 0), (other, one.width + BETWEEN, 0))
    return Block(width, max(one.height, other.height), parts)


def worthwhile(parts: Iterable[Part]) -> list[Part]:
    """Without those that are no narrower than a lower one; from the narrowest on."""
    kept: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.width, part.height)):
        if not kept or part.height < kept[-1].height:
            kept.append(part)
    return kept


def joined(first: Sequence[Part], then: Sequence[Part], ways: Sequence[Join]) -> list[Part]:
    """Every form of what comes first with every form of what comes then."""
    return [way(one, other) for one, other, way in itertools.product(first, then, ways)]


def cut(groups: Sequence[Sequence[Part]], ways: Sequence[Join]) -> list[Part]:
    """Groups in the order of reading, cut in two wherever one likes, and each piece again."""
    parts = {(i, i + 1): worthwhile(forms_) for i, forms_ in enumerate(groups)}
    for length in range(2, len(groups) + 1):
        for i in range(len(groups) - length + 1):
            end, options = i + length, []
            for middle in range(i + 1, end):
                options += joined(parts[i, middle], parts[middle, end], ways)
            parts[i, end] = worthwhile(options)
    return parts[0, len(groups)]


def stacked(groups: Sequence[Sequence[Part]]) -> list[Part]:
    """Groups over one another, and such stacks beside one another."""
    parts: list[Part] = []
    for count in range(1, len(groups) + 1):
        for pieces in consecutive(groups, count):
            parts += cut([cut(piece, [over]) for piece in pieces], [beside])
    return worthwhile(parts)


def sliced(groups: Sequence[Sequence[Part]]) -> list[Part]:
    """Groups over and beside one another, each right of or below those before it."""
    return cut(groups, [over, beside])


def best(groups: Sequence[Sequence[Form]]) -> Part:
    """What is read at the largest scale, of equals the smallest: stacks, and where they are not
    readable all that can be cut.
    """
    chosen: list[Part] = []
    for way in (stacked, sliced):
        chosen += way(groups)
        chosen.sort(key=lambda part: (-scale(part.width, part.height), part.width * part.height))
        if scale(chosen[0].width, chosen[0].height) >= READABLE:
            break
    return chosen[0]


def boxes(part: Part, left: int, top: int, width: int) -> Iterator[tuple[Form, Box]]:
    """Every group with its place, those over one another equally wide."""
    if isinstance(part, Form):
        yield part, (left, top, width, part.height)
        return
    one, other = part.parts
    for inner, x, y in part.parts:
        yield from boxes(inner, left + x, top + y, width if one[1] == other[1] else inner.width)


def lay_out(groups: Mapping[str, Sequence[int]], nodes: Mapping[int, Node]) -> list[dict[str, Any]]:
    """Give the nodes their places; the groups as the canvas draws them, in the order of reading:
    each right of or below those before it.
    """
    whole = best([forms(ids, nodes) for ids in groups.values()])
    drawn = []
    for title, (form_, box) in zip(groups, boxes(whole, 0, 0, whole.width)):
        place(form_.columns, nodes, box[0] + PADDING, box[1] + GROUP_TITLE + TITLE)
        drawn.append(group(len(drawn), title, box))
    return drawn


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
