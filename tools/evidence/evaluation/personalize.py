"""Paper A: a subject known from one photo, asked for elsewhere. On the miniature the subjects are held-out identities."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import rivals
from .pixels import as_png, copied, small
from .rivals import KIB
from .rows import CAPTURE, CONCEPT, INJECT, Row

if TYPE_CHECKING:
    from miniature_host import Studio

    from .rivals import Concept, Draw

APART = 1_000_003  # between the noise of two seeds, so that no case meets another's
RENDERED = 6000  # seeds of the renderings that copied pixels are told by
SEEDS = 1000  # more than anybody takes: between the noise of two batches of one subject


@dataclass(frozen=True)
class Subject:
    """Whom a photo shows, what is asked for, and how the pictures are judged."""

    photo: Any  # IMAGE [1 y x 3]
    word: str
    coarse: str  # prompt of the photo
    prompts: tuple[str, ...]
    judge: Callable[[Any], dict[str, Any]]  # pictures [b y x 3] -> values
    mask: Any = None  # the true one [y x], where it is known
    another: tuple[Any, Any] | None = None  # another subject's photo in the same pose, and its mask

    def shown(self, row: Row) -> tuple[Any, Any]:
        """The photo that a row reads, and its true mask: the control reads another subject's."""
        another = row.get("photo", "own") == "another"
        return self.another if another else (self.photo, self.mask)


class Personalize:
    """Measures rows on subjects, in the order they come; what a subject needs is made once, as long as subjects do not alternate."""

    def __init__(self, studio: Studio, subjects: Callable[[int], Subject]) -> None:
        self.studio, self.subjects = studio, subjects
        self.last: tuple[int, Subject] | None = None
        self.banks: dict[
            tuple[Any, ...], tuple[Any, float]
        ] = {}  # references by how they are read, and the seconds it took
        self.concepts: dict[
            tuple[Any, ...], Concept
        ] = {}  # what rivals made, by their rows' inputs
        self.read = 0.0  # seconds spent on reading references so far

    def subject(self, number: int) -> Subject:
        if self.last is None or self.last[0] != number:
            self.last, self.banks, self.concepts = (number, self.subjects(number)), {}, {}
        return self.last[1]

    def measure(self, row: Row, number: int, seed: int) -> tuple[dict[str, Any], Any]:
        """Values, per picture where they are of pictures, and the pictures [b y x 3]."""
        subject, studio = self.subject(number), self.studio
        pictures, start, read = [], time.monotonic(), self.read
        draw, figures = self.prepared(row, subject)
        with studio.counted() as calls:
            for first in range(0, len(subject.prompts), studio.batch):
                part = subject.prompts[first : first + studio.batch]
                noise = number + APART * (seed + SEEDS * first)
                pictures.append(draw(part, noise, row.get("cfg", None)))
        images = studio.torch.cat(pictures)
        seconds = (time.monotonic() - start - (self.read - read)) / len(
            images
        )  # the concept encoder's part is in it
        return figures | subject.judge(images) | {
            "seconds": seconds,
            "unet_calls": len(calls) // len(pictures),
        }, images

    def prepared(self, row: Row, subject: Subject) -> tuple[Draw, dict[str, Any]]:
        """How this row draws prompts, and what is known of the photo as it reads it."""
        if row.get("rival", "none") != "none":
            concept = self.rival(row, subject)
            return concept.draw, dict(concept.figures)
        studio = self.studio
        model, figures = self.injected(row, subject)

        def draw(lines: Sequence[str], seed: int, cfg: float | None) -> Any:
            positive = studio.prompts(lines, subject.word)
            return studio.sample(model, positive, len(lines), seed, cfg)

        return draw, figures

    def rival(self, row: Row, subject: Subject) -> Concept:
        """What a rival makes of the subject's photo, once."""
        if (kept := self.concepts.get(row.inputs)) is None:
            start = time.monotonic()
            kept = self.concepts[row.inputs] = rivals.concept(self.studio, row, subject)
            self.read += time.monotonic() - start
        return kept

    def injected(self, row: Row, subject: Subject) -> tuple[Any, dict[str, Any]]:
        """The model with what the row injects, and what is known of the reference."""
        studio, model, figures = self.studio, self.studio.model, {}
        if row.get("self", "on") == "on":
            bank, figures["seconds_reference"] = self.reference(row, subject)
            figures["seconds_concept"] = figures["seconds_reference"]
            mask = subject.shown(row)[1]
            if row.get("mask", "word") == "word" and mask is not None:
                figures["mask_iou"] = overlap(bank, mask)
            model = studio.run(
                "KindredMaskedSelfAttnInject", model=model, reference=bank, **row.of(INJECT)
            )[0]
        if concept := row.of(CONCEPT, "concept."):
            model = studio.run(
                "KindredCrossAttnDetailInject",
                model=model,
                concept_encoder=studio.encoder,
                image=subject.shown(row)[0],
                **concept,
            )[0]
        if model is not studio.model:
            figures["kept_kib"] = len(as_png(subject.photo)) / KIB
        return model, figures

    def reference(self, row: Row, subject: Subject) -> tuple[Any, float]:
        """The photo as this row reads it (a negative too, where a row wants its half), and the seconds that it took."""
        both, inverted, mask = (
            row.get("halves", "") == "both",
            row.get("inverted", "no") == "yes",
            row.get("mask", "word"),
        )
        own = tuple(row.get(name, "") for name in ("photo", "method"))
        key = (tuple(sorted(row.of(CAPTURE).items())), both, inverted, mask, own)
        if key not in self.banks:
            studio, start = self.studio, time.monotonic()
            photo, drawn = subject.shown(row)
            latent, coarse = (
                studio.encode(photo),
                studio.prompts([subject.coarse], subject.word),
            )
            shared = {
                "model": studio.model,
                "positive": coarse,
                "steps": studio.steps,
                "scheduler": studio.scheduler,
            }
            inputs: dict[str, Any] = {"negative": studio.empty()} if both else {}
            if inverted:
                inputs["inversion"] = studio.run(
                    "KindredDDIMInvert",
                    latent=latent,
                    check=False,
                    **row.of(("method",)),
                    **shared,
                )[0]
            else:
                inputs["latent"] = latent
            if mask != "word":
                white = (
                    studio.torch.from_numpy(drawn)
                    if mask == "true"
                    else studio.torch.ones(photo.shape[1:3])
                )
                inputs["mask"] = white.float()[None]
            bank, seconds = (
                studio.run("KindredRefUNetCapture", **shared, **inputs, **row.of(CAPTURE))[0],
                time.monotonic() - start,
            )
            self.banks[key], self.read = (bank, seconds), self.read + seconds
        return self.banks[key]


