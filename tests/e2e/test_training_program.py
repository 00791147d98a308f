"""tools/workshop/train_concept_encoder.py as a user starts it, on the miniature with a dozen pictures.

Runs, kills, two processes, a full disk.

A start costs ten seconds, so the tests share their runs: `whole` steps 1 to 8 at once, `begun` is its first step by itself.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from kindred.miniature.album import write_album
from kindred.miniature.pack import FLOW_CHECKPOINT
from kindred.models.concept.file import load_concept_encoder
from PIL import Image

HOST = os.environ.get("KINDRED_HOST")
PROGRAM = str(ROOT / "tools" / "workshop" / "train_concept_encoder.py")
TOWER = (
    '{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, '
    '"patch_size": 8, "hidden_act": "quick_gelu"}'
)
STEPS, LIMIT = 8, 600  # seconds for one run: a busy machine is no failure
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HOST, reason="no host: KINDRED_HOST names a ComfyUI folder"),
]


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """Twelve pictures of six subjects, and one file that is none."""
    folder = tmp_path_factory.mktemp("album")
    write_album(folder, subjects=6, pictures=2)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    return folder


def words(album: Path, out: Path, **changes) -> list[str]:
    given = {
        "checkpoint": "kindred_miniature.safetensors",
        "images": album,
        "out": out,
        "name": "tiny",
        "new_tower": TOWER,
        "prompt": "a photo",
        "steps": STEPS,
        "batch": 2,
        "rate": 1e-3,
        "average": 0.9,
        "drop_text": 0,
        "drop_image": 0,
        "drop_both": 0,
        "held_out": 1,
        "save_every": 2,
        "validate_every": 0,
        "mixed_precision": "no",
    } | changes
    return [
        PROGRAM,
        "--cpu",
        *(str(w) for name, value in given.items() for w in (f"--{name.replace('_', '-')}", value)),
    ]


def start(arguments: list[str], launcher: tuple[str, ...] = (), **how) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        **how,
    )


def run(arguments: list[str], launcher: tuple[str, ...] = (), fails: bool = False, **how) -> str:
    """What the program says; it has to end well, or (fails) not."""
    process = start(arguments, launcher, **how)
    try:
        told = process.communicate(timeout=LIMIT)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode != 0) == fails, told[-3000:]
    return told


def losses(out: Path) -> list[float]:
    with (out / "log.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def state(out: Path) -> dict:
    return torch.load(out / "state.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(album, tmp_path_factory) -> tuple[Path, str]:
    """A run that nothing stops, with validation at its end; and what it said."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(words(album, out, validate_every=STEPS))


@pytest.fixture(scope="module")
def begun(album, tmp_path_factory) -> Path:
    """The same run asked for one step only, by accelerate's launcher."""
    out = tmp_path_factory.mktemp("begun")
    run(
        words(album, out, steps=1),
        ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
    )
    return out


def test_a_run_writes_its_encoder_log_state_and_validation(whole):
    out, told = whole
    encoder = load_concept_encoder(out / "tiny.safetensors")
    assert encoder.config.family == "KindredMiniature" and encoder.config.training["steps"] == STEPS
    assert (
        encoder.config.training["pictures"] == 10 and encoder.config.training["subjects"] == 5
    )  # one of six is held out
    assert len(losses(out)) == STEPS and state(out)["step"] == STEPS
    with Image.open(out / f"validation-{STEPS:06d}.png") as picture:
        assert picture.size == (128, 3 * 128)  # what the tower saw, plain, with the concept
    assert "memory: UNet" in told and "validation loss" in told and "pictures a second" in told


