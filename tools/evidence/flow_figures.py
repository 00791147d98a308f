"""Paper A's training-free half on the flow miniature as it is shipped: a photo, and the same subject in another scene.

python3 tools/evidence/flow_figures.py [--count 6] [--first 300] [--steps 16] [--positions] [--out SHEET.png]

Held-out identities, each photo of one class and scene, drawn again in another scene, CFG 4. The reader tells how alike the identity
is; beside it stand a random other identity (floor), the same one rendered again (ceiling), and the photo of the next identity.
With --positions the rows are the places where the reference may stand, each under the wired mask.
Runs in the environment of dev.py, or with KINDRED_HOST in the Python at hand.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[1:1] = [str(Path(__file__).resolve().parents[1] / room) for room in ("client", "workshop")]

from miniature_host import FlowStudio
from results import prepare
from terminal import run_program

CFG = 4.0
ROWS = ("plain", "wired mask", "mask by word", "wired mask, text_share plain", "another's photo")
SHOWN = ("plain", "wired mask", "another's photo")  # on the sheet, behind the photo
PLACES = ("own", "aside", "apart", "none")  # where the reference stands


@dataclass(frozen=True)
class Subject:
    """A held-out identity, its photo, and where it is drawn again."""

    identity: Any
    class_name: str
    scene: str  # of the photo
    target: str
    photo: Any  # IMAGE
    mask: Any  # MASK: where the renderer drew it


@dataclass(frozen=True)
class Reading:
    """What the reader says of one picture."""

    likeness: float
    class_right: bool
    scene_right: bool


def subjects(studio: FlowStudio, first: int, count: int) -> list[Subject]:
    from kindred.miniature.world import CLASSES, SCENES, held_out_identity, render

    all_subjects = []
    for n in range(count):
        identity, class_name = held_out_identity(first + n), CLASSES[n % len(CLASSES)]
        scene, target = SCENES[3 * n % len(SCENES)], SCENES[(3 * n + 3) % len(SCENES)]
        drawn = render(identity, class_name, scene, 1000 + n)
        mask = studio.torch.from_numpy(drawn.mask).float()[None]
        all_subjects.append(
            Subject(identity, class_name, scene, target, studio.picture(drawn.image), mask)
        )
    return all_subjects


def capture(studio: FlowStudio, subject: Subject, mask: Any) -> tuple[Any, Any]:
    """Ref-UNet Feature Capture -> REFERENCE, MASK."""
    from kindred.miniature.world import prompt

    text = studio.prompts([prompt(subject.class_name, subject.scene)], subject.class_name)
    return studio.run(
        "KindredRefUNetCapture",
        model=studio.model,
        positive=text,
        steps=studio.steps,
        scheduler=studio.scheduler,
        latent=studio.encode(subject.photo),
        mask=mask,
    )


def overlap(one: Any, other: Any) -> float:
    """Intersection over union of two masks of one size."""
    both, any_ = (one > 0.5) & (other > 0.5), (one > 0.5) | (other > 0.5)
    return float(both.sum() / any_.sum())


def pictures(
    studio: FlowStudio, subject: Subject, wired: Any, by_word: Any, of_another: Any, seed: int
) -> dict[str, Any]:
    """The subject's new picture [1 y x 3] in every row."""
    from kindred.miniature.world import prompt

    text = studio.prompts([prompt(subject.class_name, subject.target)], subject.class_name)

    def injected(reference: Any, **more: Any) -> Any:
        inputs = {"model": studio.model, "reference": reference} | more
        return studio.run("KindredMaskedSelfAttnInject", **inputs)[0]

    models = (
        studio.model,
        injected(wired),
        injected(by_word),
        injected(wired, text_share="plain"),
        injected(of_another),
    )
    drawn = [studio.sample(model, text, 1, seed) for model in models]
    return dict(zip(ROWS, drawn, strict=True))


def placed_pictures(studio: FlowStudio, subject: Subject, wired: Any, seed: int) -> dict[str, Any]:
    """The subject's new picture [1 y x 3] without a reference, and with it at every place."""
    from kindred.miniature.world import prompt

    text = studio.prompts([prompt(subject.class_name, subject.target)], subject.class_name)
    models = {"plain": studio.model}
    for place in PLACES:
        inputs = {"model": studio.model, "reference": wired, "positions": place}
        models[place] = studio.run("KindredMaskedSelfAttnInject", **inputs)[0]
    return {row: studio.sample(model, text, 1, seed) for row, model in models.items()}


