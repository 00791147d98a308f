"""Pictures of the tables, without a display and the same bytes every time: identity against text, and strength curves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, IdentityTransform
from PIL import Image

from .labels import LEADER, RIM, leaders, placed, spread

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
class Point:
    """One row of a table; the errors are standard errors of the means."""

    label: str
    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0


@dataclass(frozen=True)
class Axis:
    """What is measured along an axis, and between which scores it makes sense."""

    title: str
    floor: float | None = None
    ceiling: float | None = None

    def marks(self, logarithmic: bool = False) -> list[tuple[str, float]]:
        """The floor and the ceiling that are known and can be drawn, with their labels."""
        found = [
            (name, v)
            for name, v in (("floor", self.floor), ("ceiling", self.ceiling))
            if v is not None and math.isfinite(v)
        ]
        return [
            (f"{name} {v:.2f}" if 0.1 <= abs(v) < 10 else f"{name} {v:.3g}", v)
            for name, v in found
            if v > 0 or not logarithmic
        ]


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


@dataclass
class Page:
    """A figure whose words are laid out in pixels from its lower left corner."""

    figure: Figure
    canvas: FigureCanvasAgg
    axes: Axes
    free: float = 0.0  # where the words beside the axes begin, or the paper ends

    def write(
        self,
        text: str,
        size: float = SMALL,
        colour: str = INK,
        turned: bool = False,
        bold: bool = False,
    ) -> Text:
        """A text that is nowhere yet: `put` gives it its place."""
        return self.figure.text(
            0,
            0,
            text,
            fontsize=size,
            color=colour,
            rotation=90 * turned,
            fontweight="bold" if bold else "normal",
            transform=IdentityTransform(),
            zorder=9,
            path_effects=[HALO],
        )

    def box(self, text: Text) -> Bbox:
        return text.get_window_extent(self.canvas.get_renderer())

    def put(self, text: Text, left: float, bottom: float) -> Bbox:
        """Move a text so that its box begins there -> its box."""
        (x, y), box = text.get_position(), self.box(text)
        text.set_position((x + left - box.x0, y + bottom - box.y0))
        return self.box(text)

    def paragraph(
        self, text: str, room: float, size: float = WORDS, turned: bool = False, bold: bool = False
    ) -> Text:
        """A text broken into lines of at most `room` pixels, where it has spaces."""
        made = ""
        for word in text.split():
            probe = self.write(
                said(f"{made.rsplit(chr(10), 1)[-1]} {word}".strip()), size, bold=bold
            )
            made += ("\n" if self.box(probe).width > room else " ") * bool(made) + word
            probe.remove()
        return self.write(said(made), size, turned=turned, bold=bold)

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, marker: str = "") -> None:
        """A thin line to a label, under everything; with a marker at its first place a strong one, for the key."""
        self.figure.add_artist(
            Line2D(
                xs,
                ys,
                color=colour,
                linewidth=1.2 if marker else 0.6,
                alpha=1.0 if marker else 0.6,
                marker=marker,
                markersize=6,
                markevery=[0],
                markeredgecolor=PAPER,
                markeredgewidth=0.6,
                transform=IdentityTransform(),
                zorder=-1,
            )
        )


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


def error(value: float) -> float:
    """A standard error that can be drawn: one seed has none."""
    return abs(value) if math.isfinite(value) else 0.0


def finite(points: Sequence[Point], logarithmic: bool = False) -> list[Point]:
    return [
        p
        for p in points
        if math.isfinite(p.x) and math.isfinite(p.y) and (p.x > 0 or not logarithmic)
    ]


def limits(values: Sequence[float], before: float, after: float) -> tuple[float, float]:
    """An axis' ends: all values with shares of their range around them."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    width = (high - low) or 0.2 * abs(high) or 1.0
    return low - before * width, high + after * width


# the paper -----------------------------------------------------------------------------------------------------------------


