"""The score card: pictures with a table of their similarities, and what each of them shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...models.overlay import oklch
from .pen import FAINT, GREY, INK, PAPER, WRONG, paste, typeface, wrapped, write

SMALLEST = 24  # pixels of a cell that words and numbers still fit
SHADES = 256
RAMP = ((0.97, 0.02, 235.0), (0.42, 0.11, 255.0))  # least to most, OKLCH: pale to deep blue


@dataclass(frozen=True)
class Line:
    """What stands beside a picture: its prompt, what was found instead or as well, and whether that
    is wrong.
    """

    prompt: str
    verdict: str
    wrong: bool = False


@dataclass(frozen=True)
class Card:
    """What score_card draws; every number is a similarity or a share that the words beside it
    explain.
    """

    title: str
    judge: str
    figures: Sequence[tuple[str, float | None, str]]  # name, value or None, what it is of
    pictures: Sequence[Image.Image]
    references: Sequence[Image.Image]
    pairs: Tensor  # [b b]
    known: Tensor | None  # [b r]
    lines: Sequence[Line]  # per picture
    scale: tuple[float, float]  # what the palest and the deepest cells mean


def shade(share: float) -> tuple[str, str]:
    """A share 0..1 -> colour of a cell, and of what is written on it."""
    step = round(min(max(share, 0.0), 1.0) * (SHADES - 1))
    return shades()[step], "white" if share > 0.5 else INK


@cache
def shades() -> list[str]:
    """The ramp's colours, all at once: a large table has thousands of cells."""
    low, high = torch.tensor(RAMP)
    colours = oklch(torch.lerp(low, high, torch.linspace(0, 1, SHADES)[:, None])) * 255
    return [
        f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours.round().int().tolist()
    ]


