"""Killed in the middle of saving: the older file is whole, nothing half-made is offered, and the next save works."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from demo import CAPTURE, PHOTO, WORD, WORKFLOW
from host_server import HostServer

HOST = os.environ.get("KINDRED_HOST")
LAW = pytest.mark.parametrize
if not hasattr(os, "fork"):
    pytest.skip("no fork: this system cannot kill a copy of a process", allow_module_level=True)


@pytest.fixture(scope="module")
def told() -> dict[str, dict]:
    """What dying.py saw, by case; see there."""
    if not HOST:
        pytest.skip("no host: KINDRED_HOST names a ComfyUI folder (python3 dev.py test sets it)")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("dying.py")), HOST],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


MOMENTS = [
    "half of it is written",
    "it is written and not flushed",
    "it is flushed and not renamed",
    "it is renamed",
    "the system stops it while it writes",
]


def partials(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".partial")]


@LAW("moment", MOMENTS)
def test_a_reference_that_a_killed_process_was_saving(told, moment):
    """Where it had its name already, it is whole; else the next one takes the number, and what was left is gone."""
    case, renamed = told[f"reference: {moment}"], moment == "it is renamed"
    assert (
        case["code"] == -(signal.SIGXFSZ if "system" in moment else signal.SIGKILL)
        and case["again"] == 0
    )
    names = [f"reference_0000{n}_.safetensors" for n in (1, 2, 3)]
    assert case["older"] and case["listed"] == names[: 1 + renamed]
    assert renamed or [
        re.sub(r"\d+\.partial", "N.partial", name) for name in partials(case["left"])
    ] == [f".{names[1]}.N.partial"]
    assert case["after"] == case["listed after"] == names[: 2 + renamed] and case["same"]


@LAW("moment", MOMENTS)
def test_a_concept_encoder_that_a_killed_process_was_replacing(told, moment):
    case, renamed = told[f"encoder: {moment}"], moment == "it is renamed"
    assert (
        case["code"] == -(signal.SIGXFSZ if "system" in moment else signal.SIGKILL)
        and case["again"] == 0
    )
    assert (
        case["older"] != renamed
        and case["newer"] == renamed
        and case["listed"] == ["faces.safetensors"]
    )
    assert len(partials(case["left"])) == 1 - renamed
    assert case["after"] == case["listed after"] == ["faces.safetensors"] and case["same"]


@LAW(
    ("suffix", "moment", "steps"),
    [
        (".training", "half of it is written", [2, 1]),
        (".training", "it is flushed and not renamed", [2, 1]),
        ("new.safetensors", "it is flushed and not renamed", [1, 1]),
        ("new.safetensors", "it is renamed", [2, 1]),
    ],
)
def test_a_training_that_is_killed_while_it_saves_goes_on_bit_for_bit(told, suffix, moment, steps):
    """steps: of the encoder and of the state beside it, which is never ahead."""
    case = told[f"training, {suffix}: {moment}"]
    assert case["code"] == -signal.SIGKILL and case["again"] == 0
    assert case["steps"] == steps and case["listed"] == ["new.safetensors", "whole.safetensors"]
    assert (
        case["after"] == ["new.safetensors", "new.training"]
        and case["listed after"] == case["listed"]
        and case["same"]
    )


SLOW_DISK = '''"""A disk that takes its time: flushing a temporary file does not end."""
import os, time
sync = os.fsync
def fsync(handle):
    if os.readlink(f"/proc/self/fd/{handle}").endswith(".partial") and os.path.exists("slow"):
        time.sleep(600)
    sync(handle)
os.fsync = fsync
NODE_CLASS_MAPPINGS = {}
'''


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="needs /proc to know which file is flushed"
)
def test_a_server_that_is_killed_while_it_saves_a_reference(tmp_path):
    """The real one, by SIGKILL; started again over the same folders it offers what is whole, and saves."""
    if not HOST:
        pytest.skip("no host: KINDRED_HOST names a ComfyUI folder (python3 dev.py test sets it)")
    graph = {
        key: node
        for key, node in json.loads(WORKFLOW.read_text("utf-8")).items()
        if key in ("1", PHOTO, "4", WORD, "5", CAPTURE)
    }
    graph[CAPTURE]["inputs"]["steps"] = 2
    graph["save"] = {
        "class_type": "KindredSaveReference",
        "inputs": {"reference": [CAPTURE, 0], "filename_prefix": "kindred/cat"},
    }
    disk = tmp_path / "custom_nodes" / "slow_disk.py"
    disk.parent.mkdir()
    flag = tmp_path / "slow"
    disk.write_text(SLOW_DISK.replace('"slow"', repr(str(flag))), "utf-8")
    folder = tmp_path / "output" / "kindred"

    def offered(client) -> list[str]:
        options = client.object_info("KindredLoadReference")["KindredLoadReference"]["input"][
            "required"
        ]["file"][1]["options"]
        return [name for name in options if (folder / name).exists()]

    with HostServer(cpu=True, threads=1, base=tmp_path) as server:
        server.client.run(graph, timeout=600)
        before = (folder / "cat_00001_.safetensors").read_bytes()
        flag.touch()
        graph[CAPTURE]["inputs"]["mask_value"] = 0.31  # not from the cache
        server.client.queue(graph)
        end = time.monotonic() + 600
        while not list(folder.glob(".*.partial")):
            assert time.monotonic() < end and server.process.poll() is None
            time.sleep(0.05)
        server.process.kill()
        server.process.wait()
    assert [p.name for p in folder.iterdir() if p.suffix == ".safetensors"] == [
        "cat_00001_.safetensors"
    ]
    flag.unlink()
    with HostServer(cpu=True, threads=1, base=tmp_path) as server:
        assert offered(server.client) == ["cat_00001_.safetensors"]
        server.client.run(graph, timeout=600)
        assert offered(server.client) == ["cat_00001_.safetensors", "cat_00002_.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "cat_00001_.safetensors",
        "cat_00002_.safetensors",
    ]
    assert (
        (folder / "cat_00001_.safetensors").read_bytes()
        == before
        == (folder / "cat_00002_.safetensors").read_bytes()
    )
