"""Comparison Grid: batches of pictures as one labelled sheet that people can post (paper A's
ablation figure).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from . import host
from .drawing.grid import comparison
from .drawing.pen import as_image, as_pictures

GRID = "Comparison Grid"
ROWS, COLUMNS = "rows", "columns"
MOST_BATCHES = 20
MOST_PIXELS = 64_000_000  # of a sheet; as an IMAGE it takes 12 bytes each


class ComparisonGrid(io.ComfyNode):
    """Paper A's ablation figure: the reference, and a row of pictures per variant."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        batches = io.Autogrow.TemplatePrefix(
            io.Image.Input(
                "image",
                tooltip="A batch of pictures made in one way; the next one gets the next row.",
            ),
            prefix="image",
            min=1,
            max=MOST_BATCHES,
        )
        return io.Schema(
            node_id="KindredComparisonGrid",
            display_name=GRID,
            category="Kindred",
            is_output_node=True,
            description="Batches of pictures as one labelled sheet: a row for each batch, such as "
            "plain, self-attention only, concept only "
            "and both, with the reference beside them.",
            search_aliases=[
                "ablation grid",
                "image grid",
                "contact sheet",
                "xy plot",
                "compare",
                "figure",
                "collage",
            ],
            inputs=[
                io.Autogrow.Input(
                    "images",
                    template=batches,
                    tooltip="One batch per row; sizes and counts may differ.",
                ),
                io.String.Input(
                    "labels",
                    default="",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="One line per batch, in their order: how it was made. A blank "
                    "line leaves that row unlabelled.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="One line per picture of a batch: what was asked for, such as the "
                    "lines of Subject Prompts.",
                ),
                io.Int.Input(
                    "cell",
                    default=256,
                    min=32,
                    max=2048,
                    step=8,
                    tooltip="Pixels of a picture's longer side on the sheet.",
                ),
                io.Combo.Input(
                    "batches_as",
                    options=[ROWS, COLUMNS],
                    default=ROWS,
                    advanced=True,
                    tooltip="rows: a batch is a row. columns: a batch is a column.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="Photos of the subject, drawn in the first column.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The sheet, as one picture.")],
        )

    @classmethod
    def execute(
        cls,
        images: io.Autogrow.Type,
        labels: str = "",
        captions: str = "",
        cell: int = 256,
        batches_as: str = ROWS,
        reference: Tensor | None = None,
    ) -> io.NodeOutput:
        batches = wired_batches(images)
        known = None if reference is None else host.pictures_in(reference, GRID, "reference")
        most = max(map(len, batches))
        names = texts(labels, len(batches), "labels", "batches")
        below = texts(captions, most, "captions", "pictures in its longest batch")
        require_room(len(batches), most, cell)
        rows = [as_pictures(batch) for batch in batches]
        if batches_as == COLUMNS:
            rows, names, below = turned(rows, most), below, names
        sheet = as_image(
            comparison(rows, names, below, [] if known is None else as_pictures(known), cell)
        )
        shown = ui.ImageSaveHelper.save_images(
            sheet, "kindred_comparison", io.FolderType.temp, cls, compress_level=1
        )
        return io.NodeOutput(sheet, ui=ui.SavedImages(shown))


def turned(rows: Sequence[Sequence[Any]], most: int) -> list[list[Any]]:
    """Columns as rows; shorter rows leave their places out."""
    return [[row[i] for row in rows if i < len(row)] for i in range(most)]


def wired_batches(images: io.Autogrow.Type) -> list[Tensor]:
    """The wired batches [b Y X 3] in the order of their slots; ValueError where there is none."""
    slots = [
        (int(name.removeprefix("image")), batch)
        for name, batch in images.items()
        if batch is not None
    ]
    if not slots:
        raise ValueError(
            f"{GRID}: no batch is wired. Wire an IMAGE into image0, and one for every further row."
        )
    in_order = sorted(slots, key=itemgetter(0))
    return [host.pictures_in(batch, GRID, f"image{slot}") for slot, batch in in_order]


def require_room(batches: int, most: int, cell: int) -> None:
    """ValueError for a sheet that is too large; most: pictures in the longest batch."""
    if batches * most * cell**2 > MOST_PIXELS:
        fits = int((MOST_PIXELS / (batches * most)) ** 0.5) // 8 * 8
        raise ValueError(
            f"{GRID}: {batches} batches of up to {most} pictures at {cell} pixels make a sheet of "
            f"more than "
            f"{MOST_PIXELS // 10**6} million pixels. Set cell to {fits} or less."
        )


def texts(text: str, count: int, name: str, of: str) -> list[str]:
    """Lines, blank ones kept; ValueError where there are more of them than of what they name."""
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if len(lines) > count:
        raise ValueError(
            f"{GRID}: {name} has {len(lines)} lines, but the sheet has {count} {of}. Take "
            f"{len(lines) - count} of them out."
        )
    return lines
