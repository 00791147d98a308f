"""Makes a .safetensors of a public adapter that was published as a pickle, for models/concept_encoders.

python3 tools/workshop/convert_adapter.py ip-adapter.bin                writes ip-adapter.safetensors beside it
python3 tools/workshop/convert_adapter.py ip-adapter.bin FILE.safetensors    somewhere else

Nothing but tensors is taken from the pickle, by torch's own reader of weights, which runs no program of it. Needs torch and
safetensors: the environment of dev.py or of ComfyUI.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

import torch
from safetensors.torch import save_file
from terminal import run_program
from torch import Tensor


def flattened(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts by their joined names; ValueError for anything else in it."""
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content.contiguous()
    elif isinstance(content, Mapping):
        for name, inner in content.items():
            yield from flattened(inner, f"{prefix}{name}.")
    else:
        raise ValueError(f"{prefix or 'the file'} holds {type(content).__name__} and no tensors")


def convert(source: Path, target: Path) -> int:
    """Write the tensors of a pickle to a .safetensors -> how many. SystemExit says why not."""
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
        tensors = dict(flattened(content))
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise SystemExit(
            f"convert_adapter: {source.name} is no pickle of weights alone ({str(error).splitlines()[0]:.160})."
            " Download it again from its authors."
        ) from error
    # two names of one tensor would be refused
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target)
    return len(tensors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="FILE.bin")
    parser.add_argument("target", type=Path, nargs="?", metavar="FILE.safetensors")
    chosen = parser.parse_args(arguments)
    if not chosen.source.is_file():
        raise SystemExit(f"convert_adapter: there is no file {chosen.source}.")
    target = chosen.target or chosen.source.with_suffix(".safetensors")
    if target.exists():
        raise SystemExit(
            f"convert_adapter: {target} is there already. Give another name behind it."
        )
    count = convert(chosen.source, target)
    print(f"{target}: {count} tensors")
    return 0


if __name__ == "__main__":
    run_program(main)
