"""What a plot shows: points with their errors, and the axes that they lie between."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One row of a table; the errors are standard errors of the means."""

    label: str
    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0


@dataclass(frozen=True)
class Axis:
    """What is measured along an axis, and between which scores it makes sense."""

    title: str
    floor: float | None = None
    ceiling: float | None = None

    def marks(self, logarithmic: bool = False) -> list[tuple[str, float]]:
        """The floor and the ceiling that are known and can be drawn, with their labels."""
        known = [
            (name, v)
            for name, v in (("floor", self.floor), ("ceiling", self.ceiling))
            if v is not None and math.isfinite(v)
        ]
        return [
            (f"{name} {v:.2f}" if 0.1 <= abs(v) < 10 else f"{name} {v:.3g}", v)
            for name, v in known
            if v > 0 or not logarithmic
        ]


def error(value: float) -> float:
    """A standard error that can be drawn: one seed has none."""
    return abs(value) if math.isfinite(value) else 0.0


def finite(points: Sequence[Point], logarithmic: bool = False) -> list[Point]:
    return [
        p
        for p in points
        if math.isfinite(p.x) and math.isfinite(p.y) and (p.x > 0 or not logarithmic)
    ]


def limits(values: Sequence[float], before: float, after: float) -> tuple[float, float]:
    """An axis' ends: all values with shares of their range around them."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    width = (high - low) or 0.2 * abs(high) or 1.0
    return low - before * width, high + after * width


def values_of(points: Iterator[Point], axis: Axis, along: str) -> list[float]:
    """Everything an axis has to show: points with their errors, floor and ceiling."""
    ends = [
        value
        for p in points
        for value in (
            getattr(p, along) - error(getattr(p, f"{along}_error")),
            getattr(p, along) + error(getattr(p, f"{along}_error")),
        )
    ]
    return ends + [value for _, value in axis.marks()]
