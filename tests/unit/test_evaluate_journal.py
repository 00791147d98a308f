"""Laws of the evaluation's journal: a run goes on where it was, and what decides a number decides its key."""

from __future__ import annotations

import math
import os

import pytest
from archive import files
from checkout import ROOT
from evaluation.ground import BOUNDS, Job, Setting
from evaluation.journal import DECIDES, Journal, fingerprint
from evaluation.rows import Row


def test_a_journal_goes_on_where_it_was(tmp_path):
    path = tmp_path / "new folder" / "journal.jsonl"
    Journal(path).add({"case": 1, "inputs": {"a": 1, "b": 2}}, {"identity": [0.5, math.nan]})
    Journal(path).add({"case": 2}, {"identity": [0.25]})
    with path.open("a") as file:
        file.write('{"of": {"case": 3}, "val')  # a kill in the middle of a line
    again = Journal(path)
    assert (
        again.get({"inputs": {"b": 2, "a": 1}, "case": 1})["identity"][0] == 0.5
        and again.get({"case": 3}) is None
    )
    again.add({"case": 3}, {"identity": [1.0]})
    assert [Journal(path).get({"case": n})["identity"] for n in (2, 3)] == [[0.25], [1.0]]
    assert len(path.read_text().splitlines()) == 3


def test_a_measurement_is_on_the_disk_before_the_next_begins(tmp_path, monkeypatch):
    journal, flushed, sync = Journal(tmp_path / "journal.jsonl"), [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: flushed.append(journal.path.read_text()) or sync(number)
    )
    journal.add({"case": 1}, {"identity": [0.5]})
    assert flushed == [journal.path.read_text()] != [""]


@pytest.mark.parametrize("line", ["no json", "[]", '{"of": 1}', "{}"])
def test_a_file_that_is_no_journal_is_named_and_left_alone(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(SystemExit, match="line 1 of .*journal.jsonl is no measurement"):
        Journal(path)
    assert path.read_text() == line + "\n"


def test_what_decides_a_number_decides_the_key():
    setting, job = Setting("host", 50, 4.0, "abc"), Job("story", Row("a", (("weight", 1.0),)), 3, 0)
    same = [
        Job("story", Row("other name", (("weight", 1.0),)), 3, 0),
        Job("story", job.row, 3, 0, "somewhere.png"),
    ]
    assert all(setting.of(other) == setting.of(job) for other in same)
    others = [
        setting.of(Job("story", Row("a", (("weight", 2.0),)), 3, 0)),
        setting.of(Job("story", job.row, 4, 0)),
        setting.of(Job("story", job.row, 3, 1)),
        setting.of(Job("personalize", job.row, 3, 0)),
        setting.of(Job("story", BOUNDS, 3, 0)),
        Setting("host", 25, 4.0, "abc").of(job),
        Setting("host", 50, 5.0, "abc").of(job),
        Setting("host", 50, 4.0, "abd").of(job),
    ]
    assert len({Journal.key(of) for of in [*others, setting.of(job)]}) == len(others) + 1


def test_the_versions_decide_too(tmp_path):
    before = fingerprint(tmp_path)
    (tmp_path / "comfyui_version.py").write_text("__version__ = '0.31.0'")
    assert len(before) == 12 and before != fingerprint(tmp_path) == fingerprint(tmp_path)


def test_every_file_of_the_pack_decides_whatever_room_it_lies_in():
    """And a program that is named there is there."""
    found = {
        pattern: [p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern)] for pattern in DECIDES
    }
    assert not [pattern for pattern, paths in found.items() if not paths]
    pack = {n for n in files(".py") if n.startswith(("nodes/", "models/", "miniature/"))}
    assert not pack - {path for paths in found.values() for path in paths}
