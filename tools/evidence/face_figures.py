"""What the judge of faces says of photos that packages ship, or of a folder of yours.

python3 tools/evidence/face_figures.py [--faces dlib] [--photos FOLDER]

Without --photos: the portraits of scikit-image and matplotlib, five changed views of each, and
pictures of theirs without a person. A folder holds one folder for every person; pictures beside
these show nobody. --faces is what dev.py evaluate takes: the word dlib (pip install dlib-bin
face-recognition-models), or FaceNet's weights. Runs in the environment of dev.py, or with
KINDRED_HOST in the Python at hand.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[1:1] = [str(Path(__file__).resolve().parents[1] / room) for room in ("client", "workshop")]

from boot import boot
from evaluation.options import faces_of
from evaluation.real import DLIB, SUFFIXES
from evaluation.tables import rounded
from PIL import Image, ImageEnhance, ImageOps
from results import prepare
from terminal import run_program

if TYPE_CHECKING:
    from evaluation.faces import Faces, Net
    from torch import Tensor

NOBODY = ""
THINGS = ("chelsea.png", "coffee.png", "rocket.jpg")


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture and the person that it shows; NOBODY for a thing."""

    name: str
    person: str
    picture: Image.Image

    def pixels(self) -> Tensor:
        """[y x 3] in 0..1."""
        import numpy
        import torch

        return torch.tensor(numpy.asarray(self.picture.convert("RGB"))).float() / 255


Pair = tuple[Photo, Photo]


def shipped() -> Iterator[Photo]:
    """Portraits of scikit-image and matplotlib with their views, and things of scikit-image."""
    import matplotlib
    import skimage

    things = Path(skimage.__file__).parent / "data"
    samples = Path(matplotlib.get_data_path()) / "sample_data"
    for path in (things / "astronaut.png", samples / "grace_hopper.jpg"):
        with Image.open(path) as file:
            yield from views(path.stem, file.convert("RGB"))
    for name in THINGS:
        yield read(things / name, NOBODY)


def views(person: str, photo: Image.Image) -> Iterator[Photo]:
    """A portrait, and what other photos may differ by that its file can be made to show."""
    rough = io.BytesIO()
    photo.save(rough, "JPEG", quality=15)
    variants = {
        "": photo,
        ", mirrored": ImageOps.mirror(photo),
        ", darker": ImageEnhance.Brightness(photo).enhance(0.5),
        ", at two thirds": photo.resize((photo.width * 2 // 3, photo.height * 2 // 3)),
        ", turned by 15 degrees": photo.rotate(15, Image.Resampling.BICUBIC),
        ", grey and JPEG 15": Image.open(rough).convert("L"),
    }
    for change, view in variants.items():
        yield Photo(f"{person}{change}", person, view)


def read(path: Path, person: str) -> Photo:
    with Image.open(path) as file:
        return Photo(path.name, person, ImageOps.exif_transpose(file).convert("RGB"))


def own(folder: Path) -> Iterator[Photo]:
    """SystemExit where the folder holds no photo."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"face_figures: {folder} holds no picture ({', '.join(SUFFIXES)}).")
    for path in paths:
        yield read(path, NOBODY if path.parent == folder else path.parent.name)


def report(judge: Faces, photos: Sequence[Photo]) -> str:
    """A line for every photo, and what the judge gets right."""
    faces = dict(zip(photos, judge.faces([photo.pixels() for photo in photos])))
    seen = [photo for photo in photos if photo.person and faces[photo] is not None]
    apart = {
        pair: judge.compared([faces[pair[0]]], [faces[pair[1]]]).distance[0]
        for pair in combinations(seen, 2)
    }
    lines = [
        "| photo | face | furthest of the same person | nearest of another |",
        "|---|---|---:|---:|",
    ]
    for photo in photos:
        mine = {pair: distance for pair, distance in apart.items() if photo in pair}
        furthest = max(distances(mine, True), default=nan)
        nearest = min(distances(mine, False), default=nan)
        face = "none" if faces[photo] is None else "found"
        lines.append(f"| {photo.name} | {face} | {rounded(furthest, 2)} | {rounded(nearest, 2)} |")
    detected = {photo: face is not None for photo, face in faces.items()}
    return "\n".join([*lines, "", *summary(judge.net, detected, apart)])


def distances(apart: Mapping[Pair, float], one_person: bool) -> list[float]:
    """Those of pairs of one person's photos, or of two people's."""
    return [d for (a, b), d in apart.items() if (a.person == b.person) == one_person]


def summary(net: Net, detected: Mapping[Photo, bool], apart: Mapping[Pair, float]) -> Iterator[str]:
    """Sentences: where a face was found, and which pairs the net's own bound tells right."""
    people = [seen for photo, seen in detected.items() if photo.person]
    others = [not seen for photo, seen in detected.items() if not photo.person]
    yield f"{net.name}, one person below {net.one_person}."
    yield f"A face in {sum(people)} of {len(people)} photos of people."
    if others:
        yield f"None in {sum(others)} of {len(others)} pictures without a person."
    for same, name in ((True, "one person"), (False, "two people")):
        if all_of := distances(apart, same):
            right = sum((distance < net.one_person) == same for distance in all_of)
            yield (
                f"Pairs of {name}: {right} of {len(all_of)} right, distances "
                f"{min(all_of):.2f} to {max(all_of):.2f}."
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faces", type=faces_of, default=DLIB, help="dlib, or FaceNet's weights")
    parser.add_argument("--photos", type=Path, help="a folder with one folder for every person")
    chosen = parser.parse_args(arguments)
    if "KINDRED_HOST" not in os.environ:
        parser.error("KINDRED_HOST names no ComfyUI folder")
    prepare(None)
    boot(Path(os.environ["KINDRED_HOST"]))
    from evaluation.faces import load_faces

    try:
        judge = load_faces(chosen.faces)
    except ValueError as error:  # it names the package or the file, and the remedy
        raise SystemExit(str(error)) from error
    print(report(judge, [*(own(chosen.photos) if chosen.photos else shipped())]))


if __name__ == "__main__":
    run_program(main)
