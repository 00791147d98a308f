"""This tree draws what that of one commit draws, to the bit: the guard of a move, to go with it.

Both trees are drawn with the same program on the same machine, each in a process of its own.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import bit_guard
import pytest
import schemas
import torch
from safetensors.torch import load_file
from torch import Tensor

BASELINE = "ba506359818f37a50474b1ffd646ce1a3bc8587a"


def has(root: Path, commit: str) -> bool:
    """Whether the history in this checkout reaches so far back."""
    try:
        found = subprocess.run(
            ["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=root, capture_output=True
        )
    except FileNotFoundError:  # no git
        return False
    return not found.returncode


def extract(root: Path, commit: str, folder: Path) -> Path:
    """The commit's files in a new folder."""
    made = subprocess.run(["git", "archive", commit], cwd=root, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def drawn(tree: Path, folder: Path) -> dict[str, Tensor]:
    """Every tensor that bit_guard.py draws with the pack in `tree`."""
    file = folder / f"{tree.name}.safetensors"
    command = [sys.executable, bit_guard.__file__, os.environ["KINDRED_HOST"], tree, file]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | threads, capture_output=True, text=True
    )
    assert not done.returncode, f"{tree}: {done.stderr[-3000:]}"
    return load_file(file)


def same(old: Tensor, new: Tensor) -> bool:
    return (old.dtype, old.shape) == (new.dtype, new.shape) and torch.equal(old, new)


def difference(old: Tensor, new: Tensor) -> str:
    """How two tensors differ, in words; of texts the words themselves."""
    if old.dtype == torch.uint8 == new.dtype:
        return f"{bytes(old.tolist())!r:.300} -> {bytes(new.tolist())!r:.300}"
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"{old.dtype} {list(old.shape)} -> {new.dtype} {list(new.shape)}"
    return f"by {(old.double() - new.double()).abs().max().item():.3g}"


def differences(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[str]:
    """A line for every name that only one side holds, and for every tensor that is not the same."""
    lines = [f"{name}: only before" for name in sorted(old.keys() - new.keys())]
    lines += [f"{name}: only now" for name in sorted(new.keys() - old.keys())]
    both = sorted(old.keys() & new.keys())
    return lines + [f"{n}: {difference(old[n], new[n])}" for n in both if not same(old[n], new[n])]


@pytest.mark.slow
def test_this_tree_draws_what_the_baseline_draws_to_the_bit(root, tmp_path):
    if not has(root, BASELINE):
        pytest.skip(f"the history here does not hold {BASELINE[:12]}: git fetch --unshallow")
    before = drawn(extract(root, BASELINE, tmp_path / "baseline"), tmp_path)
    found = differences(before, drawn(root, tmp_path))
    cells = {line.split("/")[0] for line in found}
    assert not found, f"{len(cells)} of {len(bit_guard.CELLS)} cells differ:\n" + "\n".join(found)
    assert {name.split("/")[0] for name in before} == bit_guard.CELLS.keys()


def test_what_workflows_save_is_named_and_ordered_as_before(root):
    """Values of widgets are saved by their place: old inputs and outputs come first and as they were, new inputs are optional."""
    if not has(root, BASELINE):
        pytest.skip(f"the history here does not hold {BASELINE[:12]}: git fetch --unshallow")
    record = ["git", "show", f"{BASELINE}:tests/host/object_info.json"]
    before = json.loads(subprocess.run(record, cwd=root, capture_output=True, check=True).stdout)
    now = schemas.read(schemas.GOLDEN)
    for key, node in before.items():
        count = len(node["inputs"])
        kept, more = now[key]["inputs"][:count], now[key]["inputs"][count:]
        for old, new in zip(node["inputs"], kept, strict=True):
            assert (old["id"], old["type"], old["required"]) == (
                new["id"],
                new["type"],
                new["required"],
            )
            if isinstance(old.get("options"), list):
                assert new["options"][: len(old["options"])] == old["options"]
        assert not any(entry["required"] for entry in more)
        assert node["outputs"] == now[key]["outputs"][: len(node["outputs"])]


def test_the_smallest_difference_is_named():
    one, nan = torch.ones(3), torch.full((3,), torch.nan)
    assert differences({"a": one, "b": one}, {"a": one.clone(), "b": one.clone()}) == []
    assert differences({"a": one}, {"a": one.nextafter(2 * one)}) == ["a: by 1.19e-07"]
    assert differences({"a": one}, {"a": one.half()}) == [
        "a: torch.float32 [3] -> torch.float16 [3]"
    ]
    assert differences({"a": one}, {"a": one[:2]}) == ["a: torch.float32 [3] -> torch.float32 [2]"]
    assert differences({"a": one}, {"b": one}) == ["a: only before", "b: only now"]
    assert differences({"a": nan}, {"a": nan}) == ["a: by nan"]


def test_a_history_without_the_commit_is_noticed(root, tmp_path):
    assert not has(root, "0" * 40) and not has(tmp_path, BASELINE)
