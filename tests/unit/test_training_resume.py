"""Laws of a training that goes on (method.md 2.2 eq. 10): what a kill, other settings or a full disk change."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from kindred.models.concept import training
from kindred.models.concept.encoder import load_concept_encoder
from kindred.models.identity import tell_key
from small_keys import key, weights
from small_training import SETTINGS, same, through_a_file, trainer


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tower_rate": 0.0, "average": 0.0},
        {"schedule": "cosine", "warm_up": 10, "weight_warm_up": 9, "accumulate": 2, "min_snr": 5.0},
    ],
)
def test_killed_at_step_7_and_resumed(change) -> None:
    """Losses, weights, average, and what comes after: to 1e-6 those of the run that was not stopped."""
    settings = replace(SETTINGS, steps=12, **change)
    whole, killed = trainer(settings), trainer(settings)
    for _ in range(12):
        whole.step()
    for _ in range(7):
        killed.step()
    state = through_a_file(killed.state())
    killed.step()  # what came after the state is lost
    torch.manual_seed(99)
    resumed = trainer(settings)
    with torch.no_grad():
        for p in resumed.encoder.parameters():
            p.zero_()  # nothing of a fresh start is left
    resumed.resume(state)
    assert resumed.step_number == 7
    while resumed.step_number < 12:
        resumed.step()
    assert len(whole.losses) == 12 and resumed.losses == pytest.approx(
        whole.losses, rel=0, abs=1e-6
    )
    same(resumed.encoder.state_dict(), whole.encoder.state_dict(), 1e-6)
    same(resumed.averaged(), whole.averaged(), 1e-6)


def test_what_else_it_was_made_with_is_compared() -> None:
    one, state = trainer(), trainer().state(processes=2, base="sd15")
    one.resume(state, processes=2, base="sd15")
    with pytest.raises(ValueError, match="made with processes 2, but processes 1 was asked for"):
        one.resume(state, processes=1, base="sd15")


def test_the_base_model_may_be_loaded_in_another_precision() -> None:
    one, own = trainer(), weights()
    half, tuned = tell_key(key(own.half(), "SD15 1b")), tell_key(key(own * 1.01, "SD15 2c"))
    state = trainer().state(base=tell_key(key(own)))
    one.resume(state, base=half)
    with pytest.raises(
        ValueError,
        match="made with base SD15 0a, but base SD15 2c was asked for. Give the same settings",
    ):
        one.resume(state, base=tuned)
    with pytest.raises(
        ValueError, match="made with base SD15 0a, but base SD15 1b was"
    ):  # of an older version: a name alone
        one.resume(trainer().state(base="SD15 0a"), base=half)


@pytest.mark.parametrize(
    "change, was, now",
    [
        ({"rate": 2e-3}, "rate 0.001", "rate 0.002"),
        ({"batch": 4}, "batch 3", "batch 4"),
        ({"seed": 6}, "seed 5", "seed 6"),
        ({"min_snr": 5.0}, "min_snr None", "min_snr 5.0"),
        ({"average": 0.0}, "average 0.9", "average 0.0"),
        (
            {"drop_text": 0.2, "accumulate": 2},
            "accumulate 1, drop_text 0.05",
            "accumulate 2, drop_text 0.2",
        ),
    ],
)
def test_another_run_is_not_resumed(change, was, now) -> None:
    one, other = trainer(), trainer(replace(SETTINGS, **change))
    one.step()
    before = deepcopy(other.encoder.state_dict())
    with pytest.raises(
        ValueError, match="training: the checkpoint was made with .* Give the same settings"
    ) as caught:
        other.resume(one.state())
    assert was in str(caught.value) and now in str(caught.value)
    assert other.step_number == 0
    same(other.encoder.state_dict(), before)


def test_more_steps_are_the_same_run() -> None:
    """And so is one of a time before a setting that is left at its default."""
    one = trainer()
    one.step()
    older = through_a_file(one.state())
    del older["settings"]["min_snr"], older["settings"]["weighting"]
    trainer().resume(older)
    with pytest.raises(ValueError, match="weighting plain, but weighting velocity"):
        trainer(replace(SETTINGS, weighting="velocity")).resume(older)
    longer = trainer(replace(SETTINGS, steps=500))
    longer.resume(through_a_file(one.state()))
    assert longer.step() == one.step()


def test_a_cosine_ends_where_its_run_ends() -> None:
    """Its rate hangs on the steps, so other steps are another run; a constant one may grow."""
    cosine = replace(SETTINGS, schedule="cosine", warm_up=4)
    assert (
        cosine.rate_at(0) == 0.25
        and cosine.rate_at(4) == 1.0
        and cosine.rate_at(20) == pytest.approx(0.02)
    )
    one = trainer(cosine)
    one.step()
    trainer(cosine).resume(through_a_file(one.state()))
    with pytest.raises(ValueError, match="steps 20, but steps 40"):
        trainer(replace(cosine, steps=40)).resume(through_a_file(one.state()))


def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch) -> None:
    one = trainer()
    one.step()
    encoder, state = tmp_path / "faces.safetensors", tmp_path / "state.pt"
    one.save(encoder, state, {}, {"pictures": 7})
    before = state.read_bytes()
    assert load_concept_encoder(encoder).config.training == {"steps": 1, "pictures": 7}
    one.step()

    def full(value: Any, file: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        one.save(encoder, state, {}, {})
    assert state.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    assert (
        load_concept_encoder(encoder).config.training["steps"] == 2
    )  # written first, and whole: a state is never ahead of it
    monkeypatch.undo()
    resumed = trainer()
    resumed.resume(training.read_state(state))
    assert resumed.step_number == 1 and resumed.step() == one.losses[1]


@pytest.mark.parametrize("content", [b"", b"no state", b"PK\x03\x04 torn"])
def test_a_torn_state_is_refused_by_name(tmp_path, content) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt is torn .*Remove it"):
        training.read_state(tmp_path / "state.pt")
