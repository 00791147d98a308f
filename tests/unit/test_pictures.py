"""Laws of a folder of pictures as training examples: one broken among many, a kill at any moment, several processes."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from kindred.models.concept.config import Preprocessing
from pictures import NoPictures, PictureFolder, load_examples, prepare
from PIL import Image

SIDE, SMALL = 32, Preprocessing(16)
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")


class Vae:
    """Counts what it encodes; latents [b 2 4 4] tell the pictures apart."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen, self.stop_after = 0, stop_after

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert (
            images.shape[1:] == (SIDE, SIDE, 3)
            and images.dtype == torch.float32
            and 0 <= images.min()
            and images.max() <= 1
        )
        if images.any():
            self.seen += len(images)
            if self.stop_after is not None and self.seen > self.stop_after:
                raise KeyboardInterrupt
        return torch.nn.functional.adaptive_avg_pool2d(images.movedim(-1, 1), 4)[:, :2] * 4 - 2


def make(
    folder: Path,
    vae=None,
    cache: str = "cache",
    model: str = "model",
    prompt: str = "a photo",
    **how,
) -> list[str]:
    return prepare(
        PictureFolder(folder, prompt),
        folder.parent / cache,
        SIDE,
        SMALL,
        model,
        vae or Vae(),
        **how,
    )


def paint(file: Path, colour=(200, 40, 40), size=(20, 20), mode: str = "RGB", **how) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(file, **how)
    return file


