"""Writes renderings as a folder of pictures, one subfolder per subject, each with its caption: what train_concept_encoder reads.

`python -m miniature.album FOLDER [--subjects 4000] [--pictures 4] [--held-out]`
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .program import make_folder, run_program
from .world import CLASSES, HELD_OUT, SCENES, caption, random_identity, render

FIRST = 1 << 24  # identities the other trainings do not draw either


def write_subject(folder: Path, pictures: int, number: int) -> None:
    """One identity as one class in `pictures` different scenes and poses: NUMBER/0.png and its caption NUMBER/0.txt, and so on."""
    rng = np.random.default_rng([number, 5])
    kind, scenes = CLASSES[int(rng.integers(len(CLASSES)))], rng.permutation(len(SCENES))
    own = folder / f"{number:014d}"
    own.mkdir(parents=True, exist_ok=True)
    for i in range(pictures):
        scene = SCENES[int(scenes[i % len(SCENES)])]
        seed = int(rng.integers(1 << 30))
        Image.fromarray(render(random_identity(number), kind, scene, seed).image).save(
            own / f"{i}.png", compress_level=1
        )
        (own / f"{i}.txt").write_text(caption(kind, scene, seed), "utf-8")


def write_album(folder: Path, subjects: int, pictures: int = 4, held_out: bool = False) -> None:
    """Subjects that no evaluation sees, or (held_out) those that no training sees."""
    numbers = range(HELD_OUT, HELD_OUT + subjects) if held_out else range(FIRST, FIRST + subjects)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(write_subject, folder, pictures), numbers, chunksize=16))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--subjects", type=int, default=4000)
    parser.add_argument("--pictures", type=int, default=4, help="of each subject")
    parser.add_argument("--held-out", action="store_true")
    args = parser.parse_args(arguments)
    write_album(make_folder(args.folder), args.subjects, args.pictures, args.held_out)


if __name__ == "__main__":
    run_program(main)
