"""Rebuilds the miniature from nothing: `python -m miniature.train all --host <ComfyUI> --folder <work folder>`.

Every part is seeded and can be killed at any time: the same command goes on from the last checkpoint in the work folder.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
    "whole": 3000,
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
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the flow's blocks: 1.5 times as fast behind the first minute; needs a C++ compiler",
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run = Run(
        make_folder(args.folder),
        torch.device(args.device),
        args.seed,
        args.renderings,
        args.workers,
        compiled=args.compile,
    )
    if args.part in ("flow", "flow-decoder"):  # before there are several workers
        from .pack import begin_flow

        begin_flow(run.folder)
    if args.part != "renderings" and args.workers > 1:
        training_set(
            run.folder, run.renderings
        )  # before there are several workers, who all would render it
        _meeting(args, os.getpid()).unlink(
            missing_ok=True
        )  # of an older process of this number, which was killed
        torch.multiprocessing.spawn(_work, (run, args), nprocs=args.workers)
    else:
        torch.set_num_threads(args.threads)
        _train(run, args)


def _meeting(args: argparse.Namespace, process: int) -> Path:
    """The file by which the workers of one process find one another."""
    return args.folder.resolve() / f"meeting-{args.part}-{process}"


def _work(rank: int, run: Run, args: argparse.Namespace) -> None:
    """One of several processes that train together: robust where other programs share the cores, as threads are not."""
    settle()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s"
    )
    torch.set_num_threads(max(args.threads // run.workers, 1))
    meeting = _meeting(args, os.getppid()).as_uri()
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=run.workers)
    _train(replace(run, rank=rank), args)
    torch.distributed.destroy_process_group()


def _train(run: Run, args: argparse.Namespace) -> None:
    for part in ALL if args.part == "all" else (args.part,):
        if run.rank == 0 or part not in ALONE:
            PARTS[part](run, args.host, args.steps or STEPS.get(part, 0))


# the parts, each with the imports of its own: not every one needs the host ---------------------------------------------------


def _renderings(run: Run, host: Path, steps: int) -> None:
    training_set(run.folder, run.renderings)


def _autoencoder(run: Run, host: Path, steps: int) -> None:
    from .train_autoencoder import train_autoencoder

    train_autoencoder(run, steps)


def _decoder(run: Run, host: Path, steps: int) -> None:
    from .train_autoencoder import train_autoencoder

    train_autoencoder(run, steps, peak=1e-3, decoder_only=True)


def _flow_autoencoder(run: Run, host: Path, steps: int, tuned: bool = False) -> None:
    from .train_autoencoder import train_autoencoder

    train_autoencoder(run, steps, decoder_only=tuned, channels=FLOW_CHANNELS, name=FLOW)


def _unet(run: Run, host: Path, steps: int) -> None:
    from .train_unet import train_unet

    train_unet(run, host, steps)


def _flow(run: Run, host: Path, steps: int) -> None:
    from .train_flow import train_flow

    train_flow(run, host, steps)


def _reader(run: Run, host: Path, steps: int) -> None:
    from .train_reader import train_reader

    train_reader(run, steps)


def _whole(run: Run, host: Path, steps: int) -> None:
    """Learns on the packed reader and autoencoders."""
    from .pack import pack_reader
    from .train_whole import train_whole

    train_whole(run, steps)
    pack_reader(run.folder)


def _tower(run: Run, host: Path, steps: int) -> None:
    from .train_tower import train_tower

    train_tower(run, steps)


def _pack(run: Run, host: Path, steps: int) -> None:
    from .pack import pack

    pack(run.folder)


def _control(run: Run, host: Path, steps: int) -> None:
    """Learns on the packed checkpoint."""
    from .pack import pack_control
    from .train_control import train_control

    train_control(replace(run, workers=1), host, steps)
    pack_control(run.folder)


PARTS: dict[str, Callable[[Run, Path, int], None]] = {
    "renderings": _renderings,
    "autoencoder": _autoencoder,
    "unet": _unet,
    "decoder": _decoder,
    "flow-autoencoder": _flow_autoencoder,
    "flow-decoder": partial(_flow_autoencoder, tuned=True),
    "flow": _flow,
    "reader": _reader,
    "tower": _tower,
    "pack": _pack,
    "whole": _whole,
    "control": _control,
}
ALL = (
    "autoencoder",
    "unet",
    "decoder",
    "reader",
    "tower",
    "pack",
    "whole",
    "control",
)  # in this order
ALONE = (
    "reader",
    "tower",
    "pack",
    "whole",
    "control",
)  # are made by one process, whatever --workers


if __name__ == "__main__":
    run_program(main)
