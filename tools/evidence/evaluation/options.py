"""The command line of dev.py evaluate, and the tables that it asks for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path

from results import IN_GIT

from . import real
from .catalogue import DEFAULT, PLAIN, TABLES
from .miniatures import FLOW, UNET, fitting, refuse
from .real import DLIB, INSTALL_DLIB
from .rows import Row
from .tables import Table


def parse(argv: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    """What is asked for, with `files` (None: the miniature) and `command`. Words that do not fit together end the program."""
    parser = argparse.ArgumentParser(
        prog="dev.py evaluate",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_arguments(parser)
    own_arguments(parser)
    args = parser.parse_args(argv)
    args.files = files_of(args, parser)
    for name, on_miniature, on_checkpoint in (
        ("steps", 25, 50),
        ("cfg", 4.0, 7.5),
        ("processes", min(8, os.cpu_count() or 1), 1),
    ):
        if getattr(args, name) is None:
            setattr(args, name, on_checkpoint if args.files else on_miniature)
    args.command = " ".join(["evaluate", *(sys.argv[1:] if argv is None else argv)])
    refuse_too_small(args, parser)
    refuse_without_effect(args, parser)
    args.miniature = args.miniature or UNET
    if args.miniature == FLOW and args.out == parser.get_default("out"):
        args.out = Path("kindred-evaluation-flow")
    args.host = Path(
        args.host or parser.error("--host is missing; run it as: python3 dev.py evaluate")
    )
    return args


def common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", choices=("all", "personalize", "story", "miniature"), default="all"
    )
    parser.add_argument(
        "--miniature", choices=(UNET, FLOW), help=f"whose pictures (default {UNET})"
    )
    parser.add_argument(
        "--table", action="append", choices=sorted(TABLES), help="repeat it for several"
    )
    parser.add_argument(
        "--variant", action="append", help='"name: input=value, ..."; repeat it for more rows'
    )
    parser.add_argument(
        "--count",
        type=int,
        help="identities or sets of every table (miniature: pictures per class and scene)",
    )
    parser.add_argument(
        "--first",
        type=int,
        help="the first of them (default: the table's; defaults were chosen on 1000 and up)",
    )
    parser.add_argument(
        "--seeds", type=int, default=2, help="noises for each identity or set (default %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="of the sampler (default: 25 on the miniature, which give the numbers of 50; else 50)",
    )
    parser.add_argument(
        "--cfg", type=float, help="guidance (default 4 for the miniature, 7.5 for a checkpoint)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="that measure at once (default: the cores, 8 at most; 1 for a checkpoint)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("kindred-evaluation"),
        help=f"folder (default %(default)s, of the flow miniature %(default)s-flow{IN_GIT})",
    )
    parser.add_argument("--json", type=Path, help="write the figures into this file too")
    parser.add_argument(
        "--host",
        type=Path,
        default=os.environ.get("KINDRED_HOST"),
        help="ComfyUI's folder (dev.py gives it)",
    )


def own_arguments(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group(
        "a checkpoint of yours",
        "All of these are paths. Judges whose file is missing are left out.",
    )
    own.add_argument("--checkpoint", type=Path, help="SD1.5, SD2.x or SDXL")
    own.add_argument(
        "--prompts",
        type=Path,
        help="a line per prompt, {subject} for the word; for stories a blank line between sets",
    )
    own.add_argument(
        "--references",
        type=Path,
        help="a folder of photos; one in a subfolder shows what the subfolder is called",
    )
    own.add_argument(
        "--subject", default="", help="the word for the subject, such as cat or woman (no path)"
    )
    own.add_argument(
        "--concept-encoder",
        type=Path,
        help="of this checkpoint; without it there is self-attention injection alone",
    )
    own.add_argument(
        "--concept-vision", type=Path, help="the CLIP Vision that IP-Adapter full-face weights need"
    )
    own.add_argument(
        "--clip-vision",
        type=Path,
        help="judges likeness to the photo: CLIP's picture tower, such as ViT-L/14's",
    )
    own.add_argument(
        "--clip-text",
        type=Path,
        help="judges agreement with the prompt: the text half of the same CLIP, such as clip_l",
    )
    own.add_argument(
        "--aesthetic",
        type=Path,
        help="judges quality: LAION's improved aesthetic head for ViT-L/14",
    )
    own.add_argument(
        "--dino", type=Path, help="judges likeness: a DINOv2 that the host's Load CLIP Vision reads"
    )
    own.add_argument(
        "--faces",
        type=faces_of,
        help=f"judges whose face it is: the word {DLIB} ({INSTALL_DLIB}), or FaceNet's weights "
        "(pip install --no-deps facenet-pytorch)",
    )
    own.add_argument(
        "--size",
        type=int,
        default=0,
        help="pixels of a side (default: what the checkpoint was trained at)",
    )
    own.add_argument(
        "--batch",
        type=int,
        default=4,
        help="pictures that are sampled at once (default %(default)s)",
    )


def faces_of(text: str) -> Path | str:
    """The word for dlib's net, or the path of FaceNet's weights (a file called dlib is ./dlib)."""
    return text if text == DLIB else Path(text)


def refuse_too_small(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for name, least in (
        ("count", 1 if args.files else 2),
        ("batch", 1),
        ("seeds", 1),
        ("steps", 1),
        ("processes", 1),
        ("first", 0),
    ):
        if (value := getattr(args, name)) is not None and value < least:
            why = ": the floor compares every identity with another one" if name == "count" else ""
            parser.error(f"--{name} is {value}, but takes {least} at least{why}")


def refuse_without_effect(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Options that another one leaves nothing to do."""
    for option, without, why in (
        ("table", args.variant, "--variant makes a table of its own"),
        ("table", args.task != "all", "--task takes all tables of one paper"),
        ("variant", args.task == "miniature", "--task miniature has no rows"),
        ("miniature", args.files, "--checkpoint is measured"),
        ("first", args.files, "a checkpoint's cases are your photos, from the first on"),
    ):
        if getattr(args, option) not in (None, []) and without:
            parser.error(f"--{option} does nothing here: {why}")


