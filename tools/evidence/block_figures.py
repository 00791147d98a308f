"""What Block Probe measures on a miniature, and paper A's injection in the blocks that it recommends.

python3 tools/evidence/block_figures.py [--flow] [--count 8] [--first 300] [--steps 20] [--levels 3]

The UNet's miniature, or with --flow the transformer's as it is shipped. Held-out identities, each photo of one class and scene with its
true mask, drawn again in another scene at CFG 4 with the reference read in other sets of blocks. The reader tells how alike the identity
is. Runs in the environment of dev.py, or with KINDRED_HOST in the Python at hand.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[1:1] = [str(Path(__file__).resolve().parents[1] / room) for room in ("client", "workshop")]

from flow_figures import CFG, Reading, Subject, capture, read, subjects, table
from miniature_host import FlowStudio, Studio
from results import prepare
from terminal import run_program

SETS = (
    "all",
    "encoder",
    "decoder",
    "measured",
    "measured content",
    "measured position",
    "measured lent",
)


def probed(studio: Studio, subject: Subject, levels: int) -> str:
    """Block Probe on the subject's photo -> its report."""
    from kindred.miniature.world import prompt

    text = studio.prompts([prompt(subject.class_name, subject.scene)], subject.class_name)
    latent = studio.encode(subject.photo)
    return studio.run(
        "KindredBlockProbe",
        model=studio.model,
        positive=text,
        latent=latent,
        noise_levels=levels,
    )[1]


def drawn(studio: Studio, subject: Subject, reference: Any, blocks: str, seed: int) -> Any:
    """The subject's new picture [1 y x 3] with the reference read in these blocks; "": in none."""
    from kindred.miniature.world import prompt

    text = studio.prompts([prompt(subject.class_name, subject.target)], subject.class_name)
    model = studio.model
    if blocks:
        inputs = {"model": model, "reference": reference, "blocks": blocks}
        model = studio.run("KindredMaskedSelfAttnInject", **inputs)[0]
    return studio.sample(model, text, 1, seed)


def measure(studio: Studio, chosen: argparse.Namespace) -> None:
    """Probe, draw, read and print."""
    from kindred.miniature.reader import floor_and_ceiling, load_reader

    known = subjects(studio, chosen.first, chosen.count)
    report = probed(studio, known[0], chosen.levels)
    print(report, flush=True)
    sets = ["plain", *(name for name in SETS if known_set(name, report))]
    reader, readings = load_reader(), {name: [] for name in sets}
    for n, subject in enumerate(known):
        reference = capture(studio, subject, subject.mask)[0]
        for name in sets:
            picture = drawn(studio, subject, reference, "" if name == "plain" else name, 7 + n)
            readings[name].append(read(reader, subject, picture))
    print(shown(readings))
    floor, ceiling = floor_and_ceiling(reader, studio.autoencode, 20)
    print(f"floor {floor:.3f}, ceiling {ceiling:.3f}")


def shown(readings: dict[str, list[Reading]]) -> str:
    return table(readings).replace("| row |", "| blocks |")


def known_set(name: str, report: str) -> bool:
    """Whether the probe has such a preset; what is no preset of the probe's is always known."""
    return "measured" not in name or f"\n{name}: " in report


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flow", action="store_true", help="the flow miniature")
    parser.add_argument("--count", type=int, default=8, help="identities")
    parser.add_argument("--first", type=int, default=300, help="number of the first one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--levels", type=int, default=3, help="noise levels of the probe")
    chosen = parser.parse_args(arguments)
    if "KINDRED_HOST" not in os.environ:
        parser.error("KINDRED_HOST names no ComfyUI folder")
    prepare(None)
    kind = FlowStudio if chosen.flow else Studio
    measure(kind(Path(os.environ["KINDRED_HOST"]), chosen.steps, CFG), chosen)


if __name__ == "__main__":
    run_program(main)
