"""Save Reference and Load Reference: a loaded reference draws what the unsaved one drew; nothing is overwritten, nothing is missed."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import execution
import folder_paths
import pytest
import torch
from kindred.models.identity import tell_key
from kindred.models.network.call import Half
from kindred.models.reference import file as bank_file
from kindred.models.reference.bank import BANK_VERSION
from kindred.models.reference.file import load_reference, save_reference
from kindred.nodes.host import REFERENCES, reference_files, reference_path
from kindred.nodes.library import LoadReference, SaveReference
from networks import random_model
from safetensors.torch import load_file, save_file
from studio import (
    STEPS,
    bank_of,
    capture,
    fresh_encoder,
    inject,
    invert,
    of_bank,
    plain,
    sample,
)

MODEL = random_model("tiny")
LAW = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def out():
    """The output folder's kindred folder, gone before and after; models/kindred_references likewise."""
    places = (
        Path(folder_paths.get_output_directory()) / "kindred",
        Path(folder_paths.models_dir) / REFERENCES,
    )
    assert folder_paths.get_folder_paths(REFERENCES)[:2] == [str(places[1]), str(places[0])]
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
    folder_paths.filename_list_cache.pop(REFERENCES, None)
    yield places[0]
    for place in places:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def folder():
    place = Path(folder_paths.models_dir) / REFERENCES
    place.mkdir(parents=True, exist_ok=True)
    return place


@torch.inference_mode()
def save(bank=None, prefix: str = "kindred/reference") -> str:
    """-> what the node shows."""
    made = SaveReference.execute(bank or bank_of(), prefix)
    assert not made.result
    (text,) = made.ui.as_dict()["text"]
    return text


@torch.inference_mode()
def load(name: str):
    return LoadReference.execute(name).result[0]


def refuse(act, *said: str) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, said))):
        act()


# the same reference ----------------------------------------------------------------------------------------------------------


@LAW(
    "how",
    [
        "one pass",
        "both halves",
        "from an inversion",
        "edit-friendly",
        "a mask",
        "two photos",
        "half precision",
        "live",
    ],
)
def test_a_loaded_reference_draws_the_same_picture(how, out):
    """Also where it is read live, at sigmas that it does not hold: then its prompts and latents are asked."""
    bank = {
        "one pass": lambda: capture(MODEL)[0],
        "both halves": bank_of,
        "live": bank_of,
        "from an inversion": lambda: capture(MODEL, inversion=invert(MODEL)[0])[0],
        "edit-friendly": lambda: capture(
            MODEL, inversion=invert(MODEL, method="edit-friendly ddpm")[0]
        )[0],
        "a mask": lambda: capture(MODEL, mask=(torch.arange(64) < 30).float().expand(1, 64, 64))[0],
        "two photos": lambda: bank_of(pictures=2),
        "half precision": lambda: capture(MODEL, precision="float16")[0],
    }[how]()
    before = of_bank(bank)
    save(bank)
    loaded = load("reference_00001_.safetensors")
    assert of_bank(loaded) == before == of_bank(bank)
    steps = STEPS + 2 if how == "live" else STEPS
    halves = {"halves": "both"} if how in ("both halves", "live") else {}
    ours, theirs = (sample(inject(MODEL, b, 2.0, **halves), steps=steps) for b in (loaded, bank))
    assert torch.equal(ours, theirs) and not torch.equal(ours, plain(steps=steps))


def test_the_order_of_the_subjects_words_comes_back():
    bank = bank_of()
    save(bank)
    prompt, loaded = (
        bank.prompts[Half.COND],
        load("reference_00001_.safetensors").prompts[Half.COND],
    )
    assert (
        loaded.subject == prompt.subject
        and list(loaded.extras) == list(prompt.extras)
        and loaded.text == prompt.text
    )


def test_another_model_is_refused_after_loading_as_before():
    save(bank_of())
    other = random_model("tiny_v")
    refuse(
        lambda: inject(other, load("reference_00001_.safetensors")),
        "Masked Self-Attn Inject: the reference was made with model",
        bank_of().model_key,
        "but the model given is",
    )


