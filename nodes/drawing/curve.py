"""The loss curve of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .pen import typeface


@dataclass(frozen=True)
class Axes:
    """Where a step and its loss stand on the page; a logarithmic axis where `logarithmic`."""

    box: tuple[int, int, int, int]  # left, top, right, bottom
    steps: int
    low: float
    high: float
    logarithmic: bool

    def scaled(self, loss: Any) -> Any:
        return np.log(loss) if self.logarithmic else np.asarray(loss)

    def place(self, step: Any, loss: Any) -> Any:
        """-> x, y."""
        left, top, right, bottom = self.box
        floor = max(self.low, 1e-12) if self.logarithmic else self.low
        shown = self.scaled(np.clip(loss, floor, self.high))
        y = (shown - self.scaled(self.low)) / max(
            self.scaled(self.high) - self.scaled(self.low), 1e-12
        )
        return left + (right - left) * step / max(self.steps, 1), bottom - (bottom - top) * y


def draw_curve(
    losses: Sequence[float], steps: int, width: int = 768, height: int = 432
) -> Image.Image:
    """Every step's loss, faint, and its running mean, over all steps to come; a logarithmic axis
    where the mean spans 8 times.
    """
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), typeface()
    if not losses:
        pen.text((width / 2, height / 2), "no steps yet", "#555555", font, "mm")
        return picture
    values = np.asarray(losses, dtype=np.float64).clip(1e-12)
    ends, mean = running_mean(values)
    logarithmic = bool(mean.max() / mean.min() > 8)
    low, high = (float(v) for v in np.quantile(values, (0.005, 0.995)))
    low, high = min(low, mean.min()), max(high, mean.max())
    low, high = (low / 1.1, high * 1.1) if logarithmic else (0.0, high * 1.05)
    left, top, right, bottom = box = 64, 32, width - 16, height - 40
    axes = Axes(box, steps, low, high, logarithmic)
    draw_ticks(pen, axes, font)
    for series, colour, thick in ((values, "#b9cfe8", 1), (mean, "#1f4e8c", 3)):
        points = [(float(x), float(y)) for x, y in zip(*axes.place(ends, series))]
        pen.line(points if len(points) > 1 else points * 2, colour, thick)
        if len(points) == 1:
            x, y = points[0]
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], colour)
    pen.line(((left, top), (left, bottom), (right, bottom)), "#555555")
    pen.text((left, 8), f"loss{' (log)' if logarithmic else ''}", "#555555", font)
    pen.text((right, 8), f"step {len(values)} of {steps}: {mean[-1]:.4g}", "#1f4e8c", font, "ra")
    pen.text(((left + right) / 2, height - 4), "step", "#555555", font, "mb")
    return picture


def running_mean(values: Any) -> tuple[Any, Any]:
    """The steps 1..n, and the mean of each with those before it, over a twelfth of all and at most
    400.
    """
    window = max(1, min(len(values) // 12, 400))
    sums = np.concatenate(([0.0], values.cumsum()))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return ends, (sums[ends] - sums[starts]) / (ends - starts)


def draw_ticks(pen: ImageDraw.ImageDraw, axes: Axes, font: Any) -> None:
    left, _, right, bottom = axes.box
    for loss in ticks(axes.low, axes.high, axes.logarithmic):
        y = axes.place(0, loss)[1]
        pen.line(((left, y), (right, y)), "#e6e6e6")
        pen.text((left - 6, y), f"{loss:.3g}", "#555555", font, "rm")
    for step in ticks(0, axes.steps, False):
        x = axes.place(step, axes.high)[0]
        pen.line(((x, bottom), (x, bottom + 4)), "#555555")
        pen.text((x, bottom + 7), f"{step:g}", "#555555", font, "mt")


def ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers between low and high: about five, or 1, 2 and 5 of every power of ten."""
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [n * 10.0**p for p in powers for n in (1, 2, 5) if low <= n * 10.0**p <= high]
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12) / 4))
    step *= next(n for n in (1, 2, 5, 10) if (high - low) / (n * step) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
