"""Whose the rows and keys of an attention are, after other nodes' patches changed their number
(regional prompts, NegPip).

Said only where it is certain: rows by their queries and texts, keys by their contents, compared in
samples that are brought to host memory. Axes: b rows of a call = parts x pictures, n query tokens,
t tokens of the text, k keys, c channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

TOKENS, CHANNELS = 64, 16  # that a sample holds of a row at most
Places = tuple[int, ...]  # per key its place in a text, -1: none


@dataclass(frozen=True)
class Traced:
    """parts: per equal part of the rows now, the part it came from; places: its keys in that part's
    text, None: not its text.

    repeats: per part, per row, how many times its text stands in its keys; None: as before.
    """

    parts: tuple[int, ...]
    places: tuple[Places | None, ...]
    repeats: tuple[tuple[int, ...] | None, ...]


def trace(
    parts: int,
    was: Tensor,
    now: Tensor,
    text: Tensor | None = None,
    keys: Tensor | None = None,
    once: Sequence[int] = (),
) -> Traced | None:
    """What became of the equal parts of a call; None where it cannot be told.

    was [b n c], text [b t c]: what the host gave; now [b' n c], keys [b' k c]: what is left of it;
    once: tokens of each part's text before the host repeats them. A part stands in one or more
    copies of all of its rows, in the order of the parts.
    """
    rows = was.shape[0] // parts
    whole = not was.shape[0] % parts and not now.shape[0] % rows
    if not whole or (keys is not None and keys.shape[0] != now.shape[0]):
        return None
    count = now.shape[0] // rows
    texts, left = (x if x is None else _sample(x, x.shape[1], rows) for x in (text, keys))
    places: list[list[Places | None]] = [[None] * parts for _ in range(count)]
    if left is not None:
        places = [[_places(texts[p], left[i]) for p in range(parts)] for i in range(count)]
    orders = [tuple(range(parts))]
    if now.shape[0] != was.shape[0]:
        orders = _alike(was, now, rows, parts)
        if len(orders) > 1 and left is not None:
            orders = _allowed_by_texts(orders, places, parts)
    if len(orders) != 1:
        return None
    order = orders[0]
    standing = tuple(places[i][p] for i, p in enumerate(order))
    repeats: list[tuple[int, ...] | None] = []
    for i, (part, place) in enumerate(zip(order, standing)):
        if left is None or (place is None and count == parts):
            repeats.append(None)
        elif place is not None:
            repeats.append((_copies(place, once[part]),))
        else:
            repeats.append(tuple(_repeated(row) for row in left[i]))
    return Traced(order, standing, tuple(repeats))


def _alike(was: Tensor, now: Tensor, rows: int, parts: int) -> list[tuple[int, ...]]:
    """The orders in which the rows now could be copies of the parts, by their queries; none where
    they are of another shape.
    """
    if was.shape[1:] != now.shape[1:]:
        return []
    before, after = (_sample(x, TOKENS, rows) for x in (was, now))
    alike = [[torch.equal(a, b) for b in before] for a in after]
    orders = _orders(len(after), parts)
    return [order for order in orders if all(alike[i][p] for i, p in enumerate(order))]


def _allowed_by_texts(
    orders: Sequence[tuple[int, ...]], places: Sequence[Sequence[Places | None]], parts: int
) -> list[tuple[int, ...]]:
    """Those of the orders that the texts allow, since cond and uncond begin with equal queries."""
    orders = [
        o
        for o in orders
        if all(places[i][p] is not None or not any(places[i]) for i, p in enumerate(o))
    ]
    if len(orders) > 1:
        orders = [o for o in orders if all(places[o.index(p)][p] is not None for p in range(parts))]
    return orders


def _sample(x: Tensor, tokens: int, rows: int) -> Tensor:
    """x [b n c] -> [parts rows n' c'] in host memory."""
    few = x[:, :: max(x.shape[1] // tokens, 1), :: max(x.shape[2] // CHANNELS, 1)]
    return few.detach().cpu().unflatten(0, (-1, rows))


def _orders(count: int, parts: int) -> list[tuple[int, ...]]:
    """Every way in which `count` blocks can be copies of the parts, in their order."""
    cuts = [(0, *c, count) for c in combinations(range(1, count), parts - 1)]
    return [tuple(p for p in range(parts) for _ in range(cut[p], cut[p + 1])) for cut in cuts]


def _places(text: Tensor, keys: Tensor) -> Places | None:
    """text [rows t c], keys [rows k c] -> where in the text each key stands, in all rows alike;
    None unless all of the text is there.
    """
    same = torch.stack([(k[:, None] == t).all(-1) for t, k in zip(text, keys)]).all(0)  # [k t]
    if not same.any(0).all():
        return None
    return tuple(torch.where(same.any(1), same.int().argmax(1), -1).tolist())


def _copies(places: Places, once: int) -> int:
    """How many times a text of `once` tokens stands there; tokens that are equal (the starts of
    long prompts) count at the first.
    """
    return min(Counter(place % once for place in places if place >= 0).values())


def _repeated(keys: Tensor) -> int:
    """How many times one text stands in the keys [k c] of another prompt."""
    k = keys.shape[0]
    return k // next(
        d for d in range(1, k + 1) if not k % d and torch.equal(keys[d:], keys[: k - d])
    )
