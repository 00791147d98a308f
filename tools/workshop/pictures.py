"""A folder of pictures as training examples: read once, encoded once, kept on disk and mapped into memory."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from kindred.models.concept.config import Preprocessing
    from kindred.models.concept.draws import Examples

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
CHUNK = 16
TODO, DONE, BROKEN, MOVED = 0, 1, 2, 3  # of a file's row; moved: closed up behind the broken ones


class NoPictures(Exception):
    """The folder has nothing to train on; the message says what was found instead."""


@dataclass(frozen=True)
class PictureFolder:
    """Pictures at any depth below `root`. NAME.txt beside NAME.png is its prompt; those in one subfolder show one subject."""

    root: Path
    prompt: str

    def files(self) -> list[Path]:
        if not self.root.is_dir():
            raise NoPictures(f"{self.root} is not a folder.")
        paths = sorted(
            (p for p in self.root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()),
            key=lambda p: (p.parent.parts, p.name),
        )
        if not paths:
            raise NoPictures(f"{self.root} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
        return paths

    def prompt_of(self, file: Path) -> str:
        beside = file.with_suffix(".txt")
        return (
            beside.read_bytes().decode("utf-8-sig", "replace").strip()
            if beside.is_file()
            else self.prompt
        )

    def subject_of(self, file: Path) -> str:
        """The subfolder, or the file itself where it lies directly in the root."""
        return str(
            file.relative_to(self.root).parent
            if file.parent != self.root
            else file.relative_to(self.root)
        )


def read_picture(file: Path) -> Image.Image:
    """Any mode and size -> RGB, turned as its EXIF says, alpha over white. Raises what Pillow raises on a broken file."""
    with Image.open(file) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture)
            return white.convert("RGB")
        if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
            values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
            most = values.max(
                initial=0.0
            )  # wide modes do not say how wide they are; floats are often 0 to 1
            white = (
                65535.0
                if picture.mode.startswith("I;16") or most > 255
                else 1.0
                if picture.mode == "F" and most <= 1
                else 255.0
            )
            picture = Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))
        return picture.convert("RGB")


def square(picture: Image.Image, size: int) -> np.ndarray:
    """Centre square of side `size` -> uint8 [y x 3]."""
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC))


def prepare(
    folder: PictureFolder,
    cache: Path,
    size: int,
    preprocessing: Preprocessing,
    made_with: str,
    encode: Callable[[Tensor], Tensor],
    rank: int = 0,
    processes: int = 1,
    meet: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write latents.npy, pixels.npy and index.json into `cache`, unless they are there for the same files, sizes and model.

    encode: images [b Y X 3] in 0..1 -> latents [b c y x] in model scale. Every process does its share, and a killed one goes on
    where it was. Returns the unreadable files, which are left out. Raises NoPictures, and OSError when the disk is full.
    """
    files = folder.files()
    key = key_of(folder.root, files, size, preprocessing.size, made_with)
    index, begun = cache / "index.json", cache / "begun.json"
    known = read_json(index)
    if isinstance(known, dict) and known["key"] == key:
        broken = {folder.root / name for name in known["unreadable"]}
        # other captions for the same pictures
        if rank == 0 and (now := describe(folder, files, broken, key)) != known:
            write_json(index, now)
        meet()
        return [str(f) for f in files if f in broken]
    meet()
    if rank == 0 and read_json(begun) != key:
        begin(cache, index, begun, key, encode)
    meet()
    arrays = read_share(files, cache, rank, processes, key, encode)
    meet()
    broken = {f for f, state in zip(files, arrays["done"]) if state == BROKEN}
    if len(broken) == len(files):
        raise NoPictures(
            f"None of the {len(files)} files in {folder.root} can be read; the first is {files[0]}."
        )
    if rank == 0:
        close_up(arrays)
        write_json(index, describe(folder, files, broken, key))
        begun.unlink(missing_ok=True)
    meet()
    return [str(f) for f in files if f in broken]


