"""Laws of the evaluation's plots: the same bytes, every word readable and on the paper, what was measured where it was measured."""

import itertools
import math
from collections import Counter

import matplotlib
import numpy as np
import pytest
from evaluation import labels, look
from evaluation.plots import curves, curves_figure, front, front_figure
from evaluation.points import Axis, Point
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import _pylab_helpers
from matplotlib.figure import Figure
from PIL import Image

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
TEXT = Axis("share of pictures with scene and class as asked", 0.05, 1.0)
IDENTITY = Axis("identity similarity to the reference", 0.19, 0.89)


def sweep(name: str, identity: tuple, text: tuple) -> list[Point]:
    return [Point(f"{name} {w:g}", x, y, 0.01, 0.015) for w, y, x in zip(STRENGTHS, identity, text)]


SWEEPS = {
    "plain": [Point("plain", 1.0, 0.19, 0, 0.01)],
    "self": sweep("W_S", (0.27, 0.41, 0.63, 0.74, 0.77), (1, 1, 0.99, 0.93, 0.72)),
    "self, no mask": sweep("W_S", (0.25, 0.38, 0.58, 0.66, 0.69), (1, 0.99, 0.9, 0.61, 0.1)),
    "cross": sweep("W_C", (0.24, 0.33, 0.46, 0.55, 0.57), (1, 1, 1, 0.99, 0.96)),
    "full": sweep("W", (0.35, 0.52, 0.79, 0.85, 0.87), (1, 1, 0.985, 0.9, 0.66)),
}
STRENGTH = {
    name: [Point("", w, p.y, 0, p.y_error) for w, p in zip(STRENGTHS, points)]
    for name, points in SWEEPS.items()
    if name != "plain"
}
CROWD = {
    f"series {n}": [
        Point(
            f"setting {n}.{k}",
            0.97 + 0.004 * math.sin(7 * n + k),
            0.7 + 0.02 * math.cos(3 * n + 5 * k),
            0.01,
            0.01,
        )
        for k in range(6)
    ]
    for n in range(5)
}


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def readable(figure: Figure) -> None:
    """No two texts overlap, and everything that is drawn lies on the paper."""
    paper, axes = figure.bbox, figure.axes[0]
    figure.canvas.draw()
    ticks = [
        tick.label1
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if tick.label1.get_text()
        and min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    boxes = [(text.get_text(), text.get_window_extent()) for text in (*figure.texts, *ticks)]
    for name, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= paper.x1 and box.y1 <= paper.y1, (
            name,
            box,
        )
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width <= 0 or height <= 0, (one, two, width, height)


@pytest.fixture(scope="module")
def sweeps() -> Figure:
    """Twenty-one points in five series, fourteen of them where the text is almost always right."""
    return front_figure("Identity against text", SWEEPS, TEXT, IDENTITY)


@pytest.mark.parametrize(
    "draw, series", [(front, SWEEPS), (curves, STRENGTH)], ids=["front", "curves"]
)
def test_the_same_rows_give_the_same_bytes_and_a_small_file(draw, series, tmp_path):
    before = dict(matplotlib.rcParams)
    draw(tmp_path / "a.png", "Identity", series, TEXT, IDENTITY)
    assert dict(matplotlib.rcParams) == before and not _pylab_helpers.Gcf.figs, (
        "nothing of matplotlib is left changed"
    )
    own = {
        "font.size": 20,
        "axes.facecolor": "black",
        "xtick.direction": "in",
        "lines.linewidth": 9,
        "savefig.dpi": 30,
    }
    with matplotlib.rc_context(own):
        draw(tmp_path / "b.png", "Identity", series, TEXT, IDENTITY)
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes() and len(data) < 150_000, (
        "whatever the person's own settings are"
    )
    assert b"tEXt" not in data and b"tIME" not in data and b"atplotlib" not in data
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 1600 and picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("series", [SWEEPS, CROWD], ids=["sweeps", "crowd"])
def test_every_point_has_its_label_and_no_two_words_overlap(series, sweeps):
    figure = (
        sweeps
        if series is SWEEPS
        else front_figure("Identity against text", series, TEXT, IDENTITY)
    )
    readable(figure)
    wanted = Counter(look.said(point.label) for points in series.values() for point in points)
    assert {text: words(figure).count(text) for text in wanted} == wanted


def test_long_titles_and_names_stay_on_the_paper():
    long = "a very long name that nobody would give a thing, and longer still"
    series = {
        f"{long} {n}": [Point(f"{long} {k}", k, n + k, 0.1, 0.1) for k in range(3)]
        for n in range(4)
    }
    axis = Axis(" ".join([long] * 3), 0.0, 5.0)
    for figure in (
        front_figure(" ".join([long] * 3), series, axis, axis),
        curves_figure(" ".join([long] * 3), series, axis, axis),
    ):
        readable(figure)


def test_twelve_lines_that_end_together_are_named_apart():
    series = {
        f"layers {n}": [Point("", w, 0.5 + 0.001 * n * w) for w in STRENGTHS] for n in range(12)
    }
    figure = curves_figure("Identity by strength", series, Axis("strength"), IDENTITY)
    readable(figure)
    heights = [
        next(text for text in figure.texts if text.get_text() == name).get_window_extent().y0
        for name in series
    ]
    assert heights == sorted(heights), "in the order in which the lines end"


def test_what_is_not_finite_is_left_out():
    hole = [
        Point("a", 0.1, 0.2),
        Point("gone", math.nan, 0.3),
        Point("gone", 0.2, math.inf),
        Point("b", 0.5, 0.9, math.nan, math.nan),
    ]
    figure = front_figure("Holes", {"some": hole}, Axis("x", math.nan), Axis("y", None, math.inf))
    assert {"a", "b"} <= set(words(figure)) and "gone" not in words(figure)
    marks = next(line for line in figure.axes[0].lines if line.get_gid() == "some")
    assert np.array_equal(marks.get_xydata(), [[0.1, 0.2], [0.5, 0.9]])
    figure = curves_figure(
        "Holes", {"some": [Point("", 0.0, 1.0), *hole]}, Axis("x"), Axis("y"), logarithmic=True
    )
    line = next(line for line in figure.axes[0].lines if line.get_gid() == "some")
    assert np.array_equal(line.get_xydata(), [[0.1, 0.2], [0.5, 0.9]]), (
        "nor what a logarithm does not know"
    )


@pytest.mark.parametrize("series", [{}, {"none": [], "nan": [Point("p", math.nan, 1.0)]}])
def test_nothing_measured_is_an_empty_picture(series, tmp_path):
    front(tmp_path / "front.png", "Nothing", series, TEXT, IDENTITY)
    marks = {"floor 0.05", "ceiling 1.00", "floor 0.19", "ceiling 0.89"}
    for figure in (
        front_figure("Nothing", series, TEXT, IDENTITY),
        curves_figure("Nothing", series, TEXT, IDENTITY, bool(series)),
    ):
        assert set(words(figure)) == {"Nothing", TEXT.title, IDENTITY.title} | marks
        readable(figure)


@pytest.mark.parametrize(
    "point",
    [Point("plain", 1.0, 0.19), Point("plain", 0.0, 0.0), Point("plain", -3.0, 1e-9, 0.1, 0.1)],
)
def test_one_point_is_a_picture(point):
    for draw in (front_figure, curves_figure):
        figure = draw("One", {"plain": [point]}, Axis("x"), Axis("y"))
        readable(figure)
        assert words(figure).count("plain") == 1, "named once: no key for what bears its own name"
        bars = [
            path.get_extents() for bar in figure.axes[0].collections for path in bar.get_paths()
        ]
        assert any(
            np.allclose((bar.y0, bar.y1), (point.y - point.y_error, point.y + point.y_error))
            for bar in bars
        ), "with its error"


def test_floor_and_ceiling_are_lines_where_they_are(sweeps):
    lines = {line.get_gid(): line for line in sweeps.axes[0].lines}
    for name, value, along in (
        ("floor 0.05", 0.05, 0),
        ("ceiling 1.00", 1.0, 0),
        ("floor 0.19", 0.19, 1),
        ("ceiling 0.89", 0.89, 1),
    ):
        assert (lines[name].get_xydata()[:, along] == value).all() and name in words(sweeps)
    low, high = sweeps.axes[0].get_ylim()
    assert low < 0.19 and high > 0.89
    assert not [
        name
        for name in words(curves_figure("Bare", STRENGTH, Axis("x"), Axis("y")))
        if "floor" in name or "ceiling" in name
    ]


@pytest.mark.parametrize("logarithmic", [False, True])
def test_ticks_are_where_something_was_measured(logarithmic):
    figure = curves_figure(
        "Identity by strength", STRENGTH, Axis("strength"), IDENTITY, logarithmic
    )
    axis = figure.axes[0].xaxis
    assert tuple(axis.get_majorticklocs()) == STRENGTHS and not len(axis.get_minorticklocs())
    named = [tick.label1.get_text() for tick in axis.get_major_ticks()]
    assert named == ["0.25", "0.5", "1", "2", "4"]
    readable(figure)


def test_a_series_keeps_its_colour_and_marker_beside_an_empty_one():
    one, two = look.styles(SWEEPS), look.styles({"plain": [], **STRENGTH})
    assert one == two
    many = look.styles({str(n): [] for n in range(56)}).values()
    assert len({(style.colour, style.marker) for style in many}) == 56


def test_w_s_is_set_with_its_subscript_and_money_is_no_formula():
    assert look.said("W_S 2") == "$W_{S}$ 2" and look.said("W_S, W_C") == "$W_{S}$, $W_{C}$"
    assert look.said("mid_block and a_bc") == "mid_block and a_bc"
    figure = front_figure("5$ and 6$", {"a": [Point("1$ to 2$", 0, 0)]}, Axis("x"), Axis("y"))
    figure.canvas.draw()
    assert r"1\$ to 2\$" in words(figure)


# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as each kind of eye sees it
EYES = {
    "all": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Ottosson 2020, OKLab
CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@pytest.mark.parametrize("eye", EYES)
def test_every_eye_tells_the_colours_apart(eye):
    sent = np.array(
        [[int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)] for colour in look.COLOURS]
    )
    linear = np.where(sent <= 0.04045, sent / 12.92, ((sent + 0.055) / 1.055) ** 2.4)
    seen = np.cbrt(np.clip(linear @ np.transpose(EYES[eye]), 0, 1) @ CONES.T) @ OKLAB.T
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) >= 0.09


