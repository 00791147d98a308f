#!/usr/bin/env python3
"""Kindred's front door for people: one command makes what it needs, once, and runs the job. Standard library only.

python3 dev.py demo       new pictures of one subject from a photo, in a real ComfyUI
python3 dev.py serve      ComfyUI's canvas with the pack
python3 dev.py test       the tests; --long asks every law of every network
python3 dev.py evaluate   how well it works
python3 dev.py bench      what it costs beside the plain sampler
python3 dev.py soak       hundreds of mixed prompts to one server: memory, times and pictures stay as they are
python3 dev.py workflows  makes the canvas workflows and their pictures from workflows/api
python3 dev.py setup      only make (or repair) the environment

Each has --help.

The environment is one virtual environment and one ComfyUI in your cache folder, named by the hash of tools/workshop/pins.
`--host DIR --python PATH` uses a ComfyUI and a Python of your own instead.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "tools" / room) for room in ("client", "workshop")]

import newest_frontend  # noqa: E402
from environment import Environment, Refusal, clean_environment, existing, setup  # noqa: E402
from results import IN_GIT  # noqa: E402
from terminal import run_program  # noqa: E402


def run(environment: Environment, arguments: list[str], **extra: str) -> int:
    """Run the environment's Python where the user is, whose paths it is given; it dies with this process. Returns its exit code."""
    return together(environment, [arguments], Path.cwd(), **extra)[0][0]


def together(
    environment: Environment, commands: Sequence[list[str]], folder: Path = ROOT, **extra: str
) -> list[tuple[int, float]]:
    """Several in `folder` at once, the first in the open; what the others say is shown once all have ended. Exit codes and seconds."""
    settings = clean_environment(KINDRED_HOST=str(environment.host), PYTHONUNBUFFERED="1", **extra)
    begun, ended, start = [], {}, time.monotonic()
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands[1:]]
        try:
            for arguments, out in zip(commands, [None, *said]):
                begun.append(
                    subprocess.Popen(
                        [str(environment.python), *arguments],
                        cwd=folder,
                        env=settings,
                        stdout=out,
                        stderr=None if out is None else subprocess.STDOUT,
                    )
                )
            while len(ended) < len(begun):
                for i, process in enumerate(begun):
                    if i not in ended and process.poll() is not None:
                        ended[i] = process.returncode, time.monotonic() - start
                time.sleep(0.05 if len(ended) < len(begun) else 0)
        except BaseException:
            stop(begun)
            raise
        finally:
            for out in said:
                out.seek(0)
                sys.stdout.flush()
                sys.stdout.buffer.write(out.read())
                sys.stdout.flush()
    return [ended[i] for i in range(len(begun))]


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ask all of them to end, and kill those that have not after a while."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


Stage = tuple[str, list[str]]  # its name, and what the environment's Python is given


def test(
    environment: Environment,
    expression: str | None,
    fast: bool,
    long: bool,
    newest: bool = False,
) -> int:
    """Linter, then the rooms of tests/ from the cheapest to the dearest; a failing stage ends the run.

    The last two wait for one server each, so they run beside one another. long: tests/gate.py leaves nothing out. newest: the browser
    tests alone, on the newest frontend.
    """
    refuse_without_test_packages(environment)
    stages = test_stages(expression, fast)
    settings = test_settings(long)
    if newest:
        stages = [stage for stage in stages if stage[0] == "browser"]
        settings |= with_newest_frontend(environment)
    results: list[str] = []
    failed, at_once = False, [s for s in stages if s[0] in ("e2e", "browser")]
    for group in [*([s] for s in stages if s not in at_once), *([at_once] if at_once else [])]:
        print(
            f"\n== {', then what was beside it: '.join(name for name, _ in group)} ==", flush=True
        )
        ends = together(environment, [argv for _, argv in group], **settings)
        for (name, _), (code, seconds) in zip(group, ends):
            verdict = verdict_on(name, code, expression is not None)
            results.append(f"{name} {verdict} {seconds:.0f} s")
            failed |= verdict.startswith("FAILED")
        if failed:
            break
    left = [name for name, _ in stages[len(results) :]]
    print(
        "\n" + " | ".join(results) + (f" | not run: {', '.join(left)}" if left else ""), flush=True
    )
    return int(failed)