def test_an_unreadable_file_is_named_and_counted_and_an_empty_folder_is_a_sentence(whole, tmp_path):
    assert "left out 1 unreadable files" in whole[1] and "broken.png" in whole[1]
    (tmp_path / "empty").mkdir()
    told = run(words(tmp_path / "empty", tmp_path / "out"), fails=True)
    assert (
        "train_concept_encoder: " in told
        and "holds no pictures (.bmp" in told
        and "Traceback" not in told
    )
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on_as_if_it_had_not_been(whole, begun, album, tmp_path):
    out = shutil.copytree(begun, tmp_path / "out")
    process = start(words(album, out, steps=100_000))
    try:
        until = time.monotonic() + LIMIT
        while state(out)["step"] == 1:
            assert process.poll() is None and time.monotonic() < until, "no state was saved"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    finally:
        process.communicate()
    stopped = state(out)["step"]
    assert process.returncode == -signal.SIGKILL and 2 <= stopped < STEPS and stopped % 2 == 0
    (out / ".state.pt.1.partial").write_bytes(b"killed while it saved")
    told = run(words(album, out))
    assert f"going on from step {stopped}" in told and losses(out) == pytest.approx(
        losses(whole[0]), rel=1e-6
    )
    assert (out / "tiny.safetensors").read_bytes() == (whole[0] / "tiny.safetensors").read_bytes()
    assert not list(out.glob(".*partial"))


def test_two_processes_are_one_with_the_joined_batch(begun, album, tmp_path):
    """The first step: its loss, and its gradient, which Adam's first moment holds (0.1 of it)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    run(words(album, tmp_path / "out", batch=1, steps=1), launcher)
    assert losses(tmp_path / "out") == pytest.approx(losses(begun)[:1], rel=1e-5)
    one, two = (state(out)["optimizer"]["state"] for out in (begun, tmp_path / "out"))
    assert one.keys() == two.keys() and len(one) > 20
    pairs = [(one[i]["exp_avg"], two[i]["exp_avg"]) for i in one]
    rounding = 1e-7 * max(first.abs().max() for first, _ in pairs)
    nothing = [max(a.abs().max(), b.abs().max()) < rounding for a, b in pairs]
    assert (
        sum(nothing) == 1
    )  # the bias of the tower's keys: a softmax does not see it, so its gradient is zero
    for (first, second), none in zip(pairs, nothing):
        assert none or (first - second).abs().max() <= 1e-5 * first.abs().max()


def test_a_full_disk_leaves_the_last_good_state_and_says_so(begun, album, tmp_path):
    limits = pytest.importorskip("resource")
    out = shutil.copytree(begun, tmp_path / "out")
    before = {name: (out / name).read_bytes() for name in ("state.pt", "log.csv")}
    size = len(before["state.pt"]) // 2
    told = run(
        words(album, out, steps=4),
        fails=True,
        preexec_fn=lambda: limits.setrlimit(limits.RLIMIT_FSIZE, (size, size)),
    )
    assert "state.pt could not be written" in told and "What was saved is whole; make room" in told
    assert "Traceback" not in told
    assert {name: (out / name).read_bytes() for name in before} == before and state(out)[
        "step"
    ] == 1
    assert load_concept_encoder(out / "tiny.safetensors").config.training["steps"] in (
        1,
        2,
    )  # written first, so it may be newer
    assert not list(out.glob(".*partial"))


def test_other_settings_are_another_run(begun, album, tmp_path):
    out = shutil.copytree(begun, tmp_path / "out")
    told = run(words(album, out, rate=2e-3, size=64), fails=True)
    assert (
        all(
            w in told
            for w in ("rate 0.001", "rate 0.002", "size 128", "size 64", "another output folder")
        )
        and "Traceback" not in told
    )


def test_it_trains_through_a_transformer_and_goes_on(album, tmp_path) -> None:
    """The flow miniature, ten blocks of which neighbours share keys and values."""
    flow = {"checkpoint": FLOW_CHECKPOINT, "size": 64, "tie": 2, "average": 0}
    run(words(album, tmp_path, steps=2, **flow))
    said = run(words(album, tmp_path, steps=4, **flow))
    encoder = load_concept_encoder(tmp_path / "tiny.safetensors")
    assert "going on from step 2" in said and len(losses(tmp_path)) == 4
    assert encoder.config.decoupled and len(encoder.config.layers) == 10 and len(encoder.to_k) == 5
    assert all(layer.weight.any() for layer in encoder.to_v.values())


def test_ties_are_for_transformers(album, tmp_path) -> None:
    said = run(words(album, tmp_path, tie=2), fails=True)
    assert "--tie is for transformers" in said
