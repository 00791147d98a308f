"""Laws of models/files.py: whole or absent, on the disk before it has its name, and a full disk in words."""

from __future__ import annotations

import errno
import os
import re
import stat

import pytest
import torch
from kindred.models import files
from kindred.models.files import whole
from safetensors.torch import save_file

PLACE = "cat.safetensors"


def save(path, content: bytes = b"new", tensors=()) -> None:
    with whole(path, tensors) as partial:
        partial.write_bytes(content)


def test_bytes_and_then_the_name_are_flushed(tmp_path, monkeypatch) -> None:
    """fsync of the temporary file, the rename, fsync of the folder: in this order, or a power cut may leave an empty file."""
    told, sync, replace = [], os.fsync, os.replace

    def fsync(handle: int) -> None:
        told.append(
            "folder"
            if stat.S_ISDIR(os.fstat(handle).st_mode)
            else f"{os.fstat(handle).st_size} bytes"
        )
        sync(handle)

    def rename(source, target) -> None:
        told.append(f"{source.parent.name}/{source.name} -> {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    save(tmp_path / PLACE)
    assert re.fullmatch(
        rf"\.{re.escape(PLACE)}\.{os.getpid()}\d{{8}}\.partial/file\.partial -> {re.escape(PLACE)}",
        told.pop(1),
    )
    assert told == ["3 bytes", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has other rights")
def test_who_may_read_is_what_the_system_says_and_not_what_a_library_does(tmp_path) -> None:
    """safetensors 0.8 makes its files the owner's alone: a folder of models for several users would have strangers' files in it."""
    with whole(tmp_path / PLACE) as partial:
        save_file({"a": torch.zeros(2)}, partial)
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / PLACE).stat().st_mode) == stat.S_IMODE(
        (tmp_path / "other").stat().st_mode
    )


def test_a_folder_that_cannot_be_flushed_is_no_fault(tmp_path, monkeypatch) -> None:
    opened = os.open

    def refuse(name, *given) -> int:
        if os.path.isdir(name):
            raise PermissionError(errno.EACCES, "Windows")
        return opened(name, *given)

    monkeypatch.setattr(files.os, "open", refuse)
    save(tmp_path / PLACE)
    assert (tmp_path / PLACE).read_bytes() == b"new"


def test_what_a_killed_process_left_of_this_name_goes_and_nothing_else(tmp_path) -> None:
    name = "cat[1].safetensors"
    left = [f".{name}.{n}.partial" for n in (1, os.getpid(), 999_999)]
    stays = [f".{PLACE}.1.partial", ".cat1.safetensors.1.partial", f".{name}", "x.partial"]
    for file in left + stays:
        (tmp_path / file).write_bytes(b"half")
    (tmp_path / f".{name}.2.partial").mkdir()
    (tmp_path / f".{name}.2.partial" / ".tmpAbc").write_bytes(b"half")
    save(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, *stays])


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_full_disk_names_the_folder_and_what_was_needed(tmp_path, monkeypatch, older, at) -> None:
    path, room = tmp_path / PLACE, []
    if older:
        path.write_bytes(b"older")

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    def usage(folder):
        room.append([p.name for p in folder.iterdir()])
        return type("Usage", (), {"free": 1_200_000})

    monkeypatch.setattr(files.shutil, "disk_usage", usage)
    with (
        pytest.raises(OSError) as said,
        whole(path, [torch.zeros(1_000_000), torch.zeros(50_000, dtype=torch.float16)]) as partial,
    ):
        partial.write_bytes(b"half")
        full() if at == "write" else monkeypatch.setattr(os, at, full)
    monkeypatch.undo()
    assert str(said.value) == (
        f"{PLACE} could not be written to {tmp_path}: No space left on device; it takes 4.1 MB and 1.2 MB are free "
        "there"
    )
    assert room == [[PLACE] * older] == [[p.name for p in tmp_path.iterdir()]], (
        "the room is told after the half is gone"
    )
    assert not older or path.read_bytes() == b"older"


def test_a_folder_that_is_gone_is_named(tmp_path) -> None:
    with pytest.raises(
        OSError, match=f"{PLACE} could not be written to .*gone: No such file or directory$"
    ):
        save(tmp_path / "gone" / PLACE)


@pytest.mark.parametrize(
    "stop", [RuntimeError("CUDA error"), KeyboardInterrupt(), ValueError("nothing to write")]
)
def test_what_is_no_fault_of_the_disk_comes_through_and_leaves_nothing(tmp_path, stop) -> None:
    with pytest.raises(type(stop)) as said, whole(tmp_path / PLACE) as partial:
        partial.write_bytes(b"half")
        raise stop
    assert said.value is stop and not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOTDIR, errno.ESTALE])
@pytest.mark.parametrize("reader", ["load_reference", "load_concept_encoder", "read_state"])
def test_a_file_that_the_system_does_not_give_is_not_called_torn(
    tmp_path, monkeypatch, reader, code
) -> None:
    """For a training's state the advice would be to remove it."""
    from pathlib import Path

    from kindred.models.concept.encoder import load_concept_encoder
    from kindred.models.concept.training import read_state
    from kindred.models.reference.file import load_reference

    path = tmp_path / PLACE
    path.write_bytes(b"whole")

    def refuse(*given, **more):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        OSError, match=f"{PLACE} could not be read in .*: {os.strerror(code)}"
    ) as said:
        {
            "load_reference": load_reference,
            "load_concept_encoder": load_concept_encoder,
            "read_state": read_state,
        }[reader](path)
    assert said.value.errno == code and "torn" not in str(said.value)


@pytest.mark.parametrize(
    "code, said",
    [
        (errno.ENOSPC, "make room there"),
        (errno.EROFS, "choose a drawer"),
        (errno.EACCES, "let ComfyUI write there, or choose a drawer"),
        (errno.ENOENT, "see that the folder is there"),
        (errno.EIO, "see that the folder is there"),
        (errno.ENAMETOOLONG, "shorter name"),
    ],
)
def test_the_remedy_is_that_of_the_fault(code, said) -> None:
    assert said in files.remedy(OSError(code, os.strerror(code)), "a drawer")


def test_a_fault_without_a_number_is_a_disk_whose_library_does_not_say_why() -> None:
    assert files.remedy(OSError("inline_container"), "a drawer") == "make room there"
