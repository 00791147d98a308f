"""Sheets that nodes show: pictures in rows, and scores over pictures, drawn with Pillow in a typeface that is everywhere."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..models.overlay import oklch

# in the order tried, for what Pillow's own typeface cannot write: by file name, where the system keeps its fonts
SYSTEM = (
    "DejaVuSans.ttf",
    "segoeui.ttf",
    "arial.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
)
PAPER, INK, GREY, FAINT, WRONG = "#ffffff", "#1c2530", "#66717e", "#dfe3e8", "#b8452c"
SMALLEST = 24  # pixels of a cell that words and numbers still fit
SHADES = 256
RAMP = ((0.97, 0.02, 235.0), (0.42, 0.11, 255.0))  # least to most, OKLCH: pale to deep blue


@dataclass(frozen=True)
class Line:
    """What stands beside a picture: its prompt, what was found instead or as well, and whether that is wrong."""

    prompt: str
    found: str
    wrong: bool = False


@dataclass(frozen=True)
class Card:
    """What score_card draws; every number is a similarity or a share that the words beside it explain."""

    title: str
    judge: str
    figures: Sequence[tuple[str, float | None, str]]  # name, value or None, what it is of
    pictures: Sequence[Image.Image]
    references: Sequence[Image.Image]
    pairs: Tensor  # [b b]
    known: Tensor | None  # [b r]
    lines: Sequence[Line]  # per picture
    scale: tuple[float, float]  # what the palest and the deepest cells mean


def as_image(picture: Image.Image) -> Tensor:
    """A picture -> IMAGE [1 Y X 3]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).float()[None] / 255


def as_pictures(images: Tensor) -> list[Image.Image]:
    """IMAGE [b Y X 3] in 0..1 -> pictures."""
    return [Image.fromarray(image) for image in images.mul(255).round().byte().numpy()]


def fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture as large as it fits, in its own proportions."""
    scale = min(width / picture.width, height / picture.height)
    return picture.resize(
        (max(1, round(scale * picture.width)), max(1, round(scale * picture.height))),
        Image.Resampling.LANCZOS,
    )


def paste(
    page: Image.Image, picture: Image.Image, left: int, top: int, width: int, height: int
) -> None:
    """The picture in the middle of a box of the page."""
    small = fitted(picture, width, height)
    page.paste(small, (left + (width - small.width) // 2, top + (height - small.height) // 2))


# words ---------------------------------------------------------------------------------------------------------------------


def typeface(size: int = 14, text: str = "") -> Any:
    """Pillow's own typeface, or for a text that it cannot write the one of the system's that writes most of it."""
    known = [font for name in ("", *SYSTEM) if (font := opened(name, size))]
    return (
        max(known, key=lambda font: writable(font, text)) if unwritten(known[0], text) else known[0]
    )


@cache
def opened(name: str, size: int) -> Any:
    """A typeface of the system, or "" Pillow's; None where there is none of that name."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()


def unwritten(font: Any, text: str) -> bool:
    return writable(font, text) < len(set(text))


def writable(font: Any, text: str) -> int:
    """How many of the text's different characters the typeface has; a missing one is drawn as every missing one."""
    if not isinstance(font, ImageFont.FreeTypeFont):
        return sum(c.isascii() for c in set(text))
    return sum(has(font, c) for c in set(text))


@cache
def has(font: Any, character: str) -> bool:
    missing, mask = (font.getmask(c) for c in ("\U0010fffe", character))
    return character.isspace() or mask.size != missing.size or bytes(mask) != bytes(missing)


