"""The workflows for FLUX.1, FLUX.2, Qwen-Image, Z-Image and SD3.5, run from loader to picture on small random models of the host's classes.

tests/small_models writes the files that they name: transformer, text encoders and autoencoder apart, SD3.5 as a checkpoint beside its
text encoders. What is covered: the host's loaders, its detection (which three kinds of parts are told their size, says that file), its
tokenizers, the nodes of each form, and that Kindred's nodes change nothing at strength 0. What is not: how a picture looks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import ROOT
from client import Client, NodeFailed
from host_server import HostServer
from PIL import Image
from workflow_models import LOADERS
from workflow_notes import CHOICES, NOTES

from workflows import CANVAS, api_form, transformers

HOST = os.environ.get("KINDRED_HOST")
SIZE, STEPS = 128, 3
TRANSFORMERS = transformers()
Graph = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def small() -> Iterator[Client]:
    """A server that has the files of all these workflows, small and random."""
    if not HOST:
        pytest.skip("no host: KINDRED_HOST names a ComfyUI folder (python3 dev.py test sets it)")
    with HostServer(cpu=True, threads=1, packs=[ROOT / "tests" / "small_models"]) as running:
        yield running.client


def reduced(name: str, **changes: Any) -> Graph:
    """As shipped, but small; changes: input -> value, wherever there is one."""
    graph = api_form(name)
    wanted = {"width": SIZE, "height": SIZE, "steps": STEPS} | changes
    for node in graph.values():
        node["inputs"] |= {key: value for key, value in wanted.items() if key in node["inputs"]}
    return graph


def of_kind(graph: Graph, kind: str) -> list[str]:
    return [key for key, node in graph.items() if node["class_type"] == kind]


def without_kindred(graph: Graph) -> Graph:
    """The same pictures by the host alone: its text node in place of ours, and nothing that hangs on a photo."""
    inject = of_kind(graph, "KindredMaskedSelfAttnInject")[0]
    prompts = of_kind(graph, "KindredSubjectPrompts")[-1]
    words = graph[prompts]["inputs"]
    made = json.loads(json.dumps(graph))
    made[prompts] = {
        "class_type": "CLIPTextEncode",
        "inputs": {"clip": words["clip"], "text": words["prompts"]},
    }
    for node in made.values():
        for key, value in node["inputs"].items():
            if value == [inject, 0]:
                node["inputs"][key] = graph[inject]["inputs"]["model"]
            if value == [prompts, 1]:
                node["inputs"][key] = 1
    gone = {key for key, node in made.items() if node["class_type"].startswith("Kindred")}
    while more := {
        key
        for key, node in made.items()
        if key not in gone
        and any(isinstance(v, list) and v[0] in gone for v in node["inputs"].values())
    }:
        gone |= more
    return {key: node for key, node in made.items() if key not in gone}


def by_another_way(graph: Graph) -> Graph:
    """The same pictures by a graph that the host's cache does not know, so that it draws again."""
    made, size = json.loads(json.dumps(graph)), titled(graph, "Size")
    for node in made.values():
        for key, value in node["inputs"].items():
            if value == [size, 0]:
                node["inputs"][key] = ["way", 0]
    first = {"samples": [size, 0], "batch_index": 0, "length": 1}
    return made | {"way": {"class_type": "LatentFromBatch", "inputs": first}}


def titled(graph: Graph, title: str) -> str:
    return next(key for key, node in graph.items() if node.get("_meta", {}).get("title") == title)


