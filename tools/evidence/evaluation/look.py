"""What all plots look like: colours, marks, sizes, and matplotlib's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib import rcParamsDefault
from matplotlib.patheffects import withStroke

PAPER, INK, GREY, FAINT = "#ffffff", "#1c2530", "#66717e", "#dfe3e8"  # as nodes/drawing.py
# no two nearer than 0.09 in OKLab to any colour-blind eye (searched for; test_plots holds them to it)
COLOURS = (INK, "#1b4fc4", "#d63a0c", "#068a6b", "#b070cc", "#f0a012", "#7db8f0")
MARKERS = (
    "o",
    "s",
    "^",
    "D",
    "v",
    "P",
    "X",
    "*",
)  # eight: with seven colours no pair returns before 56 series
DPI, WIDTH, HEIGHT = 200, 1600, 1100  # twice 800 x 550
HEIGHTS = (HEIGHT, 1400, 1800, 2400)  # the first in which every label finds a place
MARGIN, GAP = 36.0, 14.0  # pixels
TITLE, WORDS, SMALL = 12.5, 9.5, 8.5  # points
STEPS = (1, 2, 2.5, 5, 10)
LONGEST = 44  # characters of a label
HALO = withStroke(linewidth=2.4, foreground=PAPER)  # words stay readable over lines
# matplotlib's own settings whatever the person's matplotlibrc says, and the house's
OWN = (
    "axes",
    "agg",
    "errorbar",
    "figure",
    "font",
    "grid",
    "lines",
    "markers",
    "mathtext",
    "patch",
    "path",
    "text",
    "xtick",
    "ytick",
)
LOOK = {key: rcParamsDefault[key] for key in rcParamsDefault if key.split(".")[0] in OWN} | {
    "font.family": ["DejaVu Sans"],
    "mathtext.fontset": "dejavusans",
    "font.size": WORDS,
    "axes.edgecolor": GREY,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str

    @property
    def ink(self) -> str:
        """The colour for words: a little darker."""
        mixed = (
            round(0.68 * int(self.colour[n : n + 2], 16) + 0.32 * int(INK[n : n + 2], 16))
            for n in (1, 3, 5)
        )
        return "#" + "".join(f"{part:02x}" for part in mixed)


def said(text: str) -> str:
    """A text as it is set: W_S with its subscript, everything else as it stands."""
    plain = text.replace("$", r"\$")
    return re.sub(r"(?<![\w\\])([A-Za-z])_([A-Za-z0-9])(?!\w)", r"$\1_{\2}$", plain)


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1].rstrip() + "\u2026"


def styles(series: Mapping[str, object]) -> dict[str, Style]:
    return {
        name: Style(COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)])
        for n, name in enumerate(series)
    }