def wrapped(text: str, font: Any, width: float, lines: int) -> list[str]:
    """A text in at most so many lines of at most this width; what does not fit ends in an ellipsis. Words are broken if they must."""
    made: list[str] = []
    for word in " ".join(text.split())[
        : lines * int(width) + 1
    ].split():  # what can be seen is a pixel wide at least
        while word and len(made) <= lines:
            joined = f"{made[-1]} {word}" if made else word
            if made and font.getlength(joined) <= width:
                made[-1], word = joined, ""
            else:
                cut = max(
                    bisect_right(
                        range(1, len(word) + 1), width, key=lambda n: font.getlength(word[:n])
                    ),
                    1,
                )
                made, word = [*made, word[:cut]], word[cut:]
    if len(made) > lines:
        last = made[lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        made = [*made[: lines - 1], last.rstrip() + "..."]
    return made


def write(
    pen: ImageDraw.ImageDraw,
    x: float,
    y: float,
    text: str,
    size: int,
    colour: str = INK,
    anchor: str = "la",
    width: float = 0,
    lines: int = 1,
) -> None:
    """A text at a place; anchor as Pillow's, of the whole block. width: wrap it into at most `lines` lines."""
    font = typeface(size, text)
    made = wrapped(text, font, width, lines) if width else [text]
    down = {"a": 0.0, "m": (1 - len(made)) / 2, "d": 1.0 - len(made)}[anchor[1]]
    for number, line in enumerate(made):
        pen.text((x, y + round((down + number) * 1.3 * size)), line, colour, font, anchor)


# the comparison grid -------------------------------------------------------------------------------------------------------


def comparison(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    captions: Sequence[str],
    references: Sequence[Image.Image],
    cell: int,
) -> Image.Image:
    """Rows of pictures, of any sizes and counts, each within `cell` pixels; labels to the left, captions above, references first.

    Every cell has the size of the largest fitted picture, so equal pictures stand side by side without borders.
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
    """Pictures below one another in the middle of a column `room` high, smaller where they are too many -> where they begin."""
    height = max(1, min(height, (room + gap) // len(pictures) - gap))
    top += max(0, (room - len(pictures) * (height + gap) + gap) // 2)
    for y, picture in enumerate(pictures):
        paste(page, picture, left, top + y * (height + gap), width, height)
    return top


# the score card ------------------------------------------------------------------------------------------------------------


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


def score_card(card: Card) -> Image.Image:
    """The pictures with a table of their similarities, the numbers above it and what each picture shows beside it."""
    b, r = len(card.pictures), len(card.references)
    cell = max(4, min(104, max(28, 1100 // (b + r + 1)), 2400 // (b + r + 1)))
    gap, margin, top, size = max(2, cell // 26), 36, 244, min(14, max(10, cell // 4))
    digits, apart = max(9, min(round(0.23 * cell), 22)), 6 * gap
    left = margin + cell + 2 * gap
    columns = (
        []
        if b == 1
        else [
            (left + x * (cell + gap), f"{x + 1}", picture)
            for x, picture in enumerate(card.pictures)
        ]
    )
    start = left + len(columns) * (cell + gap) + (apart if columns else 0)
    columns += [
        (start + x * (cell + gap), "reference" if r == 1 else f"ref. {x + 1}", picture)
        for x, picture in enumerate(card.references)
    ]
    said = (columns[-1][0] + cell if columns else margin + cell) + 6 * gap
    longest = max(
        typeface(size, text).getlength(text)
        for line in card.lines
        for text in (line.prompt, line.found)
    )
    room = min(340, int(longest) + 1) if cell >= SMALLEST else 0
    page = Image.new(
        "RGB", (max(said + room + margin, 800), top + (b + 1) * (cell + gap) + gap + 74), PAPER
    )
    pen = ImageDraw.Draw(page)
    write(pen, margin, 28, card.title, 30)
    write(pen, margin, 68, card.judge, 15, GREY, width=page.width - 2 * margin)
    tiles(pen, card.figures, margin, 112, page.width - 2 * margin)
    for x, name, picture in columns:
        if cell >= SMALLEST:
            write(pen, x + cell / 2, top - 5, name, min(14, max(9, cell // 6)), GREY, "md")
        paste(page, picture, x, top, cell, cell)
    values = torch.cat(
        [part for part in (card.pairs if b > 1 else None, card.known) if part is not None]
        or [card.pairs[:, :0]],
        1,
    )
    low, high = card.scale
    for y, (picture, line, row) in enumerate(zip(card.pictures, card.lines, values.tolist())):
        above = top + (y + 1) * (cell + gap) + gap
        paste(page, picture, margin, above, cell, cell)
        for number, ((x, _, _), value) in enumerate(zip(columns, row)):
            box = (x, above, x + cell - 1, above + cell - 1)
            if number == y and b > 1:  # itself
                pen.rectangle(box, PAPER, FAINT)
                continue
            ground, ink = shade((value - low) / (high - low))
            pen.rectangle(box, ground)
            if cell >= SMALLEST:
                write(
                    pen,
                    x + cell / 2,
                    above + cell / 2,
                    f"{round(value, 2) + 0.0:.2f}",
                    digits,
                    ink,
                    "mm",
                )  # + 0: no -0.00
        if cell < SMALLEST:
            continue
        most = max(1, int(cell / (1.3 * size)) - bool(line.found))
        prompt = wrapped(line.prompt, typeface(size, line.prompt), room, most)
        middle = above + cell / 2 - 0.65 * size * (len(prompt) + bool(line.found))
        write(pen, said, middle, line.prompt, size, INK, width=room, lines=most)
        write(
            pen,
            said,
            middle + 1.3 * size * len(prompt),
            line.found,
            size,
            WRONG if line.wrong else GREY,
            width=room,
        )
    legend(pen, card.scale, left, page.height - 46)
    return page


def tiles(
    pen: ImageDraw.ImageDraw,
    figures: Sequence[tuple[str, float | None, str]],
    left: int,
    top: int,
    width: int,
) -> None:
    """The numbers that matter, large, each with its name and what it is of."""
    each = min(300, width // len(figures))
    for number, (name, value, told) in enumerate(figures):
        x = left + number * each
        write(pen, x, top, name, 15, GREY)
        if value is None:
            write(pen, x, top + 22, told, 15, GREY, width=each - 20, lines=2)
        else:
            write(pen, x, top + 16, f"{round(value, 3) + 0.0:.3f}", 44)
            write(pen, x, top + 68, told, 13, GREY, width=each - 20, lines=1)


def legend(
    pen: ImageDraw.ImageDraw, scale: tuple[float, float], left: int, top: int, width: int = 160
) -> None:
    """What the cells' colours mean."""
    for x in range(width):
        pen.line(((left + x, top), (left + x, top + 9)), shade(x / (width - 1))[0])
    write(pen, left - 6, top + 5, f"{scale[0]:g}", 13, GREY, "rm")
    write(pen, left + width + 8, top + 5, f"{scale[1]:g}: the same subject", 13, GREY, "lm")