def drawn(client: Client, graph: Graph) -> list[np.ndarray]:
    saved = client.run(graph)[of_kind(graph, "SaveImage")[0]]["images"]
    return [np.asarray(Image.open(BytesIO(client.view(image)))) for image in saved]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_it_draws_a_picture_for_every_line_and_all_look_at_the_photo(small, name):
    graph = reduced(name)
    lines = graph[of_kind(graph, "KindredSubjectPrompts")[-1]]["inputs"]["prompts"].splitlines()
    outputs = small.run(graph)
    preview = of_kind(graph, "KindredReferencePreview")[0]
    assert len(outputs[preview]["images"]) == 1
    looked = drawn(small, reduced(name, filename_prefix="looked"))
    alone = drawn(small, reduced(name, strength=0.0))
    assert len(looked) == len(alone) == len(lines)
    assert all(picture.shape == (SIZE, SIZE, 3) and picture.std() > 5 for picture in looked)
    assert all(np.abs(a.astype(int) - b).mean() > 0.1 for a, b in zip(looked, alone))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_without_kindreds_nodes_it_is_the_plain_picture_and_so_is_strength_0(small, name):
    line = "a photo of a cat on the beach"
    new = of_kind(api_form(name), "KindredSubjectPrompts")[-1]

    def one_line(**changes: Any) -> Graph:
        graph = reduced(name, **changes)
        graph[new]["inputs"]["prompts"] = line
        return graph

    before = without_kindred(one_line())
    assert not [node for node in before.values() if node["class_type"].startswith("Kindred")]
    plain = drawn(small, before)[0]
    looked = drawn(small, one_line())[0]
    off = drawn(small, one_line(strength=0.0))[0]
    other = drawn(small, without_kindred(one_line(noise_seed=2, seed=2)))[0]
    again = drawn(small, by_another_way(without_kindred(one_line())))[0]
    assert (plain == off).all() and (plain == again).all()
    assert (plain != looked).any() and (plain != other).any()


def test_a_lost_subject_is_said_in_words_and_the_plain_picture_follows(small):
    graph = reduced("personalize_z_image")
    new = of_kind(graph, "KindredSubjectPrompts")[-1]
    graph[new]["inputs"]["prompts"] = "a photo of a cat\na photo of a cat far away on the beach"
    with pytest.raises(NodeFailed, match="same number of tokens"):
        small.run(graph)


def blueprints() -> dict[str, set[tuple[str, str]]]:
    """File -> folders and links, as the workflows that the host itself ships give them."""
    known: dict[str, set[tuple[str, str]]] = {}
    for path in Path(HOST, "blueprints").glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        for graph in (content, *content.get("definitions", {}).get("subgraphs", [])):
            for node in graph["nodes"]:
                for model in (node.get("properties") or {}).get("models") or []:
                    place = (model["directory"], model["url"])
                    known.setdefault(model["name"], set()).add(place)
    return known


@pytest.mark.skipif(not HOST, reason="no host")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_file_that_the_host_knows_a_link_of_carries_it(name):
    known, graph = blueprints(), api_form(name)
    drawn_nodes = json.loads((CANVAS / f"{name}.json").read_text("utf-8"))["nodes"]
    by_id = {str(node["id"]): node for node in drawn_nodes}
    for key, node in graph.items():
        files = [node["inputs"][at] for at in LOADERS.get(node["class_type"], ())]
        carried = by_id[key]["properties"].get("models", [])
        assert [model["name"] for model in carried] == [file for file in files if file in known]
        for model in carried:
            assert set(model) == {"name", "url", "directory"}
            assert (model["directory"], model["url"]) in known[model["name"]]
            assert model["name"] in by_id[key]["widgets_values"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_note_says_for_its_own_family_what_the_workflow_holds(name):
    """Steps, guidance, size and blocks of the line are those of the nodes; every note has the lines of all families."""
    graph, line = api_form(name), CHOICES[name]
    values = {key: value for node in graph.values() for key, value in node["inputs"].items()}
    assert f"{values['steps']} steps" in line
    assert f"{values['width']} x {values['height']}" in line
    blocks = {node["inputs"]["blocks"] for node in graph.values() if "blocks" in node["inputs"]}
    assert len(blocks) == 1 and f"blocks *{blocks.pop()}*" in line
    guidance = values.get("cfg", values.get("guidance"))
    assert re.search(rf"(cfg|Guidance) {guidance:g}\b", line)
    assert values.get("sampler_name") in line
    files = [
        node["inputs"][at] for node in graph.values() for at in LOADERS.get(node["class_type"], ())
    ]
    assert all(file in line for file in files)
    assert all(other in NOTES[name].yours for other in CHOICES.values())
