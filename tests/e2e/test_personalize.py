"""Paper A's training-free half through the API of a real server: the shipped workflow, bad input, and what stays behind."""

from __future__ import annotations

import copy
import json
from io import BytesIO

import numpy as np
import pytest
from client import NodeFailed, Progress, PromptRefused
from demo import (
    CAPTURE,
    COARSE,
    CONCEPT,
    ENCODER,
    INJECT,
    LOADER,
    PHOTO,
    PICTURES,
    PROMPTS,
    SAMPLER,
    WORKFLOW,
)
from PIL import Image

STEPS = 5  # a divisor of 1000: ddim_uniform then has as many steps as asked for


def shipped(**changes) -> dict:
    """workflows/api/personalize.json with few steps; changes: {node id: {input: value}}."""
    graph = json.loads(WORKFLOW.read_text("utf-8"))
    graph[CAPTURE]["inputs"]["steps"] = graph[SAMPLER]["inputs"]["steps"] = STEPS
    for node, inputs in changes.items():
        graph[node]["inputs"] |= inputs
    return graph


def pictures(client, graph, on_progress=None) -> list[np.ndarray]:
    images = client.run(graph, on_progress)[PICTURES]["images"]
    return [np.asarray(Image.open(BytesIO(client.view(i)))) for i in images]


def plain(seed: int) -> dict:
    """A prompt with no node of ours at all."""
    return {
        "1": {
            "class_type": "CheckpointLoaderSimple",
            "inputs": {"ckpt_name": "kindred_miniature.safetensors"},
        },
        "2": {
            "class_type": "CLIPTextEncode",
            "inputs": {"clip": ["1", 1], "text": "a photo of a dog in a meadow"},
        },
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 128, "height": 128, "batch_size": 1},
        },
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": seed,
                "steps": STEPS,
                "cfg": 4.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        PICTURES: {
            "class_type": "SaveImage",
            "inputs": {"images": ["6", 0], "filename_prefix": "plain"},
        },
    }


@pytest.fixture(scope="module")
def untouched(client) -> np.ndarray:
    """The plain picture before any node of ours ran in this test file."""
    return pictures(client, plain(4))[0]


def test_the_shipped_workflow_runs_as_it_is(client, untouched):
    """Three pictures, others with weight 0, steps + 1 calls for the reference, and the mask's preview."""
    seen: list[Progress] = []
    injected = pictures(client, shipped(), seen.append)
    assert len(injected) == 3 and all(p.shape == (128, 128, 3) for p in injected)
    assert max(p.maximum for p in seen if p.node == CAPTURE) == STEPS + 1
    alone = [pictures(client, shipped(**{node: {"weight": 0.0}})) for node in (INJECT, CONCEPT)]
    without = pictures(client, shipped(**{INJECT: {"weight": 0.0}, CONCEPT: {"weight": 0.0}}))
    for one, other in (
        (injected, alone[0]),
        (injected, alone[1]),
        (alone[0], alone[1]),
        (alone[0], without),
        (alone[1], without),
    ):
        assert all(np.abs(a.astype(int) - b).mean() > 1 for a, b in zip(one, other))
    bare = pictures(
        client, shipped(**{SAMPLER: {"model": [LOADER, 0]}, PICTURES: {"filename_prefix": "bare"}})
    )
    assert all((a == b).all() for a, b in zip(bare, without))
    again = pictures(client, shipped(**{PICTURES: {"filename_prefix": "again"}}))
    assert all((a == b).all() for a, b in zip(injected, again))
    assert (pictures(client, plain(4) | {"9": plain(4)[PICTURES]})[0] == untouched).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {COARSE: {"prompts": "cat", "subject": "dog"}},
            ["line 1", "'a photo of a cat'", "'dog'"],
        ),
        (
            {PROMPTS: {"prompts": "a photo of a cat\na photo of a bird", "subject": "cat"}},
            ["line 2", "'a photo of a bird'", "'cat'"],
        ),
        ({CAPTURE: {"blocks": "output 9"}}, ["'output 9'", "output 0"]),
        ({INJECT: {"halves": "both"}}, ["'both'", "cond", "negative"]),
        ({CAPTURE: {"mask_blocks": "nowhere"}}, ["'nowhere'", "write a preset"]),
    ],
)
def test_bad_input_is_a_sentence_and_the_server_lives_on(client, untouched, changes, words):
    """What the letters alone tell, before anything runs, also where it reaches one output of two."""
    early = changes.keys() & {COARSE, PROMPTS}
    with pytest.raises(PromptRefused if early else NodeFailed) as failed:
        client.run(shipped(**changes))
    assert all(word in str(failed.value) for word in words), failed.value
    graph = plain(4)
    graph[PICTURES]["inputs"]["filename_prefix"] = "after"
    assert (pictures(client, graph)[0] == untouched).all()


@pytest.mark.parametrize(
    "inputs",
    [
        {"strength": 2.0},
        {"weight": -1.0},
        {"weight": "much"},
        {"start_percent": 2.0},
        {"weight_mode": "loud"},
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_runs(client, inputs):
    graph = shipped(**{INJECT: inputs})
    del graph[
        "14"
    ]  # the mask's preview does not depend on the node, so the host would still run that much
    with pytest.raises(PromptRefused) as refused:
        client.run(graph)
    assert INJECT in refused.value.nodes and next(iter(inputs)) in str(refused.value)


def test_an_encoder_that_is_not_there_is_refused_by_name(client):
    graph = shipped(**{ENCODER: {"file": "gone.safetensors"}})
    del graph["14"]
    with pytest.raises(PromptRefused) as refused:
        client.run(graph)
    assert ENCODER in refused.value.nodes and "gone.safetensors" in str(refused.value)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA", "1"])
def test_photos_of_any_mode_and_shape(client, mode):
    """Transparent, grey, palette and one-bit photos, not square and not of the model's size."""
    buffer = BytesIO()
    Image.linear_gradient("L").resize((200, 90)).convert("RGB").convert(mode).save(buffer, "PNG")
    name = client.upload_image(buffer.getvalue(), f"photo_{mode}.png")
    graph = shipped(
        **{
            PHOTO: {"image": name},
            CAPTURE: {"steps": 2},
            SAMPLER: {"steps": 2},
            PROMPTS: {"prompts": "a photo of a cat"},
        }
    )
    assert len(pictures(client, graph)) == 1


def test_a_reference_of_another_model_is_refused(client):
    """A LoRA-free change of the weights is enough: half of the model merged with itself is another model."""
    graph = copy.deepcopy(shipped())
    graph["30"] = {
        "class_type": "ModelMergeSubtract",
        "inputs": {"model1": [LOADER, 0], "model2": [LOADER, 0], "multiplier": 0.5},
    }
    graph[INJECT]["inputs"]["model"] = ["30", 0]
    with pytest.raises(NodeFailed) as failed:
        client.run(graph)
    assert (
        failed.value.sentence.count("KindredMiniature") == 2
        and "Wire a MODEL with the same LoRAs (or merge)" in failed.value.sentence
    )
