"""What ships as a blueprint: which nodes of a workflow stand in one subgraph, and what of them is
on its outside.

The workflow's API form says which they are: ComfyUI numbers the nodes of subgraph 4 "4:10", "4:11"
and so on. tools/workshop/workflows.py draws them flat, `fold` puts them into the subgraph, and
`alone` is the file of subgraphs/ that ComfyUI offers among the nodes.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CATEGORY = "Kindred"  # among the blueprints; web/search.js looks for it
IN, OUT = -10, -20  # the canvas's own numbers for the two ends of a subgraph
Node = dict[str, Any]
Link = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """A socket or a field of the subgraph, and all inputs inside that take it."""

    name: str
    targets: tuple[tuple[int, str], ...]
    label: str = ""


@dataclass(frozen=True)
class Output:
    """A socket of the subgraph: an output of a node inside."""

    name: str
    node: int
    slot: int


@dataclass(frozen=True)
class Blueprint:
    """A subgraph of a workflow that also stands alone in subgraphs/."""

    name: str  # the file's, and what the search box shows
    node: int
    description: str
    aliases: tuple[str, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    values: Mapping[str, Any]  # of a blueprint on its own: the miniature's fit no other model
    asks: tuple[tuple[int, str], ...]  # fields of the app, in order: node, name
    labels: Mapping[tuple[int, str], str]  # of fields outside of the subgraph
    shows: int  # the node whose pictures the app shows
    size: tuple[int, int]


SAMPLING = {"width": 512, "height": 512, "cfg": 6.0}  # of SD1.5
BLUEPRINTS = {
    "personalize_app": Blueprint(
        "Personalize from my photo (Kindred)",
        4,
        "New pictures of the subject of one photo, with nothing trained: the same face, character, "
        "pet or thing in every picture. Wire a checkpoint and a photo.",
        (
            "personalize",
            "consistent character",
            "my photo",
            "same face",
            "same person",
            "likeness",
            "cref",
            "character reference",
            "reference image",
            "keep identity",
            "ipadapter",
        ),
        (
            Input("model", ((23, "model"), (14, "model"), (15, "model"))),
            Input("clip", ((13, "clip"), (16, "clip"), (17, "clip"))),
            Input("vae", ((11, "vae"), (20, "vae"))),
            Input("photo", ((10, "image"),)),
            Input("prompts", ((16, "prompts"),), "new pictures, one per line"),
            Input("subject", ((21, "value"),), "what the photo shows"),
            Input("strength", ((15, "strength"),), "likeness"),
            Input("preset", ((15, "preset"),)),
            Input("negative", ((17, "text"),), "not in the pictures"),
            Input("width", ((10, "width"),)),
            Input("height", ((10, "height"),)),
            Input("steps", ((23, "steps"),)),
            Input("cfg", ((19, "cfg"),)),
            Input("sampler_name", ((24, "sampler_name"),)),
            Input("scheduler", ((23, "scheduler"),)),
            Input("seed", ((19, "noise_seed"),)),
        ),
        (Output("pictures", 20, 0), Output("subject mask", 14, 1)),
        SAMPLING,
        (
            (2, "image"),
            (4, "subject"),
            (4, "prompts"),
            (4, "strength"),
            (4, "preset"),
            (4, "seed"),
        ),
        {(2, "image"): "your photo"},
        3,
        (400, 584),
    ),
    "story_app": Blueprint(
        "Story of one character (Kindred)",
        4,
        "One subject in several pictures, without a photo and with nothing trained: write a line "
        "for each picture. Wire a checkpoint.",
        (
            "story",
            "consistent story",
            "consistent character",
            "consistory",
            "same character",
            "same face",
            "storyboard",
            "comic",
        ),
        (
            Input("model", ((13, "model"),)),
            Input("clip", ((10, "clip"), (11, "clip"))),
            Input("vae", ((15, "vae"),)),
            Input("prompts", ((10, "prompts"),), "the story, one picture per line"),
            Input("subject", ((10, "subject"),), "who or what it is about"),
            Input("strength", ((13, "strength"),), "likeness"),
            Input("negative", ((11, "text"),), "not in the pictures"),
            Input("width", ((12, "width"),)),
            Input("height", ((12, "height"),)),
            Input("steps", ((14, "steps"),)),
            Input("cfg", ((14, "cfg"),)),
            Input("sampler_name", ((14, "sampler_name"),)),
            Input("scheduler", ((14, "scheduler"),)),
            Input("seed", ((14, "seed"),)),
        ),
        (Output("pictures", 15, 0),),
        SAMPLING,
        ((4, "prompts"), (4, "subject"), (4, "strength"), (4, "seed")),
        {},
        3,
        (400, 540),
    ),
}


def number(key: str) -> int:
    """Of a node on the flat canvas: the last part of its API key."""
    return int(key.rpartition(":")[2])


def flat(graph: Mapping[str, Node]) -> dict[str, Node]:
    """An API form with its subgraphs dissolved."""
    nodes = {}
    for key, node in graph.items():
        node = copy.deepcopy(node)
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = [str(number(value[0])), value[1]]
        nodes[str(number(key))] = node
    return nodes


def inside(graph: Mapping[str, Node]) -> dict[str, Node]:
    """The nodes that stand in a subgraph."""
    return {key: node for key, node in graph.items() if ":" in key}


def with_values(graph: Mapping[str, Node], blueprint: Blueprint) -> dict[str, Node]:
    """The API form with the values that a blueprint has on its own."""
    filled = json.loads(json.dumps(graph))
    for port in blueprint.inputs:
        if port.name in blueprint.values:
            for node, name in port.targets:
                filled[f"{blueprint.node}:{node}"]["inputs"][name] = blueprint.values[port.name]
    return filled


def identity(*parts: str) -> str:
    """An id that stays from one drawing to the next."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("kindred", *parts))))


