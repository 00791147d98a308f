"""Measures the miniature's ControlNet: `python -m miniature.measure_control --host <ComfyUI> [--count 120] [--json FILE]`.

Held-out renderings give silhouette, class and scene; one picture is sampled for each with the ControlNet and one, from the same noise,
without. The reader says where the subject stands (on its grid of 16 x 16) and what the picture shows.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from torch import Tensor

from .control import WEIGHTS, build_network, control, covered, hint_of, load_weights
from .data import Renderings, held_out
from .measure import CFG, STEPS, Miniature, open_miniature, overlap, sample
from .program import measuring_options, prepare, run_program, tell_figures
from .reader import MASK_GRID, Reader, load_reader
from .world import CLASSES, SCENES, prompt

OFFSET = 30_000  # held-out renderings that no other figure uses


def controlled(
    model: Miniature,
    host: Path,
    path: Path,
    hints: Tensor,
    prompts: list[str],
    seed: int,
    steps: int,
    cfg: float,
    strength: float = 1.0,
) -> Tensor:
    """Pictures [b y x 3] that follow hints [b 3 y x], both halves of CFG with the ControlNet, as the host's node applies it."""
    network, weights = build_network(host), load_weights(model.unet.state_dict(), path)

    def added(rows: slice, x: Tensor, t: Tensor, context: Tensor) -> dict[str, list[Tensor]]:
        controlled = control(network, weights, x, hints[rows].repeat(2, 1, 1, 1), t, context)
        return {name: [part * strength for part in parts] for name, parts in controlled.items()}

    return sample(model, prompts, seed, steps, cfg, control=added)


def figures_of(reader: Reader, pictures: Renderings, images: Tensor, name: str) -> dict[str, float]:
    """IoU of the read masks with the silhouettes, and the shares of classes and scenes that are read as they were asked for."""
    reading = reader.read(images)
    true = covered(torch.from_numpy(pictures.masks), MASK_GRID)
    figures = {f"mask.iou.{name}": overlap((reading.mask > 0.5).numpy(), true.numpy())}
    for column, (kind, names) in enumerate((("class", CLASSES), ("scene", SCENES))):
        wanted = [names[index] for index in pictures.labels[:, column]]
        right = [a == b for a, b in zip(reading.names(kind), wanted, strict=True)]
        figures[f"{kind}_accuracy.{name}"] = sum(right) / len(right)
    return figures


@torch.no_grad()
def measure(
    host: Path,
    count: int = 120,
    seed: int = 5000,
    path: Path = WEIGHTS,
    strength: float = 1.0,
    steps: int = STEPS,
    cfg: float = CFG,
    sheet: Path | None = None,
) -> dict[str, float]:
    """Figures with the ControlNet, without it, and of the renderings themselves after the autoencoder (the reader's own limit)."""
    model, reader, pictures = open_miniature(host), load_reader(), held_out(count, OFFSET)
    prompts = [prompt(CLASSES[kind], SCENES[scene]) for kind, scene, *_ in pictures.labels.tolist()]
    hints, images = hint_of(pictures.masks), torch.from_numpy(pictures.images).float() / 255
    by_kind = {
        "control": controlled(model, host, path, hints, prompts, seed, steps, cfg, strength),
        "plain": sample(model, prompts, seed, steps, cfg),
        "ceiling": model.decode(model.encode(images)),
    }
    figures: dict[str, float] = {"count.pictures": count, "strength": strength}
    for name, pictures_made in by_kind.items():
        figures |= figures_of(reader, pictures, pictures_made, name)
    if sheet is not None:
        _save_sheet([hints.movedim(1, -1), by_kind["control"], by_kind["plain"]], sheet)
    return figures


def _save_sheet(rows: list[Tensor], path: Path, columns: int = 10) -> None:
    """Hints over the pictures with the ControlNet over those without, the first ten."""
    from PIL import Image

    grid = torch.cat([row[:columns].clamp(0, 1).transpose(0, 1).flatten(1, 2) for row in rows])
    Image.fromarray((grid * 255).round().byte().numpy()).save(path, quality=88)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m miniature.measure_control", description=__doc__
    )
    measuring_options(parser, 120, "held-out silhouettes", 5000, "hints and pictures")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cfg", type=float, default=CFG)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--control", type=Path, default=WEIGHTS)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare(None, args.json, args.sheet)
    torch.set_num_threads(args.threads)
    figures = measure(
        args.host,
        args.count,
        args.seed,
        args.control,
        args.strength,
        args.steps,
        args.cfg,
        args.sheet,
    )
    tell_figures("miniature.measure_control", args.seed, figures, args.json)


if __name__ == "__main__":
    run_program(main)
