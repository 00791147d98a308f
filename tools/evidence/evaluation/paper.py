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
        lines = ""
        for word in text.split():
            probe = self.write(
                said(f"{lines.rsplit(chr(10), 1)[-1]} {word}".strip()), size, bold=bold
            )
            lines += ("\n" if self.box(probe).width > room else " ") * bool(lines) + word
            probe.remove()
        return self.write(said(lines), size, turned=turned, bold=bold)

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
    sheet = Page(figure, FigureCanvasAgg(figure), figure.add_axes((0.1, 0.1, 0.8, 0.8)))
    sheet.axes.patch.set_visible(False)  # lines to labels lie under the axes
    top = heading(sheet, title, key, height)
    scales.on(sheet.axes)
    crossing = x.marks(scales.logarithmic)
    beside = [sheet.write(said(cut(name)), SMALL, style.ink) for name, _, _, style in ends]
    beside += [sheet.write(name, SMALL, GREY) for name, _ in y.marks()]
    above = [sheet.write(name, SMALL, GREY) for name, _ in crossing]
    right = WIDTH - MARGIN - max((sheet.box(text).width + 2 * GAP for text in beside), default=0.0)
    top -= max((sheet.box(text).height + GAP for text in above), default=0.0)
    fit(sheet, x.title, y.title, right, top, height)
    if scales.ticks is not None:
        thin(sheet, scales.ticks)
    sheet.free = right + GAP if beside else WIDTH - MARGIN / 2
    for name, value in y.marks():
        sheet.axes.axhline(value, color=GREY, linewidth=0.7, dashes=(5, 3), zorder=1.5, gid=name)
    for name, value in crossing:
        sheet.axes.axvline(value, color=GREY, linewidth=0.7, dashes=(5, 3), zorder=1.5, gid=name)
    places = [(p, q, style.colour) for _, p, q, style in ends]
    places += [(math.nan, value, GREY) for _, value in y.marks()]
    beside_of(sheet, beside, places)
    above_of(sheet, above, [value for _, value in crossing], top)
    return sheet


def heading(page: Page, title: str, key: Mapping[str, Style], height: int) -> float:
    """Title and key -> where they end."""
    top = height - MARGIN
    if title:
        text = page.paragraph(title, WIDTH - 2 * MARGIN, TITLE, bold=True)
        top = page.put(text, MARGIN, top - page.box(text).height).y0 - 1.4 * GAP
    return legend(page, key, top)


def fit(page: Page, across: str, upward: str, right: float, top: float, height: int) -> None:
    """Put the axes below `top` and left of `right`, as large as the words along them let them be."""
    below = page.paragraph(across, right - 4 * MARGIN)
    beside = page.paragraph(upward, top - 4 * MARGIN, turned=True)
    least_left = MARGIN + page.box(beside).width + GAP
    least_bottom = MARGIN + page.box(below).height + GAP
    left, bottom = least_left, least_bottom
    axes, renderer = page.axes, page.canvas.get_renderer
    for _ in range(2):  # the ticks' words depend on the axes' size, and that on them
        frame(axes, left, bottom, right, top, height)
        words = [axis.get_tightbbox(renderer()) for axis in (axes.xaxis, axes.yaxis)]
        boxes = [box for box in words if box]
        left += max(0.0, least_left - min((box.x0 for box in boxes), default=math.inf))
        bottom += max(0.0, least_bottom - min((box.y0 for box in boxes), default=math.inf))
    frame(axes, left, bottom, right, top, height)
    width = page.box(below).width
    page.put(below, min((left + right - width) / 2, WIDTH - MARGIN - width), MARGIN)
    page.put(beside, MARGIN, (bottom + top - page.box(beside).height) / 2)


def frame(axes: Axes, left: float, bottom: float, right: float, top: float, height: int) -> None:
    axes.set_position(
        (left / WIDTH, bottom / height, (right - left) / WIDTH, (top - bottom) / height)
    )


def legend(page: Page, key: Mapping[str, Style], top: float) -> float:
    """What each colour is, in rows under the title -> where they end."""
    left, low = MARGIN, top
    for name, style in key.items():
        text = page.write(said(cut(name)), WORDS, style.ink)
        box = page.box(text)
        if left > MARGIN and left + 54 + box.width > WIDTH - MARGIN:
            left, top = MARGIN, low - GAP / 2
        box = page.put(text, left + 54, top - box.height)
        page.line(
            [left + 22, left, left + 44], [(box.y0 + box.y1) / 2] * 3, style.colour, style.marker
        )
        left, low = box.x1 + 3 * GAP, min(low, box.y0)
    return low - 1.5 * GAP if key else top


def thin(page: Page, ticks: Sequence[float]) -> None:
    """Ticks stay where something was measured; of their words only those that do not touch the one before."""
    end, words = -math.inf, []
    for tick in ticks:
        text = page.write(f"{tick:g}", WORDS)
        width, middle = (
            page.box(text).width,
            page.axes.transData.transform((tick, page.axes.get_ylim()[0]))[0],
        )
        fits = middle - width / 2 > end + 8
        words.append(text.get_text() if fits else "")
        end = middle + width / 2 if fits else end
        text.remove()
    page.axes.xaxis.set_major_formatter(FixedFormatter(words))


def beside_of(
    page: Page, texts: Sequence[Text], places: Sequence[tuple[float, float, str]]
) -> None:
    """Labels right of the axes, as near to their lines' ends (x or nan for the frame, y, colour) as they go without touching."""
    frame_box = page.axes.get_window_extent()
    ends = [
        page.axes.transData.transform((page.axes.get_xlim()[1] if math.isnan(p) else p, q))
        for p, q, _ in places
    ]
    heights = [page.box(text).height + 5 for text in texts]
    starts = spread(
        [y - height / 2 for (_, y), height in zip(ends, heights)],
        heights,
        frame_box.y0 - 3 * GAP,
        frame_box.y1 + GAP,
    )
    for text, start, height, (x, y), (p, _, colour) in zip(texts, starts, heights, ends, places):
        page.put(text, frame_box.x1 + 1.6 * GAP, start + 2.5)
        xs, ys = [x, frame_box.x1, frame_box.x1 + 1.3 * GAP], [y, y, start + height / 2]
        page.line(xs[math.isnan(p) :], ys[math.isnan(p) :], colour)


def above_of(page: Page, texts: Sequence[Text], values: Sequence[float], top: float) -> None:
    """Labels above the axes, which end at `top`, as near to their values as they go without touching."""
    low = page.axes.get_ylim()[0]
    places = [page.axes.transData.transform((value, low))[0] for value in values]
    widths = [page.box(text).width + GAP for text in texts]
    wanted = [place - width / 2 for place, width in zip(places, widths)]
    starts = spread(wanted, widths, MARGIN, WIDTH - MARGIN)
    for text, start, place in zip(texts, starts, places):
        box = page.put(text, start + GAP / 2, top + GAP)
        page.line([place, min(max(place, box.x0), box.x1)], [top, top + GAP - 3], GREY)