# where labels go -----------------------------------------------------------------------------------------------------------

sizes = st.lists(st.tuples(st.floats(0, 400), st.floats(1, 30)), min_size=1, max_size=12)


@given(sizes)
def test_a_row_of_boxes_never_overlaps_and_stays_within(rows):
    wanted, lengths = zip(*rows)
    starts = labels.spread(wanted, lengths, 0, 400)
    order = sorted(zip(starts, lengths))
    assert order[0][0] >= -1e-6 and order[-1][0] + order[-1][1] <= 400 + 1e-6
    assert all(a + length <= b + 1e-6 for (a, length), (b, _) in zip(order, order[1:]))


@given(sizes)
def test_a_row_of_boxes_that_fit_is_left_alone(rows):
    lengths = [length for _, length in rows]
    wanted = [40.0 * n for n in range(len(rows))]
    assert np.allclose(labels.spread(wanted, lengths, 0, 1000), wanted)


def test_boxes_that_want_one_place_lie_around_it():
    assert labels.spread([95.0, 95.0], [10.0, 10.0], 0, 400) == [90.0, 100.0]
    assert labels.spread([0.0, 0.0], [10.0, 10.0], 0, 400) == [0.0, 10.0], "the edge holds"


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 700)), min_size=1, max_size=12),
    st.integers(10, 160),
)
def test_placed_labels_touch_no_label_and_no_point(points, width):
    anchors, room = np.array(points), np.array([0.0, 0.0, 1000.0, 700.0])
    found = labels.placed(
        anchors, np.tile([float(width), 26.0], (len(points), 1)), room, np.zeros((0, 4))
    )
    assert all(box is not None for box in found), "there is room for twelve"
    for box in found:
        assert (box[:2] >= room[:2]).all() and (box[2:] <= room[2:]).all()
        assert np.allclose(box[2:] - box[:2], (width, 26))
        assert not ((anchors > box[:2]) & (anchors < box[2:])).all(1).any()
    for a, b in itertools.combinations(found, 2):
        assert not labels.shared(a[None], b[None]).any()


