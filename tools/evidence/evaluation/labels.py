"""Where labels go in a picture: beside their points or along its edge, none over another. Boxes are pixels: x0 y0 x1 y1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

ANGLES = np.deg2rad(
    [0, 180, 90, 270, 45, 135, 315, 225, 20, 340, 160, 200, 70, 110, 250, 290]
)  # the places tried, best first
DISTANCES = (
    0,
    10,
    24,
    42,
    64,
    90,
    120,
    155,
    195,
    240,
    290,
    345,
    405,
    470,
    540,
    620,
)  # pixels from the point's rim
RIM, LEADER = (
    15.0,
    20.0,
)  # a point's own room; how far from it a label lies before a thin line leads there
CROSSED, ALONG = (
    60.0,
    2.0,
)  # what it costs when a leader passes through a label: once, and per pixel


def spread(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Where boxes in a row begin: as near as can be, in squares, to where they are wanted, none over another, all within low..high.

    Isotonic regression of what is left when the boxes before each are taken off; bounds then only clip it.
    """
    order = sorted(range(len(wanted)), key=lambda n: wanted[n] + sizes[n] / 2)
    before = np.cumsum([0.0, *(sizes[n] for n in order)])
    blocks: list[list[float]] = []  # sum and count of pooled neighbours
    for n, offset in zip(order, before):
        blocks.append([wanted[n] - offset, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    level = chain.from_iterable([total / count] * int(count) for total, count in blocks)
    starts = [
        min(max(value, low), high - before[-1]) + offset for value, offset in zip(level, before)
    ]
    return [start for _, start in sorted(zip(order, starts))]


def covered(boxes: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Boxes [k 4] (x0 y0 x1 y1), segments [s 4] (from x y, to x y) -> pixels of each segment within each box [k s] (Liang and Barsky)."""
    start, step = segments[None, :, :2], segments[None, :, 2:] - segments[None, :, :2]
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = (boxes[:, None, :2] - start) / step, (boxes[:, None, 2:] - start) / step
    inside = (start >= boxes[:, None, :2]) & (start <= boxes[:, None, 2:])
    flat = step == 0  # along such an axis a segment is within or it is not
    enter = np.where(flat, np.where(inside, -np.inf, np.inf), np.minimum(one, two)).max(-1)
    leave = np.where(flat, np.where(inside, np.inf, -np.inf), np.maximum(one, two)).min(-1)
    return np.clip(np.minimum(leave, 1) - np.maximum(enter, 0), 0, None) * np.hypot(
        step[..., 0], step[..., 1]
    )


def shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Boxes [k 4], others [o 4] -> which overlap [k o]."""
    low, high = (
        np.maximum(boxes[:, None, :2], others[None, :, :2]),
        np.minimum(boxes[:, None, 2:], others[None, :, 2:]),
    )
    return (high > low).all(-1)


def through(pixels: np.ndarray) -> np.ndarray:
    """What it costs that leaders pass so far through labels."""
    return np.where(pixels > 1, CROSSED + ALONG * pixels, 0)


def leaders(anchor: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """From a point to the nearest place of each box [k 4]: segments [k 4]."""
    return np.concatenate(
        [np.broadcast_to(anchor, (len(boxes), 2)), np.clip(anchor, boxes[:, :2], boxes[:, 2:])], 1
    )


def candidates(
    anchor: np.ndarray, size: np.ndarray, room: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A point [2], its label's size [2], the room [4] -> boxes [k 4] within the room that the label could have, and their costs [k]."""
    turn = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)  # [a 2]
    rank = np.arange(len(ANGLES)) * 0.8
    far = np.asarray(DISTANCES, float)
    middle = (
        anchor
        + (RIM + far)[:, None, None] * turn
        + turn / np.abs(turn).max(1, keepdims=True) * size / 2
    )  # [d a 2]
    middle = middle.reshape(-1, 2)
    cost = (far[:, None] * 1.0 + (far[:, None] > LEADER) * 12 + rank).ravel()
    boxes = np.concatenate([middle - size / 2, middle + size / 2], 1)
    fits = (boxes[:, :2] >= room[:2]).all(1) & (boxes[:, 2:] <= room[2:]).all(1)
    return boxes[fits], cost[fits]


def placed(
    anchors: np.ndarray, sizes: np.ndarray, room: np.ndarray, lines: np.ndarray, rounds: int = 4
) -> list[np.ndarray | None]:
    """Boxes for labels of points: none over another, over a point, or out of the room; as near and as clear of lines as greed finds.

    anchors, sizes [n 2], room [4], lines [s 4], all in pixels. The most crowded label chooses first; then each chooses again, knowing all
    others, a few times. None for a label that has no place.
    """
    count = len(anchors)
    points = np.concatenate([anchors - RIM * 0.7, anchors + RIM * 0.7], 1)
    choices = []
    for anchor, size in zip(anchors, sizes):
        boxes, cost = candidates(anchor, size, room)
        free = ~shared(boxes, points).any(1)
        boxes, cost = boxes[free], cost[free]
        rays = leaders(anchor, boxes)
        others = points[(anchors != anchor).any(1)]
        hits = (
            (covered(others, rays) > 0).sum(0) if len(others) else 0
        )  # a leader through another point misleads
        choices.append((boxes, cost + 0.6 * covered(boxes, lines).sum(1) + 40 * hits, rays))
    crowd = (np.hypot(*(anchors[:, None] - anchors[None]).transpose(2, 0, 1)) < 130).sum(1)
    order = sorted(range(count), key=lambda n: (-crowd[n], anchors[n, 1], anchors[n, 0], n))
    taken: list[int | None] = [None] * count
    for _ in range(rounds):
        before = list(taken)
        for n in order:
            boxes, cost, rays = choices[n]
            known = [m for m in range(count) if m != n and taken[m] is not None]
            if known:
                theirs = np.stack([choices[m][0][taken[m]] for m in known])
                threads = np.stack([choices[m][2][taken[m]] for m in known])
                cost = (
                    cost
                    + np.where(shared(boxes, theirs).any(1), np.inf, 0)
                    + through(covered(boxes, threads)).sum(1)
                )
                cost = cost + through(covered(theirs, rays)).sum(0)
            taken[n] = int(cost.argmin()) if len(cost) and np.isfinite(cost.min()) else None
        if taken == before:
            break
    return [None if choice is None else choices[n][0][choice] for n, choice in enumerate(taken)]
