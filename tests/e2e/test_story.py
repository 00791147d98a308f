"""Consistent stories through the API of a real server: the three shipped workflows, a saved subject, bad input, cancelling."""

from __future__ import annotations

import copy
import json
from io import BytesIO

import numpy as np
import pytest
from client import Interrupted, NodeFailed, PromptRefused
from demo_story import (
    CAPTURE,
    LOAD,
    LOADER,
    PICTURES,
    PREVIEW,
    PROMPTS,
    SAMPLER,
    SIZE,
    STORY,
    WORKFLOWS,
    anchors,
    plain,
)
from PIL import Image

TWO = {STORY: {"anchors": 2}}  # the node itself may come with another number
STEPS = (
    10  # a divisor of 1000: ddim_uniform then has as many steps as asked for, and both stages come
)


def shipped(name: str, **changes) -> dict:
    """A shipped workflow, with few steps where its reference is made anew; changes: {node id: {input: value}}."""
    graph = json.loads(WORKFLOWS[name].read_text("utf-8"))
    for node in (SAMPLER, CAPTURE) if name != "story_more_pictures" else ():
        if node in graph:
            graph[node]["inputs"]["steps"] = STEPS
    for node, inputs in changes.items():
        graph[node]["inputs"] |= inputs
    return graph


def pictures(client, graph, on_progress=None, node: str = PICTURES) -> list[np.ndarray]:
    images = client.run(graph, on_progress)[node]["images"]
    return [np.asarray(Image.open(BytesIO(client.view(i)))) for i in images]


def differ(these, those) -> list[bool]:
    return [bool(np.abs(a.astype(int) - b).mean() > 1) for a, b in zip(these, those, strict=True)]


@pytest.fixture(scope="module")
def story(client) -> list[np.ndarray]:
    """With two anchors, whatever the node comes with."""
    return pictures(client, shipped("story", **TWO))


@pytest.fixture(scope="module")
def without(client) -> list[np.ndarray]:
    return pictures(client, plain(shipped("story")))


def test_the_story_comes_out_and_is_not_the_plain_one(client, story, without):
    """Four pictures, each of them moved by the others; with nothing shared the host's own, bit for bit."""
    assert all(differ(pictures(client, shipped("story")), without))
    assert (
        len(story) == 4
        and all(p.shape == (128, 128, 3) for p in story)
        and all(differ(story, without))
    )
    quiet = shipped(
        "story",
        **{
            STORY: {"weight": 0.0, "feature_injection": 0.0},
            PICTURES: {"filename_prefix": "quiet"},
        },
    )
    assert all((a == b).all() for a, b in zip(pictures(client, quiet), without, strict=True))


def test_fewer_pictures_are_the_same_pictures(client, story):
    lines = shipped("story")[PROMPTS]["inputs"]["prompts"].splitlines()
    fewer = pictures(
        client, shipped("story", **TWO, **{PROMPTS: {"prompts": "\n".join(lines[:3])}})
    )
    assert not any(differ(fewer, story[:3]))  # another batch size rounds otherwise


def test_the_shipped_subject_gives_further_pictures(client):
    """As it is, all steps; plain they are others; other steps are refused with both schedules named."""
    graph = shipped("story_more_pictures")
    made = pictures(client, graph)
    graph[SAMPLER]["inputs"] |= {"steps": 12, "sampler_name": "ddim", "scheduler": "simple"}
    graph[SIZE]["inputs"] |= {"width": 128, "height": 128}  # as the file says
    assert all(map(np.array_equal, made, pictures(client, graph)))
    bare = plain(graph)
    del bare[LOAD]
    bare[PICTURES]["inputs"]["filename_prefix"] = "bare"
    assert len(made) == 2 and all(differ(made, pictures(client, bare)))
    steps = graph[SAMPLER]["inputs"]["steps"]
    graph[SAMPLER]["inputs"]["steps"] = steps - 2
    with pytest.raises(NodeFailed) as failed:
        client.run(graph)
    assert all(
        word in failed.value.sentence
        for word in (f"({steps - 2} steps)", f"{steps} steps", "the anchors", "Take the sampler")
    )


