"""Paper B: prompts of one subject, sampled as one batch; how far the pictures show one. On the miniature a class in four scenes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from . import story_rivals
from .personalize import APART, one_whole
from .rivals import Concept, Draw
from .rows import STORY, Row

if TYPE_CHECKING:
    from kindred.miniature.reader import Reading
    from miniature_host import Studio

PICTURES = 4  # of a set of the miniature
FREEU = {
    "b1": 1.1,
    "b2": 1.2,
    "s1": 0.6,
    "s2": 0.4,
}  # paper B, appendix B; constant factors, so the host's FreeU and not its V2


@dataclass(frozen=True)
class StorySet:
    """Prompts of one subject, and how the pictures are judged."""

    word: str
    prompts: tuple[str, ...]
    judge: Callable[[Any], dict[str, Any]]  # pictures [b y x 3] -> values


class Story:
    """Measures rows on sets; the pictures of a set are one latent batch."""

    def __init__(self, studio: Studio, sets: Callable[[int], StorySet]) -> None:
        self.studio, self.sets = studio, sets

    def measure(self, row: Row, number: int, seed: int) -> tuple[dict[str, Any], Any]:
        """Values of the set, per picture where they are of pictures, and its pictures [b y x 3]."""
        sets, start, noise = self.sets(number), time.monotonic(), number + APART * seed
        if row.get("rival", "none") != "none":
            concept = story_rivals.concept(self.studio, row, sets, noise)
        else:
            concept = Concept(self.shared(row, sets, number), {})
        taught = concept.figures.get("seconds_concept", 0.0)
        with self.studio.counted() as calls:
            images = concept.draw(sets.prompts, noise, row.get("cfg", None))
        seconds = (time.monotonic() - start - taught) / len(sets.prompts)
        known = {"seconds": seconds, "unet_calls": len(calls)}
        return dict(concept.figures) | sets.judge(images) | known, images

    def shared(self, row: Row, sets: StorySet, number: int) -> Draw:
        """How the set is drawn behind ConsiStory Shared Attention, or plain."""
        studio, count = self.studio, len(sets.prompts)
        model, positive = studio.model, studio.prompts(sets.prompts, sets.word)
        if row.get("freeu", "no") == "yes":
            model = studio.freeu(model, **FREEU)
        if row.get("node", "on") == "on":
            masks = (
                {"masks": studio.torch.ones(count, studio.size, studio.size)}
                if row.get("mask", "word") == "none"
                else {}
            )
            model = studio.run(
                "KindredConsiStory", model=model, **{"seed": number} | row.of(STORY) | masks
            )[0]

        def draw(lines: Sequence[str], seed: int, cfg: float | None) -> Any:
            return studio.sample(model, positive, len(lines), seed, cfg)

        return draw


# the miniature's sets --------------------------------------------------------------------------------------------------------


def story_set(number: int) -> tuple[str, list[str]]:
    """Class and scenes of a set."""
    import numpy as np
    from kindred.miniature.world import CLASSES, SCENES

    drawn = np.random.default_rng([number, 5]).permutation(len(SCENES))[
        :PICTURES
    ]  # the world's own seeds are [seed, 1..4]
    return CLASSES[number % len(CLASSES)], [SCENES[i] for i in drawn]


class Scenes:
    """A class in four scenes; the attribute reader judges."""

    def __init__(self, studio: Studio) -> None:
        from kindred.miniature.reader import load_reader

        self.studio, self.reader = studio, load_reader()

    def __call__(self, number: int) -> StorySet:
        from kindred.miniature.world import prompt

        kind, scenes = story_set(number)

        def judge(images: Any) -> dict[str, Any]:
            from kindred.miniature.reader import consistency, layout_spread, subject_boxes

            reading = self.reader.read(images)
            return {
                "consistency": consistency(reading),
                "layout_spread": layout_spread(subject_boxes(reading)),
                "scene": [
                    float(read == scene)
                    for read, scene in zip(reading.names("scene"), scenes, strict=True)
                ],
                "class": [float(read == kind) for read in reading.names("class")],
                "whole": one_whole(reading),
                "reading": listed(reading),
            }

        return StorySet(kind, tuple(prompt(kind, scene) for scene in scenes), judge)

    def bounds(self, number: int) -> tuple[dict[str, Any], Any]:
        """One held-out identity rendered in the set's scenes, through the autoencoder; the pictures."""
        from kindred.miniature.reader import consistency
        from kindred.miniature.world import held_out_identity, render

        kind, scenes = story_set(number)
        rendered = [
            render(held_out_identity(number), kind, scene, 6000 + PICTURES * number + i)
            for i, scene in enumerate(scenes)
        ]
        images = self.studio.autoencode(
            self.studio.torch.cat([self.studio.picture(r.image) for r in rendered])
        )
        return {"ceiling": consistency(self.reader.read(images))}, images


def listed(reading: Reading) -> dict[str, dict[str, list[Any]]]:
    """The parts of a reading that tell an identity, as lists: the floor pairs plain pictures of different sets."""
    return {
        "probabilities": {
            kind: reading.probabilities[kind].tolist() for kind in ("pattern", "hat")
        },
        "colours": {name: values.tolist() for name, values in reading.colours.items()},
    }


def floor_of(readings: Sequence[Mapping[str, Mapping[str, Sequence[Any]]]]) -> float:
    """Mean similarity of plain pictures of different sets; NaN for one set alone."""
    import torch
    from kindred.miniature.reader import Reading, pairwise_similarity

    sets = [
        Reading(
            *(
                {name: torch.tensor(values) for name, values in reading[part].items()}
                for part in ("probabilities", "colours")
            ),
            mask=torch.zeros(PICTURES, 1, 1),
            whole=torch.ones(PICTURES),
        )
        for reading in readings
    ]
    similarities = [float(pairwise_similarity(a, b).mean()) for a, b in combinations(sets, 2)]
    return statistics.fmean(similarities) if similarities else math.nan
