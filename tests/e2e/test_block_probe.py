"""Block Probe through the API of a real server: the shipped workflow measures, and `blocks = measured` then means it."""

from __future__ import annotations

import json
import shutil
from io import BytesIO

import pytest
from client import NodeFailed
from PIL import Image

from workflows import api_form

CAPTURE, INJECT, SAMPLER = "6", "7", "11"


def personalize() -> dict:
    """self_attention_only with few steps, in the measured blocks."""
    graph = json.loads(json.dumps(api_form("self_attention_only")))
    graph[CAPTURE]["inputs"] |= {"steps": 2, "blocks": "measured"}
    graph[INJECT]["inputs"]["blocks"] = "measured"
    graph[SAMPLER]["inputs"]["steps"] = 2
    return graph


def test_a_workflow_measures_and_another_one_uses_it(client, server):
    folder = server.base / "user" / "kindred"
    shutil.rmtree(folder, ignore_errors=True)
    with pytest.raises(NodeFailed, match="not been measured.*Block Probe"):
        client.run(personalize())
    outputs = client.run(api_form("measure_blocks"))
    (shown,), (saved,) = outputs["6"]["images"], outputs["7"]["images"]
    sizes = {Image.open(BytesIO(client.view(image))).size for image in (shown, saved)}
    assert len(sizes) == 1
    (kept,) = (folder / "blocks").iterdir()
    assert json.loads(kept.read_text("utf-8"))["presets"]["measured"]
    assert client.run(personalize())["13"]["images"]
    assert "measured by Block Probe on this checkpoint" in server.tail()
    shutil.rmtree(folder)