def test_a_subject_saved_and_loaded_draws_what_its_own_batch_drew(client, story):
    """The first two pictures saved as anchors; the last two asked for with the loaded file and the noise they had."""
    graph = anchors(shipped("story", **TWO))
    outputs = client.run(graph)
    name = outputs["20"]["text"][0].partition(",")[0].removeprefix("kindred/")
    assert (
        name
        in client.object_info("KindredLoadReference")["KindredLoadReference"]["input"]["required"][
            "file"
        ][1]["options"]
    )
    lines = graph[PROMPTS]["inputs"]["prompts"].splitlines()
    more = shipped(
        "story_more_pictures",
        **{
            LOAD: {"file": name},
            PROMPTS: {"prompts": "\n".join(lines[2:]), "subject": "cat"},
            SAMPLER: {
                key: value
                for key, value in shipped("story")[SAMPLER]["inputs"].items()
                if key != "model" and not isinstance(value, list)
            },
        },
    )
    more["30"] = copy.deepcopy(more[SIZE])
    more["30"]["inputs"]["batch_size"] = 4
    more["31"] = {
        "class_type": "LatentFromBatch",
        "inputs": {"samples": ["30", 0], "batch_index": 2, "length": 2},
    }
    more[SAMPLER]["inputs"]["latent_image"] = ["31", 0]
    assert not any(differ(pictures(client, more), story[2:]))


def test_a_story_from_photos_and_what_was_read_of_them(client, without):
    """Both photos are drawn in the preview, the pictures are not the plain ones; with one photo it works too."""
    graph = shipped("story_from_photo")
    made = pictures(client, graph)
    assert len(made) == 4 and all(differ(made, without))
    shown = pictures(
        client,
        {k: v for k, v in graph.items() if k not in (PROMPTS, SIZE, STORY, SAMPLER, "7", PICTURES)},
        node=PREVIEW,
    )
    assert len(shown) == 2 and shown[0].shape[1] > 2 * 128
    graph["13"]["inputs"].pop("images.image1")
    graph = {k: v for k, v in graph.items() if k not in ("10", "12")}
    graph[PROMPTS]["inputs"]["prompts"] = "cat on the beach"
    assert all(differ(pictures(client, graph), without[:1]))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "story",
            {PROMPTS: {"prompts": "cat on the beach\nbird in the snow"}},
            ["line 2", "bird in the snow", "'cat'"],
        ),
        (
            "story_more_pictures",
            {PROMPTS: {"subject": "cat"}},
            ["2 of 2 lines", "dog in the snow", "'cat'"],
        ),
        (
            "story_more_pictures",
            {STORY: {"order": "official"}},
            ["'official'", "'fast'", "Choose the same"],
        ),
        ("story", {STORY: {"blocks": "output 9"}}, ["'output 9'", "output 0"]),
    ],
)
def test_bad_input_is_a_sentence_and_the_server_lives_on(client, without, name, changes, words):
    """What the letters alone tell, before anything runs."""
    with pytest.raises(PromptRefused if PROMPTS in changes else NodeFailed) as failed:
        client.run(shipped(name, **changes))
    assert all(word in str(failed.value) for word in words), failed.value
    assert client.object_info("KindredConsiStory")


def test_a_subject_of_another_model_is_refused(client):
    graph = shipped("story_more_pictures")
    graph["30"] = {
        "class_type": "ModelMergeSubtract",
        "inputs": {"model1": [LOADER, 0], "model2": [LOADER, 0], "multiplier": 0.5},
    }
    graph[STORY]["inputs"]["model"] = ["30", 0]
    with pytest.raises(NodeFailed) as failed:
        client.run(graph)
    assert (
        failed.value.sentence.count("KindredMiniature") == 2
        and "Wire a MODEL with the same LoRAs (or merge)" in failed.value.sentence
    )


def test_one_picture_stays_plain_and_the_log_says_so(client, server):
    graph = shipped(
        "story",
        **{PROMPTS: {"prompts": "cat on the beach"}, PICTURES: {"filename_prefix": "alone"}},
    )
    bare = plain(graph)
    bare[PICTURES]["inputs"]["filename_prefix"] = "alone_plain"
    assert (pictures(client, graph)[0] == pictures(client, bare)[0]).all()
    assert "one picture has nobody to share with" in server.log.read_text("utf-8", errors="replace")


LONG = 100  # steps of a stage: so many that a late word still comes within it


@pytest.mark.parametrize("after", [2, LONG + 2])
def test_cancelling_in_either_stage_leaves_nothing_behind(client, story, without, after):
    """Interrupted within the first and within the second stage; then plain and story are what they were."""

    def stop(progress) -> None:
        if progress.node == SAMPLER and progress.value == after:
            client.interrupt()

    with pytest.raises(Interrupted):
        client.run(shipped("story", **{SAMPLER: {"seed": 90 + after, "steps": LONG}}), stop)
    again = plain(shipped("story", **{PICTURES: {"filename_prefix": f"after_{after}"}}))
    assert all((a == b).all() for a, b in zip(pictures(client, again), without, strict=True))
    again = shipped("story", **TWO, **{PICTURES: {"filename_prefix": f"story_after_{after}"}})
    assert all((a == b).all() for a, b in zip(pictures(client, again), story, strict=True))
