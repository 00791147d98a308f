"""What a soak sends: rounds of every kind of prompt, none of which the host can answer from its cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import demo
import demo_story as story

Graph = dict[str, dict[str, Any]]
SIZES = ((128, 128), (192, 128), (136, 120))  # one to a round
PICTURES = "pictures"  # the node whose pictures count, in every graph
PATIENT = 40  # steps of a prompt that will be interrupted
STORY_LINES = ("cat on the beach", "cat in the snow", "cat in the forest")


@dataclass(frozen=True)
class Turn:
    """One prompt's place in the soak. number: the round whose seeds and size it has; saved: what earlier prompts wrote, by kind."""

    number: int
    steps: int
    saved: dict[str, str]

    @property
    def seed(self) -> int:
        return 1000 * self.number + 1

    @property
    def size(self) -> dict[str, int]:
        return dict(zip(("width", "height"), SIZES[self.number % len(SIZES)]))


def read(name: str) -> Graph:
    return json.loads((demo.WORKFLOW.parent / f"{name}.json").read_text("utf-8"))


def shown(graph: Graph, node: str) -> Graph:
    """The node that saves pictures under a name of its own in every graph."""
    graph[PICTURES] = graph.pop(node)
    return graph


def plain(turn: Turn) -> Graph:
    """No node of ours."""
    graph = story.plain(read("story"))
    graph[story.PROMPTS] = {
        "class_type": "CLIPTextEncode",
        "inputs": {"clip": [story.LOADER, 1], "text": "a photo of a dog in a meadow"},
    }
    graph[story.SAMPLER]["inputs"] |= {"seed": turn.seed, "steps": turn.steps}
    graph[story.SIZE]["inputs"] |= turn.size | {"batch_size": 1}
    return shown(graph, story.PICTURES)


def check(turn: Turn) -> Graph:
    """The plain picture that has to be the same in every round."""
    graph = plain(Turn(0, turn.steps, {}))
    graph[story.SAMPLER]["inputs"]["seed"] = 7
    return graph


def both(turn: Turn) -> Graph:
    """One picture by both injections; a mask's value that Otsu does not read keeps the capture out of the host's cache."""
    graph = read("personalize")
    for node in (demo.CAPTURE, demo.SAMPLER):
        graph[node]["inputs"]["steps"] = turn.steps
    graph[demo.CAPTURE]["inputs"]["mask_value"] = 0.3 + turn.number / 10_000
    graph[demo.PROMPTS]["inputs"]["prompts"] = "a photo of a cat on the beach"
    graph[demo.SAMPLER]["inputs"]["seed"] = turn.seed
    graph[demo.SIZE]["inputs"] |= turn.size
    return shown(graph, demo.PICTURES)


def everything(turn: Turn) -> Graph:
    """Both injections and a story of two pictures on one model."""
    graph = both(turn)
    graph[demo.PROMPTS]["inputs"]["prompts"] = (
        "a photo of a cat on the beach\na photo of a cat in the snow"
    )
    graph[demo.SIZE]["inputs"]["batch_size"] = 2
    how = read("story")[story.STORY]["inputs"] | {
        "model": graph[demo.SAMPLER]["inputs"]["model"],
        "seed": turn.number,
    }
    graph["story"] = {"class_type": "KindredConsiStory", "inputs": how}
    graph[demo.SAMPLER]["inputs"]["model"] = ["story", 0]
    return graph


def own(turn: Turn) -> Graph:
    """Self-attention injection alone."""
    graph = both(turn)
    del graph[demo.ENCODER], graph[demo.CONCEPT]
    graph[demo.SAMPLER]["inputs"]["model"] = [demo.INJECT, 0]
    return graph


def cross(turn: Turn) -> Graph:
    """The concept encoder alone."""
    graph = {
        key: node
        for key, node in both(turn).items()
        if key not in (demo.INJECT, demo.CAPTURE, demo.COARSE, "4", "14")
    }
    graph[demo.CONCEPT]["inputs"]["model"] = [demo.LOADER, 0]
    return graph


def live(turn: Turn) -> Graph:
    """A schedule that the reference does not hold."""
    graph = own(turn)
    graph[demo.SAMPLER]["inputs"] |= {"sampler_name": "dpmpp_2m", "scheduler": "karras"}
    return graph


def saves(turn: Turn) -> Graph:
    """A reference used and saved."""
    graph = own(turn)
    graph["save"] = {
        "class_type": "KindredSaveReference",
        "inputs": {"reference": [demo.CAPTURE, 0], "filename_prefix": "kindred/soak"},
    }
    return graph


def loads(turn: Turn) -> Graph:
    """The reference that was saved last."""
    graph = {
        key: node
        for key, node in own(turn).items()
        if key not in (demo.CAPTURE, demo.COARSE, demo.PHOTO, "4", "14")
    }
    graph["load"] = {"class_type": "KindredLoadReference", "inputs": {"file": turn.saved["saves"]}}
    graph[demo.INJECT]["inputs"]["reference"] = ["load", 0]
    return graph


