"""Damaged and lying references: each is refused in words that name it and the remedy, or it is as good as a whole one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from kindred.models.reference.bank import ReferenceBank
from kindred.models.reference.file import FORMAT, save_reference
from kindred.models.reference.soundness import check
from kindred.nodes.host import REFERENCES
from kindred.nodes.library import LoadReference
from kindred.nodes.preview import (
    heat_panel,
    masks_panel,
    matches_panel,
    why_no_heat,
    why_no_masks,
    why_no_matches,
)
from mutations import Mutator
from networks import random_model
from refusals import LONG, faults_of, resident
from studio import anchors, bank_of, inject, pictures, sample, story
from torch import Tensor

MODEL = random_model("tiny")
EVERY = 6 // min(6, LONG)  # of the references that load, one in so many is drawn with
LAW = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("nothing_else_changes")


@pytest.fixture(scope="module", autouse=True)
def made_before() -> None:
    """A capture shows its subject in the temp folder."""
    banks()


@cache
@torch.inference_mode()
def banks() -> dict[str, ReferenceBank]:
    return {
        "photo": bank_of(steps=2),
        "photos": bank_of(steps=2, pictures=2, both=False),
        "anchors": anchors(story(MODEL), (0, 1), steps=3)[1],
    }


def drawings(bank: ReferenceBank) -> list[Callable[[], Tensor]]:
    """A picture with it, through every node that reads one."""
    drawn = torch.rand(bank.pictures, 16, 16, 3)
    halves = "both" if len(bank.features) == 2 else "cond only"
    acts: list[Callable[[], Tensor]] = [
        lambda: sample(inject(MODEL, bank), steps=2, size=(4, 4), cfg=1.0),
        lambda: pictures(story(MODEL, reference=bank, halves=halves), (5,), steps=3),
    ]
    acts += [
        partial(panel, drawn, bank)
        for why, panel in ((why_no_masks, masks_panel), (why_no_matches, matches_panel))
        if not why(bank)
    ]
    return acts + [
        partial(heat_panel, drawn, bank, percent)
        for percent in (-1.0, 0.0, 1.0)
        if not why_no_heat(bank)
    ]


@torch.inference_mode()
def load_reference(name: str) -> ReferenceBank:
    return LoadReference.execute(name).result[0]


@LAW("kind", ["photo", "photos", "anchors"])
@torch.inference_mode()
def test_a_damaged_reference_is_refused_or_draws(kind, place):
    """What still loads passes the bank's own checks, and a part of it is drawn with."""
    folder = place(REFERENCES)
    save_reference(banks()[kind], folder / "whole.safetensors")
    whole = (folder / "whole.safetensors").read_bytes()
    assert all(torch.isfinite(act()).all() for act in drawings(load_reference("whole.safetensors")))
    before, fates, faults = resident(), Counter(), []
    for mutant, words in Mutator(whole, FORMAT, seed=f"{kind} ").mutants(420 * LONG):
        (folder / "cat.safetensors").write_bytes(mutant)
        bank, fault = faults_of(lambda: load_reference("cat.safetensors"), "cat.safetensors")
        faults += [f"{words}: {fault}"] * bool(fault)
        fates["refused" if bank is None else "loaded"] += 1
        if bank is not None:
            check(bank)
            for act in drawings(bank) if fates["loaded"] % EVERY == 0 else ():
                picture, fault = faults_of(act)
                fault = fault or "NaN or infinite" * (
                    picture is not None and not torch.isfinite(picture).all()
                )
                faults += [f"drawn, {words}: {fault}"] * bool(fault)
                fates["not drawn" if picture is None else "drawn"] += 1
    print(kind, dict(fates))
    assert not faults, "\n".join(faults)
    assert (
        fates["refused"] > 200 * LONG and fates["loaded"] > 20 * LONG and fates["drawn"] > 10 * LONG
    )
    assert resident() - before < 150