@dataclass(frozen=True)
class Sizes:
    """Of a score card's parts, in pixels."""

    cell: int
    gap: int
    text: int
    digits: int
    margin: int = 36
    top: int = 244

    @staticmethod
    def of(count: int) -> Sizes:
        """count: cells that stand beside one another."""
        cell = max(4, min(104, max(28, 1100 // count), 2400 // count))
        digits = max(9, min(round(0.23 * cell), 22))
        return Sizes(cell, max(2, cell // 26), min(14, max(10, cell // 4)), digits)

    @property
    def left(self) -> int:
        """Where the table begins, right of the pictures."""
        return self.margin + self.cell + 2 * self.gap

    def above(self, row: int) -> int:
        return self.top + (row + 1) * (self.cell + self.gap) + self.gap

    @property
    def legible(self) -> bool:
        return self.cell >= SMALLEST


Column = tuple[int, str, Image.Image]  # its left, its name, its picture


def score_card(card: Card) -> Image.Image:
    """The pictures with a table of their similarities, the numbers above it and what each picture
    shows beside it.
    """
    b, s = len(card.pictures), Sizes.of(len(card.pictures) + len(card.references) + 1)
    columns = columns_of(card, s)
    beside = (columns[-1][0] + s.cell if columns else s.margin + s.cell) + 6 * s.gap
    longest = max(
        typeface(s.text, text).getlength(text)
        for line in card.lines
        for text in (line.prompt, line.verdict)
    )
    room = min(340, int(longest) + 1) if s.legible else 0
    height = s.top + (b + 1) * (s.cell + s.gap) + s.gap + 74
    page = Image.new("RGB", (max(beside + room + s.margin, 800), height), PAPER)
    pen = ImageDraw.Draw(page)
    write(pen, s.margin, 28, card.title, 30)
    write(pen, s.margin, 68, card.judge, 15, GREY, width=page.width - 2 * s.margin)
    tiles(pen, card.figures, s.margin, 112, page.width - 2 * s.margin)
    for x, name, picture in columns:
        if s.legible:
            write(pen, x + s.cell / 2, s.top - 5, name, min(14, max(9, s.cell // 6)), GREY, "md")
        paste(page, picture, x, s.top, s.cell, s.cell)
    parts = [part for part in (card.pairs if b > 1 else None, card.known) if part is not None]
    values = torch.cat(parts or [card.pairs[:, :0]], 1).tolist()
    for y, (picture, line) in enumerate(zip(card.pictures, card.lines)):
        paste(page, picture, s.margin, s.above(y), s.cell, s.cell)
        for x, (column, value) in enumerate(zip(columns, values[y])):
            draw_cell(pen, s, column[0], y, None if x == y and b > 1 else value, card.scale)
        if s.legible:
            draw_line(pen, s, line, beside, s.above(y), room)
    legend(pen, card.scale, s.left, page.height - 46)
    return page


def columns_of(card: Card, s: Sizes) -> list[Column]:
    """The pictures, where there are two to compare, and apart from them the references."""
    step, r = s.cell + s.gap, len(card.references)
    pictures = card.pictures if len(card.pictures) > 1 else ()
    columns = [(s.left + x * step, f"{x + 1}", picture) for x, picture in enumerate(pictures)]
    start = s.left + len(columns) * step + (6 * s.gap if columns else 0)
    names = ["reference"] if r == 1 else [f"ref. {x + 1}" for x in range(r)]
    return columns + [
        (start + x * step, name, picture)
        for x, (name, picture) in enumerate(zip(names, card.references))
    ]


def draw_cell(
    pen: ImageDraw.ImageDraw,
    s: Sizes,
    x: int,
    row: int,
    value: float | None,
    scale: tuple[float, float],
) -> None:
    """One similarity; None: of a picture with itself."""
    y, (low, high) = s.above(row), scale
    box = (x, y, x + s.cell - 1, y + s.cell - 1)
    if value is None:
        pen.rectangle(box, PAPER, FAINT)
        return
    ground, ink = shade((value - low) / (high - low))
    pen.rectangle(box, ground)
    if s.legible:  # + 0: no -0.00
        text = f"{round(value, 2) + 0.0:.2f}"
        write(pen, x + s.cell / 2, y + s.cell / 2, text, s.digits, ink, "mm")


def draw_line(
    pen: ImageDraw.ImageDraw, s: Sizes, line: Line, x: int, above: int, room: int
) -> None:
    """A picture's prompt in at most `room` pixels, and below it what was found."""
    most = max(1, int(s.cell / (1.3 * s.text)) - bool(line.verdict))
    prompt = wrapped(line.prompt, typeface(s.text, line.prompt), room, most)
    middle = above + s.cell / 2 - 0.65 * s.text * (len(prompt) + bool(line.verdict))
    write(pen, x, middle, line.prompt, s.text, INK, width=room, lines=most)
    below = middle + 1.3 * s.text * len(prompt)
    write(pen, x, below, line.verdict, s.text, WRONG if line.wrong else GREY, width=room)


def tiles(
    pen: ImageDraw.ImageDraw,
    figures: Sequence[tuple[str, float | None, str]],
    left: int,
    top: int,
    width: int,
) -> None:
    """The numbers that matter, large, each with its name and what it is of."""
    each = min(300, width // len(figures))
    for number, (name, value, meaning) in enumerate(figures):
        x = left + number * each
        write(pen, x, top, name, 15, GREY)
        if value is None:
            write(pen, x, top + 22, meaning, 15, GREY, width=each - 20, lines=2)
        else:
            write(pen, x, top + 16, f"{round(value, 3) + 0.0:.3f}", 44)
            write(pen, x, top + 68, meaning, 13, GREY, width=each - 20, lines=1)


def legend(
    pen: ImageDraw.ImageDraw, scale: tuple[float, float], left: int, top: int, width: int = 160
) -> None:
    """What the cells' colours mean."""
    for x in range(width):
        pen.line(((left + x, top), (left + x, top + 9)), shade(x / (width - 1))[0])
    write(pen, left - 6, top + 5, f"{scale[0]:g}", 13, GREY, "rm")
    write(pen, left + width + 8, top + 5, f"{scale[1]:g}: the same subject", 13, GREY, "lm")
