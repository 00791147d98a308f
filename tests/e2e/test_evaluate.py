"""tools/evidence/evaluate.py as a user starts it: the same numbers twice, a stop and its continuation, and a checkpoint of one's own."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from kindred.miniature.world import held_out_identity, render
from PIL import Image
from safetensors.torch import save_file

HOST = os.environ.get("KINDRED_HOST")
WEIGHTS = ROOT / "miniature" / "weights"
LIMIT = 600  # seconds for one run: a busy machine is no failure
SMALL = ("--table", "table_2", "--count", "2", "--steps", "3", "--seeds", "1")
TIMES = ("seconds", "seconds_error", "seconds_count")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HOST, reason="no host: KINDRED_HOST names a ComfyUI folder"),
]


def begin(out: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "tools" / "evidence" / "evaluate.py"),
            "--out",
            str(out),
            *words,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def run(out: Path, *words: str) -> str:
    process = begin(out, *words)
    told, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    return told


def tables(told: str) -> list[str]:
    return [line for line in told.splitlines() if line.startswith(("|", "**"))]


def numbers(out: Path, table: str) -> list[dict[str, str]]:
    """A table's numbers, less the times."""
    rows = list(csv.DictReader((out / f"{table}.csv").open()))
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("once")
    return out, run(out, *SMALL, "--processes", "2", "--json", str(out / "figures.json"))


def test_a_folder_holds_what_was_measured(once):
    out, told = once
    names = {path.name for path in out.iterdir()}
    assert {
        "report.md",
        "report.json",
        "table_2.csv",
        "table_2_front.png",
        "table_2_pictures.jpg",
        "journal.jsonl",
    } <= names
    assert tables(told)[0].startswith(
        "**Paper A, Table 2: what each injection adds**: 2 identities, 1 seed; floor "
    )
    assert [line.split(" | ")[0] for line in tables(told)[3:]] == [
        "| plain",
        "| cross",
        "| self",
        "| full",
        "| shuffled",
    ]
    figures = json.loads((out / "figures.json").read_text())["figures"]
    assert figures == json.loads((out / "report.json").read_text())["figures"]
    assert {
        "identity.floor",
        "identity.plain",
        "identity.self",
        "identity.cross",
        "identity.full",
        "identity.ceiling",
        "scene_accuracy.full",
        "class_accuracy.plain",
        "whole_subject.self",
        "identity.shuffled",
        "count.identities",
    } <= figures.keys()
    report = (out / "report.md").read_text()
    assert all(line in report for line in tables(told)) and "table_2_front.png" in report
    assert (
        Image.open(out / "table_2_pictures.jpg").width > 6 * 112
    )  # photo, plain, cross, self, full, shuffled


def test_a_second_run_gives_the_same_numbers_with_any_number_of_processes(once, tmp_path):
    out, told = once
    assert tables(run(tmp_path, *SMALL, "--processes", "1")) == tables(told)
    assert numbers(tmp_path, "table_2") == numbers(out, "table_2")


def test_a_stopped_run_goes_on(once, tmp_path):
    out, told = once
    process = begin(tmp_path, *SMALL, "--processes", "2")
    journal, deadline = tmp_path / "journal.jsonl", time.monotonic() + LIMIT
    while (
        (not journal.exists() or journal.read_text().count("\n") < 3)
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # as dev.py does
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "the same command resumes here" in said
    before = journal.read_text().splitlines()
    assert 3 <= len(before) < 12
    assert tables(run(tmp_path, *SMALL, "--processes", "1")) == tables(told)
    after = journal.read_text().splitlines()
    assert after[: len(before)] == before and len(after) == 12


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> list[str]:
    """The miniature as somebody's checkpoint, photos and prompts, and a CLIP of the real size with random weights."""
    folder = tmp_path_factory.mktemp("own")
    for word, number in (("cat", 0), ("dog", 1)):
        (folder / "photos" / word).mkdir(parents=True)
        Image.fromarray(
            render(held_out_identity(number), word, "meadow", 5000 + number).image
        ).save(folder / "photos" / word / "a.png")
    (folder / "prompts.txt").write_text(
        "a {subject} on a beach\na {subject} in the snow\n\na {subject} at night\na {subject} at home\n"
    )
    import transformers

    g = torch.Generator().manual_seed(0)
    for name, kind, config in (
        (
            "vision",
            transformers.CLIPVisionModelWithProjection,
            transformers.CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                patch_size=14,
                projection_dim=768,
            ),
        ),
        (
            "text",
            transformers.CLIPTextModelWithProjection,
            transformers.CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
            ),
        ),
    ):
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in kind(config).state_dict().items()}
        weights = {
            key: torch.ones(shape)
            if "norm" in key and key.endswith("weight")
            else 0.02 * torch.randn(shape, generator=g)
            for key, shape in shapes.items()
            if "position_ids" not in key
        }
        save_file(
            {key: value.half() for key, value in weights.items()}, folder / f"{name}.safetensors"
        )
    return [
        "--checkpoint",
        str(WEIGHTS / "checkpoints" / "kindred_miniature.safetensors"),
        "--prompts",
        str(folder / "prompts.txt"),
        "--clip-vision",
        str(folder / "vision.safetensors"),
        "--clip-text",
        str(folder / "text.safetensors"),
        "--size",
        "128",
        "--steps",
        "3",
        "--seeds",
        "1",
        "--references",
        str(folder / "photos"),
    ]