def test_a_lonely_label_lies_beside_its_point_and_none_where_none_fits():
    anchor, room, no_lines = (
        np.array([[500.0, 350.0]]),
        np.array([0.0, 0.0, 1000.0, 700.0]),
        np.zeros((0, 4)),
    )
    (box,) = labels.placed(anchor, np.array([[80.0, 26.0]]), room, no_lines)
    assert np.allclose(box, [500 + labels.RIM, 337, 580 + labels.RIM, 363])
    assert labels.placed(anchor, np.array([[2000.0, 26.0]]), room, no_lines) == [None]


def test_a_label_covers_no_neighbour():
    anchors, room = (
        np.array([[500.0, 350.0], [560.0, 350.0], [440.0, 352.0]]),
        np.array([0.0, 0.0, 1000.0, 700.0]),
    )
    found = np.stack(labels.placed(anchors, np.array([[80.0, 26.0]] * 3), room, np.zeros((0, 4))))
    assert not labels.shared(found, np.concatenate([anchors - 9, anchors + 9], 1)).any(), (
        "18 pixels of marker stay free"
    )


def test_a_label_keeps_clear_of_lines():
    anchor, room = np.array([[500.0, 350.0]]), np.array([0.0, 0.0, 1000.0, 700.0])
    (box,) = labels.placed(
        anchor,
        np.array([[80.0, 26.0]]),
        room,
        np.array([[500.0, 350.0, 1000.0, 350.0], [0.0, 350.0, 500.0, 350.0]]),
    )
    assert box[1] >= 350 or box[3] <= 350


def test_the_length_of_a_line_within_a_box():
    boxes = np.array([[0.0, 0.0, 10.0, 10.0]])
    lines = np.array(
        [
            [-5, 5, 15, 5],
            [5, 5, 5, 50],
            [-5, -5, 15, 15],
            [-5, 20, 15, 20],
            [3, 3, 3, 3],
            [20, 5, 30, 5],
            [2, 2, 8, 2.0],
        ]
    )
    assert np.allclose(labels.covered(boxes, lines), [[10, 5, 10 * math.sqrt(2), 0, 0, 0, 6]])
