"""Laws of the evaluation's tables, plots and sheets, worked by hand."""

from __future__ import annotations

import csv
import math
from io import StringIO

import pytest
from evaluate import bounded, fill, measured
from evaluation.catalogue import TABLES
from evaluation.ground import Job, Setting
from evaluation.journal import Journal
from evaluation.report import family, plots
from evaluation.rows import Row
from evaluation.tables import MINIATURE, Filled, Table
from small_measurements import values


def by_hand() -> Filled:
    table = Table("t", "By hand", "personalize", (Row("plain", (("self", "off"),)), Row("made")), 2)
    found = {
        "plain": {0: [values([0.1, 0.2])], 1: [values([0.3, 0.2])]},
        "made": {
            0: [values([0.5, 0.7], scene=(1.0, 0.0), kind=(0.0, 1.0)) | {"mask_iou": 0.5}],
            1: [values([0.8, 0.8], seconds=4.0) | {"mask_iou": 0.7}],
        },
    }
    return Filled(table, MINIATURE["personalize"], found, 0.1, 1.0)


def test_a_table_by_hand():
    filled = by_hand()
    lines = filled.markdown().splitlines()
    assert lines[0] == "**By hand**: 2 identities, 1 seed; floor 0.100, ceiling 1.000"
    assert (
        lines[2] == "| | identity | s.e. | of the way | scene right | class right | whole subject |"
    )
    assert lines[4:] == [
        "| plain | 0.200 | 0.050 | 0.00 | 1.00 | 1.00 | 0.50 |",
        "| made | 0.700 | 0.100 | 0.62 | 0.75 | 0.75 | 0.50 |",
    ]
    assert (
        filled.scores["made"]["text"].mean == 0.5
    )  # no picture of the first identity has both right
    figures = filled.figures()
    assert figures["identity.plain"] == pytest.approx(0.2) and figures[
        "identity.made"
    ] == pytest.approx(0.7)
    assert (
        figures["identity.floor"] == 0.1
        and figures["identity.ceiling"] == 1.0
        and figures["count.identities"] == 2
    )
    assert figures["whole_subject.made"] == 0.5
    assert figures["scene_accuracy.made"] == 0.75 and figures["seconds.made"] == 3.0
    assert figures["error.identity.made"] == pytest.approx(0.1) and figures[
        "mask.iou"
    ] == pytest.approx(0.6)
    assert filled.way("made") == pytest.approx(0.5 / 0.8)


def test_csv_holds_every_number():
    plain, made = csv.DictReader(StringIO(by_hand().csv()))
    assert (
        plain["inputs"] == "self=off"
        and float(made["identity"]) == pytest.approx(0.7)
        and float(made["text"]) == 0.5
    )
    assert float(made["of_the_way"]) == pytest.approx(0.625) and made["identity_count"] == "2"


def test_identity_part_by_part_beside_the_known_answer():
    """Means over identities, the journal's own numbers; a ground without parts says nothing."""
    table = Table("t", "By hand", "personalize", (Row("plain", (("self", "off"),)), Row("made")), 2)
    hats = {"plain": ([0.0, 0.2], [0.3, 0.3]), "made": ([0.5, 0.7], [0.2, 0.4])}
    found = {
        name: {i: [values([0.5, 0.5]) | {"hat": hat, "body": [0.25]}] for i, hat in enumerate(of)}
        for name, of in hats.items()
    }
    known = [
        {"floor": 0.1, "ceiling": 0.9, "hat": [0.8], "body": [1.0]},
        {"floor": 0.3, "ceiling": 0.7, "hat": [1.0], "body": [0.5]},
    ]
    filled = bounded(table, measured(MINIATURE["personalize"], found), found, known)
    assert (filled.floor, filled.ceiling) == (pytest.approx(0.2), pytest.approx(0.8))
    assert filled.by_part().splitlines()[2:] == [
        "| | body colour | hat |",
        "|---|---:|---:|",
        "| plain | 0.25 | 0.20 |",
        "| made | 0.25 | 0.45 |",
        "| ceiling | 0.75 | 0.90 |",
    ]
    assert float(list(csv.DictReader(StringIO(filled.csv())))[1]["hat"]) == pytest.approx(0.45)
    assert not Filled(table, MINIATURE["story"], {}).by_part()


def test_the_parts_of_the_presets_have_their_errors():
    """Of (0.1, 0.3) and (0.6, 0.3): half their difference; the known answer has none."""
    table = Table("t", "By hand", "personalize", (Row("plain", (("self", "off"),)), Row("made")), 2)
    hats = {"plain": ([0.0, 0.2], [0.3, 0.3]), "made": ([0.5, 0.7], [0.2, 0.4])}
    found = {
        name: {i: [values([0.5, 0.5]) | {"hat": hat}] for i, hat in enumerate(of)}
        for name, of in hats.items()
    }
    known = [{"floor": 0.1, "ceiling": 0.9, "hat": [0.8]}]
    for name in ("presets", "settings_presets"):
        filled = bounded(table, measured(MINIATURE[name], found), found, known)
        assert filled.by_part().splitlines()[4:] == [
            "| plain | 0.20 (0.10) |",
            "| made | 0.45 (0.15) |",
            "| ceiling | 0.80 |",
        ]


