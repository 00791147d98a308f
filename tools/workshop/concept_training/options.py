"""The command line of train_concept_encoder.py."""

from __future__ import annotations

import argparse
import os
from dataclasses import Field, fields
from pathlib import Path

from checkout import as_kindred
from results import IN_GIT


def parse(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """What is asked for; `settings` are those of TrainSettings."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run_arguments(parser)
    loop_arguments(parser)
    args = parser.parse_args(argv)
    if not args.host:
        parser.error("--host is missing: ComfyUI's folder")
    args.settings = {s.name: getattr(args, s.name) for s in loop_settings()}
    return args


def run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", type=Path, default=os.environ.get("KINDRED_HOST"), help="ComfyUI's folder"
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a whole checkpoint (.safetensors) of a UNet or a transformer, or a name in models/checkpoints",
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of this run{IN_GIT}")
    parser.add_argument("--name", help="of the encoder's file (default: the run's folder)")
    parser.add_argument(
        "--prompt",
        default="a photo",
        help='what every picture shows, for instance "a photo of a face"',
    )
    tower = parser.add_mutually_exclusive_group(required=True)
    tower.add_argument(
        "--clip-vision", help="CLIP ViT-L or ViT-H .safetensors, or a name in models/clip_vision"
    )
    tower.add_argument("--new-tower", help="JSON of a CLIPVisionConfig for a tower from nothing")
    parser.add_argument(
        "--tower-weights", type=Path, help="weights for --new-tower, in transformers' names"
    )
    tower.add_argument(
        "--start", type=Path, help="a concept encoder with a tower of its own to go on from"
    )
    parser.add_argument(
        "--size", type=int, help="pixels of a side (default: what the model was trained at)"
    )
    parser.add_argument("--merge", choices=("concat", "add"), default="concat")
    parser.add_argument(
        "--tie",
        type=int,
        default=1,
        help="on a transformer: neighbouring blocks that share keys and values (default: %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=8,
        help="subjects kept out for validation (default: %(default)s)",
    )
    parser.add_argument("--save-every", type=int, default=500, help="steps between states")
    parser.add_argument(
        "--validate-every", type=int, default=1000, help="steps between validations; 0 for none"
    )
    parser.add_argument(
        "--mixed-precision",
        choices=("no", "bf16"),
        default="bf16",
        help="of the forward pass; fp16 would need its losses scaled (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="recompute the UNet in the backward pass: less memory, slower; not on transformers",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write TensorBoard events (needs the tensorboard package)",
    )
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")


def loop_settings() -> tuple[Field, ...]:
    """The fields of the loop's TrainSettings, which both front ends share."""
    as_kindred()
    from kindred.models.concept.settings import TrainSettings

    return fields(TrainSettings)


def loop_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field of TrainSettings."""
    loop = parser.add_argument_group("the loop")
    words = {
        "accumulate": "micro-steps per step",
        "rate": "learning rate",
        "tower_rate": "of the tower; 0 freezes it",
        "batch": "pictures per process and micro-step",
        "min_snr": "gamma of min-SNR weights; none is the paper's plain loss",
    }
    for setting in loop_settings():
        kind = {"int": int, "float": float, "float | None": float, "str": str}[setting.type]
        loop.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=kind,
            default=setting.default,
            help=f"{words.get(setting.name, '')} (default: {setting.default})".strip(),
        )