def files_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> real.Files | None:
    """What a run on the user's checkpoint reads; None for the miniature."""
    names = [field.name for field in fields(real.Files)]
    if not args.checkpoint:
        if lonely := [name for name in names if getattr(args, name) and name != "batch"]:
            parser.error(
                f"--{lonely[0].replace('_', '-')} needs a --checkpoint: the miniature has its own"
            )
        return None
    if not args.prompts:
        parser.error("--checkpoint needs --prompts, a file with a prompt on each line")
    if args.table or args.task == "miniature":
        parser.error(
            f"{'--table' if args.table else '--task miniature'} is the miniature's; take --variant for rows of your own"
        )
    return real.Files(**{name: getattr(args, name) for name in names})


def chosen(args: argparse.Namespace) -> list[Table]:
    """The tables to measure, with this run's cases; what the miniature has not for them is said. SystemExit where words do not fit."""
    if args.variant:
        tables = [own_table(args)]
    elif args.files:
        tables = real.tables(args.files, args.task)
    else:
        names = args.table or [name for name in DEFAULT if args.task in ("all", TABLES[name].task)]
        tables, sentences = fitting(
            [TABLES[name] for name in names], args.miniature, bool(args.table)
        )
        for sentence in sentences:
            print(f"evaluate: {sentence}", file=sys.stderr)
    if args.files:
        return [replace(t, count=min(args.count or t.count, t.count)) for t in tables]
    return [
        replace(t, count=args.count or t.count, first=t.first if args.first is None else args.first)
        for t in tables
    ]


def own_table(args: argparse.Namespace) -> Table:
    """The rows of --variant beside plain."""
    if args.task not in ("personalize", "story"):
        raise SystemExit(
            "evaluate: --variant needs --task personalize or --task story: the inputs are that task's."
        )
    rows = (PLAIN[args.task], *(Row.parse(args.task, text) for text in args.variant))
    if twice := sorted({a.name for a, b in combinations(rows, 2) if a.name == b.name}):
        raise SystemExit(
            f"evaluate: two rows are called {', '.join(twice)}. Give each a name of its own."
        )
    if args.files:
        count = real.tables(args.files, args.task)[0].count
        real.refuse(rows, args.files)
    else:
        refuse(rows, args.miniature)
        count = 12 if args.task == "personalize" else 6
    return Table("own", "Rows of your own", args.task, rows, count)
