"""The flow miniature as the evaluation measures it, through the host's loader and the pack's own nodes; no law about how well it draws."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import miniature_host
import pytest
import torch
from evaluation import own
from evaluation.catalogue import TABLES
from evaluation.ground import BOUNDS, Job, Miniature, Setting
from evaluation.miniatures import FLOW, fitted
from evaluation.rows import Row
from evaluation.tables import MINIATURE
from PIL import Image

STEPS = 2
SETTING = Setting(Path(os.environ.get("KINDRED_HOST", "")), STEPS, 4.0, "", miniature=FLOW)


@pytest.fixture(scope="module")
def started(host) -> Iterator[None]:
    """The host runs already: a second start would load the pack anew under the feet of every other test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature_host, "boot", lambda *_: host)
        yield


@pytest.fixture(scope="module")
def ground(started) -> Miniature:
    return Miniature(SETTING)


def test_every_column_is_measured_and_every_row_is_felt(ground, tmp_path):
    """Plain is what the sampler gives alone; the control is another picture than the subject's own photo gives."""
    rows, strips, found = fitted(TABLES["table_2"], FLOW).rows, {}, {}
    for row in rows:
        path = tmp_path / f"{row.name}.png"
        found[row.name] = ground(Job("personalize", row, 3, 0, path))
        strips[row.name] = Image.open(path).tobytes()
    columns = {column.key for column in MINIATURE["personalize"].columns}
    for name, values in found.items():
        assert columns <= values.keys(), name
        assert values["unet_calls"] in (STEPS, 2 * STEPS), name  # a live reference is one call more
        assert all(len(values[key]) == 2 for key in columns)
    assert [row.name for row in rows] == ["plain", "self", "shuffled"] and len(
        set(strips.values())
    ) == 3
    assert "mask_iou" in found["self"] and "mask_iou" not in found["plain"]
    assert ground(Job("personalize", rows[0], 3, 0)) | {"seconds": 0} == found["plain"] | {
        "seconds": 0
    }


def test_a_story_and_what_is_left_out_of_it_are_measured(started, tmp_path):
    """In six steps: in fewer none lies between the bounds of feature injection."""
    ground, strips = Miniature(replace(SETTING, steps=6)), set()
    columns = {column.key for column in MINIATURE["story"].columns}
    rows = {row.name: row for row in fitted(TABLES["ablation"], FLOW).rows}
    for name in ("plain", "story", "no_injection"):
        path = tmp_path / f"{name}.png"
        values = ground(Job("story", rows[name], 3, 0, path))
        assert columns <= values.keys() and len(values["whole"]) == 4, name
        strips.add(Image.open(path).tobytes())
    assert len(strips) == 3
    assert ground(Job("story", BOUNDS, 3, 0))["ceiling"] > 0.6


def test_floor_and_ceiling_pass_its_own_autoencoder(ground):
    bounds = ground(Job("personalize", BOUNDS, 3, 0))
    assert bounds["ceiling"] > 0.6 > bounds["floor"]


@pytest.mark.parametrize("row", TABLES["settings_flow"].rows, ids=lambda row: row.name)
def test_every_setting_of_its_own_table_can_be_measured(ground, row):
    values = ground(Job("personalize", row, 3, 0))
    assert all(0 <= number <= 1 for number in (*values["identity"], *values["whole"]))


def test_its_own_figures_are_measured_in_jobs(started, monkeypatch):
    monkeypatch.setattr(own, "CHUNK", 2)
    measure = own.OwnFigures(SETTING)
    drawn, known = (
        Job(own.PROMPTS, Row("prompts", (("pictures", 2),)), 9, 0),
        Job(own.RENDERINGS, Row("renderings", (("masked", 1),)), 0, 0),
    )
    found = {job: measure(job) for job in (drawn, known)}
    assert all(len(found[drawn][key]) == 2 for key in ("class", "scene", "whole", "hue"))
    assert min(found[known]["psnr"]) > 26 and len(found[known]["iou"]) == 1
    assert found[known]["accuracy"]["class"] == found[known]["accuracy"]["scene"] == 1
    assert found[drawn] == measure(drawn)


def test_its_live_previews_are_pictures(started):
    from latent_preview import Latent2RGBPreviewer

    studio = miniature_host.FlowStudio(SETTING.host, STEPS, 4.0)
    form = studio.model.model.latent_format
    previewer = Latent2RGBPreviewer(form.latent_rgb_factors, form.latent_rgb_factors_bias)
    shown = previewer.decode_latent_to_preview(torch.randn(1, form.latent_channels, 16, 16))
    assert shown.size == (16, 16) and len(set(shown.getdata())) > 100
