"""Pictures with faults and the reader's head for one whole subject: the faults are faults, and nothing else of the reader moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from kindred.miniature import pack, train_whole
from kindred.miniature.collages import FAULTS, WHOLE, collage, cut, kind_of
from kindred.miniature.reader import Reader, load_reader
from kindred.miniature.training import Run, load
from kindred.miniature.world import (
    HELD_OUT,
    backdrop,
    head_of,
    random_rendering,
    render,
    world_hash,
)
from safetensors import safe_open
from safetensors.torch import load_file

CPU = torch.device("cpu")
SEEDS = range(HELD_OUT, HELD_OUT + 12)


def test_a_backdrop_is_the_rendering_without_its_subject():
    for seed in SEEDS:
        drawn = random_rendering(seed)
        empty = backdrop(drawn.class_name, drawn.scene, seed)
        differs = (drawn.image != empty).any(2)
        assert differs[drawn.mask].mean() > 0.9
        around = np.pad(drawn.mask, 2)
        near = sum(np.roll(around, (y, x), (0, 1)) for y in (-2, 0, 2) for x in (-2, 0, 2)) > 0
        assert not differs[~near[2:-2, 2:-2]].any()


def test_the_head_lies_on_the_subject():
    for seed in SEEDS:
        drawn = random_rendering(seed)
        x, y, radius = head_of(drawn.class_name, drawn.scene, seed)
        down, across = np.mgrid[:128, :128]
        disc = (across - 128 * x) ** 2 + (down - 128 * y) ** 2 < (128 * radius) ** 2
        assert drawn.mask[disc].mean() > 0.4 and 0.1 < (drawn.mask & disc).sum() / drawn.mask.sum()


def test_the_world_is_the_one_that_the_shipped_weights_know():
    for path in (pack.READER, pack.FLOW_CHECKPOINT):
        with safe_open(path, "pt") as shipped:
            assert shipped.metadata()["kindred.world"] == world_hash(), path.name


@pytest.mark.parametrize("kind", [*WHOLE, *FAULTS])
def test_a_collage_is_a_function_of_its_seed(kind):
    one, again, other = (collage(kind, seed) for seed in (5, 5, 6))
    assert one.shape == (128, 128, 3) and one.dtype == np.uint8
    assert np.array_equal(one, again) and not np.array_equal(one, other)


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "missing"])
def test_a_fault_changes_the_picture_where_the_subject_or_its_copy_is(kind):
    for seed in SEEDS:
        drawn = random_rendering(seed)
        changed = (collage(kind, seed) != drawn.image).any(2)
        assert changed.sum() > 0.1 * drawn.mask.sum(), (kind, seed)


def test_of_a_half_a_part_is_left_and_no_more():
    for seed in SEEDS:
        drawn = random_rendering(seed)
        left = (collage("half", seed) != backdrop(drawn.class_name, drawn.scene, seed)).any(2)
        assert 0.2 < left.sum() / drawn.mask.sum() < 0.8, seed


def test_half_of_the_training_is_whole_and_every_fault_is_met():
    kinds = [kind_of(seed) for seed in range(2000)]
    assert 0.46 < sum(kind in WHOLE for kind in kinds) / 2000 < 0.54
    assert all(100 < kinds.count(kind) < 240 for kind in FAULTS)


def test_a_cutting_lies_where_it_is_laid():
    drawn = render(random_rendering(1).identity, "cat", "beach", 4)
    piece, box = cut(drawn)
    assert np.array_equal(piece.at(*box[:2]), drawn.mask) and piece.area() == drawn.mask.sum()
    assert piece.at(box[0] + 128, box[1]).sum() == 0


# the head ----------------------------------------------------------------------------------------------------------------------


def test_the_shipped_head_tells_faults_from_whole_subjects():
    """On held-out pictures, which no training sees; the figures over more of them are on the miniature's card."""
    told = train_whole.verdicts(load_reader(), 40, first=700)
    assert told["balanced"] >= 0.95 and told["moved"] >= 0.8, told
    assert told["missing"] >= 0.95 and told["twice"] >= 0.9 and told["inset"] >= 0.9, told


def test_it_learns_without_moving_what_it_shares_with_the_other_heads():
    reader = Reader()
    reader(torch.rand(2, 3, 64, 64))["whole"].sum().backward()
    moved = {name for name, p in reader.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved and all(name.startswith("whole.") for name in moved)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(train_whole, "SAVE_EVERY", 2)
    return Run(tmp_path, CPU)


def learn(run: Run, steps: int) -> None:
    train_whole.train_whole(run, steps, batch=4, count=8, tripped=0)


def test_a_killed_training_goes_on_as_if_nothing_had_been(run, monkeypatch):
    learn(run, 4)
    path, real = run.folder / "whole.pt", train_whole.save
    whole = load(path, CPU)
    path.unlink()

    def die(place: Path, state: dict) -> None:
        real(place, state)
        if state["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_whole, "save", die)
    with pytest.raises(KeyboardInterrupt):
        learn(run, 4)
    monkeypatch.setattr(train_whole, "save", real)
    assert load(path, CPU)["step"] == 2
    learn(run, 4)
    again = load(path, CPU)
    for part in ("model", "raw"):
        assert all(torch.equal(again[part][name], value) for name, value in whole[part].items())


def test_packing_the_head_leaves_the_rest_of_the_reader_to_the_bit(run, tmp_path, monkeypatch):
    before, shipped = load_file(pack.READER), pack.READER.read_bytes()
    (copy := tmp_path / "reader.safetensors").write_bytes(shipped)
    monkeypatch.setattr(pack, "READER", copy)
    pack.pack_reader(run.folder)  # nothing has begun in the folder
    assert copy.read_bytes() == shipped
    learn(run, 2)
    pack.pack_reader(run.folder)
    after, state = load_file(copy), load(run.folder / "whole.pt", CPU)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if name.startswith("whole."):
            assert torch.equal(after[name], state["model"][name[6:]].half()), name
        else:
            assert torch.equal(after[name], value), name
    with safe_open(copy, "pt") as file:
        assert file.metadata()["kindred.whole_steps"] == "2" and file.metadata()["kindred.steps"]
