"""The story demo without a host: its graphs are the shipped workflows, its sheet holds every picture, its figures tell stories apart."""

from __future__ import annotations

import argparse
import json

import demo
import pytest
from checkout import ROOT
from demo_story import (
    BATCH,
    CAPTURE,
    LOADER,
    PICTURES,
    PREVIEW,
    PROMPTS,
    SAMPLER,
    SAVE,
    STORY,
    WORKFLOWS,
    StoryRun,
    anchors,
    costs,
    from_photos,
    graph_of,
    only_read,
    parse,
    plain,
    rows,
    saved_name,
    sheet,
    write,
)
from kindred.miniature.world import PLACES, held_out_identity, render
from PIL import Image
from story_figures import HELD_OUT, PHOTO_SCENES, SCENES, SUBJECT, photos

LAW = pytest.mark.parametrize


def links(graph) -> set[str]:
    return {v[0] for node in graph.values() for v in node["inputs"].values() if isinstance(v, list)}


def run_of(pictures=(), graph=None, outputs=None, calls: int = 7) -> StoryRun:
    return StoryRun(graph or {}, outputs or {}, list(pictures), {SAMPLER: 2.5, CAPTURE: 1.5}, calls)


@LAW("name", WORKFLOWS)
def test_a_shipped_workflow_is_whole_and_titled(name):
    """Every link leads somewhere, every node is used or an output, and all stories are told alike; photos are read by one half of CFG."""
    graph = json.loads(WORKFLOWS[name].read_text("utf-8"))
    assert links(graph) <= set(graph) and all(node["_meta"]["title"] for node in graph.values())
    assert set(graph) - links(graph) == {PICTURES} | (
        {PREVIEW} if name == "story_from_photo" else set()
    )
    story, first = (
        graph[STORY]["inputs"],
        json.loads(WORKFLOWS["story"].read_text("utf-8"))[STORY]["inputs"],
    )
    photo = {"halves": "cond only"} if name == "story_from_photo" else {}
    assert {k: v for k, v in story.items() if k != "reference"} == first | photo
    lines, word = (graph[PROMPTS]["inputs"][key] for key in ("prompts", "subject"))
    word = graph[word[0]]["inputs"]["value"] if isinstance(word, list) else word
    assert all(word in line for line in lines.splitlines())
    if CAPTURE in graph:
        assert all(
            graph[CAPTURE]["inputs"][key] == graph[SAMPLER]["inputs"][key]
            for key in ("steps", "scheduler")
        )


def test_the_demo_runs_the_shipped_story_as_it_is():
    given = parse([])
    assert graph_of("story", given, given.prompt, given.subject) == json.loads(
        WORKFLOWS["story"].read_text("utf-8")
    )


def test_the_demos_photos_are_those_that_the_pack_offers():
    assert photos(PHOTO_SCENES) == parse([]).reference
    for file, (scene, pose) in zip(("reference.png", "reference_2.png"), PHOTO_SCENES):
        with Image.open(ROOT / "miniature" / file) as picture:
            assert (
                picture.tobytes()
                == Image.fromarray(
                    render(held_out_identity(HELD_OUT), SUBJECT, scene, pose).image
                ).tobytes()
            )
    asked = {scene for name in SCENES.values() for scene in name}
    assert not {scene for scene, _ in PHOTO_SCENES} & set(SCENES["story"]) and asked <= set(PLACES)


def test_plain_has_no_node_of_ours_on_the_model_and_anchors_are_saved():
    graph = graph_of("story", parse([]), ["cat on the beach", "cat at night"], "cat")
    without, made = plain(graph), anchors(graph)
    assert STORY not in without and without[SAMPLER]["inputs"]["model"] == [LOADER, 0]
    assert {k: v for k, v in without[SAMPLER]["inputs"].items() if k != "model"} == {
        k: v for k, v in graph[SAMPLER]["inputs"].items() if k != "model"
    }
    assert made[SAMPLER]["class_type"] == "KindredAnchorSampler" and made[SAVE]["inputs"][
        "reference"
    ] == [SAMPLER, 1]
    assert (
        graph[SAMPLER]["class_type"] == "KSampler" and STORY in graph
    )  # the given graph stays as it was


