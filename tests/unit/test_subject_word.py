"""In every shipped workflow a subject's word is typed into one field; besides it only the lines of the new pictures hold it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")  # the program that draws them imports the browser

from workflows import api_form, canvas_form, names

PROMPTS = "KindredSubjectPrompts"
DRAWS_NO_LINES = "invert_and_inspect"
NO_SUBJECT = ("measure_blocks", "train_concept_encoder")  # nothing in them looks for one


def typed(graph: Mapping[str, Any], value: Any) -> str:
    """What a person typed for an input: itself, or what the node that it is wired to holds."""
    return graph[value[0]]["inputs"]["value"] if isinstance(value, list) else value


def words_of(graph: Mapping[str, Any]) -> set[str]:
    """The subjects that the workflow's nodes are told."""
    fields = (node["inputs"].get("subject", "") for node in graph.values())
    return {word for field in fields if (word := typed(graph, field))}


def holders(graph: Mapping[str, Any], word: str) -> Counter[str]:
    """Fields whose text holds the word, those of lines of pictures and those of anything else."""
    found: Counter[str] = Counter()
    for node in graph.values():
        for name, value in node["inputs"].items():
            if name == "image" or not isinstance(value, str):  # a photo has the name of its file
                continue
            if re.search(rf"(?<![a-z]){word}(?![a-z])", value):
                lines = node["class_type"] == PROMPTS and name == "prompts"
                found["lines" if lines else "words"] += 1
    return found


@pytest.mark.parametrize("name", names())
def test_a_subjects_word_is_typed_once(name: str) -> None:
    graph = api_form(name)
    lines = {} if name == DRAWS_NO_LINES else {"lines": 1}
    for word in words_of(graph):
        assert holders(graph, word) == {"words": 1} | lines, word
    assert words_of(graph) or name in NO_SUBJECT


def test_a_concept_encoder_is_trained_on_one_description() -> None:
    """Its prompt is the one field that says what the photos show."""
    assert holders(api_form("train_concept_encoder"), "cat") == {"words": 1, "lines": 1}


@pytest.mark.parametrize("name", names())
def test_every_line_of_the_new_pictures_holds_the_word(name: str) -> None:
    graph = api_form(name)
    for node in graph.values():
        lines = node["inputs"].get("prompts")
        if node["class_type"] == PROMPTS and isinstance(lines, str):
            word = typed(graph, node["inputs"]["subject"])
            assert all(word in line for line in lines.splitlines())


@pytest.mark.parametrize("name", names())
def test_a_field_that_takes_the_word_shows_none_of_its_own(name: str) -> None:
    """Grey on the canvas, it would still tell the word that the workflow came with."""
    made = canvas_form(name)
    for part in (made, *made.get("definitions", {}).get("subgraphs", [])):
        words = [node for node in part["nodes"] if node["type"] == "PrimitiveString"]
        links = {link for node in words for link in node["outputs"][0]["links"]}
        for node in part["nodes"]:
            fields = [socket for socket in node["inputs"] if "widget" in socket]
            for socket, value in zip(fields, node["widgets_values"] if fields else ()):
                assert value == "" or socket["link"] not in links, (node["title"], socket["name"])


def test_the_law_sees_a_word_that_is_typed_twice() -> None:
    graph = json.loads(json.dumps(api_form("personalize")))
    prompts = next(node for node in graph.values() if node["_meta"]["title"].startswith("What"))
    prompts["inputs"]["subject"] = "cat"
    assert holders(graph, "cat") == {"words": 2, "lines": 1}
