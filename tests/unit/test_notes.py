"""What the notes on the canvas say of other checkpoints is what their networks are."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("playwright.sync_api")  # the notes' program imports the browser

from workflow_notes import NOTES, TABLE

# down-sampling, width and depth of each kind of block, and how many there are of it: five (two
# down, three up) at every size that has attention, and the middle
SD = ((1, 320, 1, 5), (2, 640, 1, 5), (4, 1280, 1, 5), (8, 1280, 1, 1))
SDXL = ((2, 640, 2, 5), (4, 1280, 10, 5), (4, 1280, 10, 1))
ROWS = dict(re.findall(r"^\| (SD\S+) \|(.*)\|$", TABLE, re.M))


@pytest.mark.parametrize("name, blocks", [("SD1.5", SD), ("SD2.1", SD), ("SDXL", SDXL)])
def test_a_photo_takes_the_hidden_states_of_all_blocks_in_half_precision(name, blocks):
    size = int(ROWS[name].split("|")[0])
    values = sum((size // 8 // down) ** 2 * width * deep * n for down, width, deep, n in blocks)
    assert float(re.search(r"(\d+) MB a step", ROWS[name])[1]) == pytest.approx(
        2 * values / 1e6, rel=0.02
    )


def test_every_workflow_on_the_miniature_says_what_to_change_line_by_line():
    for name, note in NOTES.items():
        assert note.yours.count("\n- ") >= 2 or name == "story_more_pictures", name
