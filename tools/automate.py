#!/usr/bin/env python3
"""Run a workflow on one ComfyUI or on several, without the canvas. Python 3.10 or later and this folder, nothing else.

  automate.py story_more_pictures.json --set "2.prompts=dog in the snow" --repeat 4 --out pictures
  automate.py personalize.json --image "Photo of the subject=photo.png" --server http://gpu1:8188
  automate.py story_more_pictures.json --subject dog.safetensors --each 2.prompts=@scenes.txt --server gpu1:8188 --server gpu2:8188

The workflow is in API form: those in workflows/api, or what File > Export (API) saves. NODE is a node's id, its title or its type.
Nothing is posted before every name and value has been compared with what the host declares. Pictures, texts and saved subjects
come into --out under new numbers. Ctrl-C takes back what this program handed over, and nothing else.

Exit code: 0 all done, 1 a job failed, 2 refused, 3 no host was left, 130 stopped. Paths of what was saved go to stdout, the rest to stderr.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from jobs import Board, Job, Runner
from results import IN_GIT, make_folder
from terminal import run_program

SAVE_REFERENCE = "KindredSaveReference"
DEFAULT = "http://127.0.0.1:8188"


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
            made = copy.deepcopy(graph)
            if self.each is not None:
                put(made, self.each, typed(info, graph, Change(self.each, job.lines or "")))
            if self.seed is not None or self.repeat > 1:
                first = (
                    graph[seeds[0].node]["inputs"][seeds[0].input]
                    if self.seed is None
                    else self.seed
                )
                job.seed = first + job.turn
                for place in seeds:
                    put(made, place, typed(info, graph, Change(place, str(job.seed))))
            return made

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


@dataclass
class Shelf:
    """The folder that everything is saved in: NUMBER_TITLE_INDEX, the job's number counting on from what is there."""

    folder: Path
    first: int = 1

    def __post_init__(self) -> None:
        make_folder(self.folder)
        numbers = [
            int(found[1])
            for path in self.folder.iterdir()
            if (found := re.match(r"(\d{5,})_", path.name))
        ]
        self.first = max(numbers, default=0) + 1

    def keep(self, job: Job, name: str, index: int, suffix: str, data: bytes) -> str:
        """Write one file under a name that was free. OSError where it could not be written; then nothing is left of it."""
        letters = sys.getfilesystemencoding()
        words = re.sub(r"\W+", "_", name.encode(letters, "ignore").decode(letters)).strip("_")[:60]
        stem = f"{self.first + job.number - 1:05}_{words or 'output'}"
        path, file = self.folder / f"{stem}_{index}{suffix}", None
        while file is None:
            try:
                file = path.open("xb")
            except FileExistsError:  # somebody's, perhaps of this very moment
                index += 1
                path = self.folder / f"{stem}_{index}{suffix}"
            except OSError as error:
                raise OSError(f"{path} could not be written: {error}") from error
        try:
            with file:
                file.write(data)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(f"{path} could not be written: {error}") from error
        return str(path)


def files_of(
    graph: Graph, outputs: Mapping[str, Any]
) -> Iterator[tuple[str, int, Mapping[str, str] | str]]:
    """(title, index, file or text) of all that the nodes gave; a saved subject is a file too."""
    for node in sorted(
        outputs, key=[*graph, *outputs].index
    ):  # as the workflow has them, whichever came first
        name, index = title(graph, node), 0
        for things in outputs[node].values():
            for thing in things if isinstance(things, list) else ():
                if isinstance(thing, str) or (isinstance(thing, dict) and "filename" in thing):
                    index += 1
                    yield name, index, thing
                if (
                    isinstance(thing, str)
                    and graph.get(node, {}).get("class_type") == SAVE_REFERENCE
                ):
                    folder, _, file = (
                        thing.partition(".safetensors")[0] + ".safetensors"
                    ).rpartition("/")
                    yield name, index, {"filename": file, "subfolder": folder, "type": "output"}


def keeper(shelf: Shelf, voice: Teller) -> Callable[[Client, Job, Graph, Mapping[str, Any]], None]:
    """Fetches everything, then saves it: a host that goes away in between leaves no half of a job."""

    def keep(client: Client, job: Job, graph: Graph, outputs: Mapping[str, Any]) -> None:
        fetched = []
        for name, index, thing in files_of(graph, outputs):
            if isinstance(thing, str):
                fetched.append((name, index, ".txt", thing.encode()))
                continue
            try:
                fetched.append((name, index, Path(thing["filename"]).suffix, client.view(thing)))
            except Answered as error:
                if thing.get("type") != "temp":  # previews do not survive a restart
                    raise
                voice.say(client.url, f"{name}: {error}")
        for name, index, suffix, data in fetched:
            job.files.append(shelf.keep(job, name, index, suffix, data))

    return keep