def key_of(
    root: Path, files: Sequence[Path], size: int, pixels: int, made_with: str
) -> dict[str, Any]:
    """What a cache was made of: it serves for nothing else. size, pixels: sides that the VAE and the tower see."""
    facts = [[str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return {"files": facts, "size": size, "pixels": pixels, "model": made_with, "version": 1}


def begin(
    cache: Path,
    index: Path,
    begun: Path,
    key: Mapping[str, Any],
    encode: Callable[[Tensor], Tensor],
) -> None:
    """Arrays with room for every file, and begun.json, which says what for."""
    cache.mkdir(parents=True, exist_ok=True)
    for old in (index, begun):
        old.unlink(missing_ok=True)
    shape = encode(torch.zeros(1, key["size"], key["size"], 3)).shape[1:]
    side, count = key["pixels"], len(key["files"])
    for name, kind, sizes in (
        ("latents", np.float16, shape),
        ("pixels", np.uint8, (side, side, 3)),
        ("done", np.uint8, ()),
    ):
        np.lib.format.open_memmap(cache / f"{name}.npy", "w+", kind, (count, *sizes)).flush()
        take_room(cache / f"{name}.npy")
    write_json(begun, key)


def read_share(
    files: Sequence[Path],
    cache: Path,
    rank: int,
    processes: int,
    key: Mapping[str, Any],
    encode: Callable[[Tensor], Tensor],
) -> dict[str, np.ndarray]:
    """This process' share of the files into the arrays of the cache, which come back."""
    arrays = {
        name: np.load(cache / f"{name}.npy", mmap_mode="r+")
        for name in ("latents", "pixels", "done")
    }
    todo = [i for i in range(rank, len(files), processes) if arrays["done"][i] == TODO]
    for start in tqdm(
        range(0, len(todo), CHUNK), "reading pictures", disable=rank > 0, file=sys.stderr
    ):
        part = todo[start : start + CHUNK]
        read_chunk(files, part, arrays, key["size"], key["pixels"], encode)
    for array in arrays.values():
        array.flush()
    return arrays


def describe(
    folder: PictureFolder, files: Sequence[Path], broken: set[Path], key: Mapping[str, Any]
) -> dict[str, Any]:
    """What index.json says: for which files, and prompt and subject of each row."""
    kept = [f for f in files if f not in broken]
    names = [folder.subject_of(f) for f in kept]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return {
        "key": key,
        "unreadable": [str(f.relative_to(folder.root)) for f in files if f in broken],
        "prompts": [folder.prompt_of(f) for f in kept],
        "subjects": [numbers[name] for name in names],
    }


def close_up(arrays: Mapping[str, np.ndarray]) -> None:
    """Rows of readable files to the front, each noted when it is there, so that a kill in between loses none."""
    done = arrays["done"]
    for place, i in enumerate([i for i, state in enumerate(done) if state != BROKEN]):
        if place != i and done[i] != MOVED:
            for name in ("latents", "pixels"):
                arrays[name][place] = arrays[name][i]
            done[i] = MOVED


def take_room(file: Path) -> None:
    """A file that is mapped has its room on the disk: OSError now, where a write into a hole would end the process."""
    if hasattr(os, "posix_fallocate"):
        with file.open("rb+") as opened:
            try:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            except OSError as error:
                if error.errno in (
                    errno.ENOSPC,
                    errno.EDQUOT,
                    errno.EFBIG,
                ):  # anything else: not every file system can
                    raise


def read_json(file: Path) -> Any:
    """None where there is no such file, or a torn one."""
    try:
        return json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def write_json(file: Path, value: Any) -> None:
    from kindred.models.files import whole

    with whole(file) as partial:
        partial.write_text(json.dumps(value), "utf-8")


def read_chunk(
    files: Sequence[Path],
    rows: Sequence[int],
    arrays: Mapping[str, np.ndarray],
    size: int,
    small: int,
    encode: Callable[[Tensor], Tensor],
) -> None:
    """Some pictures into their rows; a broken one is marked so. ValueError where the VAE gives NaN."""
    good, images = [], []
    for row in rows:
        try:
            picture = read_picture(files[row])
            seen, drawn = square(picture, small), square(picture, size)
        except MemoryError:
            raise
        except Exception as problem:  # decoders raise whatever a broken file leads them to: struct.error, EOFError, IndexError, a bomb's
            if isinstance(problem, OSError) and problem.errno is not None and files[row].is_file():
                raise  # the disk, not the picture
            arrays["done"][row] = BROKEN
            continue
        arrays["pixels"][row] = seen
        good.append(row)
        images.append(drawn)
    if good:
        latents = (
            encode(torch.from_numpy(np.stack(images)).float() / 255).detach().half().cpu().numpy()
        )
        if not np.isfinite(latents).all():
            raise ValueError(
                f"the VAE gives NaN or infinite values for {files[good[0]]} or a file beside it. Use another VAE."
            )
        arrays["latents"][good] = latents
        arrays["done"][good] = DONE


def load_examples(cache: Path, held_out: int) -> tuple[Examples, Examples | None]:
    """What `prepare` wrote -> training examples and those of the last `held_out` subjects, mapped and not read."""
    from kindred.models.concept.draws import Examples

    known = json.loads((cache / "index.json").read_text("utf-8"))
    n, subjects = len(known["prompts"]), known["subjects"]
    arrays = [np.load(cache / f"{name}.npy", mmap_mode="c")[:n] for name in ("latents", "pixels")]
    latents, pixels = (torch.from_numpy(a) for a in arrays)
    last = max(subjects) + 1 - held_out
    cut = next((i for i in range(n) if subjects[i] >= last), n) if held_out else n
    if cut == 0:
        raise NoPictures(
            f"{max(subjects) + 1} subjects are too few to hold {held_out} of them out for validation."
        )
    train = Examples(latents[:cut], pixels[:cut], known["prompts"][:cut], subjects[:cut])
    return train, Examples(
        latents[cut:], pixels[cut:], known["prompts"][cut:], subjects[cut:]
    ) if held_out else None
