"""Words into a workflow: nodes by title, values by type, and a sentence that says what there is."""

import copy
import json

import pytest
from changes import (
    Change,
    Place,
    Refusal,
    check_known,
    find_node,
    find_place,
    parse_change,
    picture_place,
    read_workflow,
    seed_places,
    subject_place,
    title,
    typed,
)
from checkout import ROOT
from fake_host import INFO
from hypothesis import given
from hypothesis import strategies as st

GRAPH = {
    "1": {
        "class_type": "Load",
        "inputs": {"image": "a.png"},
        "_meta": {"title": "Photo of the subject"},
    },
    "2": {
        "class_type": "Draw",
        "inputs": {
            "prompts": "a cat",
            "seed": 7,
            "steps": 12,
            "cfg": 4.0,
            "mode": "part",
            "mode.width": 3,
            "images.image1": ["1", 0],
        },
        "_meta": {"title": "New pictures, one per line"},
    },
    "3": {"class_type": "Method", "inputs": {"seed": 0}, "_meta": {"title": "v1.5 method"}},
    "4": {
        "class_type": "KindredLoadReference",
        "inputs": {"file": "old.safetensors"},
        "_meta": {"title": "Twin"},
    },
    "5": {"class_type": "KindredSaveReference", "inputs": {}, "_meta": {"title": "Twin"}},
}


@pytest.mark.parametrize(
    "words, place",
    [
        ("2.prompts", ("2", "prompts")),
        ("New pictures, one per line.prompts", ("2", "prompts")),
        ("photo of the SUBJECT.image", ("1", "image")),
        ("v1.5 method.seed", ("3", "seed")),
        ("Draw.mode.width", ("2", "mode.width")),
        ("2.images.image1", ("2", "images.image1")),
        ("KindredLoadReference.file", ("4", "file")),
    ],
)
def test_a_place_by_id_title_or_type(words, place):
    assert find_place(GRAPH, words) == Place(*place)


@pytest.mark.parametrize(
    "words, said",
    [
        ("prompts", ["names no input", "8.prompts"]),
        ("9.prompts", ["'9'", "2 (New pictures, one per line)"]),
        ("New picture.prompts", ["'New picture'", "There are", "1 (Photo of the subject)"]),
        ("Twin.file", ["2 nodes", "'Twin'", "4 or 5"]),
        ("Foto of the subject.image", ["Did you mean 'Photo of the subject'"]),
    ],
)
def test_no_such_node_is_a_sentence(words, said):
    with pytest.raises(Refusal) as refused:
        find_place(GRAPH, words)
    assert all(word in str(refused.value) for word in said), refused.value


@pytest.mark.parametrize(
    "words, value",
    [
        ("2.prompts=a=b, c", "a=b, c"),
        ("2.prompts=12", "12"),
        ("2.prompts=@@home", "@home"),
        ("2.steps=20", 20),
        ("2.steps= 20", 20),
        ("2.cfg=5", 5.0),
        ("2.tile=yes", True),
        ("2.tile=FALSE", False),
        ("2.sampler=ddim", "ddim"),
        ("2.size=3", 3),
        ("2.size=2.5", 2.5),
        ("2.mode=whole", "whole"),
        ("2.mode.width=8", 8),
        ("1.image=b.png [temp]", "b.png [temp]"),
        (f"2.seed={2**64 - 1}", 2**64 - 1),
    ],
)
def test_a_value_has_the_hosts_type(words, value):
    got = typed(INFO, GRAPH, parse_change(GRAPH, words))
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "words, said",
    [
        ("2.steps=2.5", ["whole number", "'2.5'", "one per line.steps (2)"]),
        ("2.cfg=high", ["a number", "'high'"]),
        ("2.cfg=nan", ["0.0 to 30.0"]),
        ("2.steps=0", ["1 to 100", "not 0"]),
        ("2.tile=maybe", ["true or false"]),
        ("2.sampler=eulr", ["Did you mean 'euler'", "euler, ddim"]),
        ("2.model=sd15", ["connection of type MODEL"]),
        ("2.step=3", ["no input 'step'", "Did you mean 'steps'", "prompts, seed"]),
        ("2.mode.height=3", ["no input 'mode.height'"]),
        ("2.images.image1=a", ["connection"]),
        ("4.file=new", ["old.safetensors"]),
        ("2.prompts=@nowhere.txt", ["there is no such file", "nowhere.txt", "write @@nowhere.txt"]),
        ("2.prompts", ["lacks a ="]),
    ],
)
def test_a_wrong_value_is_a_sentence_with_what_there_is(words, said):
    with pytest.raises(Refusal) as refused:
        typed(INFO, GRAPH, parse_change(GRAPH, words))
    assert all(word in str(refused.value) for word in said), refused.value