@LAW("count", [1, 2, 3])
def test_a_photo_story_of_any_number_of_photos(count):
    given = parse(["--steps", "20"])
    names = [f"{i}.png" for i in range(count)]
    graph = from_photos(
        graph_of("story_from_photo", given, given.prompt, given.subject), names, given
    )
    assert links(graph) <= set(graph) and set(graph) - links(graph) == {PICTURES, PREVIEW}
    assert (
        len(graph[BATCH]["inputs"]) == count
        and graph[CAPTURE]["inputs"]["steps"] == graph[SAMPLER]["inputs"]["steps"] == 20
    )
    loaded = [graph[link[0]]["inputs"] for link in graph[BATCH]["inputs"].values()]
    assert [photo["image"] for photo in loaded] == names
    assert all(photo["width"] == photo["height"] == given.size for photo in loaded)
    reading = only_read(graph)
    assert links(reading) <= set(reading) and set(reading) - links(reading) == {PREVIEW}
    assert all(
        reading[key] == graph[key] for key in reading
    )  # the same inputs: the host's cache answers


def test_the_saved_name_is_what_load_reference_lists():
    assert (
        saved_name(run_of(outputs={SAVE: {"text": ["kindred/subject_00002_.safetensors, 2.9 MB"]}}))
        == "subject_00002_.safetensors"
    )


@LAW(
    ("argv", "words"),
    [
        (["--prompt", "a cat"], ("--checkpoint",)),
        (["--reference", __file__], ("--checkpoint",)),
        (["--checkpoint", "nowhere.safetensors"], ("nowhere.safetensors", "not a file")),
        (["--checkpoint", __file__, "--subject", "cat", "--prompt", "a cat"], ("--prompt twice",)),
        (["--checkpoint", __file__, "--prompt", "a cat", "--prompt", "the cat"], ("--subject",)),
        (["--pictures", "3"], ("--pictures",)),
    ],
)
def test_arguments_that_do_not_fit_are_a_sentence(argv, words, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--story", *argv])
    said = capsys.readouterr().err
    assert all(word in said for word in words) and "dev.py demo --story" in said


def test_a_checkpoint_of_ones_own_tells_what_is_asked_for():
    own = [
        "--checkpoint",
        __file__,
        "--subject",
        "cat",
        "--prompt",
        "a cat here",
        "--prompt",
        "a cat there",
    ]
    given = parse(own)
    assert (given.size, given.cfg, given.style, given.more, given.reference, given.measured) == (
        512,
        5.0,
        "",
        None,
        [],
        False,
    )
    graph = graph_of("story", given, given.prompt, given.subject)
    assert (
        graph[LOADER]["inputs"]["ckpt_name"] == "test_demo_story.py"
        and graph[PROMPTS]["inputs"]["prompts"] == "a cat here\na cat there"
    )
    given = parse([*own, "--more", "a cat asleep", "--reference", __file__])
    assert (
        given.anchors == ["a cat here", "a cat there"]
        and given.second == "cat"
        and len(given.reference) == 1
    )


def test_the_sheet_and_the_report_hold_everything(tmp_path, capsys):
    given = parse(["--out", str(tmp_path), "--json", str(tmp_path / "figures.json")])
    jobs = {
        "plain": 4,
        "story": 4,
        "anchors": 2,
        "more_pictures": 2,
        "reading": 1,
        "photo_story": 4,
    }
    every = {
        name: run_of(
            [Image.new("RGB", (128, 128), (10 * i + 5, 200, 40 * j)) for i in range(count)],
            {"1": {}},
            calls=j,
        )
        for j, (name, count) in enumerate(jobs.items())
    }
    made = rows(given, every)
    assert [len(pictures) for _, pictures in made] == [4, 4, 4, 6]
    page = sheet(made, cell=64)
    assert page.width == 8 + 6 * 72
    seen = {colour for _, colour in page.getcolors(1 << 20)}
    wanted = {
        (10 * i + 5, 200, 40 * j)
        for j, (name, count) in enumerate(jobs.items())
        for i in range(count)
        if name != "reading"
    }
    assert wanted <= seen
    write(given, every, costs(every))
    found = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert (
        found == json.loads((tmp_path / "report.json").read_text("utf-8"))
        and found["command"] == "demo --story"
    )
    assert found["figures"]["unet_calls.story"] == 1 and found["figures"]["seconds.story"] == 2.5
    assert found["figures"]["seconds.reading"] == 1.5
    assert len(list(tmp_path.glob("*.png"))) == 1 + sum(jobs.values()) and len(
        list(tmp_path.glob("*_api.json"))
    ) == len(jobs)
    assert "unet_calls.story" in capsys.readouterr().out


def test_without_more_and_photos_the_sheet_has_two_rows():
    given = argparse.Namespace(prompt=["a", "b"])
    pictures = [Image.new("RGB", (30, 20))] * 2
    assert len(rows(given, {"plain": run_of(pictures), "story": run_of(pictures)})) == 2