def tones(count: int) -> list[tuple[int, int, int]]:
    return [(10 + 20 * i, 250 - 20 * i, 90) for i in range(count)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten pictures of ten tones, ten subjects."""
    for i, tone in enumerate(tones(10)):
        paint(tmp_path / "set" / f"{i}.png", tone)
    return tmp_path / "set"


def rows(examples) -> list[list[int]]:
    """The tone each picture has in the tower's pixels."""
    return [examples.pixels[i, 0, 0].tolist() for i in range(len(examples))]


# a folder --------------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_was_painted(folder) -> None:
    vae = Vae()
    assert make(folder, vae) == [] and vae.seen == 10
    train, held = load_examples(folder.parent / "cache", 0)
    assert (
        held is None
        and rows(train) == [list(t) for t in tones(10)]
        and list(train.prompts) == ["a photo"] * 10
    )
    assert (
        train.latents.dtype == torch.float16
        and train.pixels.dtype == torch.uint8
        and train.latents.shape == (10, 2, 4, 4)
    )
    assert list(train.subjects) == list(range(10))
    image = torch.tensor(tones(10)[3]) / 255
    torch.testing.assert_close(
        train.latents[3].float(),
        (image[:2] * 4 - 2)[:, None, None].expand(2, 4, 4),
        rtol=0,
        atol=2e-3,
    )


def broken_files(folder: Path) -> list[Path]:
    whole = paint(folder / "whole.jpg", (5, 5, 5), (64, 64)).read_bytes()
    png = paint(folder / "whole.png", (6, 6, 6), (64, 64)).read_bytes()
    contents = {
        "00 empty.png": b"",
        "4 cut.jpg": whole[: len(whole) // 2],
        "cut.png": png[: len(png) - 30],
        "text.jpg": b"<html>404</html>",
        "wrong.png": png[:40] + b"\xff" * 30 + png[70:],
        "head.gif": b"GIF89a",
        "z.webp": b"RIFF\x10\0\0\0WEBPVP8 ",
        "tiff.tif": b"II*\0\xff\xff\xff\xff",
        "bmp.bmp": b"BM" + b"\xff" * 60,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def test_broken_files_are_named_skipped_and_counted(folder) -> None:
    broken = broken_files(folder)
    (folder / "notes.md").write_text("no picture")
    assert sorted(make(folder)) == sorted(map(str, broken))
    train, _ = load_examples(folder.parent / "cache", 0)
    assert rows(train) == [list(t) for t in tones(10)] + [[5, 5, 5], [6, 6, 6]] and list(
        train.subjects
    ) == list(range(12))
    assert (train.latents.float().flatten(2).std(2) < 1e-2).all() and len(
        {tuple(r.flatten().tolist()) for r in train.latents}
    ) == 12
    vae = Vae()
    assert sorted(make(folder, vae)) == sorted(map(str, broken)) and vae.seen == 0


def test_a_bomb_is_a_broken_file(folder, monkeypatch) -> None:
    paint(folder / "bomb.png", size=(300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert make(folder) == [str(folder / "bomb.png")]


@pytest.mark.parametrize("problem", [OSError(5, "Input/output error"), MemoryError()])
def test_a_disk_or_memory_that_fails_is_no_broken_picture(folder, monkeypatch, problem) -> None:
    """Named so, a picture would be left out of every later run."""

    def fails(file: Path) -> None:
        raise problem

    with monkeypatch.context() as patched, pytest.raises(type(problem)):
        patched.setattr(pictures, "read_picture", fails)
        make(folder)
    assert make(folder) == []


def test_a_decoder_may_raise_anything(folder, monkeypatch) -> None:
    read = pictures.read_picture

    def odd(file: Path) -> Image.Image:
        if file.name == "4.png":
            raise EOFError
        return read(file)

    monkeypatch.setattr(pictures, "read_picture", odd)
    assert make(folder) == [str(folder / "4.png")]


def test_folders_with_nothing_to_train_on(tmp_path) -> None:
    with pytest.raises(NoPictures, match="nowhere is not a folder"):
        make(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(NoPictures, match="empty holds no pictures .*png"):
        make(tmp_path / "empty")
    for name in ("a.png", "b.jpg"):
        (tmp_path / "empty" / name).write_bytes(b"no")
    for _ in range(2):
        with pytest.raises(
            NoPictures, match="None of the 2 files in .*empty can be read; the first is .*a.png"
        ):
            make(tmp_path / "empty")
    paint(tmp_path / "empty" / "a.png")
    assert make(tmp_path / "empty") == [str(tmp_path / "empty" / "b.jpg")]


def test_captions_and_subjects(tmp_path) -> None:
    root = tmp_path / "set"
    for name in ("ann/1.png", "ann/2.JPG", "bob/1.png", "bob/deep/1.png", "alone.png", "other.png"):
        paint(root / name)
    (root / "ann" / "1.txt").write_text("  a photo of Ann\n", "utf-8")
    (root / "alone.txt").write_bytes("\ufeffein Foto, schön".encode())
    (root / "other.txt").write_bytes(
        b"caf\xe9"
    )  # another encoding: one letter is lost, not the run
    make(root, prompt="somebody")
    train, _ = load_examples(tmp_path / "cache", 0)
    assert list(train.prompts) == [
        "ein Foto, schön",
        "caf\ufffd",
        "a photo of Ann",
        "somebody",
        "somebody",
        "somebody",
    ]
    assert list(train.subjects) == [0, 1, 2, 2, 3, 4]
    assert dict(train.groups) == {0: [0], 1: [1], 2: [2, 3], 3: [4], 4: [5]}


# again -----------------------------------------------------------------------------------------------------------------------


def test_a_second_time_reads_nothing(folder) -> None:
    make(folder)
    before = (folder.parent / "cache" / "index.json").stat().st_mtime_ns
    vae = Vae()
    make(folder, vae)
    assert vae.seen == 0 and (folder.parent / "cache" / "index.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["newer", "another", "gone", "model"])
def test_what_changed_is_encoded(folder, change) -> None:
    make(folder)
    vae, expected = Vae(), tones(10)
    if change == "newer":
        paint(folder / "3.png", (1, 2, 3))
        os.utime(folder / "3.png", ns=(5, 5))
        expected[3] = (1, 2, 3)
    elif change == "another":
        paint(folder / "99.png", (1, 2, 3))
        expected.append((1, 2, 3))
    elif change == "gone":
        (folder / "9.png").unlink()
        expected.pop()
    make(folder, vae, model="other" if change == "model" else "model")
    assert vae.seen == len(expected) and rows(load_examples(folder.parent / "cache", 0)[0]) == [
        list(t) for t in expected
    ]


def test_other_captions_need_no_encoding(folder) -> None:
    broken_files(folder)
    make(folder)
    (folder / "2.txt").write_text("the third", "utf-8")
    vae = Vae()
    make(folder, vae, prompt="all others")
    train, _ = load_examples(folder.parent / "cache", 0)
    assert (
        vae.seen == 0
        and list(train.prompts) == ["all others"] * 2 + ["the third"] + ["all others"] * 9
    )
    assert rows(train) == [list(t) for t in tones(10)] + [[5, 5, 5], [6, 6, 6]]


def test_an_interrupted_reading_goes_on(folder, monkeypatch) -> None:
    monkeypatch.setattr(pictures, "CHUNK", 2)
    broken_files(folder)
    with pytest.raises(KeyboardInterrupt):
        make(folder, Vae(stop_after=5))
    assert not (folder.parent / "cache" / "index.json").exists()
    vae = Vae()
    make(folder, vae)
    assert 0 < vae.seen < 12
    assert rows(load_examples(folder.parent / "cache", 0)[0]) == [list(t) for t in tones(10)] + [
        [5, 5, 5],
        [6, 6, 6],
    ]


class Stops:
    """An array whose n-th write never comes: the process was killed."""

    def __init__(self, array: np.ndarray, left: list[int]) -> None:
        self.array, self.left = array, left

    def __getitem__(self, i):
        return self.array[i]

    def __iter__(self):
        return iter(self.array)

    def __setitem__(self, i, value) -> None:
        if not self.left[0]:
            raise KeyboardInterrupt
        self.left[0] -= 1
        self.array[i] = value


@pytest.mark.parametrize("moment", range(12))
def test_a_kill_while_rows_close_up_loses_none(moment) -> None:
    """Rows 0 and 3 are broken; killed before any of the writes and begun again, each row is its own picture."""
    done = np.array(
        [
            pictures.BROKEN,
            pictures.DONE,
            pictures.DONE,
            pictures.BROKEN,
            pictures.DONE,
            pictures.DONE,
        ],
        np.uint8,
    )
    arrays = {"latents": np.arange(6.0), "pixels": np.arange(6), "done": done}
    with pytest.raises(KeyboardInterrupt):
        left = [moment]
        pictures.close_up({name: Stops(array, left) for name, array in arrays.items()})
    pictures.close_up(arrays)
    assert arrays["latents"][:4].tolist() == arrays["pixels"][:4].tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize("name", ["index.json", "begun.json"])
def test_a_torn_note_is_no_note(folder, name) -> None:
    (folder.parent / "cache").mkdir()
    (folder.parent / "cache" / name).write_text('{"key": {"fil')
    vae = Vae()
    make(folder, vae)
    assert vae.seen == 10 and len(load_examples(folder.parent / "cache", 0)[0]) == 10


def test_a_full_disk_is_told_before_anything_is_read(folder, monkeypatch) -> None:
    """A write into a hole of a mapped file would end the process without a word."""

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    vae = Vae()
    with pytest.raises(OSError, match="No space left"):
        make(folder, vae)
    assert vae.seen == 0 and not list((folder.parent / "cache").glob("*.json"))
    monkeypatch.undo()
    make(folder)
    assert len(load_examples(folder.parent / "cache", 0)[0]) == 10


def test_latents_that_are_no_numbers(folder) -> None:
    with pytest.raises(ValueError, match="NaN or infinite values for .*png.*Use another VAE"):
        make(folder, lambda images: torch.full((len(images), 2, 4, 4), torch.nan))


# several processes -----------------------------------------------------------------------------------------------------------


def together(folder: Path, processes: int, cache: str) -> tuple[list, Vae]:
    """`prepare` in as many threads, with a barrier."""
    barrier, told, vae = threading.Barrier(processes), [None] * processes, Vae()

    def work(rank: int) -> None:
        try:
            told[rank] = make(folder, vae, cache, rank=rank, processes=processes, meet=barrier.wait)
        except BaseException as problem:  # the test reports it
            told[rank] = problem
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told, vae


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_what_one_writes(folder, processes) -> None:
    broken = sorted(map(str, broken_files(folder)))
    make(folder, cache="one")
    told, vae = together(folder, processes, "many")
    assert [sorted(t) for t in told] == [broken] * processes and vae.seen == 12
    one, many = folder.parent / "one", folder.parent / "many"
    for name in ("latents.npy", "pixels.npy"):
        assert np.array_equal(np.load(one / name)[:12], np.load(many / name)[:12])
    assert json.loads((one / "index.json").read_text()) == json.loads(
        (many / "index.json").read_text()
    )
    told, vae = together(folder, processes, "many")
    assert [sorted(t) for t in told] == [broken] * processes and vae.seen == 0


# validation ------------------------------------------------------------------------------------------------------------------


def test_held_out_subjects_are_never_trained_on(tmp_path) -> None:
    for i, tone in enumerate(tones(9)):
        paint(tmp_path / "set" / f"subject {i // 3}" / f"{i}.png", tone)
    make(tmp_path / "set")
    everything = rows(load_examples(tmp_path / "cache", 0)[0])
    for held_out in (1, 2):
        train, held = load_examples(tmp_path / "cache", held_out)
        assert rows(train) + rows(held) == everything and len(held) == 3 * held_out
        assert not set(train.subjects) & set(held.subjects) and len(held.groups) == held_out
        assert {held.partner(i, d) for i in range(3) for d in (0.0, 0.6)} == {0, 1, 2}
    for held_out in (3, 4, 100):
        with pytest.raises(
            NoPictures, match=f"3 subjects are too few to hold {held_out} of them out"
        ):
            load_examples(tmp_path / "cache", held_out)