@given(st.integers(0, 2**64 - 1), st.text())
def test_numbers_and_texts_come_through_as_they_are(number, text):
    assert typed(INFO, GRAPH, Change(Place("2", "seed"), str(number))) == number
    assert typed(INFO, GRAPH, Change(Place("2", "prompts"), text)) == text


def test_a_text_from_a_file(tmp_path):
    (tmp_path / "lines.txt").write_text("one\nzwei ä\n", "utf-8")
    assert parse_change(GRAPH, f"2.prompts=@{tmp_path / 'lines.txt'}").text == "one\nzwei ä"


def test_a_text_that_cannot_be_read_is_told_in_words(tmp_path):
    """No number of the system's, whatever lies there."""
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    for name, said in (("lines", "no such file"), ("picture.png", "not text in UTF-8")):
        with pytest.raises(Refusal, match=said) as refused:
            parse_change(GRAPH, f"2.prompts=@{tmp_path / name}")
        assert str(tmp_path / name) in str(refused.value) and "Errno" not in str(refused.value)
    with pytest.raises(Refusal, match="w.json could not be read as a workflow: there is no such"):
        read_workflow(tmp_path / "w.json")


def test_where_pictures_subjects_and_seeds_go():
    """Seeds are those of noise: what the canvas would not change is left alone."""
    assert (
        picture_place(INFO, GRAPH, "Photo of the subject")
        == picture_place(INFO, GRAPH, "1.image")
        == Place("1", "image")
    )
    with pytest.raises(Refusal, match=r"takes no picture.*: 1 \(Photo of the subject\)\."):
        picture_place(INFO, GRAPH, "2")
    assert subject_place(GRAPH, None) == Place("4", "file")
    with pytest.raises(Refusal, match="2 nodes load a reference.*4, 6"):
        subject_place(GRAPH | {"6": GRAPH["4"]}, None)
    with pytest.raises(Refusal, match="has none"):
        subject_place({"1": GRAPH["1"]}, None)
    assert seed_places(INFO, GRAPH) == [Place("2", "seed")]
    linked = copy.deepcopy(GRAPH)
    linked["2"]["inputs"]["seed"] = ["3", 0]
    assert not seed_places(INFO, linked)


def test_a_node_that_the_host_lacks_is_named():
    check_known(INFO, GRAPH)
    with pytest.raises(Refusal, match="KindredStory"):
        check_known(INFO, GRAPH | {"9": {"class_type": "KindredStory"}})


@pytest.mark.parametrize(
    "told, said",
    [
        ({"nodes": [], "links": []}, r"canvas form.*Export \(API\)"),
        ({}, "API form"),
        ([], "API form"),
        ({"1": {"inputs": {}}}, "class_type"),
    ],
)
def test_only_the_api_form_is_read(tmp_path, told, said):
    path = tmp_path / "w.json"
    path.write_text(json.dumps(told), "utf-8")
    with pytest.raises(Refusal, match=said):
        read_workflow(path)
    path.write_text("{", "utf-8")
    with pytest.raises(Refusal, match="could not be read"):
        read_workflow(path)


def test_every_node_of_a_shipped_workflow_has_a_name():
    """Its title finds it; where a column stands twice, the sentence names the ids to choose from."""
    for path in (ROOT / "workflows" / "api").glob("*.json"):
        graph = read_workflow(path)
        titles = [title(graph, key) for key in graph]
        for key in graph:
            if titles.count(title(graph, key)) == 1:
                assert find_node(graph, title(graph, key)) == key, path.name
            else:
                with pytest.raises(Refusal, match=rf"by its id, .*\b{key}\b"):
                    find_node(graph, title(graph, key))
