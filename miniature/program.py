"""The miniature's programs run, and put what they make, as those of tools/ do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools" / "client"))

from results import make_folder, prepare  # noqa: E402
from terminal import run_program, settle  # noqa: E402

__all__ = ["make_folder", "measuring_options", "prepare", "run_program", "settle", "tell_figures"]


def measuring_options(
    parser: argparse.ArgumentParser, count: int, of_what: str, seed: int, sheet: str
) -> None:
    """What every program that measures a miniature takes; of_what, sheet: their help."""
    parser.add_argument("--host", type=Path, required=True, help="a ComfyUI folder")
    parser.add_argument("--count", type=int, default=count, help=of_what)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--sheet", type=Path, help=f"write {sheet} here (.jpg or .png)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)


def tell_figures(command: str, seed: int, figures: Mapping[str, float], file: Path | None) -> None:
    """Print them as JSON, and write them to a file where one is asked for."""
    text = json.dumps({"command": command, "seed": seed, "figures": figures}, indent=1)
    if file:
        file.write_text(text)
    sys.stdout.write(text + "\n")
