"""Rebuilds the miniature from nothing: `python -m miniature.train all --host <ComfyUI> --folder <work folder>`.

Every part is seeded and can be killed at any time: the same command goes on from the last checkpoint in the work folder.
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from .data import training_set
from .layout import FLOW, FLOW_CHANNELS
from .program import make_folder, run_program, settle
from .training import Run

STEPS = {
    "autoencoder": 1600,
    "control": 1200,
    "decoder": 3000,
    "flow": 30_000,
    "flow-autoencoder": 4000,
    "flow-decoder": 3000,
    "reader": 1200,
    "tower": 1500,
    "unet": 4500,
}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("renderings", *sorted(STEPS), "pack", "all"))
    parser.add_argument(
        "--folder", type=Path, required=True, help="work folder for renderings and checkpoints"
    )
    parser.add_argument(
        "--host",
        type=Path,
        help="a ComfyUI folder: the UNet's own class and the tokenizer come from there",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--renderings", type=int, default=24_000)
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes that share each step and average their gradients",
    )
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run = Run(
        make_folder(given.folder),
        torch.device(given.device),
        given.seed,
        given.renderings,
        given.workers,
    )
    if given.part in ("flow", "flow-decoder"):  # before there are several workers
        from .pack import begin_flow

        begin_flow(run.folder)
    if given.part != "renderings" and given.workers > 1:
        training_set(
            run.folder, run.renderings
        )  # before there are several workers, who all would render it
        _meeting(given, os.getpid()).unlink(
            missing_ok=True
        )  # of an older process of this number, which was killed
        torch.multiprocessing.spawn(_work, (run, given), nprocs=given.workers)
    else:
        torch.set_num_threads(given.threads)
        _train(run, given)


def _meeting(given: argparse.Namespace, process: int) -> Path:
    """The file by which the workers of one process find one another."""
    return given.folder.resolve() / f"meeting-{given.part}-{process}"


def _work(rank: int, run: Run, given: argparse.Namespace) -> None:
    """One of several processes that train together: robust where other programs share the cores, as threads are not."""
    settle()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s"
    )
    torch.set_num_threads(max(given.threads // run.workers, 1))
    meeting = _meeting(given, os.getppid()).as_uri()
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=run.workers)
    _train(replace(run, rank=rank), given)
    torch.distributed.destroy_process_group()


def _train(run: Run, given: argparse.Namespace) -> None:
    wanted = (
        ("autoencoder", "unet", "decoder", "reader", "tower")
        if given.part == "all"
        else (given.part,)
    )
    if "renderings" in wanted:
        training_set(run.folder, run.renderings)
    if "autoencoder" in wanted:
        from .train_autoencoder import train_autoencoder

        train_autoencoder(run, given.steps or STEPS["autoencoder"])
    if "unet" in wanted:
        from .train_unet import train_unet

        train_unet(run, given.host, given.steps or STEPS["unet"])
    if "decoder" in wanted:
        from .train_autoencoder import train_autoencoder

        train_autoencoder(run, given.steps or STEPS["decoder"], peak=1e-3, decoder_only=True)
    if given.part in ("flow-autoencoder", "flow-decoder"):
        from .train_autoencoder import train_autoencoder

        tuned = given.part == "flow-decoder"
        train_autoencoder(
            run,
            given.steps or STEPS[given.part],
            decoder_only=tuned,
            channels=FLOW_CHANNELS,
            name=FLOW,
        )
    if given.part == "flow":
        from .train_flow import train_flow

        train_flow(run, given.host, given.steps or STEPS["flow"])
    if "reader" in wanted and run.rank == 0:
        from .train_reader import train_reader

        train_reader(run, given.steps or STEPS["reader"])
    if "tower" in wanted and run.rank == 0:
        from .train_tower import train_tower

        train_tower(run, given.steps or STEPS["tower"])
    if given.part in ("pack", "all") and run.rank == 0:
        from .pack import pack

        pack(run.folder)
    if given.part in ("control", "all") and run.rank == 0:  # learns on the packed checkpoint
        from .pack import pack_control
        from .train_control import train_control

        train_control(replace(run, workers=1), given.host, given.steps or STEPS["control"])
        pack_control(run.folder)


if __name__ == "__main__":
    run_program(main)
