"""The flow miniature's own figures: what it draws when it is asked plainly, what its autoencoder and its word masks are worth.

Measured through the host's own loader, sampler and VAE and the pack's own nodes, in jobs of a few pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .ground import Job, Setting, studio_of
from .personalize import APART, one_whole, overlap
from .rows import Row

if TYPE_CHECKING:
    from kindred.miniature.reader import Reading

PROMPTS, RENDERINGS = "prompts", "renderings"  # the two tasks
CHUNK, HELD_OUT = 10, 200  # renderings of a job, and all of them
MASKED = 10  # of how many renderings the subject is sought by its word, for each picture of --count
BODY = ("hue", "saturation", "value")


def jobs(count: int, batch: int = 4) -> list[Job]:
    """`count` pictures of every class and scene, at most `batch` in a job; and the held-out renderings."""
    from kindred.miniature.world import CLASSES, SCENES

    all_jobs = []
    for pair in range(len(CLASSES) * len(SCENES)):
        for number, first in enumerate(range(0, count, batch)):
            pictures = min(batch, count - first)
            all_jobs.append(Job(PROMPTS, Row("prompts", (("pictures", pictures),)), pair, number))
    for chunk in range(HELD_OUT // CHUNK):
        masked = max(0, min(CHUNK, MASKED * count - CHUNK * chunk))
        all_jobs.append(Job(RENDERINGS, Row("renderings", (("masked", masked),)), chunk, 0))
    return all_jobs


class OwnFigures:
    """Measures these jobs; the host starts when it is made."""

    def __init__(self, setting: Setting) -> None:
        self.studio = studio_of(setting)
        from kindred.miniature.reader import load_reader

        self.reader = load_reader()
        self.tasks: Mapping[str, Callable[[Job], dict[str, Any]]] = {
            PROMPTS: self.prompted,
            RENDERINGS: self.rendered,
        }

    def __call__(self, job: Job) -> dict[str, Any]:
        return self.tasks[job.task](job)

    def prompted(self, job: Job) -> dict[str, Any]:
        """Pictures of one class in one scene: which of them are as asked, and their body colours."""
        from kindred.miniature.world import CLASSES, SCENES, prompt

        kind, scene = CLASSES[job.case // len(SCENES)], SCENES[job.case % len(SCENES)]
        pictures = job.row.get("pictures", 1)
        lines = self.studio.prompts([prompt(kind, scene)] * pictures, kind)
        drawn = self.studio.sample(self.studio.model, lines, pictures, job.case + APART * job.seed)
        reading = self.reader.read(drawn)
        return colours_of(reading) | {
            "class": [float(name == kind) for name in reading.names("class")],
            "scene": [float(name == scene) for name in reading.names("scene")],
            "whole": one_whole(reading),
        }

    def rendered(self, job: Job) -> dict[str, Any]:
        """Held-out renderings through the autoencoder; and the first of them sought by their words."""
        from kindred.miniature.autoencoder import psnr
        from kindred.miniature.data import held_out
        from kindred.miniature.train_reader import accuracy
        from kindred.miniature.world import CLASSES

        torch, known = self.studio.torch, held_out(CHUNK, CHUNK * job.case)
        images = torch.from_numpy(known.images).float() / 255
        rebuilt = self.studio.autoencode(images)
        reading = self.reader.read(rebuilt)
        return colours_of(reading) | {
            "psnr": psnr(rebuilt.movedim(-1, 1), images.movedim(-1, 1)).tolist(),
            "whole": one_whole(reading),
            "accuracy": accuracy(self.reader, known, rebuilt),
            "iou": [
                self.mask_iou(images[i : i + 1], CLASSES[known.labels[i, 0]], known.masks[i])
                for i in range(job.row.get("masked", 0))
            ],
        }

    def mask_iou(self, photo: Any, kind: str, mask: Any) -> float:
        """IoU of the mask found by the word with the renderer's [y x], at the latent's grid."""
        from kindred.miniature.world import prompt

        studio = self.studio
        bank = studio.run(
            "KindredRefUNetCapture",
            model=studio.model,
            positive=studio.prompts([prompt(kind)], kind),
            latent=studio.encode(photo),
            steps=studio.steps,
            scheduler=studio.scheduler,
        )[0]
        return overlap(bank, mask)


def colours_of(reading: Reading) -> dict[str, list[float]]:
    return {name: reading.colours[name].tolist() for name in BODY}


def spread(values: Sequence[Mapping[str, Sequence[float]]]) -> float:
    """Spread of the body colours of all pictures: root of the summed variances of red, green and blue in 0..1."""
    import torch
    from kindred.miniature.measure import colour_spread

    return colour_spread(*(torch.tensor(list(every(values, name))) for name in BODY))


def figures(measurements: Mapping[Job, Mapping[str, Any]], size: float) -> dict[str, float]:
    """Flat names and numbers, as of the UNet miniature; measurements: what was measured of every job; size: of the file in MiB."""
    from kindred.miniature.world import CLASSES, SCENES

    prompted = {job: values for job, values in measurements.items() if job.task == PROMPTS}
    known = [values for job, values in measurements.items() if job.task == RENDERINGS]
    means = {
        "class_accuracy.prompts": fmean(every(prompted.values(), "class")),
        "scene_accuracy.prompts": fmean(every(prompted.values(), "scene")),
        "whole_subject.prompts": fmean(every(prompted.values(), "whole")),
        "whole_subject.renderings": fmean(every(known, "whole")),
        "spread_ratio": spread(list(prompted.values())) / spread(known),
        "vae.psnr_db": fmean(every(known, "psnr")),
        "count.pictures": len(list(every(prompted.values(), "class"))),
        "size.mib": size,
    }
    if sought := list(every(known, "iou")):
        means |= {"mask.iou": fmean(sought), "count.masks": len(sought)}
    for name in known[0]["accuracy"]:
        values = [one["accuracy"][name] for one in known if not math.isnan(one["accuracy"][name])]
        means[f"reader_after_vae.{name}"] = fmean(values)
    for number, kind in enumerate(CLASSES):
        of_kind = [values for job, values in prompted.items() if job.case // len(SCENES) == number]
        means[f"class_accuracy.{kind}"] = fmean(every(of_kind, "class"))
    return means


def every(
    values: Iterator[Mapping[str, Any]] | Sequence[Mapping[str, Any]], name: str
) -> Iterator[float]:
    for one in values:
        yield from one[name]