# what is written -------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(out):
    """Numbered as the host numbers what it saves, whatever lies there."""
    first = save(bank_of())
    assert (
        first
        == f"kindred/reference_00001_.safetensors, {(out / 'reference_00001_.safetensors').stat().st_size / 1e6:.1f} MB"
    )
    before = (out / "reference_00001_.safetensors").read_bytes()
    assert save(bank_of(pictures=2)).startswith("kindred/reference_00002_.safetensors")
    (out / "reference_00007_.png").write_bytes(b"a picture")
    assert save(bank_of()).startswith("kindred/reference_00008_.safetensors")
    assert (
        (out / "reference_00001_.safetensors").read_bytes()
        == before
        == (out / "reference_00008_.safetensors").read_bytes()
    )
    assert sorted(p.name for p in out.iterdir()) == [
        f"reference_0000{n}_{end}"
        for n, end in ((1, ".safetensors"), (2, ".safetensors"), (7, ".png"), (8, ".safetensors"))
    ]


@LAW("prefix", ["kindred/reference/", "kindred/", "kindred/sub/../cat"])
def test_nothing_is_overwritten_where_the_host_counts_wrongly(prefix):
    shown = {save(prefix=prefix).split(",")[0] for _ in range(3)}
    top = Path(folder_paths.get_output_directory())
    assert len(shown) == 3 and all((top / name).is_file() for name in shown)
    for name in shown:
        (top / name).unlink()


def test_a_prefix_outside_of_the_listed_folders_says_where_to_put_it(folder):
    shown = save(prefix="elsewhere/cat")
    assert (
        shown.startswith("elsewhere/cat_00001_.safetensors, ")
        and "move it into models/kindred_references" in shown
    )
    written = Path(folder_paths.get_output_directory()) / "elsewhere" / "cat_00001_.safetensors"
    assert written.name not in reference_files()
    shutil.move(written, folder / "cat.safetensors")
    assert offered() == ["cat.safetensors"] and of_bank(load("cat.safetensors")) == of_bank(
        bank_of()
    )
    written.parent.rmdir()


@LAW("prefix", ["../out", "kindred/../../out", "{}/out"])
def test_a_prefix_that_leads_out_is_refused_as_the_host_does(prefix, tmp_path):
    above = Path(folder_paths.get_output_directory()).parent
    before = sorted(above.iterdir())
    with pytest.raises(Exception, match="Saving image outside the output folder is not allowed"):
        save(prefix=prefix.format(tmp_path))
    assert sorted(above.iterdir()) == before and not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_leaves_nothing(out, monkeypatch):
    def full(tensors, to, metadata):
        Path(to).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    save(bank_of())
    before = (out / "reference_00001_.safetensors").read_bytes()
    monkeypatch.setattr(bank_file, "save_file", full)
    with pytest.raises(
        OSError,
        match="Save Reference: reference_00002_.safetensors could not be .*No space left.*make room",
    ) as said:
        save(bank_of())
    needed = (out / "reference_00001_.safetensors").stat().st_size / 1e6
    assert str(out) in str(said.value) and f"it takes {needed:.1f} MB and " in str(said.value)
    assert [p.name for p in out.iterdir()] == ["reference_00001_.safetensors"]
    assert (out / "reference_00001_.safetensors").read_bytes() == before


def test_a_reference_that_cannot_be_loaded_is_not_saved(out):
    refuse(
        lambda: save(replace(bank_of(), version=BANK_VERSION + 1)),
        f"Save Reference: the reference is of version {BANK_VERSION + 1}, but this Kindred writes version {BANK_VERSION}",
    )
    assert not list(out.iterdir())


# what is listed --------------------------------------------------------------------------------------------------------------


def offered() -> list[str]:
    """What the node lists, less what the pack itself ships."""
    return less_shipped(
        next(i for i in LoadReference.define_schema().inputs if i.id == "file").options
    )


def less_shipped(names) -> list[str]:
    return [
        name
        for name in names
        if not any(
            Path(place, name).is_file() for place in folder_paths.get_folder_paths(REFERENCES)[2:]
        )
    ]


def queued(name: str) -> tuple[bool, dict]:
    """The host's own validation of a prompt that loads `name` and saves it again."""
    prompt = {
        "1": {"class_type": "KindredLoadReference", "inputs": {"file": name}},
        "2": {
            "class_type": "KindredSaveReference",
            "inputs": {"reference": ["1", 0], "filename_prefix": "kindred/again"},
        },
    }
    valid, error, _, node_errors = asyncio.run(execution.validate_prompt("a test", prompt, None))
    return valid, node_errors