# the miniature's subjects ----------------------------------------------------------------------------------------------------


class Identities:
    """Held-out identities in one scene each, asked for in two others; the attribute reader judges."""

    def __init__(self, studio: Studio) -> None:
        from kindred.miniature.reader import load_reader

        self.studio, self.reader = studio, load_reader()

    def __call__(self, number: int) -> Subject:
        from kindred.miniature.world import CLASSES, SCENES, held_out_identity, prompt, render

        identity, kind = held_out_identity(number), CLASSES[number % len(CLASSES)]
        photographed, *scenes = (SCENES[(number + k) % len(SCENES)] for k in (0, 3, 6))
        photo, another = (
            render(who, kind, photographed, 5000 + number)
            for who in (identity, held_out_identity(number + 1))
        )

        def judge(images: Any) -> dict[str, Any]:
            import torch

            reading = self.reader.read(images)
            true = [render(identity, kind, scene, RENDERED + number).image for scene in scenes]
            as_asked = torch.cat([self.studio.picture(image) for image in true])
            return judged(reading, identity) | {
                "scene": [
                    float(read == scene)
                    for read, scene in zip(reading.names("scene"), scenes, strict=True)
                ],
                "class": [float(read == kind) for read in reading.names("class")],
                "whole": one_whole(reading),
                "copied": copied(images, self.studio.picture(photo.image), as_asked),
                "small": small(images),
            }

        prompts = tuple(prompt(kind, scene) for scene in scenes)
        return Subject(
            self.studio.picture(photo.image),
            kind,
            prompt(kind),
            prompts,
            judge,
            photo.mask,
            (self.studio.picture(another.image), another.mask),
        )

    def bounds(self, number: int) -> tuple[dict[str, Any], Any]:
        """What the judge gives this identity rendered in another pose, and what it gives the next one; and the photo."""
        from kindred.miniature.world import CLASSES, SCENES, held_out_identity, render

        one, other = held_out_identity(number), held_out_identity(number + 1)
        shown = render(
            one, CLASSES[number % len(CLASSES)], SCENES[number % len(SCENES)], 7919 + number
        )
        reading = self.reader.read(self.studio.autoencode(self.studio.picture(shown.image)))
        values = judged(reading, one)
        return {
            "ceiling": values.pop("identity")[0],
            "floor": judged(reading, other)["identity"][0],
        } | values, self(number).photo


def judged(reading: Any, identity: Any) -> dict[str, list[float]]:
    """Identity similarity of every picture, and the parts that it is the weighted mean of."""
    from kindred.miniature.reader import SHARES, similarity_parts

    parts = [similarity_parts(reading, identity, i) for i in range(len(reading))]
    return {"identity": [sum(SHARES[name] * part[name] for name in SHARES) for part in parts]} | {
        name: [part[name] for part in parts] for name in SHARES
    }


def one_whole(reading: Any) -> list[float]:
    """1 for every picture that shows one whole subject, 0 for the others."""
    return (reading.whole > 0.5).float().tolist()


def overlap(bank: Any, mask: Any) -> float:
    """IoU of the found mask with the renderer's, at the latent's grid."""
    import torch
    from kindred.models.subject.masks import iou, resize_user_mask

    grid = tuple(bank.trajectory.latents.shape[-2:])
    return float(
        iou(bank.masks[grid], resize_user_mask(torch.from_numpy(mask).float()[None], grid))
    )
