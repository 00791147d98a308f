"""What a run of automate.py was asked for: a workflow, its changes, its files and its jobs. Standard library only."""

from __future__ import annotations

import argparse
import copy
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from changes import (
    Change,
    Graph,
    Place,
    Refusal,
    check_known,
    listed,
    parse_change,
    picture_place,
    put,
    read_workflow,
    seed_places,
    spec,
    split,
    subject_place,
    title,
    typed,
)
from client import Answered, Client
from jobs import Job


@dataclass(frozen=True)
class Plan:
    """What was asked for, before any host is known."""

    graph: Graph
    changes: Sequence[Change] = ()
    pictures: Sequence[tuple[str, Path]] = ()  # node, file
    subject: tuple[Place, Path, str] | None = (
        None  # where it goes, the file, its name on every host
    )
    each: Place | None = None
    seed: int | None = None
    repeat: int = 1

    def prepare(self, client: Client, jobs: Sequence[Job]) -> Callable[[Job], Graph]:
        """Bring the files to a host; returns what makes a job's graph for it. Refuses what the host would not take, for every job."""
        graph, info = copy.deepcopy(self.graph), client.object_info()
        check_known(info, graph)
        places = [(picture_place(info, graph, key), path) for key, path in self.pictures]
        for change in self.changes:
            put(graph, change.place, typed(info, graph, change))
        seeds = seed_places(info, graph)
        if (self.seed is not None or self.repeat > 1) and not seeds:
            raise Refusal(
                "No node of this workflow has a seed for --seed or --repeat to vary; name one with --set NODE.INPUT=NUMBER."
            )

        def build(job: Job) -> Graph:
            changed = copy.deepcopy(graph)
            if self.each is not None:
                put(changed, self.each, typed(info, graph, Change(self.each, job.lines or "")))
            if self.seed is not None or self.repeat > 1:
                first = (
                    graph[seeds[0].node]["inputs"][seeds[0].input]
                    if self.seed is None
                    else self.seed
                )
                job.seed = first + job.turn
                for place in seeds:
                    put(changed, place, typed(info, graph, Change(place, str(job.seed))))
            return changed

        for job in jobs:
            build(job)
        for place, path in places:
            put(graph, place, client.upload(path, path.name))
        if self.subject is not None:
            self._bring_subject(client, graph, info)
        return build

    def _bring_subject(self, client: Client, graph: Graph, info: Mapping[str, Any]) -> None:
        """The saved subject into the folder of the host's output that Load Reference lists, unless it is there."""
        place, path, name = self.subject
        if name not in (spec(info, graph, place)[1].get("options") or ()):
            try:
                client.upload(path, name, folder="output", subfolder="kindred")
            except Answered as error:
                if error.code != 413:
                    raise
                raise Refusal(
                    f"{client.url} takes no upload of {path.stat().st_size / 1e6:.0f} MB: start it with --max-upload-size "
                    f"{path.stat().st_size // 1_000_000 + 10}, or put the file into its models/kindred_references and use "
                    f"--set {place.node}.{place.input}={path.name}"
                ) from None
            kind = graph[place.node]["class_type"]
            known = spec(client.object_info(kind), graph, place)[1].get("options") or ()
            if name not in known:
                raise Refusal(
                    f"{client.url} took {name}, but {title(graph, place.node)} does not list it; it lists {listed(known)}."
                )
        put(graph, place, name)


def planned(options: argparse.Namespace) -> tuple[Plan, list[Job]]:
    """The plan and its jobs: every line, each as often as --repeat says. Raises Refusal."""
    graph = read_workflow(options.workflow)
    pictures = [
        (key, existing(Path(path)))
        for key, path in (split(words, "--image") for words in options.image)
    ]
    subject = None if options.subject is None else saved_subject(graph, options.subject)
    place, lines = lines_of(graph, options.each)
    seed = seed_of(options.seed)
    packs = [
        "\n".join(lines[i : i + options.lines_per_job])
        for i in range(0, len(lines), options.lines_per_job)
    ] or [None]
    jobs = [
        Job(i * options.repeat + turn + 1, pack, turn)
        for i, pack in enumerate(packs)
        for turn in range(options.repeat)
    ]
    changes = [parse_change(graph, words) for words in options.set]
    return Plan(graph, changes, pictures, subject, place, seed, options.repeat), jobs


def saved_subject(graph: Graph, words: str) -> tuple[Place, Path, str]:
    """--subject as [NODE=]FILE: where it goes, the file, and its name on every host."""
    key, equals, path = words.partition("=")
    if Path(words).is_file() or not equals:
        key, path = None, words
    file = existing(Path(path))
    digest = hashlib.sha256()
    with file.open("rb") as source:
        for piece in iter(lambda: source.read(1 << 20), b""):
            digest.update(piece)
    # the same contents have the same name everywhere, so that no host has to be sent them twice
    name = f"{file.stem}-{digest.hexdigest()[:12]}.safetensors"
    return subject_place(graph, key), file, name


def lines_of(graph: Graph, each: Sequence[str]) -> tuple[Place | None, list[str]]:
    """--each: the one input that its lines go to, and those that are not empty."""
    changes = [parse_change(graph, words, "--each") for words in each]
    if len({change.place for change in changes}) > 1:
        raise Refusal("--each goes through the lines of one input; give the others with --set.")
    lines = [line for change in changes for line in change.text.splitlines() if line.strip()]
    if changes and not lines:
        raise Refusal("--each has no line that is not empty.")
    return (changes[0].place if changes else None), lines


def seed_of(words: str | None) -> int | None:
    """--seed as a number; None leaves the workflow's."""
    if words is None:
        return None
    if words == "random":
        return secrets.randbits(53)
    try:
        return int(words)
    except ValueError:
        raise Refusal(f"--seed takes a whole number or random, not {words!r}.") from None


def existing(path: Path) -> Path:
    if not path.expanduser().is_file():
        raise Refusal(f"{path} is not a file.")
    return path.expanduser()
