"""The first pictures of a table's rows on one sheet: a column per row, the photo first."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .ground import BOUNDS
from .rows import Row
from .tables import Filled

CELL, GAP, HEAD = 112, 6, 40


def sheets(
    filled: Sequence[Filled], kept: Callable[[str, Row, int], Path]
) -> dict[str, Image.Image]:
    """A sheet for every table of which pictures were kept; `kept` tells where those of a task's row and case lie."""
    files = {}
    for one in filled:
        table = one.table
        rows = ([BOUNDS] if table.task == "personalize" else []) + list(table.rows)
        strips = [
            [
                cut(Image.open(file))
                for row in rows
                if (file := kept(table.task, row, case)).is_file()
            ]
            for case in range(table.first, table.first + table.count)
        ]
        if whole := [case for case in strips if len(case) == len(rows)]:
            files[table.name] = sheet(
                ["photo" if row == BOUNDS else row.name for row in rows], whole
            )
    return files


def sheet(titles: Sequence[str], cases: Sequence[Sequence[Sequence[Image.Image]]]) -> Image.Image:
    """Cases below one another, each as [column][picture]; a photo alone stands in the first line of its case."""
    heights = [max(map(len, case)) for case in cases]
    page = Image.new(
        "RGB",
        (GAP + len(titles) * (CELL + GAP), HEAD + sum(heights) * (CELL + GAP) + len(cases) * GAP),
        "white",
    )
    pen, font, top = ImageDraw.Draw(page), ImageFont.load_default(13), HEAD
    for column, title in enumerate(titles):
        pen.multiline_text(
            (GAP + column * (CELL + GAP), HEAD - 4),
            "\n".join(textwrap.wrap(title, 16)[:2]),
            "black",
            font,
            "ld",
            spacing=2,
        )
    for case, height in zip(cases, heights):
        for column, pictures in enumerate(case):
            for line, picture in enumerate(pictures):
                page.paste(
                    picture.resize((CELL, CELL), Image.Resampling.LANCZOS),
                    (GAP + column * (CELL + GAP), top + line * (CELL + GAP)),
                )
        top += height * (CELL + GAP) + GAP
    return page


def cut(strip: Image.Image) -> list[Image.Image]:
    """Square pictures that stand side by side."""
    side = strip.height
    return [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]