def scored(turn: Turn) -> Graph:
    """Both injections, and what the judge says of them."""
    graph = both(turn)
    graph["score"] = {
        "class_type": "KindredConsistencyScore",
        "inputs": {
            "images": ["12", 0],
            "judge": "auto",
            "prompts": [demo.PROMPTS, 2],
            "reference": [demo.PHOTO, 0],
        },
    }
    return graph


def inverted(turn: Turn) -> Graph:
    """DDIM Invert first, its path replayed for the capture."""
    graph = own(turn)
    inputs = graph[demo.CAPTURE]["inputs"]
    graph["invert"] = {
        "class_type": "KindredDDIMInvert",
        "inputs": {
            "model": inputs["model"],
            "latent": inputs.pop("latent"),
            "positive": inputs["positive"],
            "steps": turn.steps,
            "scheduler": "ddim_uniform",
            "method": "ddim",
            "seed": turn.seed,
            "check": True,
        },
    }
    inputs["inversion"] = ["invert", 0]
    return graph


def story_graph(turn: Turn) -> Graph:
    """A story of three pictures."""
    graph = read("story")
    graph[story.PROMPTS]["inputs"]["prompts"] = "\n".join(STORY_LINES)
    graph[story.STORY]["inputs"]["seed"] = turn.number
    graph[story.SAMPLER]["inputs"] |= {"seed": turn.seed, "steps": turn.steps}
    graph[story.SIZE]["inputs"] |= turn.size
    return shown(graph, story.PICTURES)


def anchored(turn: Turn) -> Graph:
    """Two anchors, sampled and saved, and one more picture of their subject."""
    graph = story.anchors(story_graph(turn))
    graph[story.PROMPTS]["inputs"]["prompts"] = "\n".join(STORY_LINES[:2])
    extra = extra_picture(turn, [story.SAMPLER, 1])
    graph[story.SAVE]["inputs"]["filename_prefix"] = "kindred/soak_anchors"
    del graph[PICTURES], graph[story.DECODE]
    return graph | extra


def extra_picture(turn: Turn, reference: list[Any]) -> Graph:
    """One more picture of anchors; its nodes carry names of their own."""
    graph = {
        key: node
        for key, node in story_graph(turn).items()
        if key not in (story.LOADER, story.NEGATIVE)
    }
    graph[story.PROMPTS]["inputs"]["prompts"] = STORY_LINES[2]
    graph[story.STORY]["inputs"]["reference"] = reference
    names = {key: key if key == PICTURES else f"extra {key}" for key in graph}
    renamed = {names[key]: copy.deepcopy(node) for key, node in graph.items()}
    for node in renamed.values():
        if node["inputs"].get("reference") == reference:
            kept = node["inputs"].pop("reference")
        else:
            kept = None
        node["inputs"] = {
            name: [names.get(value[0], value[0]), value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        } | ({"reference": kept} if kept else {})
    return renamed


def more(turn: Turn) -> Graph:
    """One more picture of the anchors that were saved last."""
    alone = {
        key: node
        for key, node in story_graph(turn).items()
        if key in (story.LOADER, story.NEGATIVE)
    }
    load = {
        "load": {"class_type": "KindredLoadReference", "inputs": {"file": turn.saved["anchored"]}}
    }
    return alone | load | extra_picture(turn, ["load", 0])


def fails(turn: Turn) -> Graph:
    """Each round another way: before anything runs, in a node, and when the sampler starts."""
    way = turn.number % 3
    if way == 0:
        graph = both(turn)
        graph[demo.INJECT]["inputs"]["weight"] = -1.0
        del graph["14"]  # it does not depend on that node, so the host would still run it
        return graph
    if way == 1:
        graph = story_graph(turn)
        graph[story.PROMPTS]["inputs"]["prompts"] = "cat on the beach\nbird in the snow"
        return graph
    graph = more(turn)
    graph[f"extra {story.SAMPLER}"]["inputs"]["steps"] = turn.steps + 1
    return graph


def stopped(turn: Turn) -> Graph:
    """Interrupted while it samples: a story, or both injections."""
    graph = (story_graph if turn.number % 2 else both)(Turn(turn.number, PATIENT, turn.saved))
    if demo.CAPTURE in graph and graph[demo.CAPTURE]["class_type"] == "KindredRefUNetCapture":
        graph[demo.CAPTURE]["inputs"]["steps"] = turn.steps
    return graph


MIX: dict[str, Callable[[Turn], Graph]] = {
    "plain": plain,
    "own": own,
    "told": story_graph,
    "cross": cross,
    "saves": saves,
    "anchored": anchored,
    "live": live,
    "more": more,
    "both": both,
    "everything": everything,
    "loads": loads,
    "scored": scored,
    "inverted": inverted,
    "fails": fails,
    "stopped": stopped,
    "check": check,
}
ENDS = {"fails": "failed", "stopped": "interrupted"}  # the others give pictures
NEEDS = {
    "loads": "saves",
    "more": "anchored",
    "fails": "anchored",
}  # kinds that read what another one saved
SAVERS = {"saves": "save", "anchored": story.SAVE}  # the node that says what was written


def rounds_of(prompts: int, kinds: int) -> int:
    """Whole rounds, at least two: the last has the seeds of the first."""
    return max(2, -(-prompts // kinds))
