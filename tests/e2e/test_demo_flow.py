"""The demo on the flow miniature as a user starts it: pictures, figures, and where they lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("KINDRED_HOST"), reason="no host: KINDRED_HOST names a ComfyUI folder"
    ),
]


def test_it_draws_the_photos_subject_and_tells_where(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "workshop" / "demo.py"),
            "--miniature",
            "flow",
            "--steps",
            "3",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    last, sheet = done.stdout.splitlines()[-1], tmp_path / "kindred-demo-flow" / "sheet.png"
    assert last.startswith(f"Open {sheet.resolve()}: on the left your photo") and sheet.is_file()
    out = tmp_path / "kindred-demo-flow"
    pictures = {name: [out / f"{name}_{n}.png" for n in (1, 2, 3)] for name in ("self", "plain")}
    assert all(Image.open(path).size == (128, 128) for row in pictures.values() for path in row)
    for one, other in zip(*pictures.values(), strict=True):
        assert Image.open(one).tobytes() != Image.open(other).tobytes()
    figures = json.loads((out / "report.json").read_text("utf-8"))["figures"]
    assert (
        figures["unet_calls.reference"] == 4
        and {
            "identity.self",
            "identity.plain",
            "identity.ceiling",
            "whole_subject.self",
            "scene_accuracy.self",
        }
        <= figures.keys()
    )
    graph = json.loads((out / "workflow_api.json").read_text("utf-8"))
    assert {node["class_type"] for node in graph.values()} >= {"KindredMaskedSelfAttnInject"}
