"""What the miniature's reader says of the story demo's pictures, and the pictures it inverts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import combinations
from typing import TYPE_CHECKING, Any

from checkout import as_kindred

if TYPE_CHECKING:  # --help has to come without any package
    from PIL import Image

if TYPE_CHECKING:
    from kindred.miniature.reader import Reader

SUBJECT, SECOND = "cat", "dog"  # the class of the story and of its photos; of the saved subject
SCENES = {
    "story": ("beach", "snow", "forest", "night"),
    "anchors": ("beach", "meadow"),
    "more_pictures": ("snow", "city"),
}
HELD_OUT, PHOTO_SCENES = (
    6,
    (("meadow", 11), ("room", 20)),
)  # the identity of the photos; their scenes and poses, as the pack ships them
LIMITS = 12  # identities that floor and ceiling are measured with


def photos(scenes: Sequence[tuple[str, int]]) -> list[bytes]:
    """The held-out identity, as PNG files."""
    from PIL import Image

    as_kindred()
    from kindred.miniature.world import held_out_identity, render

    files = []
    for scene, pose in scenes:
        file = BytesIO()
        Image.fromarray(render(held_out_identity(HELD_OUT), SUBJECT, scene, pose).image).save(
            file, "PNG"
        )
        files.append(file.getvalue())
    return files


def images_of(pictures: Sequence[Image.Image]) -> Any:
    """IMAGE [b y x 3]."""
    import numpy as np
    import torch

    return (
        torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures])).float() / 255
    )


def limits(reader: Reader, autoencode: Any, count: int = LIMITS) -> tuple[float, float]:
    """Consistency of pictures of different held-out identities, and of one, rendered in the story's scenes: floor and ceiling."""
    from PIL import Image

    from kindred.miniature.reader import consistency, pairwise_similarity
    from kindred.miniature.world import held_out_identity, render

    sets = []
    for i in range(count):
        drawn = [
            Image.fromarray(render(held_out_identity(i), SUBJECT, scene, 6000 + 4 * i + j).image)
            for j, scene in enumerate(SCENES["story"])
        ]
        sets.append(reader.read(autoencode(images_of(drawn))))
    return (
        statistics.fmean(float(pairwise_similarity(a, b).mean()) for a, b in combinations(sets, 2)),
        statistics.fmean(consistency(reading) for reading in sets),
    )


def figures_of(sets: Mapping[str, Sequence[Image.Image]]) -> dict[str, float]:
    """Figures of plain, story, photo_story, and of more_pictures: its two pictures among themselves and with the two anchors."""
    as_kindred()
    import torch
    from kindred.miniature.pack import load_autoencoder
    from kindred.miniature.reader import floor_and_ceiling, load_reader

    torch.set_num_threads(1)
    reader, autoencoder = load_reader(), load_autoencoder()

    def autoencode(images: Any) -> Any:
        return autoencoder.decode(autoencoder.encode(images.movedim(-1, 1))).movedim(1, -1)

    figures: dict[str, float] = {"count.sets": 1}
    figures["consistency.floor"], figures["consistency.ceiling"] = limits(reader, autoencode)
    figures["identity.floor"], figures["identity.ceiling"] = floor_and_ceiling(reader, autoencode)
    for name in ("plain", "story", "photo_story"):
        figures |= figures_of_set(name, reader, sets[name], SCENES["story"], SUBJECT)
    name, scenes = "more_pictures", SCENES["anchors"] + SCENES["more_pictures"]
    pictures = [*sets["anchors"], *sets[name]]
    figures |= figures_of_set(name, reader, pictures, scenes, SECOND)
    # a picture without a subject has no box
    return {name: value for name, value in figures.items() if value == value}


def figures_of_set(
    name: str, reader: Reader, pictures: Sequence[Image.Image], scenes: Sequence[str], kind: str
) -> dict[str, float]:
    """Figures of one set of pictures, which were asked for in these scenes with a subject of this kind."""
    from kindred.miniature.reader import (
        consistency,
        identity_similarity,
        layout_spread,
        subject_boxes,
    )
    from kindred.miniature.world import held_out_identity

    reading = reader.read(images_of(pictures))
    figures = {
        f"consistency.{name}": consistency(reading),
        f"scene_accuracy.{name}": statistics.fmean(
            a == b for a, b in zip(reading.names("scene"), scenes, strict=True)
        ),
        f"class_accuracy.{name}": statistics.fmean(read == kind for read in reading.names("class")),
        f"layout_spread.{name}": layout_spread(subject_boxes(reading)),
    }
    if name in ("plain", "photo_story"):
        identity = held_out_identity(HELD_OUT)
        figures[f"identity.{name}"] = statistics.fmean(
            identity_similarity(reading, identity, i) for i in range(len(reading))
        )
    return figures
