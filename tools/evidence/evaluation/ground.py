"""Where jobs are measured: a miniature in the host of a process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .miniatures import FLOW, UNET
from .rows import Row

SHOWN = 2  # cases of a table whose pictures are kept, for its sheet
BOUNDS = Row(
    "floor and ceiling", (("bounds", True),)
)  # no row of a table: what the judge gives where the answer is known


@dataclass(frozen=True)
class Job:
    """One row on one case with one seed."""

    task: str
    row: Row
    case: int
    seed: int
    pictures: Path | None = None  # where to keep them, side by side

    def __str__(self) -> str:
        return f"{self.row.name}, {'set' if self.task == 'story' else 'identity'} {self.case}, seed {self.seed}"


@dataclass(frozen=True)
class Setting:
    """What every job of a run has in common."""

    host: Path
    steps: int
    cfg: float
    code: str  # fingerprint of what decides the numbers
    miniature: str = field(default=UNET, kw_only=True)

    def of(self, job: Job) -> dict[str, Any]:
        """Everything that decides a job's numbers: its key in the journal."""
        facts = {
            "ground": "miniature" if self.miniature == UNET else f"{self.miniature} miniature",
            "task": job.task,
            "inputs": dict(job.row.inputs),
            "case": job.case,
            "code": self.code,
        }
        return (
            facts
            if job.row == BOUNDS
            else facts | {"seed": job.seed, "steps": self.steps, "cfg": self.cfg}
        )


def studio_of(setting: Setting) -> Any:
    """The miniature in the host of this process, which starts now, with one thread: numbers depend on no number of processes."""
    import torch
    from miniature_host import FlowStudio, Studio

    torch.set_num_threads(1)
    kind = FlowStudio if setting.miniature == FLOW else Studio
    return kind(setting.host, setting.steps, setting.cfg)


class Miniature:
    """A miniature, and paper A's and paper B's ways to measure it; the host starts when it is made."""

    def __init__(self, setting: Setting) -> None:
        studio = studio_of(setting)
        from .personalize import Identities, Personalize
        from .story import Scenes, Story

        identities, scenes = Identities(studio), Scenes(studio)
        self.tasks = {
            "personalize": Personalize(studio, identities),
            "story": Story(studio, scenes),
        }
        self.bounds = {"personalize": identities.bounds, "story": scenes.bounds}

    def __call__(self, job: Job) -> dict[str, Any]:
        if job.row == BOUNDS:
            values, images = self.bounds[job.task](job.case)
        else:
            values, images = self.tasks[job.task].measure(job.row, job.case, job.seed)
        if job.pictures:
            keep(images, job.pictures)
        return values


def keep(images: Any, path: Path) -> None:
    """Pictures [b y x 3] side by side as one .png."""
    from kindred.models.files import whole
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    strip = images.mul(255).round().byte().permute(1, 0, 2, 3).flatten(1, 2).cpu().numpy()
    with whole(path) as partial:
        Image.fromarray(strip).save(partial, "PNG")