def test_a_checkpoint_of_ones_own_with_photos(own, tmp_path):
    (one := tmp_path / "prompt.txt").write_text(
        "a {subject} on a beach\n"
    )  # a ViT-L looks at every picture, and takes its time
    encoder = WEIGHTS / "concept_encoders" / "kindred_miniature_concept.safetensors"
    told = run(tmp_path, *own, "--prompts", str(one), "--concept-encoder", str(encoder))
    head = tables(told)[1]
    assert all(
        word in head
        for word in (
            "CLIP text",
            "CLIP image",
            "seconds per picture",
            "to read the photo",
            "peak GiB",
        )
    )
    assert "face" not in head and "DINO" not in head  # their files were not given
    rows = {row["row"]: row for row in csv.DictReader((tmp_path / "table_2.csv").open())}
    assert list(rows) == ["plain", "cross", "self", "full"]
    for row in rows.values():
        assert (
            -1 <= float(row["text"]) <= 1
            and 0 < float(row["image"]) <= 1
            and row["image_count"] == "2"
        )
        assert float(row["memory_gib"]) > 0.1 and float(row["unet_calls"]) == 3
    assert rows["plain"]["image"] != rows["self"]["image"] != rows["full"]["image"]
    report = (tmp_path / "report.md").read_text()
    assert (
        "| full | 0.3526 | 1.4251 | 6.6489 | 10 |" in report and "table_2_pictures.jpg" in report
    )  # the paper's own numbers
    assert "- CLIP text: raw cosine with the picture's own prompt (CLIP ViT-L, 224 px)" in report
    figures = json.loads((tmp_path / "report.json").read_text())["figures"]
    assert {
        "text_clip.full",
        "image_clip.plain",
        "memory.self",
        "count.identities",
    } <= figures.keys() and "identity.ceiling" not in figures


def test_a_checkpoint_of_ones_own_with_stories(own, tmp_path):
    told = run(tmp_path, *own, "--task", "story", "--subject", "cat", "--count", "1")
    assert "CLIP consistency" in tables(told)[1] and "1 set, 1 seed" in told
    rows = {row["row"]: row for row in csv.DictReader((tmp_path / "story.csv").open())}
    assert list(rows) == ["plain", "story"] and all(
        0 < float(row["consistency"]) <= 1 for row in rows.values()
    )
    assert rows["plain"]["consistency"] != rows["story"]["consistency"]


def test_what_cannot_be_judged_ends_before_the_work(own, tmp_path):
    begun = [own[own.index(name) + 1] for name in ("--checkpoint", "--prompts")]
    process = begin(
        tmp_path / "out", "--checkpoint", begun[0], "--prompts", begun[1], "--subject", "cat"
    )
    _, said = process.communicate(timeout=LIMIT)
    assert (
        process.returncode == 1
        and "nothing would be judged" in said
        and not (tmp_path / "out").exists()
    )


def test_the_flow_miniature_is_measured_and_goes_on(tmp_path):
    """Same figure names as the UNet miniature's; a second run measures nothing anew."""
    words = ("--miniature", "flow", "--count", "2", "--steps", "2", "--processes", "2")
    table = tables(run(tmp_path, *words, "--table", "table_2", "--seeds", "1"))
    assert [line.split(" | ")[0] for line in table[3:]] == ["| plain", "| self", "| shuffled"]
    figures = json.loads((tmp_path / "report.json").read_text())
    assert (
        figures["miniature"] == "flow"
        and {
            "identity.shuffled",
            "whole_subject.plain",
            "whole_subject.self",
            "mask.iou",
        }
        <= figures["figures"].keys()
    )
    lines = (tmp_path / "journal.jsonl").read_text().count("\n")
    assert tables(run(tmp_path, *words, "--table", "table_2", "--seeds", "1")) == table
    assert (tmp_path / "journal.jsonl").read_text().count("\n") == lines == 8
