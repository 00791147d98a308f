"""Pictures of the tables, without a display and the same bytes every time: identity against text, and strength curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from .labels import LEADER, RIM, leaders, placed
from .look import DPI, HEIGHT, HEIGHTS, LOOK, PAPER, SMALL, Style, cut, said, styles
from .paper import Page, Scales, page
from .points import Axis, Point, error, finite, limits, values_of


def label(
    sheet: Page, series: Mapping[str, Sequence[Point]], look: Mapping[str, Style], x: Axis, y: Axis
) -> bool:
    """Write every point's label beside it -> whether all found a place."""
    rows = [(point, look[name]) for name, points in series.items() for point in points]
    if not rows:
        return True
    at, box = sheet.axes.transData.transform, sheet.axes.get_window_extent()
    ends = [
        ((a.x, a.y), (b.x, b.y)) for points in series.values() for a, b in zip(points, points[1:])
    ]
    for p, _ in rows:
        dx, dy = error(p.x_error), error(p.y_error)
        ends += [((p.x - dx, p.y), (p.x + dx, p.y)), ((p.x, p.y - dy), (p.x, p.y + dy))]
    ends += [((sheet.axes.get_xlim()[0], v), (sheet.axes.get_xlim()[1], v)) for _, v in y.marks()]
    ends += [((v, sheet.axes.get_ylim()[0]), (v, sheet.axes.get_ylim()[1])) for _, v in x.marks()]
    anchors, lines = at([(p.x, p.y) for p, _ in rows]), at(np.reshape(ends, (-1, 2))).reshape(-1, 4)
    texts = [sheet.write(said(cut(p.label)), SMALL, style.ink) for p, style in rows]
    sizes = np.array([(sheet.box(text).width + 4, sheet.box(text).height + 4) for text in texts])
    room = np.array([box.x0 + 4, box.y0 + 4, sheet.free, box.y1 - 4])
    done = True
    for text, spot, anchor, (point, style) in zip(
        texts, placed(anchors, sizes, room, lines), anchors, rows
    ):
        if spot is None or not point.label:
            text.remove()
            done = done and not point.label
            continue
        sheet.put(text, spot[0] + 2, spot[1] + 2)
        ray = leaders(anchor, spot[None])[0]
        if np.hypot(*(ray[2:] - ray[:2])) > RIM + LEADER:
            sheet.line(ray[::2], ray[1::2], style.colour)
    return done


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
        sheet = page(title, key, x, y, Scales(xs, ys), height)
        for name, points in shown.items():
            scatter(sheet, name, points, look[name])
        if label(sheet, shown, look, x, y):
            break
    return sheet.figure


def scatter(sheet: Page, name: str, points: Sequence[Point], style: Style) -> None:
    """The points of a series with their errors, joined in their order."""
    across, up = [point.x for point in points], [point.y for point in points]
    sheet.axes.errorbar(
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
    sheet.axes.plot(across, up, color=style.colour, linewidth=0.9, alpha=0.5, zorder=2.5)
    sheet.axes.plot(
        across,
        up,
        linestyle="none",
        color=style.colour,
        zorder=3,
        clip_on=False,
        gid=name,
        **marks(style),
    )


def marks(style: Style) -> dict[str, object]:
    """How matplotlib draws the marks of a series."""
    return {
        "marker": style.marker,
        "markersize": 6,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.6,
    }


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
    across = (2.0 ** xs[0], 2.0 ** xs[1]) if logarithmic else xs
    sheet = page(title, {}, x, y, Scales(across, ys, ticks, logarithmic), height, ends)
    for name, points in shown.items():
        curve(sheet, name, points, look[name])
    return sheet.figure


def curve(sheet: Page, name: str, points: Sequence[Point], style: Style) -> None:
    """A series as a line with a band of one standard error."""
    across = [point.x for point in points]
    low, high = ([point.y + sign * error(point.y_error) for point in points] for sign in (-1, 1))
    sheet.axes.fill_between(
        across, low, high, color=style.colour, alpha=0.13, linewidth=0, zorder=2
    )
    if len(points) == 1:  # a band of no width shows no error
        sheet.axes.vlines(
            across, low, high, color=style.colour, linewidth=0.8, alpha=0.45, zorder=2
        )
    sheet.axes.plot(
        across,
        [point.y for point in points],
        color=style.colour,
        linewidth=1.4,
        zorder=3,
        gid=name,
        **marks(style),
    )


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