def test_a_file_written_while_the_server_runs_is_found(out, folder):
    """Also where the listing of before is cached, and the folder's time does not tell."""
    name = "reference_00001_.safetensors"
    assert offered() == less_shipped(folder_paths.get_filename_list(REFERENCES)) == []
    valid, errors = queued(name)
    assert not valid and name in str(errors)
    save(bank_of())
    assert offered() == [name] and queued(name) == (True, {})
    then = out.stat().st_mtime_ns
    save(bank_of())
    os.utime(out, ns=(then, then))  # a clock of two seconds, as on some disks
    assert (
        offered() == [name, "reference_00002_.safetensors"]
        and queued("reference_00002_.safetensors")[0]
    )
    save_reference(bank_of(), folder / "sent.safetensors")
    assert "sent.safetensors" in offered() and queued("sent.safetensors")[0]


def test_a_cleaned_output_folder_is_an_empty_list(out):
    save(bank_of())
    assert less_shipped(folder_paths.get_filename_list(REFERENCES)) == offered() != []
    shutil.rmtree(out)
    with pytest.raises(FileNotFoundError):
        folder_paths.get_filename_list(REFERENCES)  # which is why we ask the disk
    assert offered() == [] and not queued("reference_00001_.safetensors")[0]


def test_only_safetensors_are_listed(out):
    save(bank_of())
    for name in ("cat.png", ".reference_00002_.safetensors.1.partial", "cat.pt", "notes.txt"):
        (out / name).write_bytes(b"x")
    (out / "sub").mkdir()
    save(prefix="kindred/sub/dog")
    assert offered() == [
        "reference_00001_.safetensors",
        os.path.join("sub", "dog_00001_.safetensors"),
    ]
    assert of_bank(load(os.path.join("sub", "dog_00001_.safetensors"))) == of_bank(bank_of())


def test_a_name_of_two_files_is_refused(out, folder):
    """The host would take the first folder's, and so another subject than the one just saved."""
    save(bank_of())
    save_reference(bank_of(pictures=2), folder / "reference_00001_.safetensors")
    refuse(
        lambda: load("reference_00001_.safetensors"),
        "Load Reference: reference_00001_.safetensors is the name of 2 files: ",
        "Rename all but one",
    )


@LAW("name", ["gone.safetensors", "sub/gone.safetensors"])
def test_a_file_that_is_gone_is_named(name):
    with pytest.raises(FileNotFoundError, match=name):
        load(name)


def test_a_name_cannot_lead_out(out, folder):
    outside = folder.parent / "outside.safetensors"
    save_reference(bank_of(), outside)
    with pytest.raises(FileNotFoundError):
        load("../outside.safetensors")
    outside.unlink()


def test_a_file_replaced_under_the_same_name_is_another_reference(folder):
    file = folder / "cat.safetensors"
    save_reference(bank_of(), file)
    mark = LoadReference.fingerprint_inputs(file.name)
    assert LoadReference.fingerprint_inputs(file.name) == mark
    save_reference(bank_of(seed=4), file)
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 10**7))
    assert LoadReference.fingerprint_inputs(file.name) != mark and of_bank(
        load(file.name)
    ) == of_bank(bank_of(seed=4))


# what is refused -------------------------------------------------------------------------------------------------------------


@LAW("share", [0.0, 0.1, 0.5, 0.99])
def test_a_torn_file(share, out, folder):
    save(bank_of())
    whole = reference_path("reference_00001_.safetensors").read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[: int(share * len(whole))])
    refuse(lambda: load("torn.safetensors"), "Load Reference: torn.safetensors is torn", "again")
    assert of_bank(load("reference_00001_.safetensors")) == of_bank(bank_of())


def test_files_of_other_kinds(folder):
    fresh_encoder().save(folder / "encoder.safetensors")
    refuse(
        lambda: load("encoder.safetensors"),
        "Load Reference: encoder.safetensors is of format kindred.concept_encoder, but a "
        "reference is of format kindred.reference",
        "Choose a file that Save Reference wrote",
    )
    save_file({"lora.weight": torch.ones(2)}, folder / "lora.safetensors")
    refuse(lambda: load("lora.safetensors"), "Load Reference: lora.safetensors is no reference")


