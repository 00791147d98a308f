"""A chart of what a network's blocks do: a row of bars for each measure, a column for each
block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw

from .pen import FAINT, GREY, INK, PAPER, wrapped, typeface, write

CHOSEN, OTHER = "#1f4e8c", "#b9cfe8"
MARGIN, HEAD, HIGH, LOW, GAP, FOOT = 36, 84, 132, 34, 46, 64


@dataclass(frozen=True)
class Bars:
    """One measure of some blocks, by the number of their column."""

    title: str
    values: Mapping[int, float]
    missing: str = ""  # why there is none, in words

    @property
    def height(self) -> int:
        """Of its part of the page, without its title."""
        return HIGH if self.values else LOW


@dataclass(frozen=True)
class Chart:
    """What draw_blocks draws."""

    title: str
    note: str  # below the title
    columns: Sequence[tuple[str, int]]  # per block: its stage and its number there
    bars: Sequence[Bars]
    chosen: Collection[int]  # columns that are recommended


def draw_blocks(chart: Chart) -> Image.Image:
    """The whole page, as wide as its blocks need."""
    count = len(chart.columns)
    step = max(12, min(88, 880 // count))
    left = MARGIN + 58
    width = max(left + count * step + MARGIN, 720)
    height = HEAD + sum(bars.height + GAP for bars in chart.bars) + FOOT
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    write(pen, MARGIN, 18, chart.title, 20, INK, width=width - 2 * MARGIN)
    write(pen, MARGIN, 48, chart.note, 13, GREY, width=width - 2 * MARGIN, lines=2)
    right = left + count * step
    top = HEAD
    for bars in chart.bars:
        _draw_bars(pen, bars, chart.chosen, left, right, top + GAP - 14, step)
        top += bars.height + GAP
    _draw_names(pen, chart.columns, left, top + 4, step)
    _draw_legend(pen, width, height)
    return page


def _draw_bars(
    pen: ImageDraw.ImageDraw,
    bars: Bars,
    chosen: Collection[int],
    left: int,
    right: int,
    top: int,
    step: int,
) -> None:
    """One row: its title, a scale from 0 to a round number, and a bar for each block."""
    write(pen, left, top - 24, bars.title, 14)
    bottom = top + HIGH
    if not bars.values:
        write(pen, left, top, bars.missing, 13, GREY)
        return
    most = round_up(max(bars.values.values()))
    for share in (0.0, 0.5, 1.0):
        y = bottom - HIGH * share
        pen.line(((left, y), (right, y)), FAINT)
        write(pen, left - 8, y, f"{most * share:.3g}", 12, GREY, "rm")
    edge = max(1, step // 8)
    for column, value in bars.values.items():
        x = left + column * step
        box = (x + edge, bottom - HIGH * value / most, x + step - edge - 1, bottom)
        pen.rectangle(box, CHOSEN if column in chosen else OTHER)


def round_up(value: float) -> float:
    """The next number of 1, 2, 5 times a power of ten that is no less; 1 for nothing."""
    power = 1e-9
    while value > 1e-9:
        for times in (1, 2, 5):
            if value <= times * power:
                return times * power
        power *= 10
    return 1.0


def _draw_names(
    pen: ImageDraw.ImageDraw, columns: Sequence[tuple[str, int]], left: int, top: int, step: int
) -> None:
    """The blocks' numbers, and below them the stages."""
    every = 1 if step >= 20 else 2 if step >= 14 else 4
    for column, (_, number) in enumerate(columns):
        if number % every == 0:
            write(pen, left + (column + 0.5) * step, top + 8, str(number), 11, GREY, "mm")
    for first, last, stage in stages(columns):
        x = left + first * step, left + (last + 1) * step
        pen.line(((x[0] + 2, top + 20), (x[1] - 2, top + 20)), GREY)
        room = x[1] - x[0]
        text = wrapped(stage, typeface(12, stage), max(room, 8), 1)[0]
        write(pen, sum(x) / 2, top + 31, text, 12, INK, "mm")


def stages(columns: Sequence[tuple[str, int]]) -> Iterator[tuple[int, int, str]]:
    """The first and the last column of every run of blocks of one stage."""
    for stage, run in groupby(enumerate(columns), key=lambda column: column[1][0]):
        numbers = [number for number, _ in run]
        yield numbers[0], numbers[-1], stage


def _draw_legend(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    y = height - 14
    write(pen, width - MARGIN, y, "blocks = measured", 12, GREY, "rm")
    x = width - MARGIN - typeface(12).getlength("blocks = measured") - 18
    pen.rectangle((x, y - 5, x + 10, y + 5), CHOSEN)
