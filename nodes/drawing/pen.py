"""A page's pictures and words, drawn with Pillow in a typeface that is everywhere."""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# in the order tried, for what Pillow's own typeface cannot write: by file name, where the system
# keeps its fonts
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


# words --------------------------------------------------------------------------------------------


def typeface(size: int = 14, text: str = "") -> Any:
    """Pillow's own typeface, or for a text that it cannot write the one of the system's that writes
    most of it.
    """
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
    """How many of the text's different characters the typeface has; a missing one is drawn as every
    missing one.
    """
    if not isinstance(font, ImageFont.FreeTypeFont):
        return sum(c.isascii() for c in set(text))
    return sum(has(font, c) for c in set(text))


@cache
def has(font: Any, character: str) -> bool:
    missing, mask = (font.getmask(c) for c in ("\U0010fffe", character))
    return character.isspace() or mask.size != missing.size or bytes(mask) != bytes(missing)


def wrapped(text: str, font: Any, width: float, lines: int) -> list[str]:
    """A text in at most so many lines of at most this width; what does not fit ends in an ellipsis.
    Words are broken if they must.
    """
    pieces: list[str] = []
    for word in " ".join(text.split())[
        : lines * int(width) + 1
    ].split():  # what can be seen is a pixel wide at least
        while word and len(pieces) <= lines:
            joined = f"{pieces[-1]} {word}" if pieces else word
            if pieces and font.getlength(joined) <= width:
                pieces[-1], word = joined, ""
            else:
                cut = max(
                    bisect_right(
                        range(1, len(word) + 1), width, key=lambda n: font.getlength(word[:n])
                    ),
                    1,
                )
                pieces, word = [*pieces, word[:cut]], word[cut:]
    if len(pieces) > lines:
        last = pieces[lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        pieces = [*pieces[: lines - 1], last.rstrip() + "..."]
    return pieces


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
    """A text at a place; anchor as Pillow's, of the whole block. width: wrap it into at most
    `lines` lines.
    """
    font = typeface(size, text)
    pieces = wrapped(text, font, width, lines) if width else [text]
    down = {"a": 0.0, "m": (1 - len(pieces)) / 2, "d": 1.0 - len(pieces)}[anchor[1]]
    for number, line in enumerate(pieces):
        pen.text((x, y + round((down + number) * 1.3 * size)), line, colour, font, anchor)
