"""The comparison grid: rows of pictures with labels, captions and references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from PIL import Image, ImageDraw

from .pen import GREY, INK, PAPER, fitted, paste, typeface, wrapped, write


def comparison(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    captions: Sequence[str],
    references: Sequence[Image.Image],
    cell: int,
) -> Image.Image:
    """Rows of pictures, of any sizes and counts, each within `cell` pixels; labels to the left,
    captions above, references first.

    Every cell has the size of the largest fitted picture, so equal pictures stand side by side
    without borders.
    """
    sheet = sheet_of(rows, labels, captions, references, cell)
    page = Image.new("RGB", sheet.size, PAPER)
    pen = ImageDraw.Draw(page)
    if references:
        draw_references(page, pen, sheet, references)
    draw_captions(pen, sheet, captions)
    for y, (row, label) in enumerate(zip_longest(rows, labels[: len(rows)], fillvalue="")):
        draw_label(pen, sheet, y, label)
        for x, picture in enumerate(row):
            paste(page, picture, sheet.x(x), sheet.y(y), sheet.width, sheet.height)
    return page


@dataclass(frozen=True)
class Sheet:
    """Where everything stands, in pixels."""

    rows: int
    across: int  # cells of the longest row
    width: int  # of a cell
    height: int
    text: int  # size of the letters
    gap: int
    margin: int
    side: int  # width of the labels
    left: int  # where the first cell begins
    top: int

    @property
    def size(self) -> tuple[int, int]:
        """Of the page."""
        return (
            self.left + self.across * (self.width + self.gap) - self.gap + self.margin,
            self.top + self.room + self.margin,
        )

    @property
    def room(self) -> int:
        """Height of all rows."""
        return self.rows * (self.height + self.gap) - self.gap

    def x(self, column: int) -> int:
        return self.left + column * (self.width + self.gap)

    def y(self, row: int) -> int:
        return self.top + row * (self.height + self.gap)


def sheet_of(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    captions: Sequence[str],
    references: Sequence[Image.Image],
    cell: int,
) -> Sheet:
    """The places of what `comparison` is given."""
    pictures = [*chain.from_iterable(rows), *references]
    width, height = map(max, zip(*(fitted(picture, cell, cell).size for picture in pictures)))
    size = max(12, min(cell // 13, 30))
    gap, margin = max(4, cell // 32), max(10, cell // 12)
    longest = max((typeface(size, label).getlength(label) for label in labels), default=0)
    side = int(min(longest, max(0.7 * cell, 7 * size))) + 1 + gap + margin if longest else 0
    high = max((len(wrapped(text, typeface(size, text), width, 3)) for text in captions), default=0)
    high = high or int(len(references) >= len(rows))  # room for the word above them
    head = round(1.3 * size * high) + gap if high else 0
    left = margin + side + (width + margin if references else 0)
    across = max(map(len, rows))
    return Sheet(len(rows), across, width, height, size, gap, margin, side, left, margin + head)


def draw_references(
    page: Image.Image, pen: ImageDraw.ImageDraw, sheet: Sheet, references: Sequence[Image.Image]
) -> None:
    above = stack(
        page,
        references,
        sheet.margin,
        sheet.top,
        sheet.width,
        sheet.room,
        sheet.height,
        sheet.gap,
    )
    middle = sheet.margin + sheet.width / 2
    write(pen, middle, above - sheet.gap, "reference", sheet.text, GREY, "md")


def draw_captions(pen: ImageDraw.ImageDraw, sheet: Sheet, captions: Sequence[str]) -> None:
    bottom = sheet.top - sheet.gap
    for column, caption in zip(range(sheet.across), captions):
        middle = sheet.x(column) + sheet.width / 2
        write(pen, middle, bottom, caption, sheet.text, INK, "md", sheet.width, 3)


def draw_label(pen: ImageDraw.ImageDraw, sheet: Sheet, row: int, label: str) -> None:
    right = sheet.left - sheet.gap - sheet.margin / 2
    middle = sheet.y(row) + sheet.height / 2
    width, lines = sheet.side - sheet.gap - sheet.margin, int(sheet.height / (1.3 * sheet.text))
    write(pen, right, middle, label, sheet.text, INK, "rm", width, max(1, lines))


def stack(
    page: Image.Image,
    pictures: Sequence[Image.Image],
    left: int,
    top: int,
    width: int,
    room: int,
    height: int,
    gap: int,
) -> int:
    """Pictures below one another in the middle of a column `room` high, smaller where they are too
    many -> where they begin.
    """
    height = max(1, min(height, (room + gap) // len(pictures) - gap))
    top += max(0, (room - len(pictures) * (height + gap) + gap) // 2)
    for y, picture in enumerate(pictures):
        paste(page, picture, left, top + y * (height + gap), width, height)
    return top
