"""Paper B on the flow miniature as it is shipped: four scenes of one subject, plain and with ConsiStory Shared Attention.

python3 tools/evidence/flow_story_figures.py JOURNAL [--count 8] [--first 0] [--steps 16] [--rows NAME ...] [--out SHEET.png]

What the reader says of every set is added to the journal, a line of JSON each, and the table is of all that it holds: so a run may be
cut into several. Body: how far the pictures of a set agree in the hue, saturation and value of the body; consistency: in all of an
identity; spread: how much the places of the subjects differ. Standard errors are over sets.
Runs in the environment of dev.py, or with KINDRED_HOST in the Python at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[1:1] = [str(Path(__file__).resolve().parents[1] / room) for room in ("client", "workshop")]

from flow_figures import CFG, save_sheet
from miniature_host import FlowStudio
from results import prepare
from terminal import run_program

PICTURES = 4
ALONE = {"feature_injection": 0.0, "query_blend": 0.0}
ROWS: dict[str, Mapping[str, Any] | None] = {  # inputs of the node; None: without it
    "plain": None,
    "sharing alone": ALONE,
    "no dropout": ALONE | {"dropout": 0.0},
    "both halves": ALONE | {"halves": "both"},
    "text_share plain": ALONE | {"text_share": "plain"},
    "all blocks": ALONE | {"blocks": "all"},
    "and query blending": {"feature_injection": 0.0},
    "as the node comes": {},
}
MEASURES = ("body", "consistency", "class", "scene", "spread")


def set_of(number: int) -> tuple[str, list[str]]:
    """The class and the scenes of a set."""
    from kindred.miniature.world import CLASSES, SCENES

    scenes = [SCENES[(3 * number + 3 * i) % len(SCENES)] for i in range(PICTURES)]
    return CLASSES[number % len(CLASSES)], scenes


def draw(studio: FlowStudio, number: int, inputs: Mapping[str, Any] | None) -> Any:
    """IMAGE [b y x 3] of a set."""
    from kindred.miniature.world import prompt

    name, scenes = set_of(number)
    text = studio.prompts([prompt(name, scene) for scene in scenes], name)
    model = studio.model
    if inputs is not None:
        model = studio.run("KindredConsiStory", model=model, **inputs)[0]
    return studio.sample(model, text, PICTURES, 100 + number)


def body_agreement(reading: Any) -> float:
    """Mean over all pairs of pictures: hue agreement times what saturation and value leave over."""
    from kindred.miniature.reader import hue_agreement

    import torch

    hue, saturation, value = (reading.colours[c] for c in ("hue", "saturation", "value"))
    apart = sum((c[:, None] - c).abs() for c in (saturation, value))
    agree = hue_agreement(hue[:, None], hue) * (1 - apart).clamp(min=0)
    return float(agree[tuple(torch.triu_indices(len(reading), len(reading), 1))].mean())


def read(reader: Any, number: int, pictures: Any) -> dict[str, float]:
    """What the reader says of a set, by measure."""
    from kindred.miniature.reader import consistency, layout_spread, subject_boxes

    reading, (name, scenes) = reader.read(pictures), set_of(number)
    right = [seen == scene for seen, scene in zip(reading.names("scene"), scenes)]
    return {
        "body": body_agreement(reading),
        "consistency": consistency(reading),
        "class": reading.names("class").count(name) / PICTURES,
        "scene": sum(right) / PICTURES,
        "spread": layout_spread(subject_boxes(reading)),
    }


def table(readings: Sequence[Mapping[str, Any]]) -> str:
    """Every row's means and standard errors, and its gain over plain, set by set."""
    lines = [f"| row | sets | {' | '.join(MEASURES)} | body over plain |", "|---|---|" + "---|" * 6]
    sets = {(one["row"], one["set"]): one for one in readings}
    for row in ROWS:
        mine = [one for (name, _), one in sets.items() if name == row]
        if not mine:
            continue
        cells = [_mean([one[m] for one in mine]) for m in MEASURES]
        pairs = [(one, sets["plain", one["set"]]) for one in mine if ("plain", one["set"]) in sets]
        gain = _mean([one["body"] - plain["body"] for one, plain in pairs])
        lines.append(f"| {row} | {len(mine)} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    seen = [v for v in values if v == v]  # no NaN, where no two subjects are seen
    if not seen:
        return ""
    error = statistics.stdev(seen) / len(seen) ** 0.5 if len(seen) > 1 else 0.0
    return f"{statistics.mean(seen):.3f} ± {error:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("journal", type=Path)
    parser.add_argument("--count", type=int, default=8, help="sets")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a sheet of the pictures, PNG")
    chosen = parser.parse_args(arguments)
    if "KINDRED_HOST" not in os.environ:
        parser.error("KINDRED_HOST names no ComfyUI folder")
    prepare(None, chosen.out)
    studio = FlowStudio(Path(os.environ["KINDRED_HOST"]), chosen.steps, CFG)
    measure(studio, chosen)


def measure(studio: FlowStudio, chosen: argparse.Namespace) -> None:
    """Draw, read, write down and print."""
    from kindred.miniature.reader import load_reader

    reader, sheet = load_reader(), []
    for number in range(chosen.first, chosen.first + chosen.count):
        for row in chosen.rows:
            pictures = draw(studio, number, ROWS[row])
            line = {"row": row, "set": number} | read(reader, number, pictures)
            with chosen.journal.open("a") as journal:
                journal.write(json.dumps(line) + "\n")
            sheet.append([pictures[i : i + 1] for i in range(PICTURES)])
    lines = chosen.journal.read_text("utf-8").splitlines()
    print(table([json.loads(line) for line in lines]))
    if chosen.out:
        save_sheet(studio, sheet, chosen.out)


if __name__ == "__main__":
    run_program(main)
