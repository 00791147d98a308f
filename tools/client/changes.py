"""A workflow in API form, changed by words: which node a title means, which input, and the value in the type the host wants.

graph: node id -> {"class_type", "inputs", "_meta"}; info: the host's /object_info. Every mistake is a Refusal: one sentence with what
there is instead. Nothing here talks to a host.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Graph = dict[str, dict[str, Any]]
Info = Mapping[str, Any]
WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
READERS = {
    "INT": (int, "a whole number"),
    "FLOAT": (float, "a number"),  # the order in which a type of many is tried
    "BOOLEAN": (lambda text: WORDS[text.strip().lower()], "true or false"),
    "STRING": (str, "text"),
}
UPLOADS = ("image_upload", "video_upload", "audio_upload", "animated_image_upload")
LOAD_REFERENCE = "KindredLoadReference"


class Refusal(ValueError):
    """Something that was asked for cannot be; nothing was posted."""


class Ambiguous(Refusal):
    """A title that several nodes bear."""


@dataclass(frozen=True)
class Place:
    """One input of one node."""

    node: str
    input: str


@dataclass(frozen=True)
class Change:
    """What a place shall hold, as the user wrote it."""

    place: Place
    text: str


def read_workflow(path: Path) -> Graph:
    """The API form out of a JSON file."""
    try:
        graph = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{path} could not be read as a workflow: {why_unread(error)}.") from None
    if isinstance(graph, dict) and isinstance(
        graph.get("prompt"), dict
    ):  # as it is posted to /prompt
        graph = graph["prompt"]
    if isinstance(graph, dict) and "nodes" in graph and "links" in graph:
        raise Refusal(
            f"{path} is a workflow in canvas form; save it with File > Export (API), and give that file."
        )
    if (
        not isinstance(graph, dict)
        or not graph
        or not all(isinstance(node, dict) and "class_type" in node for node in graph.values())
    ):
        raise Refusal(
            f"{path} is not a workflow in API form: it needs a class_type for every node."
        )
    return graph


def title(graph: Mapping[str, Any], node: str) -> str:
    """What the node is called in the workflow, else its type."""
    known = graph.get(node, {})
    return known.get("_meta", {}).get("title") or known.get("class_type") or f"node {node}"


def listed(things: Iterable[object], most: int = 30) -> str:
    words = [str(thing) for thing in things]
    return (
        ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
        or "none"
    )


def near(word: str, words: Iterable[str]) -> str:
    """A question with the word that was probably meant, or nothing."""
    lower = {known.lower(): known for known in words}
    close = difflib.get_close_matches(word.lower(), lower, 1)
    return f" Did you mean {lower[close[0]]!r}?" if close else ""


def find_node(graph: Graph, key: str) -> str:
    """A node's id from its id, its title, or its type, whatever comes first; a title or type has to be the only one."""
    if key in graph:
        return key
    for name in (lambda node: title(graph, node), lambda node: graph[node]["class_type"]):
        matches = [node for node in graph if name(node).lower() == key.strip().lower()]
        if len(matches) > 1:
            raise Ambiguous(
                f"{len(matches)} nodes are called {key!r}: name one by its id, {' or '.join(matches)}."
            )
        if matches:
            return matches[0]
    raise Refusal(
        f"No node is called {key!r}.{near(key, (title(graph, node) for node in graph))} "
        f"There are: {listed(f'{node} ({title(graph, node)})' for node in graph)}."
    )


def find_place(graph: Graph, words: str) -> Place:
    """NODE.INPUT, where the node's title and the input's name may hold dots too: the longest title that is one wins."""
    cuts = [i for i, letter in enumerate(words) if letter == "."]
    if not cuts:
        raise Refusal(f"{words!r} names no input: write it as NODE.INPUT, for instance 8.prompts.")
    unknown = None
    for i in reversed(cuts):
        try:
            return Place(find_node(graph, words[:i]), words[i + 1 :].strip())
        except Ambiguous:
            raise
        except Refusal as refusal:
            unknown = unknown or refusal
    raise unknown


def split(words: str, option: str) -> tuple[str, str]:
    """KEY=VALUE in two."""
    key, equals, value = words.partition("=")
    if not equals:
        raise Refusal(f"{option} {words!r} lacks a =; write it as NODE.INPUT=VALUE.")
    return key.strip(), value


def why_unread(error: OSError | ValueError) -> str:
    """Why a file of text could not be read, in words."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    return getattr(error, "strerror", None) or str(error)


def read_text(value: str) -> str:
    """@FILE is the file's text and @@ a plain @; anything else is itself."""
    if not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    path = Path(value[1:]).expanduser()
    try:
        return path.read_text("utf-8").rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise Refusal(
            f"{value} stands for the text of {path.absolute()}, but {why_unread(error)}. Name a text file, or write "
            f"@{value} for these letters themselves."
        ) from None


def parse_change(graph: Graph, words: str, option: str = "--set") -> Change:
    key, value = split(words, option)
    return Change(find_place(graph, key), read_text(value))