@dataclass
class Teller:
    """Sentences on stderr, one line per node that has run, and the paths of what was saved on stdout."""

    titles: Mapping[str, str]
    several: bool = False  # hosts
    count: int = 1  # jobs
    quiet: bool = False
    paths: bool = True
    running: dict[str, tuple[str, int, float]] = field(
        default_factory=dict
    )  # host -> node, steps, since
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, host: str, sentence: str) -> None:
        mark = f"[{host.partition('://')[2]}] " if self.several and host not in sentence else ""
        with self.lock:
            print(mark + sentence, file=sys.stderr, flush=True)

    def heard(self, host: str, job: Job, kind: str, data: Mapping[str, Any]) -> None:
        node = data.get("display_node") or data.get("node")
        if kind == "executing" and node is not None:
            self._over(host, job)
            self.running[host] = (str(node), 0, time.monotonic())
        elif kind == "progress" and host in self.running:
            began, steps, since = self.running[host]
            self.running[host] = (began, max(steps, int(data.get("value", 0))), since)
        elif kind == "execution_cached" and data.get("nodes") and not self.quiet:
            self.say(
                host,
                f"{self._name(job)}unchanged: {listed(self.titles.get(str(node), str(node)) for node in data['nodes'])}",
            )
        elif kind != "executing" and kind.startswith("execution_"):
            self._over(host, job)

    def _over(self, host: str, job: Job) -> None:
        node, steps, since = self.running.pop(host, ("", 0, 0.0))
        if node and not self.quiet:
            count = f", {steps} steps" if steps else ""
            self.say(
                host,
                f"{self._name(job)}{self.titles.get(node, node)}: {time.monotonic() - since:.1f} s{count}",
            )

    def _name(self, job: Job) -> str:
        return f"job {job.number}  " if self.count > 1 else ""

    def ended(self, host: str, job: Job) -> None:
        self._over(host, job)
        with self.lock:
            for path in job.files if self.paths else ():
                print(path, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="automate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("workflow", type=Path, help="a workflow in API form")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="change an input; @FILE as value reads a text file",
    )
    add(
        "--image",
        action="append",
        default=[],
        metavar="NODE=FILE",
        help="upload a picture and use it there",
    )
    add(
        "--subject",
        metavar="[NODE=]FILE",
        help="a .safetensors that Save Reference wrote, for Load Reference on every host",
    )
    add(
        "--each",
        action="append",
        default=[],
        metavar="NODE.INPUT=LINES",
        help="a job for each line; @FILE reads them from a file",
    )
    add(
        "--lines-per-job",
        type=int,
        default=1,
        metavar="N",
        help="with --each: that many lines together (default %(default)s)",
    )
    add("--seed", help="the seed of the noise, a number or random (default: the workflow's)")
    add(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="every job N times, with seed, seed + 1, ...",
    )
    add(
        "--server",
        action="append",
        metavar="URL",
        help=f"a ComfyUI; repeat it to share the jobs out (default {DEFAULT})",
    )
    add(
        "--header",
        action="append",
        default=[],
        metavar="NAME: VALUE",
        help="sent with every request, for hosts behind a login",
    )
    add(
        "--out",
        type=Path,
        default=Path("pictures"),
        help=f"folder for what is saved (default: %(default)s{IN_GIT})",
    )
    add(
        "--patience",
        type=float,
        default=120,
        metavar="SECONDS",
        help="how long a host may be away (default %(default)s)",
    )
    add("--json", action="store_true", help="a report on stdout instead of the paths")
    add("--quiet", action="store_true", help="no line for every node")
    given = parser.parse_args(argv)
    for name in ("repeat", "lines_per_job"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} wants 1 or more")
    if any(":" not in words for words in given.header):
        parser.error("--header is written as NAME: VALUE")
    return given