def measure_places(studio: FlowStudio, chosen: argparse.Namespace) -> None:
    """Draw, read and print where the reference stands."""
    from kindred.miniature.reader import load_reader

    reader, sheet = load_reader(), []
    readings: dict[str, list[Reading]] = {row: [] for row in ("plain", *PLACES)}
    for n, subject in enumerate(subjects(studio, chosen.first, chosen.count)):
        drawn = placed_pictures(studio, subject, capture(studio, subject, subject.mask)[0], 7 + n)
        for row, picture in drawn.items():
            readings[row].append(read(reader, subject, picture))
        sheet.append([subject.photo, *drawn.values()])
    print(table(readings))
    if chosen.out:
        save_sheet(studio, sheet, chosen.out)


def read(reader: Any, subject: Subject, picture: Any) -> Reading:
    from kindred.miniature.reader import identity_similarity

    seen = reader.read(picture)
    return Reading(
        identity_similarity(seen, subject.identity),
        seen.names("class")[0] == subject.class_name,
        seen.names("scene")[0] == subject.target,
    )


def table(readings: dict[str, list[Reading]]) -> str:
    lines = ["| row | identity | s.e. | class right | scene right |", "|---|---|---|---|---|"]
    for row, many in readings.items():
        likeness = [one.likeness for one in many]
        error = statistics.stdev(likeness) / len(many) ** 0.5 if len(many) > 1 else 0.0
        right = [
            sum(flags) / len(many) for flags in zip(*((r.class_right, r.scene_right) for r in many))
        ]
        lines.append(
            f"| {row} | {statistics.mean(likeness):.3f} | {error:.3f} | {right[0]:.2f} | {right[1]:.2f} |"
        )
    return "\n".join(lines)


def save_sheet(studio: FlowStudio, rows: Sequence[Sequence[Any]], path: Path) -> None:
    """Rows of IMAGEs [1 y x 3] as one picture."""
    from PIL import Image

    sheet = studio.torch.cat([studio.torch.cat([p[0] for p in row], 1) for row in rows])
    Image.fromarray((sheet.clamp(0, 1) * 255).byte().numpy()).save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=6, help="identities")
    parser.add_argument("--first", type=int, default=300, help="number of the first one")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument(
        "--positions", action="store_true", help="where the reference stands, instead"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="a sheet of the pictures, PNG")
    chosen = parser.parse_args(arguments)
    if "KINDRED_HOST" not in os.environ:
        parser.error("KINDRED_HOST names no ComfyUI folder")
    prepare(None, chosen.out)
    studio = FlowStudio(Path(os.environ["KINDRED_HOST"]), chosen.steps, CFG)
    (measure_places if chosen.positions else measure)(studio, chosen)


def measure(studio: FlowStudio, chosen: argparse.Namespace) -> None:
    """Draw, read and print."""
    from kindred.miniature.reader import floor_and_ceiling, load_reader

    reader, readings, sheet = load_reader(), {row: [] for row in ROWS}, []
    known = subjects(studio, chosen.first, chosen.count)
    wired = [capture(studio, one, one.mask)[0] for one in known]
    by_word = [capture(studio, one, None) for one in known]
    for n, subject in enumerate(known):
        other = wired[(n + 1) % len(known)]
        drawn = pictures(studio, subject, wired[n], by_word[n][0], other, 7 + n)
        for row, picture in drawn.items():
            readings[row].append(read(reader, subject, picture))
        sheet.append([subject.photo, *(drawn[row] for row in SHOWN)])
    print(table(readings))
    floor, ceiling = floor_and_ceiling(reader, studio.autoencode, 20)
    ious = [overlap(one.mask, mask) for one, (_, mask) in zip(known, by_word, strict=True)]
    print(
        f"floor {floor:.3f}, ceiling {ceiling:.3f}; IoU of the word's mask {statistics.mean(ious):.2f}"
    )
    if chosen.out:
        save_sheet(studio, sheet, chosen.out)


if __name__ == "__main__":
    run_program(main)