def test_settings(long: bool) -> dict[str, str]:
    """What the tests find in their environment."""
    # one thread: the pictures do not depend on the machine's cores, and small tensors gain nothing from more
    settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return settings | ({"KINDRED_LONG": "1"} if long else {})


def with_newest_frontend(environment: Environment) -> dict[str, str]:
    """Fetch it; how the browser tests learn of it."""
    frontend = newest_frontend.fetch(environment.python)
    print(f"The newest frontend is {frontend.version}.", flush=True)
    return {newest_frontend.VARIABLE: str(frontend.root)}


def refuse_without_test_packages(environment: Environment) -> None:
    lacking = [
        name
        for name in ("ruff", "pytest", "hypothesis", "xdist", "playwright", "comfy_cli")
        if subprocess.run(
            [str(environment.python), "-c", f"import {name}"], capture_output=True
        ).returncode
    ]
    if lacking:
        raise Refusal(
            f"{environment.python} lacks {', '.join(lacking)}, which the tests need: install them there, "
            "or leave out --host and --python."
        )


def test_stages(expression: str | None, fast: bool) -> list[Stage]:
    """The linter, and a stage for every room that has tests."""
    chosen = (["-k", expression] if expression else []) + (["-m", "not slow"] if fast else [])
    plain = ["-q", "-p", "no:cacheprovider", "--durations=5", "--durations-min=3"]
    # the other rooms start servers of their own, and keep one for many tests
    shared = [
        "-n",
        str(min(2, os.cpu_count() or 1)),
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
    ]
    stages: list[Stage] = [("lint", ["-m", "ruff", "check", "--no-cache", "."])]
    for room in ("unit", "host") if fast else ("unit", "host", "e2e", "browser"):
        if any((ROOT / "tests" / room).glob("test_*.py")):
            workers = shared if room in ("unit", "host") else []
            stages.append((room, ["-m", "pytest", f"tests/{room}", *plain, *workers, *chosen]))
    return stages


def verdict_on(stage: str, code: int, selecting: bool) -> str:
    """A stage's exit code in words; selecting: by -k, which may match nothing in this room."""
    if code == 0:
        return "ok"
    if code == 5 and selecting:  # pytest: no tests
        return "nothing selected"
    if (
        code == 77 and stage == "browser"
    ):  # says its conftest: none is here and none could be installed
        return "NOT RUN, NO BROWSER"
    return f"FAILED ({code})"


GREETING = """
Open {url} in a browser: Templates, then kindred under Extensions, then personalize, then Run.
Stop with Ctrl-C. How ComfyUI started is in {log}; what it says from now on follows here.
"""


def serve(environment: Environment, port: int | None, cpu: bool, base: Path | None) -> int:
    """The real host in the foreground with the pack linked into a base directory of its own.

    Its start is full of what the pinned environment leaves out (comfy_angle, ComfyUI's templates), so it goes into a file.
    """
    from client import HostError
    from host_server import HostServer

    print("Starting ComfyUI ...", flush=True)
    try:
        with HostServer(
            environment.host,
            python=environment.python,
            port=port,
            cpu=True if cpu else None,
            base=base,
            api_nodes=True,
        ) as server:
            print(GREETING.format(url=server.url, log=server.log), flush=True)
            if base is None:
                print("Pictures live until you stop it; --base DIR keeps them.", flush=True)
            return follow(server.process, server.log)
    except HostError as error:
        raise Refusal(str(error)) from error


def follow(process: subprocess.Popen, log: Path) -> int:
    """What the process writes into its log from now on, until it ends; its exit code."""
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(0, os.SEEK_END)
        ended = None
        while ended is None:
            ended = process.poll()
            print(file.read(), end="", flush=True)
            time.sleep(0.2 if ended is None else 0)
    return ended