class Folding:
    """A drawn workflow on its way into a root graph and a subgraph."""

    def __init__(self, drawn: Mapping[str, Any], keys: Iterable[int]) -> None:
        """keys: the nodes that go into the subgraph."""
        self.drawn = json.loads(json.dumps(drawn))
        self.nodes = {int(node["id"]): node for node in self.drawn["nodes"]}
        self.keys = set(keys)
        self.root: list[Link] = []
        self.sub: list[Link] = []
        self.crossing: list[Link] = []
        self.last = int(self.drawn["last_link_id"])
        for link in map(as_dict, self.drawn["links"]):
            ends = {link["origin_id"] in self.keys, link["target_id"] in self.keys}
            home = self.crossing if len(ends) == 2 else self.sub if ends == {True} else self.root
            home.append(link)

    def link(self, home: list[Link], kind: str, *ends: int) -> int:
        """A new one, from node and slot to node and slot; gives its id."""
        self.last += 1
        names = ("origin_id", "origin_slot", "target_id", "target_slot")
        home.append({"id": self.last, **dict(zip(names, ends)), "type": kind})
        return self.last

    def add_input(self, node: int, slot: int, port: Input) -> dict[str, Any]:
        """The subgraph's input of this slot, wired on both sides; gives its definition."""
        links, origin, kind = [], None, ""
        for key, name in port.targets:
            index, socket = find(self.nodes[key]["inputs"], name)
            kind = kind or socket["type"]
            links.append(self.link(self.sub, kind, IN, slot, key, index))
            for link in self.crossing:
                if (link["target_id"], link["target_slot"]) == (key, index):
                    origin = link["origin_id"], link["origin_slot"]
        if origin:
            self.link(self.root, kind, *origin, node, slot)
        label = {"label": port.label} if port.label else {}
        return {"name": port.name, "type": kind, "linkIds": links, **label}

    def add_output(self, node: int, slot: int, port: Output) -> dict[str, Any]:
        """The subgraph's output of this slot, wired on both sides; gives its definition."""
        kind = self.nodes[port.node]["outputs"][port.slot]["type"]
        inner = self.link(self.sub, kind, port.node, port.slot, OUT, slot)
        for link in self.crossing:
            if (link["origin_id"], link["origin_slot"]) == (port.node, port.slot):
                self.link(self.root, kind, node, slot, link["target_id"], link["target_slot"])
        return {"name": port.name, "type": kind, "linkIds": [inner]}


def as_dict(link: Sequence[Any]) -> Link:
    """A link of a root graph as one of a subgraph."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return dict(zip(names, link))


def find(sockets: Sequence[Mapping[str, Any]], name: str) -> tuple[int, Mapping[str, Any]]:
    """A socket and its place; KeyError where there is none of this name."""
    for index, socket in enumerate(sockets):
        if socket["name"] == name:
            return index, socket
    raise KeyError(name)


def rewire(nodes: Iterable[Node], links: Iterable[Link]) -> None:
    """Write into the nodes' sockets what the links say."""
    links = list(links)
    into = {(link["target_id"], link["target_slot"]): link["id"] for link in links}
    for node in nodes:
        for index, socket in enumerate(node.get("inputs", [])):
            socket["link"] = into.get((node["id"], index))
        for index, socket in enumerate(node.get("outputs", [])):
            place = node["id"], index
            socket["links"] = [
                link["id"] for link in links if (link["origin_id"], link["origin_slot"]) == place
            ]