def spec(info: Info, graph: Graph, place: Place) -> tuple[Any, Mapping[str, Any]]:
    """(type, options) of an input as the host declares it; a nested name such as mode.width is found below its dynamic input."""
    kind = graph[place.node]["class_type"]
    if kind not in info:
        raise Refusal(
            f"The host does not know {kind} ({place.node}, {title(graph, place.node)}): install the pack that it comes from."
        )
    inputs = {
        name: spec
        for group in ("required", "optional")
        for name, spec in (info[kind]["input"].get(group) or {}).items()
    }
    if place.input in inputs:
        spec = inputs[place.input]
        return spec[0], spec[1] if len(spec) > 1 else {}
    now = graph[place.node].get("inputs", {}).get(place.input)
    if (
        place.input.partition(".")[0] in inputs and now is not None
    ):  # a dynamic input's own: only the workflow tells its type
        return {bool: "BOOLEAN", int: "INT", float: "FLOAT", str: "STRING"}.get(
            type(now), "link"
        ), {}
    raise Refusal(
        f"{title(graph, place.node)} ({place.node}) has no input {place.input!r}.{near(place.input, inputs)} "
        f"It has: {listed(inputs)}."
    )


def typed(info: Info, graph: Graph, change: Change) -> Any:
    """The change's text as the int, float, bool or string that the host wants there."""
    place, text = change.place, change.text
    kind, options = spec(info, graph, place)
    where = f"{title(graph, place.node)}.{place.input} ({place.node})"
    if isinstance(kind, list) or kind in ("COMBO", "COMFY_DYNAMICCOMBO_V3"):
        return chosen(
            text, kind if isinstance(kind, list) else options.get("options"), options, where
        )
    kinds = [name for name in READERS if name in str(kind).split(",")]
    if not kinds:
        raise Refusal(f"{where} takes a connection of type {kind}, not a value.")
    for name in kinds:
        try:
            value = READERS[name][0](text)
        except (ValueError, KeyError):
            continue
        return within(value, options, where) if name in ("INT", "FLOAT") else value
    raise Refusal(f"{where} takes {' or '.join(READERS[name][1] for name in kinds)}, not {text!r}.")


def chosen(text: str, known: Any, options: Mapping[str, Any], where: str) -> Any:
    """One of a list's entries; any text where the host keeps the list to itself or takes uploads, whose [temp] names are in no list."""
    if known is None or any(options.get(name) for name in UPLOADS):
        return text
    entries = [entry["key"] if isinstance(entry, Mapping) else entry for entry in known]
    for entry in entries:
        if str(entry) == text:
            return entry
    raise Refusal(
        f"{where} does not know {text!r}.{near(text, map(str, entries))} It takes: {listed(entries)}."
    )


def within(value: Any, options: Mapping[str, Any], where: str) -> Any:
    low, high = options.get("min"), options.get("max")
    if (
        not math.isfinite(value)
        or (low is not None and value < low)
        or (high is not None and value > high)
    ):
        raise Refusal(
            f"{where} takes {low if low is not None else 'anything'} to {high if high is not None else 'anything'}, not {value}."
        )
    return value


def check_known(info: Info, graph: Graph) -> None:
    """Every node of the workflow is one the host has."""
    lacking = sorted({node["class_type"] for node in graph.values()} - set(info))
    if lacking:
        raise Refusal(
            f"The host does not know {listed(lacking)}: install there what the workflow needs."
        )


def picture_place(info: Info, graph: Graph, key: str) -> Place:
    """Where an uploaded picture's name goes: NODE.INPUT, or the one input of NODE that takes uploads."""
    try:
        node = find_node(graph, key)
    except Refusal:
        if "." not in key:
            raise
        return find_place(graph, key)
    inputs = uploads(info, graph[node]["class_type"])
    if not inputs:
        loaders = [
            f"{other} ({title(graph, other)})"
            for other in graph
            if uploads(info, graph[other]["class_type"])
        ]
        raise Refusal(
            f"{title(graph, node)} ({node}) takes no picture. Those that do: {listed(loaders)}."
        )
    return Place(node, inputs[0])


def uploads(info: Info, kind: str) -> list[str]:
    """The inputs of a type of node that take an uploaded file."""
    groups = info.get(kind, {}).get("input", {})
    return [
        name
        for group in ("required", "optional")
        for name, words in (groups.get(group) or {}).items()
        if len(words) > 1 and any(words[1].get(upload) for upload in UPLOADS)
    ]


def subject_place(graph: Graph, key: str | None) -> Place:
    """The `file` of the node that loads the saved subject: the one Load Reference, unless `key` names it."""
    if key is not None:
        return Place(find_node(graph, key), "file")
    loaders = [node for node in graph if graph[node]["class_type"] == LOAD_REFERENCE]
    if len(loaders) == 1:
        return Place(loaders[0], "file")
    raise Refusal(
        "--subject needs a workflow with a Load Reference node; this one has none."
        if not loaders
        else f"{len(loaders)} nodes load a reference: write --subject NODE=FILE with one of {', '.join(loaders)}."
    )


def seed_places(info: Info, graph: Graph) -> list[Place]:
    """The seeds that the canvas would change after each run: of noise, not of what a method keeps to itself."""
    return [
        Place(node, name)
        for node, known in graph.items()
        for name in ("seed", "noise_seed")
        if isinstance(known.get("inputs", {}).get(name), int)
        and known["class_type"] in info
        and spec(info, graph, Place(node, name))[1].get("control_after_generate")
    ]


def put(graph: Graph, place: Place, value: Any) -> None:
    graph[place.node].setdefault("inputs", {})[place.input] = value
