"""The shipped workflows as other programs see them: comfy-cli's conversion of the canvas form, and its run of a file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from blueprints import BLUEPRINTS
from comfy_cli.workflow_to_api import convert_ui_to_api
from evaluation.story import FREEU
from workflow_notes import NOTES

from workflows import CANVAS, api_form, canvas_file, canvas_form, names, transformers

QUIET = {"DO_NOT_TRACK": "1", "COMFY_CLI_NO_REMOTE_REFRESH": "1", "PYTHONUTF8": "1"}


@pytest.fixture(scope="module")
def object_info(client) -> dict:
    return client.object_info()


@pytest.mark.parametrize("name", names())
def test_comfy_cli_makes_the_api_form_of_the_canvas_form(name, object_info):
    converted = convert_ui_to_api(canvas_form(name), object_info)
    ours = api_form(name)
    assert {key: (node["class_type"], node["inputs"]) for key, node in converted.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in ours.items()
    }


@pytest.mark.parametrize("form", ["canvas", "api"])
def test_comfy_run_runs_the_file(server, form, tmp_path):
    """As a person would type it; the pictures land in the server's output folder."""
    path = (
        tmp_path / "further.json"
    )  # another prefix: what the host has in its cache is not run again
    shipped = (CANVAS / ("api" if form == "api" else "") / "story_more_pictures.json").read_text(
        "utf-8"
    )
    path.write_text(shipped.replace('"kindred_more"', f'"by_comfy_run_{form}"'), "utf-8")
    address = urlsplit(server.url)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "comfy_cli",
            "--skip-prompt",
            "run",
            "--workflow",
            str(path),
            "--wait",
            "--host",
            address.hostname,
            "--port",
            str(address.port),
            "--timeout",
            "300",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | QUIET | {"HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((server.base / "output").glob(f"by_comfy_run_{form}*.png"))) == 2


def test_every_task_has_its_three_files_and_a_note():
    """API form, canvas form, thumbnail; nothing else lies in the templates' folder."""
    assert set(NOTES) == set(names())
    assert {path.name for path in CANVAS.iterdir() if path.is_file()} == {
        canvas_file(name, end).name for name in names() for end in (".json", ".jpg")
    }
    for name in names():
        assert 3_000 < canvas_file(name, ".jpg").stat().st_size < 120_000


@pytest.mark.parametrize("name", names())
def test_the_canvas_form_says_who_brings_each_node_and_what_to_change(name):
    made = canvas_form(name)
    notes = [node for node in made["nodes"] if node["type"] == "MarkdownNote"]
    about, yours = (note["widgets_values"][0] for note in notes)
    assert NOTES[name].title in about
    assert ("Qwen-Image" if name in transformers() else "| SDXL |") in yours
    folded = made.get("definitions", {}).get("subgraphs", [])
    for node in [node for graph in (made, *folded) for node in graph["nodes"]]:
        if node["type"] != "MarkdownNote":
            ours = node["type"].startswith("Kindred") or node["type"] in [s["id"] for s in folded]
            assert (
                node["properties"]["cnr_id"] == ("kindred" if ours else "comfy-core")
                and node["properties"]["ver"]
            )
    bold = {
        word
        for word in re.findall(r"\*\*(.+?)\*\*", NOTES[name].text + NOTES[name].yours)
        if not word.endswith(".")
    }
    graph = api_form(name)
    known = {node["_meta"]["title"] for node in graph.values()} | {
        key for node in graph.values() for key in node["inputs"]
    }
    known |= {given.label for given in BLUEPRINTS[name].inputs} if name in BLUEPRINTS else set()
    assert bold <= known, f"the note of {name} names what is not there: {bold - known}"
    assert made["version"] == 0.4 and len(made["groups"]) >= 3


def test_what_paper_b_samples_with_is_one_workflow_and_said_in_the_storys_note():
    """DDIM, 50 steps, CFG 5 and FreeU between the checkpoint and the story; what is measured is what is shipped."""
    graph = api_form("story_freeu")
    by_kind = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert by_kind["FreeU"] == {"model": ["1", 0]} | FREEU
    assert graph[by_kind["KindredConsiStory"]["model"][0]]["class_type"] == "FreeU"
    assert {
        key: by_kind["KSampler"][key] for key in ("sampler_name", "scheduler", "steps", "cfg")
    } == {"sampler_name": "ddim", "scheduler": "ddim_uniform", "steps": 50, "cfg": 5.0}
    told = {node["class_type"]: node["inputs"] for node in api_form("story").values()}[
        "KindredConsiStory"
    ]
    assert by_kind["KindredConsiStory"] == told | {"model": by_kind["KindredConsiStory"]["model"]}
    for name in ("story", "story_freeu"):
        said = NOTES[name].text + NOTES[name].yours
        assert all(
            word in said
            for word in (
                "FreeU",
                "DDIM",
                "50 steps",
                "CFG 5",
                *(f"{key} {value}" for key, value in FREEU.items()),
            )
        )
