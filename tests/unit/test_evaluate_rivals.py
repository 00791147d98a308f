"""Laws of table_1's columns and rows: copied pixels, diversity and what is refused, worked by hand."""

from __future__ import annotations

import json
from math import isnan
from types import SimpleNamespace

import pytest
import torch
from evaluate import fill
from evaluation.catalogue import TABLE_2, TABLES
from evaluation.ground import Job, Setting
from evaluation.journal import Journal
from evaluation.miniatures import FLOW, fitting, refuse
from evaluation.pixels import SMALL, as_png, copied, correlation, small, varied
from evaluation.real import refuse as refuse_real
from evaluation.rows import RIVALS, Row
from evaluation.tables import MINIATURE
from PIL import Image


def test_every_rival_has_a_row_and_kindred_is_as_table_2_has_it():
    rows = {row.name: row for row in TABLES["table_1"].rows}
    assert {row.get("rival", "none") for row in rows.values()} == {*RIVALS}
    for name in ("self", "cross"):
        assert rows[f"Kindred {name}"] == Row.parse(
            "personalize", f"Kindred {name}: {TABLE_2[name]}"
        )
    assert dict(rows["Kindred both"].inputs) == dict(
        Row.parse("personalize", f"x: {TABLE_2['full']}").inputs
    )
    assert (
        TABLES["table_1"].first + TABLES["table_1"].count <= 1000
    )  # defaults were chosen on these


def test_a_rival_is_refused_where_it_is_not_measured():
    row = Row.parse("personalize", "mine: rival=lora, train_steps=3, train_rate=0.001")
    with pytest.raises(SystemExit, match="row 'mine' sets rival.*--miniature unet"):
        refuse([row], FLOW)
    with pytest.raises(SystemExit, match="row 'mine' sets rival.*Leave out --checkpoint"):
        refuse_real([row], SimpleNamespace(concept_encoder=None))
    with pytest.raises(SystemExit, match="table_1 needs a concept encoder.*--miniature unet"):
        fitting([TABLES["table_1"]], FLOW, True)


def test_what_is_copied_is_worked_by_hand():
    """Four pixels: the photo itself, its negative, and one at a right angle to it."""
    photo = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 2, 2, 1)
    across = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 2, 2, 1)
    images = torch.cat([photo * 0.5 + 0.2, 1 - photo, across])
    assert correlation(images, photo) == pytest.approx([1, -1, 0])
    assert copied(images, photo, torch.cat([across, photo, 1 - photo])) == pytest.approx([1, -2, 1])


def test_diversity_is_the_difference_of_the_same_prompts_pictures():
    """Two prompts, three seeds: one picture differs by half of the scale, the other prompt's do not."""
    black, grey = torch.zeros(1, 16, 24, 3), torch.full((1, 16, 24, 3), 0.5)
    seeds = [
        {"small": small(torch.cat([first, grey])), "identity": [0.5, 0.5]}
        for first in (black, black, grey)
    ]
    assert len(seeds[0]["small"]) == 2 and len(seeds[0]["small"][0]) == 3 * SMALL**2
    json.dumps(seeds)  # a journal's line
    for values in varied(seeds):
        assert values["diversity"] == pytest.approx([128 / 255 * 2 / 3, 0])
    assert "diversity" not in varied(seeds[:1])[0]  # one seed tells nothing
    assert "diversity" not in varied([{}, {}])[0]


def test_costs_are_columns_of_table_1_alone(tmp_path):
    """And a row that keeps nothing, or was trained on nothing, has no number there."""
    setting, journal = Setting("h", 25, 4.0, "x"), Journal(tmp_path / "journal.jsonl")
    made = {"identity": [0.5], "scene": [1.0], "class": [1.0], "whole": [1.0], "copied": [0.1]}
    table = TABLES["table_1"]
    for number, row in enumerate(table.rows[:2]):
        for seed in range(2):
            job = Job("personalize", row, 0, seed)
            cost = {"kept_kib": 0.25, "loss_left": 0.5} if number else {}
            journal.add(setting.of(job), made | {"seconds": 1.0, "small": [[seed] * 3]} | cost)
    (filled,) = fill([table], 2, journal, setting)
    assert {column.key for column in filled.ground.columns} >= {"copied", "diversity", "kept_kib"}
    assert filled.scores["textual inversion"]["kept_kib"].mean == 0.25
    assert isnan(filled.scores["plain"]["kept_kib"].mean)
    assert "| 0.25 |" not in filled.markdown() and "| 0.2 |" in filled.markdown()
    assert "diversity" not in {column.key for column in MINIATURE["personalize"].columns}


def test_a_photos_file_is_the_photo(tmp_path):
    photo = torch.rand(1, 5, 7, 3)
    (tmp_path / "photo.png").write_bytes(as_png(photo))
    seen = torch.tensor(list(Image.open(tmp_path / "photo.png").tobytes())).view(1, 5, 7, 3)
    assert torch.equal(seen, photo.mul(255).round().int())