def test_presets_are_chosen_on_other_identities_than_they_are_reported_on():
    chosen_on, reported = TABLES["settings_presets"], TABLES["presets"]
    assert reported.first + reported.count <= chosen_on.first and reported.count >= 40


def test_what_was_not_measured_is_absent():
    table = Table("t", "One set", "story", (Row("plain", (("node", "off"),)), Row("story")), 2)
    told = {
        "consistency": 0.4,
        "scene": [1.0] * 4,
        "class": [1.0] * 4,
        "layout_spread": math.nan,
        "seconds": 1.0,
        "unet_calls": 88,
    }
    filled = Filled(table, MINIATURE["story"], {"story": {0: [told]}})
    figures = filled.figures()
    assert (
        "consistency.floor" not in figures
        and "layout_spread.story" not in figures
        and "error.consistency.story" not in figures
    )
    assert (
        figures["unet_calls.story"] == 88
        and "| story | 0.400 |  | 1.00 | 1.00 |  |  | 88 |" in filled.markdown()
    )
    assert (
        "of the way" not in filled.markdown()
        and "**One set**: 1 set, 1 seed\n" in filled.markdown()
    )


def test_layouts_are_told_as_a_multiple_of_the_plain_ones():
    table = Table("t", "Two sets", "story", (Row("plain", (("node", "off"),)), Row("story")), 2)

    def told(spread, consistency):
        return {
            "consistency": consistency,
            "scene": [1.0],
            "class": [1.0],
            "whole": [0.0],
            "layout_spread": spread,
            "seconds": 1.0,
            "unet_calls": 50,
        }

    found = {
        "plain": {0: [told(0.1, 0.2)], 1: [told(0.3, 0.2)]},
        "story": {0: [told(0.1, 0.6)], 1: [told(0.2, 0.6)]},
    }
    assert (
        "| story | 0.600 | 0.000 | 0.67 | 1.00 | 1.00 | 0.00 | 0.75 | 50 |"
        in Filled(table, MINIATURE["story"], found, 0.1, 0.8).markdown()
    )


@pytest.mark.parametrize(
    "name, line, at",
    [
        ("W_S 2", "W_S", 2.0),
        ("W_S 0.25, no mask", "W_S, no mask", 0.25),
        ("dropout 0", "dropout", 0.0),
        ("full", "full", None),
        ("output_blend", "output_blend", None),
        ("two 2 things 3", "two 2 things", 3.0),
    ],
)
def test_rows_that_differ_by_a_number_stand_on_one_line(name, line, at):
    assert family(name) == (line, at)


def test_one_set_is_drawn_without_errors(tmp_path):
    """Of one identity there is no standard error: NaN, and a plot all the same."""
    table = Table(
        "t",
        "One",
        "personalize",
        (Row("plain", (("self", "off"),)), Row("W 1"), Row("W 2")),
        2,
        axis="weight",
    )
    found = {row.name: {0: [values([0.1 * i, 0.3])]} for i, row in enumerate(table.rows)}
    drawn = plots(tmp_path, Filled(table, MINIATURE["personalize"], found, 0.1, 1.0))
    assert [path.name for path in drawn] == ["t_front.png", "t_curves.png"] and all(
        path.stat().st_size > 1000 for path in drawn
    )


def test_a_table_compares_like_with_like(tmp_path):
    """A stop leaves the plain row with more identities than the others: only the shared ones count."""
    setting, journal, table = (
        Setting("h", 50, 4.0, "x"),
        Journal(tmp_path / "journal.jsonl"),
        TABLES["table_2"],
    )
    for row, case, value in (
        (table.rows[0], 0, 0.1),
        (table.rows[0], 1, 0.9),
        (table.rows[1], 0, 0.5),
    ):
        journal.add(setting.of(Job("personalize", row, case, 0)), values([value, value]))
    (one,) = fill([table], 1, journal, setting)
    assert (
        one.scores["plain"]["identity"].mean == pytest.approx(0.1)
        and one.scores["plain"]["identity"].count == 1
    )


def test_a_sheet_has_a_column_per_row_and_the_photo_first():
    from evaluation.sheets import CELL, GAP, HEAD, cut, sheet
    from PIL import Image

    strip = Image.new("RGB", (256, 128), "red")
    strip.paste("blue", (128, 0, 256, 128))
    photo, (left, right) = Image.new("RGB", (128, 128), "green"), cut(strip)
    page = sheet(
        ["photo", "a row with a long name"], [[[photo], [left, right]], [[photo], [right, left]]]
    )

    def seen(column, line, case):
        return page.getpixel(
            (
                GAP + column * (CELL + GAP) + 9,
                HEAD + (2 * case + line) * (CELL + GAP) + case * GAP + 9,
            )
        )

    red, blue, green, white = (255, 0, 0), (0, 0, 255), (0, 128, 0), (255, 255, 255)
    assert [seen(c, n, case) for case in (0, 1) for c in (0, 1) for n in (0, 1)] == [
        green,
        white,
        red,
        blue,
        green,
        white,
        blue,
        red,
    ]