def page(
    title: str,
    key: Mapping[str, Style],
    x: Axis,
    y: Axis,
    xs: tuple[float, float],
    ys: tuple[float, float],
    height: int,
    ticks: Sequence[float] | None,
    logarithmic: bool,
    ends: Sequence[tuple[str, float, float, Style]],
) -> Page:
    """Title, key, axes with their titles, floor and ceiling, and labels at the ends of lines (label, x, y, style)."""
    figure = Figure((WIDTH / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
    made = Page(figure, FigureCanvasAgg(figure), figure.add_axes((0.1, 0.1, 0.8, 0.8)))
    axes, top = made.axes, height - MARGIN
    axes.patch.set_visible(False)  # lines to labels lie under the axes
    if title:
        text = made.paragraph(title, WIDTH - 2 * MARGIN, TITLE, bold=True)
        top = made.put(text, MARGIN, top - made.box(text).height).y0 - 1.4 * GAP
    top = legend(made, key, top)
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.set_xlim(*xs)
    axes.set_ylim(*ys)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=STEPS))
    if ticks is None:
        axes.xaxis.set_major_locator(MaxNLocator(9, steps=STEPS))
    else:
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="both" if ticks is None else "y")
    crossing = x.marks(logarithmic)
    beside = [made.write(said(cut(name)), SMALL, style.ink) for name, _, _, style in ends]
    beside += [made.write(name, SMALL, GREY) for name, _ in y.marks()]
    above = [made.write(name, SMALL, GREY) for name, _ in crossing]
    right = WIDTH - MARGIN - max((made.box(text).width + 2 * GAP for text in beside), default=0.0)
    top -= max((made.box(text).height + GAP for text in above), default=0.0)
    across = made.paragraph(x.title, right - 4 * MARGIN)
    upward = made.paragraph(y.title, top - 4 * MARGIN, turned=True)
    bottom = MARGIN + made.box(across).height + GAP
    left = MARGIN + made.box(upward).width + GAP
    for _ in range(2):  # the ticks' words depend on the axes' size, and that on them
        frame(axes, left, bottom, right, top, height)
        words = [
            axis.get_tightbbox(made.canvas.get_renderer()) for axis in (axes.xaxis, axes.yaxis)
        ]
        left += max(
            0.0,
            MARGIN
            + made.box(upward).width
            + GAP
            - min((box.x0 for box in words if box), default=math.inf),
        )
        bottom += max(
            0.0,
            MARGIN
            + made.box(across).height
            + GAP
            - min((box.y0 for box in words if box), default=math.inf),
        )
    frame(axes, left, bottom, right, top, height)
    made.put(
        across,
        min((left + right - made.box(across).width) / 2, WIDTH - MARGIN - made.box(across).width),
        MARGIN,
    )
    made.put(upward, MARGIN, (bottom + top - made.box(upward).height) / 2)
    if ticks is not None:
        thin(made, ticks)
    made.free = right + GAP if beside else WIDTH - MARGIN / 2
    for name, value in y.marks():
        axes.axhline(value, color=GREY, linewidth=0.7, dashes=(5, 3), zorder=1.5, gid=name)
    for name, value in crossing:
        axes.axvline(value, color=GREY, linewidth=0.7, dashes=(5, 3), zorder=1.5, gid=name)
    beside_of(
        made,
        beside,
        [(p, q, style.colour) for _, p, q, style in ends]
        + [(math.nan, value, GREY) for _, value in y.marks()],
    )
    places = [axes.transData.transform((value, ys[0]))[0] for _, value in crossing]
    widths = [made.box(text).width + GAP for text in above]
    starts = spread(
        [place - width / 2 for place, width in zip(places, widths)], widths, MARGIN, WIDTH - MARGIN
    )
    for text, start, place in zip(above, starts, places):
        box = made.put(text, start + GAP / 2, top + GAP)
        made.line([place, min(max(place, box.x0), box.x1)], [top, top + GAP - 3], GREY)
    return made


def frame(axes: Axes, left: float, bottom: float, right: float, top: float, height: int) -> None:
    axes.set_position(
        (left / WIDTH, bottom / height, (right - left) / WIDTH, (top - bottom) / height)
    )


def legend(made: Page, key: Mapping[str, Style], top: float) -> float:
    """What each colour is, in rows under the title -> where they end."""
    left, low = MARGIN, top
    for name, style in key.items():
        text = made.write(said(cut(name)), WORDS, style.ink)
        box = made.box(text)
        if left > MARGIN and left + 54 + box.width > WIDTH - MARGIN:
            left, top = MARGIN, low - GAP / 2
        box = made.put(text, left + 54, top - box.height)
        made.line(
            [left + 22, left, left + 44], [(box.y0 + box.y1) / 2] * 3, style.colour, style.marker
        )
        left, low = box.x1 + 3 * GAP, min(low, box.y0)
    return low - 1.5 * GAP if key else top


