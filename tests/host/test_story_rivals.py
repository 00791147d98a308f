"""Host laws of table_story's rivals on the UNet miniature: each does what it says, and leaves the model alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import miniature_host
import pytest
import torch
from evaluation.ground import Miniature, Setting
from evaluation.rows import Row
from evaluation.story import Story
from evaluation.story_rivals import DESCRIPTION, beside_the_first, like_the_first

CASE = 1003  # of those that no report has
SETTING = Setting(Path(os.environ.get("KINDRED_HOST", "")), 4, 4.0, "")


@pytest.fixture(scope="module")
def task(host) -> Iterator[Story]:
    """The host runs already: a second start would load the pack anew under the feet of every other test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature_host, "boot", lambda *_: host)
        yield Miniature(SETTING).tasks["story"]


def measured(task, inputs: str) -> tuple[dict, torch.Tensor]:
    return task.measure(Row.parse("story", f"a row: {inputs}"), CASE, 0)


@pytest.fixture(scope="module")
def plain(task) -> torch.Tensor:
    return measured(task, "node=off")[1]


@pytest.mark.parametrize(
    "inputs",
    ["rival=one seed", "rival=description", "rival=lora, train_steps=25", "rival=style aligned"],
)
def test_a_rival_draws_other_pictures_and_leaves_the_model_as_it_was(task, plain, inputs):
    values, images = measured(task, inputs)
    assert images.shape == plain.shape and not torch.allclose(images, plain, atol=0.02)
    assert torch.equal(measured(task, "node=off")[1], plain)
    assert values["unet_calls"] == SETTING.steps and 0 <= values["consistency"] <= 1
    if "lora" in inputs:
        assert values["loss_left"] < 1 and values["seconds_concept"] > 0
        assert values["kept_kib"] > 0


def test_one_seed_is_the_first_pictures_noise_for_all(task, plain):
    images = measured(task, "rival=one seed")[1]
    assert torch.allclose(images[0], plain[0], atol=1e-3)
    assert not torch.allclose(images[1], plain[1], atol=0.02)


def test_a_description_stands_behind_the_word_in_every_line(task, monkeypatch):
    seen, prompts = [], task.studio.prompts
    monkeypatch.setattr(
        task.studio, "prompts", lambda lines, *more: seen.extend(lines) or prompts(lines, *more)
    )
    measured(task, "rival=description")
    word = task.sets(CASE).word
    plain_lines = task.sets(CASE).prompts
    assert [line.replace(f" {DESCRIPTION}", "") for line in seen] == list(plain_lines)
    assert all(f"{word} {DESCRIPTION} " in line for line in seen)


def test_the_picture_that_is_aligned_to_is_the_plain_one(task, plain):
    """Its features have their own mean and deviation, and it reads itself twice."""
    images = measured(task, "rival=style aligned")[1]
    assert torch.allclose(images[0], plain[0], atol=1e-3)
    assert not torch.allclose(images[1], plain[1], atol=0.02)


def test_aligned_features_have_the_first_ones_mean_and_deviation():
    x = torch.randn(2, 3, 50, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    x[:, 1] = x[:, 1] * 7 - 5
    made = like_the_first(x)
    first = x[:, :1].expand_as(x)
    assert torch.allclose(made.mean(2), first.mean(2), atol=1e-4)
    assert torch.allclose(made.std(2), first.std(2), rtol=1e-4)
    assert torch.allclose(made[:, 0], x[:, 0], atol=1e-5)


def test_the_first_ones_tokens_stand_before_each_ones_own():
    x = torch.arange(12.0).view(2, 3, 2, 1)
    assert beside_the_first(x)[1, 2, :, 0].tolist() == [6, 7, 10, 11]
