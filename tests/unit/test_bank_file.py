"""Laws of a saved reference: what comes back is what was saved, bit for bit, and a save that fails leaves the older file."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kindred.models.reference import file as bank_file
from kindred.models.reference.bank import BANK_VERSION, Half
from kindred.models.reference.file import TRANSFORMER_VERSION, load_reference, save_reference
from safetensors.torch import load_file
from small_banks import (
    BANKS,
    EMPTY,
    LAYERS,
    R,
    T,
    anchor_bank,
    described,
    flow_bank,
    masks,
    photo_bank,
    rand,
    rewrite,
    same,
)

LAW = pytest.mark.parametrize
SHIPPED = Path(__file__).parents[2] / "miniature/weights/references/kindred_story.safetensors"


@pytest.fixture
def file(tmp_path) -> Path:
    save_reference(anchor_bank(), tmp_path / "cat.safetensors")
    return tmp_path / "cat.safetensors"


# round trips -----------------------------------------------------------------------------------------------------------------


@LAW("name", BANKS)
def test_what_comes_back_is_what_was_saved(name, tmp_path) -> None:
    bank = BANKS[name]()
    before = BANKS[name]()
    save_reference(bank, tmp_path / "a.safetensors")
    same(bank, before)
    loaded = load_reference(tmp_path / "a.safetensors")
    same(bank, loaded)
    assert loaded.bytes == bank.bytes and loaded.blocks == bank.blocks and loaded.pictures == R
    for half in Half:
        for step in range(T):
            same(
                bank.tokens(half, step, torch.device("cpu"), torch.float32),
                loaded.tokens(half, step, torch.device("cpu"), torch.float32),
            )


@LAW("name", ["a photo", "anchors"])
def test_saving_again_gives_the_same_bytes(name, tmp_path) -> None:
    """Twice the same bank, and the loaded one: nothing of time, folder or order of memory is in a file."""
    (tmp_path / "other").mkdir()
    first, second, third = (
        tmp_path / n for n in ("a.safetensors", "other/b.safetensors", "c.safetensors")
    )
    save_reference(BANKS[name](), first)
    save_reference(BANKS[name](), second)
    save_reference(load_reference(first), third)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    assert str(tmp_path).encode() not in first.read_bytes()


def test_a_file_has_few_tensors(file) -> None:
    """However many steps: rows lie in one tensor."""
    names = set(load_file(file))
    assert (
        len(names) < 30
        and {"features.cond", "anchors.kept.4x6", "mask.2x3", "trajectory.latents"} <= names
    )
    assert (
        load_file(file)["anchors.kept.4x6"].dtype == torch.int32
        and load_file(file)["mask.4x6"].dtype == torch.bool
    )


def test_views_and_shared_memory_are_saved(tmp_path) -> None:
    """A mask for all pictures is expanded, rows are views of one tensor, and both halves may be the same."""
    bank = photo_bank()
    one = masks()[4, 6][:1].expand(R, -1, -1)
    shared = torch.cat([rand(T, 90, seed=9)] * 2, 1)[:, ::2]
    n = sum(
        int(({(4, 6): one, (2, 3): masks()[2, 3]}[layer.grid]).sum()) * layer.channels
        for layer in LAYERS
    )
    bank = replace(
        bank,
        masks={(4, 6): one, (2, 3): masks()[2, 3]},
        features={half: shared[:, :n] for half in Half},
    )
    save_reference(bank, tmp_path / "a.safetensors")
    same(bank, load_reference(tmp_path / "a.safetensors"))


def test_a_loaded_bank_does_not_need_its_file(file) -> None:
    """It may be overwritten in place or deleted while a server holds the bank."""
    loaded = load_reference(file)
    with file.open("r+b") as held:
        held.seek(0)
        held.write(b"\xff" * file.stat().st_size)
    same(anchor_bank(), loaded)
    file.unlink()
    same(anchor_bank(), loaded)


def test_a_share_of_the_tokens_comes_back(tmp_path) -> None:
    whole = photo_bank()
    thin = replace(whole, share=0.5)
    half = replace(
        thin,
        features={
            half: torch.cat(
                [
                    torch.zeros(T, len(thin.kept[each.grid]) * each.channels)
                    for each in whole.layers
                ],
                1,
            )
            for half in Half
        },
    )
    save_reference(half, tmp_path / "a.safetensors")
    loaded = load_reference(tmp_path / "a.safetensors")
    assert (
        loaded.share == 0.5
        and loaded.loudness == half.loudness
        and max(loaded.loudness.values()) > 1
        and loaded.bytes == half.bytes
    )


def test_a_file_from_before_shares_holds_all_tokens(file) -> None:
    rewrite(file, {k: v for k, v in described(file).items() if k != "share"})
    assert load_reference(file).share == 1.0


def test_a_flow_is_told_by_its_version(tmp_path) -> None:
    """A Kindred that knows diffusions alone reads version 1 and says of any other that it has to be updated."""
    save_reference(flow_bank(8.0), tmp_path / "flow.safetensors")
    save_reference(photo_bank(), tmp_path / "photo.safetensors")
    flow, photo = (
        described(tmp_path / "flow.safetensors"),
        described(tmp_path / "photo.safetensors"),
    )
    assert flow["version"] == TRANSFORMER_VERSION == 2 and flow["trajectory"]["flow"] == {
        "scale": 8.0
    }
    assert photo["version"] == BANK_VERSION == 1 and "flow" not in photo["trajectory"]


def test_a_diffusions_file_is_written_as_ever(tmp_path) -> None:
    """The subject that the pack ships was saved before there were flows, and before token shares: nothing else is told of it now."""
    again = tmp_path / "again.safetensors"
    save_reference(load_reference(SHIPPED), again)
    assert described(again) == described(SHIPPED) | {"share": 1.0}
    same(load_file(SHIPPED), load_file(again))


# what fails ------------------------------------------------------------------------------------------------------------------


@LAW("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@LAW("older", [True, False])
def test_a_save_that_fails_leaves_the_older_file(tmp_path, monkeypatch, stop, older) -> None:
    path = tmp_path / "cat.safetensors"
    if older:
        save_reference(photo_bank(), path)
    before = path.read_bytes() if older else None

    def half(tensors, to, metadata) -> None:
        Path(to).write_bytes(b"half of it")
        raise stop

    monkeypatch.setattr(bank_file, "save_file", half)
    with pytest.raises(type(stop)):
        save_reference(anchor_bank(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["cat.safetensors"] * older
    assert not older or path.read_bytes() == before


def test_a_full_disk_is_an_oserror(file) -> None:
    resource = pytest.importorskip("resource")
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="cat.safetensors"):
            save_reference(photo_bank(), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


def test_what_could_not_be_loaded_is_not_saved(tmp_path) -> None:
    bank = photo_bank()
    bank.features[Half.COND][1, 2] = float("nan")
    with pytest.raises(
        ValueError,
        match="cannot be saved: the features of the cond half hold 1 NaN or infinite values",
    ):
        save_reference(bank, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=f"of version 0, but this Kindred writes version {BANK_VERSION}"
    ):
        save_reference(replace(photo_bank(), version=0), tmp_path / "a.safetensors")
    made = anchor_bank()
    mixed = replace(
        made, anchors=replace(made.anchors, outputs=[torch.ones(15), torch.ones(15).half(), EMPTY])
    )
    with pytest.raises(
        ValueError,
        match="cannot be saved: anchors.outputs holds rows of .*float16.*float32.*Make it again",
    ):
        save_reference(mixed, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