def thin(made: Page, ticks: Sequence[float]) -> None:
    """Ticks stay where something was measured; of their words only those that do not touch the one before."""
    end, words = -math.inf, []
    for tick in ticks:
        text = made.write(f"{tick:g}", WORDS)
        width, middle = (
            made.box(text).width,
            made.axes.transData.transform((tick, made.axes.get_ylim()[0]))[0],
        )
        fits = middle - width / 2 > end + 8
        words.append(text.get_text() if fits else "")
        end = middle + width / 2 if fits else end
        text.remove()
    made.axes.xaxis.set_major_formatter(FixedFormatter(words))


def beside_of(
    made: Page, texts: Sequence[Text], places: Sequence[tuple[float, float, str]]
) -> None:
    """Labels right of the axes, as near to their lines' ends (x or nan for the frame, y, colour) as they go without touching."""
    frame_box = made.axes.get_window_extent()
    ends = [
        made.axes.transData.transform((made.axes.get_xlim()[1] if math.isnan(p) else p, q))
        for p, q, _ in places
    ]
    heights = [made.box(text).height + 5 for text in texts]
    starts = spread(
        [y - height / 2 for (_, y), height in zip(ends, heights)],
        heights,
        frame_box.y0 - 3 * GAP,
        frame_box.y1 + GAP,
    )
    for text, start, height, (x, y), (p, _, colour) in zip(texts, starts, heights, ends, places):
        made.put(text, frame_box.x1 + 1.6 * GAP, start + 2.5)
        xs, ys = [x, frame_box.x1, frame_box.x1 + 1.3 * GAP], [y, y, start + height / 2]
        made.line(xs[math.isnan(p) :], ys[math.isnan(p) :], colour)


# labels beside points ------------------------------------------------------------------------------------------------------


def label(
    made: Page, series: Mapping[str, Sequence[Point]], look: Mapping[str, Style], x: Axis, y: Axis
) -> bool:
    """Write every point's label beside it -> whether all found a place."""
    rows = [(point, look[name]) for name, points in series.items() for point in points]
    if not rows:
        return True
    at, box = made.axes.transData.transform, made.axes.get_window_extent()
    ends = [
        ((a.x, a.y), (b.x, b.y)) for points in series.values() for a, b in zip(points, points[1:])
    ]
    for p, _ in rows:
        dx, dy = error(p.x_error), error(p.y_error)
        ends += [((p.x - dx, p.y), (p.x + dx, p.y)), ((p.x, p.y - dy), (p.x, p.y + dy))]
    ends += [((made.axes.get_xlim()[0], v), (made.axes.get_xlim()[1], v)) for _, v in y.marks()]
    ends += [((v, made.axes.get_ylim()[0]), (v, made.axes.get_ylim()[1])) for _, v in x.marks()]
    anchors, lines = at([(p.x, p.y) for p, _ in rows]), at(np.reshape(ends, (-1, 2))).reshape(-1, 4)
    texts = [made.write(said(cut(p.label)), SMALL, style.ink) for p, style in rows]
    sizes = np.array([(made.box(text).width + 4, made.box(text).height + 4) for text in texts])
    room = np.array([box.x0 + 4, box.y0 + 4, made.free, box.y1 - 4])
    done = True
    for text, spot, anchor, (point, style) in zip(
        texts, placed(anchors, sizes, room, lines), anchors, rows
    ):
        if spot is None or not point.label:
            text.remove()
            done = done and not point.label
            continue
        made.put(text, spot[0] + 2, spot[1] + 2)
        ray = leaders(anchor, spot[None])[0]
        if np.hypot(*(ray[2:] - ray[:2])) > RIM + LEADER:
            made.line(ray[::2], ray[1::2], style.colour)
    return done


# the two pictures ----------------------------------------------------------------------------------------------------------


def values_of(points: Iterator[Point], axis: Axis, along: str) -> list[float]:
    """Everything an axis has to show: points with their errors, floor and ceiling."""
    found = [
        value
        for p in points
        for value in (
            getattr(p, along) - error(getattr(p, f"{along}_error")),
            getattr(p, along) + error(getattr(p, f"{along}_error")),
        )
    ]
    return found + [value for _, value in axis.marks()]