def test_another_version(folder, monkeypatch):
    newer = bank_file.TRANSFORMER_VERSION + 1
    monkeypatch.setattr(bank_file, "BANK_VERSION", newer)
    save_reference(replace(bank_of(), version=newer), folder / "newer.safetensors")
    monkeypatch.undo()
    refuse(
        lambda: load("newer.safetensors"),
        f"Load Reference: newer.safetensors is a reference of version {newer}, but this "
        f"Kindred reads versions {BANK_VERSION} and {bank_file.TRANSFORMER_VERSION}",
        "Update Kindred",
    )


def test_nan_features(folder):
    file = folder / "nan.safetensors"
    save_reference(bank_of(), file)
    with bank_file.safe_open(file, "pt") as held:
        metadata = held.metadata()
    tensors = load_file(file)
    tensors["features.cond"][0, 0] = float("nan")
    save_file(tensors, file, metadata)
    refuse(
        lambda: load("nan.safetensors"),
        "Load Reference: nan.safetensors",
        "the features of the cond half hold 1 NaN",
        "again",
    )


def test_a_file_is_little_more_than_its_features(folder):
    bank = bank_of()
    save_reference(bank, folder / "a.safetensors")
    key = len(tell_key(bank.model_key))
    assert key < 24000  # of a model of any size
    held = [
        bank.maps,
        bank.trajectory.latents,
        bank.trajectory.sigmas,
        *bank.masks.values(),
        *(p.cross for p in bank.prompts.values()),
    ]
    rest = sum(x.numel() * x.element_size() for x in held) + sum(
        x.numel() * x.element_size()
        for p in bank.prompts.values()
        for x in p.extras.values()
        if isinstance(x, torch.Tensor)
    )
    assert 0 <= (folder / "a.safetensors").stat().st_size - bank.bytes - rest - key < 6000
    assert load_reference(folder / "a.safetensors").bytes == bank.bytes


# what a prefix says ------------------------------------------------------------------------------------------------------------


def test_a_date_in_a_prefix_is_filled_in_as_the_canvas_does(out):
    """The canvas replaces it before it sends a prompt; over the API nobody else would."""
    from datetime import datetime

    from kindred.nodes.host.references import dated

    now = datetime(2026, 3, 4, 5, 6, 7)
    assert dated("%date:yyyy-MM-dd%/%date:hhmmss%", now) == "2026-03-04/050607"
    assert dated("%date:yy.M.d h:m:s% 100 %width%", now) == "26.3.4 5:6:7 100 %width%"
    assert re.fullmatch(
        r"kindred/day \d{4}_00001_\.safetensors, .*", save(bank_of(), "kindred/day %date:yyyy%")
    )


@LAW("prefix", ["", " ", ".", "./", "/."])
def test_an_empty_prefix_saves_no_hidden_file(prefix):
    before = set(Path(folder_paths.get_output_directory()).rglob("*"))
    with pytest.raises(
        Exception, match="filename_prefix is .*Give a short name|outside the output folder"
    ):
        save(bank_of(), prefix)
    assert set(Path(folder_paths.get_output_directory()).rglob("*")) == before


@LAW(
    "code, said",
    [
        (errno.EROFS, "Read-only file system.*--output-directory"),
        (errno.ENOTDIR, "Not a directory.*move the file"),
        (errno.EACCES, "Permission denied.*let ComfyUI write there"),
        (errno.ENOSPC, "No space left on device.*make room there"),
    ],
)
@LAW("at", ["the folder", "the file"])
def test_a_fault_of_the_system_is_told_as_what_it_is(code, said, at, out, monkeypatch):
    def refuse(*given, **more):
        raise OSError(code, os.strerror(code), str(out))

    if at == "the folder":
        monkeypatch.setattr(folder_paths.os, "makedirs", refuse)
        monkeypatch.setattr(folder_paths.os, "listdir", refuse)
    else:
        monkeypatch.setattr(bank_file, "save_file", refuse)
    with pytest.raises(OSError, match=f"^Save Reference: .*kindred.*{said}"):
        save(bank_of())
    monkeypatch.undo()
    assert not list(out.rglob("*"))


def test_a_name_that_is_too_long_is_the_users(out):
    with pytest.raises(
        ValueError, match="filename_prefix is .*no file can be called.*Give a short name"
    ):
        save(bank_of(), "kindred/" + "x" * 300)
