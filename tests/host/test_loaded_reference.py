"""Load Reference shows what it read, and gives out how it was made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import folder_paths
import pytest
import torch
from kindred.nodes.host import REFERENCES
from kindred.nodes.library import LoadReference, SaveReference
from networks import random_model
from PIL import Image
from studio import MOMENTS, STEPS, anchors, bank_of, capture, inject, sample, story

MODEL = random_model("tiny")


@pytest.fixture(autouse=True)
def tidied() -> Iterator[None]:
    """What a test saves goes with it."""
    yield
    for file in Path(folder_paths.get_output_directory(), "kindred").glob("shown*"):
        file.unlink()
    folder_paths.filename_list_cache.pop(REFERENCES, None)


def loaded(bank=None) -> tuple:
    """-> every output, what the page shows."""
    with torch.inference_mode():
        (text,) = SaveReference.execute(bank or bank_of(), "kindred/shown").ui.as_dict()["text"]
        made = LoadReference.execute(text.split(", ")[0].removeprefix("kindred/"))
    return made.result, made.ui.as_dict()


def test_a_loaded_photo_says_how_a_sampler_reads_it_as_it_is_held(caplog):
    """Its outputs, put into a sampler of a fresh model, find every step."""
    (bank, subject, steps, scheduler, sampler, width, height, sigmas), shown = loaded()
    assert (subject, steps, scheduler, width, height) == ("cat", STEPS, "ddim_uniform", 64, 64)
    assert torch.equal(sigmas, bank.trajectory.sigmas.flip(0)) and sigmas[-1] == 0
    caplog.set_level("INFO")
    size = height // 8, width // 8
    sample(inject(MODEL, bank), steps=steps, scheduler=scheduler, sampler=sampler, size=size)
    assert "is read cached" in caplog.text and "live" not in caplog.text
    (picture,) = shown["images"]
    with Image.open(Path(folder_paths.get_temp_directory(), picture["filename"])) as drawn:
        assert drawn.size == (width, height) and len(set(drawn.convert("RGB").getdata())) > 8


def test_loaded_anchors_say_their_sampler():
    """Further pictures need the same sampler, scheduler and steps."""
    bank = anchors(story(MODEL), (0, 1), sampler="heun")[1]
    (_, subject, steps, scheduler, sampler, *_), shown = loaded(bank)
    assert (subject, steps, scheduler, sampler) == ("cat", MOMENTS, "ddim_uniform", "heun")
    assert len(shown["images"]) == 2


def test_a_reference_of_wired_sigmas_points_to_them(monkeypatch):
    texts = []
    monkeypatch.setattr("kindred.nodes.host.tell", lambda node, text: texts.append(text))
    held = capture(MODEL, sigmas=torch.tensor([9.0, 3.0, 0.0]), mask=torch.ones(1, 64, 64))[0]
    (_, subject, steps, scheduler, *_, sigmas), _ = loaded(held)
    assert (steps, scheduler) == (2, "custom") and sigmas.tolist() == [9.0, 3.0, 0.0]
    assert "wire sigmas into SamplerCustom" in texts[-1]
