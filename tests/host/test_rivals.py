"""Host laws of table_1's rivals on the UNet miniature: each reads the photo, learns where it is trained, and leaves the model alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import miniature_host
import pytest
import torch
from evaluation import rivals
from evaluation.ground import Job, Miniature, Setting
from evaluation.personalize import Personalize, Subject
from evaluation.pixels import correlation
from evaluation.rival_training import TEMPLATES, Learner, encoded, tokens, word_id
from evaluation.rows import Row
from evaluation.tables import COSTS

CASE = 1003  # of those that no report has
SETTING = Setting(Path(os.environ.get("KINDRED_HOST", "")), 4, 4.0, "")


@pytest.fixture(scope="module")
def task(host) -> Iterator[Personalize]:
    """The host runs already: a second start would load the pack anew under the feet of every other test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature_host, "boot", lambda *_: host)
        yield Miniature(SETTING).tasks["personalize"]


@pytest.fixture(scope="module")
def subject(task) -> Subject:
    return task.subject(CASE)


def row(inputs: str) -> Row:
    return Row.parse("personalize", f"a row: {inputs}")


def plain(task) -> torch.Tensor:
    return task.measure(row("self=off"), CASE, 0)[1]


@pytest.mark.parametrize(
    "inputs",
    [
        "rival=img2img, denoise=0.5",
        "rival=reference-only",
        "rival=reference-only, halves=cond only",
        "rival=textual inversion, train_steps=25, train_rate=0.02",
        "rival=lora, train_steps=25",
        "rival=lora with prior, train_steps=8",
    ],
)
def test_a_rival_reads_the_photo_and_leaves_the_model_as_it_was(task, inputs):
    before = plain(task)
    values, images = task.measure(row(inputs), CASE, 0)
    assert images.shape == before.shape and not torch.allclose(images, before, atol=0.02)
    assert torch.equal(plain(task), before)
    assert all(len(values[key]) == 2 for key in ("identity", "copied", "small", "whole"))
    assert values["kept_kib"] > 0
    if (
        "train_steps=25" in inputs
    ):  # its own loss, at noise levels that are the same before and after
        assert values["loss_left"] < 1 and values["seconds_concept"] > 0


def test_a_concept_is_made_once_for_all_its_seeds(task, monkeypatch):
    made = []
    concept = rivals.concept
    monkeypatch.setattr(rivals, "concept", lambda *words: made.append(words) or concept(*words))
    one = row("rival=img2img, denoise=0.6")
    first, second = (task.measure(one, CASE, seed)[1] for seed in range(2))
    assert len(made) == 1 and not torch.equal(first, second)


def test_img2img_begins_at_the_photo(task, subject):
    """The less it is noised, the more it is the photo."""
    alike = [
        min(
            correlation(task.measure(row(f"rival=img2img, denoise={d}"), CASE, 0)[1], subject.photo)
        )
        for d in (0.1, 0.9)
    ]
    assert alike[0] > 0.9 > alike[1]


def test_the_reference_stays_the_photo_while_it_is_read(task, subject, monkeypatch):
    """What is dropped in the end is the photo, as the autoencoder has it."""
    sampled, sample = [], task.studio.sample

    def kept(*words, **more):
        sampled.append(sample(*words, **more))
        return sampled[-1]

    monkeypatch.setattr(task.studio, "sample", kept)
    images = rivals.reference_only(task.studio, row("rival=reference-only"), subject).draw(
        subject.prompts, 1, 4.0
    )
    assert len(sampled[0]) == 3 and torch.equal(sampled[0][1:], images)
    assert torch.allclose(sampled[0][:1], task.studio.autoencode(subject.photo), atol=0.02)


@pytest.mark.parametrize("both", [True, False])
def test_pictures_read_their_own_tokens_and_the_first_ones(both):
    """Two halves of one reference and two pictures, worked by hand; the half without the prompt comes first, as the host may have it."""
    patches = []

    class Model:
        def clone(self):
            return self

        def set_model_attn1_patch(self, patch):
            patches.append(patch)

    rivals.reading_the_first(Model(), 2, both)
    hidden = torch.tensor([1.0, 2, 3, 4, 5, 6]).view(6, 1, 1)
    q, k, v = patches[0](hidden, hidden, hidden, {"cond_or_uncond": [1, 0]})
    assert q is hidden and k is v
    second = [[1, 1], [2, 1], [3, 1]] if both else [[1, 1], [2, 2], [3, 3]]
    assert k[..., 0].tolist() == [*second, [4, 4], [5, 4], [6, 4]]


@torch.inference_mode()
def test_the_class_words_own_vector_is_the_class_word(task, subject):
    """What textual inversion begins from, in training and in sampling."""
    studio = task.studio
    with torch.inference_mode(False):
        learner = Learner(studio, studio.encode(subject.photo)["samples"].clone(), subject.word)
        trained = learner.context(learner.word, TEMPLATES[0]).detach()
    line = tokens(studio.clip, subject.coarse, subject.word, learner.word)
    known = studio.nodes.CLIPTextEncode().encode(studio.clip, subject.coarse)[0][0][0]
    assert torch.allclose(encoded(studio, [line])[0][0], known, atol=1e-4)
    assert torch.allclose(trained, known, atol=1e-4)
    with pytest.raises(ValueError, match="'cat on the beach' is 4 tokens"):
        word_id(studio.clip, "cat on the beach")


def test_every_cost_is_measured_by_some_row(task):
    found = set()
    for inputs in ("", "rival=lora, train_steps=2"):
        found |= task.measure(row(inputs), CASE, 0)[0].keys()
    assert {column.key for column in COSTS} - {"diversity"} <= found
    assert str(Job("personalize", row(""), CASE, 0)) == f"a row, identity {CASE}, seed 0"