PASSED_ON = {  # programs of tools/ with command lines of their own
    "demo": "new pictures of one subject, from a photo; with --story in one batch",
    "evaluate": "how well it works: the papers' tables, or your own checkpoint and photos",
    "bench": "what it costs beside the plain sampler",
    "soak": "hundreds of mixed prompts to one server",
    "workflows": "canvas workflows and their pictures from workflows/api",
}


def program(command: str) -> Path:
    """The file that a command of PASSED_ON is passed on to."""
    room = "evidence" if command == "evaluate" else "workshop"
    return ROOT / "tools" / room / f"{command}.py"


def explain(command: str, words: list[str]) -> int:
    """The options of a command that is passed on, by its program; nothing is installed for it."""
    code = subprocess.run(
        [sys.executable, str(program(command)), *words], env=clean_environment()
    ).returncode
    print(
        "\nAlso: --host DIR --python PATH, your own ComfyUI and the Python that runs it.",
        flush=True,
    )
    return code


def command_line() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "--host", type=Path, metavar="DIR", help="your own ComfyUI instead of the one in the cache"
    )
    own.add_argument("--python", type=Path, metavar="PATH", help="the Python that runs it")
    parser = argparse.ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "make or repair the environment: about 2.7 GB to fetch, 6 GB in your cache folder"
    command = commands.add_parser("setup", parents=[own], help=text, description=text)
    command.add_argument("--again", action="store_true", help="make it anew even if it looks whole")
    text = "run the tests and the linter"
    command = commands.add_parser("test", parents=[own], help=text, description=text)
    command.add_argument(
        "-k", metavar="EXPR", help="only the tests whose names match, as pytest understands it"
    )
    command.add_argument(
        "--fast", action="store_true", help="without the server and without the slow tests"
    )
    command.add_argument(
        "--long",
        action="store_true",
        help="ask every law of every network and setting; otherwise the widest of a third of them",
    )
    command.add_argument(
        "--newest-frontend",
        action="store_true",
        help="only the browser tests, on the newest ComfyUI frontend that the package index has instead of the pinned one",
    )
    text = "ComfyUI's canvas with the pack; prints the address to open"
    command = commands.add_parser("serve", parents=[own], help=text, description=text)
    command.add_argument("--port", type=int, help="default: a free one")
    command.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    command.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help=f"keep models, inputs and outputs in this folder{IN_GIT}",
    )
    for name, text in PASSED_ON.items():
        commands.add_parser(
            name,
            parents=[own],
            help=text,
            add_help=False,  # the program's own
            allow_abbrev=False,
        )
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = command_line()
    chosen, rest = parser.parse_known_args(arguments)
    passes_on = chosen.command in PASSED_ON
    if rest and not passes_on:
        parser.error(f"{chosen.command} does not know {' '.join(rest)}")
    if chosen.command == "test" and chosen.fast and chosen.newest_frontend:
        parser.error("--newest-frontend is about the browser tests, which --fast leaves out")

    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(143)
        )  # so that children are stopped on the way out
    try:
        if passes_on and not program(chosen.command).is_file():
            raise Refusal(f"This version of Kindred has no `{chosen.command}` yet.")
        if passes_on and {"-h", "--help"} & set(rest):
            return explain(chosen.command, rest)
        own_host = chosen.host or chosen.python
        environment = (
            existing(chosen.host, chosen.python)
            if own_host
            else setup(getattr(chosen, "again", False))
        )
        if chosen.command == "setup":
            print(f"Python   {environment.python}\nComfyUI  {environment.host}")
            return 0
        if chosen.command == "test":
            return test(environment, chosen.k, chosen.fast, chosen.long, chosen.newest_frontend)
        if chosen.command == "serve":
            return serve(environment, chosen.port, chosen.cpu, chosen.base)
        return run(environment, [str(program(chosen.command)), *rest])
    except Refusal as refusal:
        print(f"\n{refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.version_info < (3, 10):
        sys.exit(f"dev.py needs Python 3.10 or newer; this is {platform.python_version()}.")
    run_program(main)
