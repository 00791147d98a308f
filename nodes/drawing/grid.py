"""The comparison grid: rows of pictures with labels, captions and references."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

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
    small = [
        fitted(picture, cell, cell).size
        for picture in (*(p for row in rows for p in row), *references)
    ]
    width, height = (max(sizes) for sizes in zip(*small))
    size = max(12, min(cell // 13, 30))
    gap, margin, across = max(4, cell // 32), max(10, cell // 12), max(map(len, rows))
    longest = max((typeface(size, label).getlength(label) for label in labels), default=0)
    side = int(min(longest, max(0.7 * cell, 7 * size))) + 1 + gap + margin if longest else 0
    high = max((len(wrapped(text, typeface(size, text), width, 3)) for text in captions), default=0)
    high = high or int(len(references) >= len(rows))  # room for the word above them
    head = round(1.3 * size * high) + gap if high else 0
    first = width + margin if references else 0
    left, top = margin + first + side, margin + head
    page = Image.new(
        "RGB",
        (
            left + across * (width + gap) - gap + margin,
            top + len(rows) * (height + gap) - gap + margin,
        ),
        PAPER,
    )
    pen = ImageDraw.Draw(page)
    if references:
        above = stack(
            page, references, margin, top, width, len(rows) * (height + gap) - gap, height, gap
        )
        write(pen, margin + width / 2, above - gap, "reference", size, GREY, "md")
    for x, caption in zip(range(across), captions):
        write(
            pen, left + x * (width + gap) + width / 2, top - gap, caption, size, INK, "md", width, 3
        )
    for y, (row, label) in enumerate(zip_longest(rows, labels[: len(rows)], fillvalue="")):
        middle = top + y * (height + gap) + height / 2
        write(
            pen,
            left - gap - margin / 2,
            middle,
            label,
            size,
            INK,
            "rm",
            side - gap - margin,
            max(1, int(height / (1.3 * size))),
        )
        for x, picture in enumerate(row):
            paste(page, picture, left + x * (width + gap), top + y * (height + gap), width, height)
    return page


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
