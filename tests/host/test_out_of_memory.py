"""Memory that runs out in the middle of a run, at any copy or while a file is written: the next run is as if it had not."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

import folder_paths
import pytest
from disturbances import (
    JOBS,
    MODEL,
    OutOfMemory,
    at_pass,
    disturbed,
    few,
    half_bank,
    passes_of,
    starve,
    state,
    undisturbed,
)
from kindred.models.reference.bank import ReferenceBank
from kindred.models.reference.builder import BankBuilder
from kindred.models.reference.file import Parcel
from kindred.models.story.anchors import AnchorRecorder
from kindred.nodes.host import ManagedEncoder
from kindred.nodes.library import SaveReference
from torch.utils._python_dispatch import TorchDispatchMode

LAW = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("frozen_heap")


@LAW("name", JOBS)
def test_memory_that_runs_out_at_a_unet_call(name, born):
    for number in few(passes_of(name))[1:]:
        disturbed(
            name,
            born,
            OutOfMemory,
            at_pass(number, starve),
            f"pass {number}",
            again=number < passes_of(name),
        )


class Scarce(TorchDispatchMode):
    """Counts the operations inside, and has no memory for operation `number`."""

    def __init__(self, counted: list, number: int) -> None:
        super().__init__()
        self.counted, self.number = counted, number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted.append(func)
        if len(self.counted) == self.number:
            starve()
        return func(*args, **(kwargs or {}))


@contextmanager
def scarce(monkeypatch, cls, name: str, number: int):
    """Memory runs out at operation `number` of all those that cls.name makes; yields the operations."""
    counted, original = [], getattr(cls, name)

    def inside(*args, **kwargs):
        with Scarce(counted, number):
            return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cls, name, inside)
        yield counted


COPIES = [  # what copies a bank, in which job
    ("capture in one pass", BankBuilder, "add"),
    ("capture in one pass", BankBuilder, "finish"),
    ("cached", ReferenceBank, "tokens"),
    ("live", ReferenceBank, "keep"),
    ("one more picture", ReferenceBank, "tokens"),
    *(
        ("anchor sampler", AnchorRecorder, method)
        for method in ("latent", "output", "matched", "finish")
    ),
]


@LAW(
    ("name", "cls", "method"), COPIES, ids=[f"{cls.__name__}.{method}" for _, cls, method in COPIES]
)
def test_memory_that_runs_out_while_a_bank_is_copied(name, cls, method, born, monkeypatch):
    undisturbed(name)
    with scarce(monkeypatch, cls, method, 0) as operations:
        JOBS[name](MODEL)
    assert operations
    for number in few(len(operations)):
        disturbed(
            name,
            born,
            OutOfMemory,
            scarce(monkeypatch, cls, method, number),
            f"operation {number}",
            again=number == len(operations),
        )


def test_memory_that_runs_out_while_a_photo_is_read(born, monkeypatch):
    """By the node, before any sampler begins."""
    (whole, *_), before = undisturbed("concept"), state()
    for share in (0.0, 0.5, 1.0):
        with scarce(
            monkeypatch, ManagedEncoder, "encode", 0
        ) as operations:  # counted anew: whether it had to be loaded is the host's
            assert JOBS["concept"](MODEL) == whole and len(operations) > 10
        number = max(1, round(share * len(operations)))
        with scarce(monkeypatch, ManagedEncoder, "encode", number), pytest.raises(OutOfMemory):
            JOBS["concept"](MODEL)
        assert state() == before and JOBS["concept"](MODEL) == whole, (
            f"operation {number} of {len(operations)}"
        )


def test_memory_that_runs_out_while_a_reference_is_saved_leaves_no_file(born, monkeypatch):
    place = Path(folder_paths.get_output_directory()) / "kindred"
    shutil.rmtree(place, ignore_errors=True)
    before = state()
    with scarce(monkeypatch, Parcel, "bank", 2), pytest.raises(OutOfMemory):
        SaveReference.execute(half_bank())
    assert not [p for p in place.rglob("*") if p.is_file()]
    SaveReference.execute(half_bank())
    assert [p.name for p in place.iterdir()] == ["reference_00001_.safetensors"]
    shutil.rmtree(place)
    assert state() == before
