"""Concept Encoder Train that is cancelled, fails or goes on: what it learned is kept, and nothing else is left."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import comfy.model_management
import pytest
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from kindred.models.concept.file import load_concept_encoder
from kindred.models.concept.training import Trainer
from studio import of_model
from training_steps import at_step

LAW = pytest.mark.parametrize


def test_a_cancelled_run_keeps_what_it_learned_and_goes_on_as_if_it_had_not_stopped(
    train, seen, folder, monkeypatch
):
    train(save_name="whole", steps=4)
    whole = list(seen.losses)
    with monkeypatch.context() as once:
        at_step(once, 2, lambda trainer: comfy.model_management.interrupt_current_processing())
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(steps=4)
    gc.collect()
    assert (
        not comfy.model_management.in_training
        and not comfy.model_management.processing_interrupted()
    )
    assert not [r() for r in seen.refs if r() is not None]
    assert load_concept_encoder(folder / "new.safetensors").config.training["steps"] == 2
    train(steps=4)
    assert seen.losses == whole
    assert (folder / "new.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()
    train(steps=4)  # nothing is left to do: the encoder comes from the state
    assert seen.losses == whole


@contextmanager
def at_pass(number, act):
    """`act` at the beginning of UNet pass `number` of whatever trains; yields the passes begun."""
    begun, forward = [], UNetModel.forward

    def counted(self, *args, **kwargs):
        begun.append(1)
        if len(begun) == number:
            act()
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNetModel, "forward", counted)
        yield begun


def starve():
    raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory. Tried to allocate 2.00 GiB")


def fail():
    raise NotImplementedError("another pack's patch")


FAULTS = {
    "interrupt": (
        comfy.model_management.interrupt_current_processing,
        comfy.model_management.InterruptProcessingException,
    ),
    "memory": (starve, comfy.model_management.OOM_EXCEPTION),
    "neighbour": (fail, NotImplementedError),
}


@LAW("fault", FAULTS)
def test_stopped_at_any_unet_call_of_any_step_it_goes_on_as_if_it_had_not_been(
    world, train, seen, folder, fault
):
    """Two batches to a step: in the middle of one, nothing of it is learned. An interrupt saves, an error keeps what was."""
    (act, error), how = (
        FAULTS[fault],
        {"steps": 2, "accumulate": 2, "batch": 1, "save_every": 250 if fault == "interrupt" else 1},
    )
    with at_pass(0, None) as begun:
        train(save_name="whole", **how)
    assert len(begun) == 4
    losses, before = list(seen.losses), of_model(world["model"])
    for number in range(1, 5):
        seen.refs.clear()
        with at_pass(number, act), pytest.raises(error):
            train(**how)
        gc.collect()
        assert seen.refs and not [r() for r in seen.refs if r() is not None], number
        assert (
            not comfy.model_management.in_training
            and not comfy.model_management.processing_interrupted()
        )
        done = (number - 1) // 2
        assert sorted(p.name for p in folder.glob("new*")) == [
            "new.safetensors",
            "new.training",
        ] * (done > 0), number
        assert (
            not done
            or load_concept_encoder(folder / "new.safetensors").config.training["steps"] == done
        )
        train(**how)
        assert seen.losses == losses and of_model(world["model"]) == before, number
        assert (folder / "new.safetensors").read_bytes() == (
            folder / "whole.safetensors"
        ).read_bytes(), number
        for name in ("new.safetensors", "new.training"):
            (folder / name).unlink()
    assert len(list(folder.iterdir())) == 2


def test_cancelled_before_the_first_step_nothing_is_saved(train, folder):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train()
    assert not list(folder.iterdir()) and not comfy.model_management.in_training


def test_resume_refuses_another_run_and_spares_what_is_not_its_own(train, folder, photos, seen):
    train(steps=1)
    kept = (folder / "new.safetensors").read_bytes()
    for changes, words in (
        ({"learning_rate": 2e-3}, ["0.003", "0.002", "rate"]),
        ({"batch": 1}, ["batch 2", "batch 1"]),
        ({"images": [photos.flip(1)]}, ["pictures 2"]),
        ({"prompt": "a drawing"}, ["pictures 2"]),
        ({"size": 64}, ["size 128", "size 64"]),
        ({"merge": "add"}, ["merge concat", "merge add"]),
    ):
        with pytest.raises(ValueError) as refused:
            train(**changes)
        assert all(
            word in str(refused.value)
            for word in ["Concept Encoder Train", "same settings", "name", *words]
        ), refused.value
    assert (folder / "new.safetensors").read_bytes() == kept
    (folder / "new.training").write_bytes(b"PK torn")
    with pytest.raises(ValueError, match="new.training is torn"):
        train(steps=2)
    (folder / "new.training").unlink()
    with pytest.raises(ValueError, match="new.safetensors is there already.*resume off"):
        train(steps=2)
    assert (folder / "new.safetensors").read_bytes() == kept
    train(steps=1, resume=False, learning_rate=2e-3)
    assert (folder / "new.safetensors").read_bytes() != kept


def test_a_full_disk_leaves_the_last_good_file_and_says_so(train, folder, monkeypatch):
    limits, save = pytest.importorskip("resource"), Trainer.save
    soft, hard = limits.getrlimit(limits.RLIMIT_FSIZE)

    def short(self, *files):
        limits.setrlimit(limits.RLIMIT_FSIZE, (10_000 if self.step_number == 2 else soft, hard))
        try:
            save(self, *files)
        finally:
            limits.setrlimit(limits.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as once:
        once.setattr(Trainer, "save", short)
        with pytest.raises(OSError) as full:
            train(save_every=1)
    words = [
        "Concept Encoder Train",
        "step 2 could not be saved",
        "new.safetensors of step 1 is whole",
        "make room there",
    ]
    assert all(word in str(full.value) for word in words), full.value
    assert load_concept_encoder(folder / "new.safetensors").config.training["steps"] == 1
    assert sorted(p.name for p in folder.iterdir()) == ["new.safetensors", "new.training"]
    assert not comfy.model_management.in_training
    train(save_every=1)
    assert load_concept_encoder(folder / "new.safetensors").config.training["steps"] == 3


def test_a_loss_that_is_not_finite_ends_with_a_sentence_and_the_last_good_state(
    train, folder, monkeypatch
):
    loss = Trainer.loss
    monkeypatch.setattr(
        Trainer,
        "loss",
        lambda self, *a: loss(self, *a) * (float("nan") if self.step_number == 2 else 1.0),
    )
    with pytest.raises(
        ValueError,
        match="Concept Encoder Train: training: the loss of step 3 is nan.*learning rate",
    ):
        train()
    assert load_concept_encoder(folder / "new.safetensors").config.training["steps"] == 2
