"""The paper of a plot, laid out in pixels: title, key, axes with their titles, and the labels around them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, IdentityTransform

from .labels import spread
from .look import (
    DPI,
    GAP,
    GREY,
    HALO,
    INK,
    MARGIN,
    PAPER,
    SMALL,
    STEPS,
    TITLE,
    WIDTH,
    WORDS,
    Style,
    cut,
    said,
)
from .points import Axis


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


@dataclass(frozen=True)
class Scales:
    """Both ends of the axes, and the ticks along the lower one; None leaves them to matplotlib."""

    across: tuple[float, float]
    upward: tuple[float, float]
    ticks: Sequence[float] | None = None
    logarithmic: bool = False

    def on(self, axes: Axes) -> None:
        if self.logarithmic:
            axes.set_xscale("log", base=2)
        axes.set_xlim(*self.across)
        axes.set_ylim(*self.upward)
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=STEPS))
        if self.ticks is None:
            axes.xaxis.set_major_locator(MaxNLocator(9, steps=STEPS))
        else:
            axes.xaxis.set_major_locator(FixedLocator(self.ticks))
            axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in self.ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="both" if self.ticks is None else "y")


def page(
    title: str,
    key: Mapping[str, Style],
    x: Axis,
    y: Axis,
    scales: Scales,
    height: int,
    ends: Sequence[tuple[str, float, float, Style]] = (),
) -> Page:
    """Title, key, axes with their titles, floor and ceiling, and labels at the ends of lines (label, x, y, style)."""
    figure = Figure((WIDTH / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
    made = Page(figure, FigureCanvasAgg(figure), figure.add_axes((0.1, 0.1, 0.8, 0.8)))
    made.axes.patch.set_visible(False)  # lines to labels lie under the axes
    top = heading(made, title, key, height)
    scales.on(made.axes)
    crossing = x.marks(scales.logarithmic)
    beside = [made.write(said(cut(name)), SMALL, style.ink) for name, _, _, style in ends]
    beside += [made.write(name, SMALL, GREY) for name, _ in y.marks()]
    above = [made.write(name, SMALL, GREY) for name, _ in crossing]
    right = WIDTH - MARGIN - max((made.box(text).width + 2 * GAP for text in beside), default=0.0)
    top -= max((made.box(text).height + GAP for text in above), default=0.0)
    fit(made, x.title, y.title, right, top, height)
    if scales.ticks is not None:
        thin(made, scales.ticks)
    made.free = right + GAP if beside else WIDTH - MARGIN / 2
    for name, value in y.marks():
        made.axes.axhline(value, color=GREY, linewidth=0.7, dashes=(5, 3), zorder=1.5, gid=name)
    for name, value in crossing:
        made.axes.axvline(value, color=GREY, linewidth=0.7, dashes=(5, 3), zorder=1.5, gid=name)
    places = [(p, q, style.colour) for _, p, q, style in ends]
    places += [(math.nan, value, GREY) for _, value in y.marks()]
    beside_of(made, beside, places)
    above_of(made, above, [value for _, value in crossing], top)
    return made


def heading(made: Page, title: str, key: Mapping[str, Style], height: int) -> float:
    """Title and key -> where they end."""
    top = height - MARGIN
    if title:
        text = made.paragraph(title, WIDTH - 2 * MARGIN, TITLE, bold=True)
        top = made.put(text, MARGIN, top - made.box(text).height).y0 - 1.4 * GAP
    return legend(made, key, top)


def fit(made: Page, across: str, upward: str, right: float, top: float, height: int) -> None:
    """Put the axes below `top` and left of `right`, as large as the words along them let them be."""
    below = made.paragraph(across, right - 4 * MARGIN)
    beside = made.paragraph(upward, top - 4 * MARGIN, turned=True)
    least_left = MARGIN + made.box(beside).width + GAP
    least_bottom = MARGIN + made.box(below).height + GAP
    left, bottom = least_left, least_bottom
    axes, renderer = made.axes, made.canvas.get_renderer
    for _ in range(2):  # the ticks' words depend on the axes' size, and that on them
        frame(axes, left, bottom, right, top, height)
        words = [axis.get_tightbbox(renderer()) for axis in (axes.xaxis, axes.yaxis)]
        boxes = [box for box in words if box]
        left += max(0.0, least_left - min((box.x0 for box in boxes), default=math.inf))
        bottom += max(0.0, least_bottom - min((box.y0 for box in boxes), default=math.inf))
    frame(axes, left, bottom, right, top, height)
    width = made.box(below).width
    made.put(below, min((left + right - width) / 2, WIDTH - MARGIN - width), MARGIN)
    made.put(beside, MARGIN, (bottom + top - made.box(beside).height) / 2)


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


def above_of(made: Page, texts: Sequence[Text], values: Sequence[float], top: float) -> None:
    """Labels above the axes, which end at `top`, as near to their values as they go without touching."""
    low = made.axes.get_ylim()[0]
    places = [made.axes.transData.transform((value, low))[0] for value in values]
    widths = [made.box(text).width + GAP for text in texts]
    wanted = [place - width / 2 for place, width in zip(places, widths)]
    starts = spread(wanted, widths, MARGIN, WIDTH - MARGIN)
    for text, start, place in zip(texts, starts, places):
        box = made.put(text, start + GAP / 2, top + GAP)
        made.line([place, min(max(place, box.x0), box.x1)], [top, top + GAP - 3], GREY)