def fold(
    drawn: Mapping[str, Any], graph: Mapping[str, Node], blueprint: Blueprint
) -> dict[str, Any]:
    """A drawn workflow with the nodes of its subgraph folded into one; graph: its API form."""
    folding = Folding(drawn, map(number, inside(graph)))
    kind = identity(blueprint.name)
    inputs = [
        folding.add_input(blueprint.node, slot, port) | {"id": identity(kind, "in", port.name)}
        for slot, port in enumerate(blueprint.inputs)
    ]
    outputs = [
        folding.add_output(blueprint.node, slot, port) | {"id": identity(kind, "out", port.name)}
        for slot, port in enumerate(blueprint.outputs)
    ]
    within = [folding.nodes[key] for key in sorted(folding.keys)]
    without = [node for key, node in sorted(folding.nodes.items()) if key not in folding.keys]
    outside = outer(blueprint, kind, inputs, outputs, folding, graph)
    without.append(outside)
    rewire(within, folding.sub)
    rewire(without, folding.root)
    for (node, name), label in blueprint.labels.items():
        find(folding.nodes[node]["inputs"], name)[1]["label"] = label
    folded = folding.drawn
    folded["nodes"] = sorted(without, key=lambda node: int(node["id"]))
    folded["links"] = [list(link.values()) for link in folding.root]
    folded["last_link_id"] = folding.last
    ends = {"inputs": inputs, "outputs": outputs, "nodes": within, "links": folding.sub}
    folded["definitions"] = {"subgraphs": [definition(blueprint, kind) | ends]}
    return folded


def outer(
    blueprint: Blueprint,
    kind: str,
    inputs: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    folding: Folding,
    graph: Mapping[str, Node],
) -> Node:
    """The subgraph as a node of the root graph."""
    sockets, values = [], []
    for port, entry in zip(blueprint.inputs, inputs):
        key, name = port.targets[0]
        socket = {field: entry[field] for field in ("name", "label", "type") if field in entry}
        if "widget" in find(folding.nodes[key]["inputs"], name)[1]:
            socket["widget"] = {"name": port.name}
            values.append(graph[f"{blueprint.node}:{key}"]["inputs"][name])
        sockets.append(socket)
    return {
        "id": blueprint.node,
        "type": kind,
        "title": blueprint.name,
        "pos": [0, 0],
        "size": list(blueprint.size),
        "flags": {},
        "mode": 0,
        "order": 0,
        "inputs": sockets,
        "outputs": [{"name": output["name"], "type": output["type"]} for output in outputs],
        "properties": {},
        "widgets_values": values,
    }


def definition(blueprint: Blueprint, kind: str) -> dict[str, Any]:
    """The subgraph's definition, but for what stands in it."""
    return {
        "id": kind,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": 0, "lastLinkId": 0, "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "inputNode": {"id": IN, "bounding": [-280, 60, 200, 40 + 20 * len(blueprint.inputs)]},
        "outputNode": {"id": OUT, "bounding": [0, 60, 160, 60]},
        "groups": [],
        "widgets": [],
        "description": blueprint.description,
        "extra": {},
    }


def app(blueprint: Blueprint) -> dict[str, Any]:
    """What a workflow's `extra` says for the canvas to open it as an app."""
    asks = [list(ask) for ask in blueprint.asks]
    return {"linearMode": True, "linearData": {"inputs": asks, "outputs": [blueprint.shows]}}


def alone(workflow: Mapping[str, Any], blueprint: Blueprint) -> dict[str, Any]:
    """The file of subgraphs/: the folded node of a drawn workflow, unwired."""
    whole = json.loads(json.dumps(workflow))
    node = next(node for node in whole["nodes"] if int(node["id"]) == blueprint.node)
    rewire([node], [])
    # the page names a subgraph's node after it, and keeps no category
    node |= {"pos": [0, 0], "title": blueprint.name}
    whole["definitions"]["subgraphs"][0]["category"] = CATEGORY
    return {
        "id": identity(blueprint.name, "file"),
        "revision": 0,
        "last_node_id": blueprint.node,
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "groups": [],
        "definitions": whole["definitions"],
        "config": {},
        "extra": {
            "BlueprintDescription": blueprint.description,
            "BlueprintSearchAliases": list(blueprint.aliases),
        },
        "version": 0.4,
    }
