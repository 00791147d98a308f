"""The shipped subject of story_more_pictures.json fits the shipped checkpoint, the workflow that loads it, and this version of a file."""

from __future__ import annotations

import json

import pytest
import torch
from checkout import ROOT
from kindred.nodes.library import LoadReference
from kindred.miniature import subject
from kindred.models.network.call import Half
from kindred.models.reference.bank import BANK_VERSION
from kindred.models.reference.file import load_reference
from kindred.nodes.host import model_key, reference_files, reference_path

WORKFLOWS = ROOT / "workflows" / "api"
GRAPH = json.loads((WORKFLOWS / "story_more_pictures.json").read_text("utf-8"))


def inputs(kind: str) -> dict:
    return next(node["inputs"] for node in GRAPH.values() if node["class_type"] == kind)


@pytest.fixture(scope="module")
def bank():
    return load_reference(subject.SUBJECT)


def test_it_is_small_and_the_load_node_lists_it():
    name = inputs("KindredLoadReference")["file"]
    assert subject.SUBJECT.stat().st_size < 2 * 2**20
    assert name in reference_files() and reference_path(name).resolve() == subject.SUBJECT.resolve()


def test_it_was_made_with_the_shipped_checkpoint_by_this_version(host, bank):
    with torch.inference_mode():
        model = host.CheckpointLoaderSimple().load_checkpoint(
            inputs("CheckpointLoaderSimple")["ckpt_name"]
        )[0]
    assert bank.model_key == model_key(model) and bank.version == BANK_VERSION


def test_the_workflow_asks_for_what_it_holds(bank):
    """Its steps by wire from the file, and every setting of the anchors that the story node also has."""
    sampler, story = inputs("KSampler"), inputs("KindredConsiStory")
    outputs = [output.display_name for output in LoadReference.GET_SCHEMA().outputs]
    wired = {name: outputs[sampler[name][1]] for name in ("steps", "scheduler", "sampler_name")}
    assert wired == {name: name for name in wired}
    assert bank.trajectory.schedule == "simple, ddim, 12 steps"
    assert len(bank.trajectory.sigmas) == 13
    assert (
        bank.pictures == len(subject.SCENES) == (bank.anchors.settings["anchors"] or bank.pictures)
    )  # all of them, however it is said
    shared = bank.anchors.settings.keys() & story.keys() - {"anchors"}
    assert shared >= {"weight", "dropout", "query_blend", "feature_injection", "halves", "order"}
    assert {name: bank.anchors.settings[name] for name in shared} == {
        name: story[name] for name in shared
    }
    word = inputs("KindredSubjectPrompts")["subject"]
    assert (
        bank.prompts[Half.COND].text.splitlines()
        == [line for line in bank.prompts[Half.COND].text.splitlines() if word in line]
        != []
    )
    assert all(row.dtype is torch.float16 for rows in bank.features.values() for row in rows)


@pytest.mark.parametrize("name", ["story", "story_more_pictures", "story_from_photo"])
def test_a_shipped_story_has_the_values_that_its_node_comes_with(name, node):
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))
    given = next(n["inputs"] for n in graph.values() if n["class_type"] == "KindredConsiStory")
    defaults = {
        i.id: i.default
        for i in node("KindredConsiStory").define_schema().inputs
        if getattr(i, "default", None) is not None
    }
    assert {k: v for k, v in given.items() if not isinstance(v, list)} == defaults