@rc_context(LOOK)
def front_figure(title: str, series: Mapping[str, Sequence[Point]], x: Axis, y: Axis) -> Figure:
    """The picture that `front` writes."""
    shown, look = {name: finite(points) for name, points in series.items()}, styles(series)
    key = {
        name: look[name]
        for name, points in shown.items()
        if points and {point.label for point in points} != {name}
    }
    xs = limits(values_of(chain.from_iterable(shown.values()), x, "x"), 0.06, 0.07)
    ys = limits(values_of(chain.from_iterable(shown.values()), y, "y"), 0.06, 0.06)
    for height in HEIGHTS:
        made = page(title, key, x, y, xs, ys, height, None, False, ())
        for name, points in shown.items():
            style = look[name]
            across, up = [point.x for point in points], [point.y for point in points]
            made.axes.errorbar(
                across,
                up,
                [error(p.y_error) for p in points],
                [error(p.x_error) for p in points],
                fmt="none",
                ecolor=style.colour,
                elinewidth=0.8,
                alpha=0.45,
                zorder=2,
            )
            made.axes.plot(across, up, color=style.colour, linewidth=0.9, alpha=0.5, zorder=2.5)
            made.axes.plot(
                across,
                up,
                linestyle="none",
                marker=style.marker,
                color=style.colour,
                markersize=6,
                markeredgecolor=PAPER,
                markeredgewidth=0.6,
                zorder=3,
                clip_on=False,
                gid=name,
            )
        if label(made, shown, look, x, y):
            break
    return made.figure


@rc_context(LOOK)
def curves_figure(
    title: str, series: Mapping[str, Sequence[Point]], x: Axis, y: Axis, logarithmic: bool = False
) -> Figure:
    """The picture that `curves` writes."""
    shown = {
        name: sorted(finite(points, logarithmic), key=lambda p: p.x)
        for name, points in series.items()
    }
    look, every = styles(series), [point for points in shown.values() for point in points]
    ticks = sorted({point.x for point in every})
    around = [value for _, value in x.marks(logarithmic)]
    xs = limits([math.log2(v) if logarithmic else v for v in (*ticks, *around)], 0.03, 0.02)
    ys = limits(values_of(iter(every), y, "y"), 0.06, 0.06)
    ends = [
        (name, points[-1].x, points[-1].y, look[name]) for name, points in shown.items() if points
    ]
    height = max(HEIGHT, 400 + 34 * len(ends))
    made = page(
        title,
        {},
        x,
        y,
        (2.0 ** xs[0], 2.0 ** xs[1]) if logarithmic else xs,
        ys,
        height,
        ticks,
        logarithmic,
        ends,
    )
    for name, points in shown.items():
        style, across = look[name], [point.x for point in points]
        low, high = (
            [point.y + sign * error(point.y_error) for point in points] for sign in (-1, 1)
        )
        made.axes.fill_between(
            across, low, high, color=style.colour, alpha=0.13, linewidth=0, zorder=2
        )
        if len(points) == 1:  # a band of no width shows no error
            made.axes.vlines(
                across, low, high, color=style.colour, linewidth=0.8, alpha=0.45, zorder=2
            )
        made.axes.plot(
            across,
            [point.y for point in points],
            color=style.colour,
            linewidth=1.4,
            marker=style.marker,
            markersize=6,
            markeredgecolor=PAPER,
            markeredgewidth=0.6,
            zorder=3,
            gid=name,
        )
    return made.figure


@rc_context(LOOK)
def save(figure: Figure, path: Path) -> None:
    """The pixels alone as PNG: no date, no program's name. 256 colours serve for a third of the bytes and show no difference."""
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, "PNG", optimize=True, dpi=(DPI, DPI))


def front(path: Path, title: str, series: Mapping[str, Sequence[Point]], x: Axis, y: Axis) -> None:
    """Identity against text: each series in one colour, its points with standard errors and their labels, joined in their order.

    Points that are not finite are left out; a series of one point that bears its own label needs no entry in the key.
    """
    save(front_figure(title, series, x, y), path)


def curves(
    path: Path,
    title: str,
    series: Mapping[str, Sequence[Point]],
    x: Axis,
    y: Axis,
    logarithmic: bool = False,
) -> None:
    """Strength curves: lines with bands of one standard error, named at their ends, ticks at what was measured.

    The points' own labels are not shown. Points that are not finite are left out, on a logarithmic axis also those at or below zero. An
    empty series keeps its colour free, so that the pictures of one folder can agree.
    """
    save(curves_figure(title, series, x, y, logarithmic), path)
