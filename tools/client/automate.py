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
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from changes import Refusal, listed, title
from client import Client
from jobs import Board, Job, Runner
from plans import Plan, planned
from results import IN_GIT
from shelf import Shelf, keeper
from terminal import run_program

DEFAULT = "http://127.0.0.1:8188"


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

    def on_message(self, host: str, job: Job, kind: str, data: Mapping[str, Any]) -> None:
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
    args = parser.parse_args(argv)
    for name in ("repeat", "lines_per_job"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} wants 1 or more")
    if any(":" not in words for words in args.header):
        parser.error("--header is written as NAME: VALUE")
    return args


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
    if stopped:
        return 130
    for state, code in (("not run", 3), ("failed", 1), ("refused", 2)):
        if state in states:
            return code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # what was handed over is taken back then too
    try:
        plan, jobs = planned(args)
        headers = dict(re.split(r":\s*", words, maxsplit=1) for words in args.header)
        urls = dict.fromkeys(
            (url if "://" in url else f"http://{url}").rstrip("/")
            for url in args.server or [DEFAULT]
        )
        shelf = Shelf(args.out.expanduser())
    except (Refusal, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    voice = Teller(
        {node: title(plan.graph, node) for node in plan.graph},
        len(urls) > 1,
        len(jobs),
        args.quiet,
        not args.json,
    )
    stopped, runners = run(
        plan, jobs, [Client(url, headers) for url in urls], shelf, voice, args.patience
    )
    code = exit_code(jobs, runners, stopped)
    tell_end(args, jobs, runners, code)
    return code


def tell_end(
    args: argparse.Namespace, jobs: Sequence[Job], runners: Sequence[Runner], code: int
) -> None:
    """A sentence on stderr, and with --json the report on stdout."""
    done = sum(job.state == "done" for job in jobs)
    print(
        f"{done} of {len(jobs)} job{'s' * (len(jobs) > 1)} done"
        + (f", files in {args.out}" if done else ""),
        file=sys.stderr,
    )
    if args.json:
        report = {
            "exit_code": code,
            "hosts": {runner.host: runner.reason or runner.state for runner in runners},
            "jobs": [asdict(job) for job in jobs],
        }
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_program(main)
