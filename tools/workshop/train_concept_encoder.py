"""Trains a concept encoder for a base model from a folder of pictures (paper A, arXiv 2403.11284, section 2.3 and 3.1).

  accelerate launch tools/workshop/train_concept_encoder.py --host COMFYUI --checkpoint sd15.safetensors \\
      --clip-vision vit-l.safetensors --images FOLDER --prompt "a photo of a face" --out RUN

One process, on a GPU or (--cpu) the CPU. Several GPUs: accelerate launch --multi_gpu --num_processes 4 tools/workshop/...
Several processes on a CPU, where accelerate launch starts but one:
  python -m torch.distributed.run --nproc_per_node 2 tools/workshop/... --cpu
p processes with --batch b are one with --batch p * b. The same command resumes from the newest state in --out after any kill.
Pictures may lie in subfolders, one per subject: then the tower sees another picture of the subject than the UNet draws.
NAME.txt beside NAME.png is its prompt. Writes RUN/<name>.safetensors (put it into models/concept_encoders), log.csv, validation
pictures and state.pt.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

from boot import boot
from concept_training.options import parse
from concept_training.run import Training
from pictures import NoPictures, PictureFolder
from terminal import run_program


def main(argv: list[str] | None = None) -> int:
    args = parse(argv, __doc__)
    try:
        PictureFolder(args.images, args.prompt).files()
    except NoPictures as problem:  # said before seconds of loading
        raise SystemExit(f"train_concept_encoder: {problem}") from problem
    if args.tensorboard and find_spec("tensorboard") is None:
        raise SystemExit(
            "train_concept_encoder: --tensorboard needs the tensorboard package; log.csv is written in any case."
        )
    quiet = int(os.environ.get("RANK", "0")) != 0
    if torch.cuda.is_available() and not args.cpu:
        torch.cuda.set_device(
            int(os.environ.get("LOCAL_RANK", 0))
        )  # before the host asks the first GPU for its memory
    boot(Path(args.host), cpu=args.cpu or not torch.cuda.is_available())
    from datetime import timedelta

    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        cpu=args.cpu or not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )  # the first process reads the pictures
    if accelerator.device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    try:
        return Training(args, accelerator, quiet).run()
    except NoPictures as problem:
        raise SystemExit(f"train_concept_encoder: {problem}") from problem
    except OSError as problem:
        full = problem.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise SystemExit(
            f"train_concept_encoder: {problem}. What was saved is whole; {'make room and ' * full}run the same command."
        ) from problem
    except (ValueError, FloatingPointError) as problem:
        raise SystemExit(f"train_concept_encoder: {problem}") from problem


if __name__ == "__main__":
    run_program(main)