def planned(given: argparse.Namespace) -> tuple[Plan, list[Job]]:
    """The plan and its jobs: every line, each as often as --repeat says."""
    graph = read_workflow(given.workflow)
    pictures = [
        (key, existing(Path(path)))
        for key, path in (split(words, "--image") for words in given.image)
    ]
    subject = None
    if given.subject is not None:
        key, equals, path = (
            (None, "", given.subject)
            if Path(given.subject).is_file()
            else given.subject.partition("=")
        )
        file = existing(Path(path if equals else given.subject))
        with file.open("rb") as source:
            digest = hashlib.sha256()
            for piece in iter(lambda: source.read(1 << 20), b""):
                digest.update(piece)
        # the same contents have the same name everywhere, so that no host has to be sent them twice
        subject = (
            subject_place(graph, key if equals else None),
            file,
            f"{file.stem}-{digest.hexdigest()[:12]}.safetensors",
        )
    lines = [parse_change(graph, words, "--each") for words in given.each]
    if len({change.place for change in lines}) > 1:
        raise Refusal("--each goes through the lines of one input; give the others with --set.")
    each = [line for change in lines for line in change.text.splitlines() if line.strip()]
    if lines and not each:
        raise Refusal("--each has no line that is not empty.")
    try:
        seed = (
            secrets.randbits(53)
            if given.seed == "random"
            else None
            if given.seed is None
            else int(given.seed)
        )
    except ValueError:
        raise Refusal(f"--seed takes a whole number or random, not {given.seed!r}.") from None
    packs = [
        "\n".join(each[i : i + given.lines_per_job])
        for i in range(0, len(each), given.lines_per_job)
    ] or [None]
    jobs = [
        Job(i * given.repeat + turn + 1, pack, turn)
        for i, pack in enumerate(packs)
        for turn in range(given.repeat)
    ]
    return Plan(
        graph,
        [parse_change(graph, words) for words in given.set],
        pictures,
        subject,
        lines[0].place if lines else None,
        seed,
        given.repeat,
    ), jobs


def existing(path: Path) -> Path:
    if not path.expanduser().is_file():
        raise Refusal(f"{path} is not a file.")
    return path.expanduser()


def run(
    plan: Plan,
    jobs: Sequence[Job],
    clients: Sequence[Client],
    shelf: Shelf,
    voice: Teller,
    patience: float,
) -> tuple[bool, list[Runner]]:
    """All jobs on all hosts; whether it was stopped by the user, and the runners."""
    keep = keeper(shelf, voice)
    stop, board = threading.Event(), Board(jobs, (client.url for client in clients))
    runners = [
        Runner(
            client, board, voice, lambda client: plan.prepare(client, jobs), keep, stop, patience
        )
        for client in clients
    ]
    try:
        for runner in runners:
            threading.Thread(target=runner, daemon=True).start()
        for runner in runners:
            while not runner.over.wait(0.2):  # an endless wait would not hear Ctrl-C on Windows
                pass
    except KeyboardInterrupt:
        stop.set()
        board.close()
        print("Stopping; what this program handed over is taken back.", file=sys.stderr, flush=True)
        for runner in runners:  # a second Ctrl-C leaves at once
            runner.over.wait(90)
    for crash in (runner.crash for runner in runners):
        if crash is not None:
            raise crash
    return stop.is_set(), runners


def exit_code(jobs: Sequence[Job], runners: Sequence[Runner], stopped: bool) -> int:
    """Settles what became of the jobs that no host took, too."""
    refusals = {runner.host: runner.reason for runner in runners if runner.state == "refused"}
    for job in jobs:
        job.refusals |= refusals if job.state == "not run" else {}
        if job.state == "not run" and set(job.refusals) == {runner.host for runner in runners}:
            job.state, job.error = "refused", next(iter(job.refusals.values()))
    states = {job.state for job in jobs}
    return (
        130
        if stopped
        else 3
        if "not run" in states
        else 1
        if "failed" in states
        else 2
        if "refused" in states
        else 0
    )


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # what was handed over is taken back then too
    try:
        plan, jobs = planned(given)
        headers = dict(re.split(r":\s*", words, maxsplit=1) for words in given.header)
        urls = dict.fromkeys(
            (url if "://" in url else f"http://{url}").rstrip("/")
            for url in given.server or [DEFAULT]
        )
        shelf = Shelf(given.out.expanduser())
    except (Refusal, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    voice = Teller(
        {node: title(plan.graph, node) for node in plan.graph},
        len(urls) > 1,
        len(jobs),
        given.quiet,
        not given.json,
    )
    stopped, runners = run(
        plan, jobs, [Client(url, headers) for url in urls], shelf, voice, given.patience
    )
    code = exit_code(jobs, runners, stopped)
    done = sum(job.state == "done" for job in jobs)
    print(
        f"{done} of {len(jobs)} job{'s' * (len(jobs) > 1)} done"
        + (f", files in {given.out}" if done else ""),
        file=sys.stderr,
    )
    if given.json:
        print(
            json.dumps(
                {
                    "exit_code": code,
                    "hosts": {runner.host: runner.reason or runner.state for runner in runners},
                    "jobs": [asdict(job) for job in jobs],
                },
                indent=2,
            )
        )
    return code


if __name__ == "__main__":
    run_program(main)
