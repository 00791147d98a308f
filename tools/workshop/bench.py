"""What Kindred costs beside the plain sampler, measured in one run.

Rounds are interleaved (plain, case, case, plain with four pictures, case, ...), the first is thrown away, and each ratio is within its own
round. On a CPU the clock is the process' own time, on CUDA the device's events. Models have random weights in the host's own
configurations and the subject is a drawn square: the arithmetic does not care. Ctrl-C prints the table of the rounds that were finished.

cases, by groups (hooks, references, concepts, stories); without --case those that have a gate on a CPU:
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

from benching.catalogue import CASES, GROUPS, PLAIN, Key, chosen, left_out, name_of
from benching.clocks import Clock, clock_of, forget_peak, peak_of_process
from benching.ground import DTYPES, Ground, Setting
from benching.probes import counted, first_wait
from benching.report import (
    block,
    command_of,
    listed,
    markdown,
    report,
    run_of,
    write_json,
    write_page,
)
from benching.rounds import Job, play, table
from boot import ATTENTION
from results import prepare
from terminal import run_program
from workers import stoppable

STOPPED, REFUSED = 130, 2
PATIENCE = 20  # seconds that a stopped child has to print its table


class Refusal(Exception):
    """A sentence for the person at the terminal."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py bench",
        description=f"{__doc__}{listed()}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        help=f"all, a group ({', '.join(GROUPS)}), a case, or a case with its "
        "pictures such as cached_b4; repeat it for several",
    )
    add(
        "--pictures",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="in the batch (default: as each case is usually used)",
    )
    add("--family", choices=("sd15", "sd21", "sdxl", "tiny"), default="sd15")
    add(
        "--latent",
        type=int,
        default=32,
        help="side in latent cells (default %(default)s; 64 is 512 pixels)",
    )
    add(
        "--steps",
        type=int,
        help="default 2 on the CPU, whose table says what 50 would cost, and 50 on CUDA, where setting up a run is no "
        "trifle beside 2; story, blended and more need 4",
    )
    add("--rounds", type=int, default=3, help="default %(default)s; 5 for a table to rely on")
    add("--dtype", choices=tuple(DTYPES), help="default fp32, on CUDA fp16")
    add(
        "--subject",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of the picture, as 0.05, 0.25 (default) or 0.5",
    )
    add(
        "--attention",
        choices=(*ATTENTION, "both"),
        default="pytorch",
        help="the host's setting; both measures one after the other",
    )
    add(
        "--threads",
        type=int,
        default=int(os.environ.get("OMP_NUM_THREADS") or 1),
        help="default: OMP_NUM_THREADS, else 1",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add(
        "--memory",
        action="store_true",
        help="on a CPU: also the peak memory, in a process of its own for each case",
    )
    add(
        "--counts",
        action="store_true",
        help="also FLOPs, operations and reads that wait for the device, in a round without a clock",
    )
    add(
        "--syncs",
        action="store_true",
        help="on CUDA: also where a UNet call first waits for the device, in a round without a clock",
    )
    add("--json", type=Path, metavar="FILE", help="write settings, rows and figures into this file")
    add(
        "--update",
        type=Path,
        metavar="PAGE",
        help="rewrite the block of a page, such as docs/performance.md",
    )
    add("--block", metavar="NAME", help="which (default: the family)")
    add(
        "--host",
        type=Path,
        default=os.environ.get("KINDRED_HOST"),
        help="ComfyUI's folder (dev.py gives it)",
    )
    add("--one", help=argparse.SUPPRESS)  # a child that tells the peak memory of one case
    given = parser.parse_args(argv)
    given.host = Path(
        given.host or parser.error("--host is missing; run it as: python3 dev.py bench")
    )
    given.steps = given.steps if given.steps is not None else 50 if given.device == "cuda" else 2
    given.dtype = given.dtype or ("fp16" if given.device == "cuda" else "fp32")
    for name, least in (("latent", 8), ("steps", 2), ("rounds", 1), ("threads", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name} is {getattr(given, name)}; give {least} or more")
    if not 0 < given.subject <= 1:
        parser.error(
            f"--subject is {given.subject}; give a share of the picture above 0 and up to 1, such as 0.25"
        )
    if min(given.pictures, default=1) < 1:
        parser.error(f"--pictures is {min(given.pictures)}; give 1 or more")
    if given.memory and given.device == "cuda":
        parser.error(
            "--memory is for --device cpu; on CUDA every run tells the allocator's peak by itself, so leave it out"
        )
    if given.syncs and given.device != "cuda":
        parser.error(
            f"--syncs asks a CUDA device, but --device is {given.device}. Add --device cuda, or take --counts instead"
        )
    if given.update and not given.update.is_file():
        parser.error(f"--update {given.update}: there is no such page")
    try:
        given.keys = chosen(given.case, given.pictures, given.steps)
    except ValueError as error:
        parser.error(str(error))
    return given


def setting_of(given: argparse.Namespace) -> Setting:
    return Setting(**{f.name: getattr(given, f.name) for f in fields(Setting)})


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    given = arguments(argv)
    prepare(None, given.json)
    try:
        with stoppable():
            if given.one:
                return tell_peak(given)
            runs, code = both(given) if given.attention == "both" else alone(given)
    except (Refusal, RuntimeError) as refusal:
        print(f"\nbench: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(
            "\nbench: stopped before the first round was finished, so there is nothing to tell.",
            file=sys.stderr,
        )
        return STOPPED
    return deliver(given, runs, code, command_of(argv))


def deliver(given: argparse.Namespace, runs: list[dict[str, Any]], code: int, command: str) -> int:
    """The table on the terminal (of two attention settings, each child has printed its own), the JSON, the page -> exit code."""
    if given.attention != "both":
        print(f"{command}\n\n{markdown(runs[0])}" if runs else "", flush=True)
    try:
        if given.json and runs:
            write_json(given.json, report(runs, command))
        if given.update and not code:  # a page shows whole measurements
            write_page(given.update, given.block or given.family, block(runs, command))
    except (OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return REFUSED
    return code


# one setting ---------------------------------------------------------------------------------------------------------------------


def alone(given: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Measure in this process -> the run, exit code."""
    import torch

    setting, clock = setting_of(given), clock_of(given.device, torch)
    if missing := left_out(given.case, given.steps):
        note(f"Left out, since they need more than {given.steps} steps: {', '.join(missing)}.")
    ground = Ground(given.host, setting)
    note(ground.estimate(given.keys))
    jobs: dict[Key, Job] = {}
    for key in given.keys:  # plain first, then what is compared with it
        jobs.setdefault((PLAIN, key[1]), ground.job((PLAIN, key[1]), clock))
        note(f"made ready: {name_of(key)}", passing=True)
        jobs[key] = ground.job(key, clock)
    played = play(jobs, given.rounds, Told(given.rounds))
    note("", passing=True)
    if not played.rounds:
        raise KeyboardInterrupt
    probed: dict[str, dict[str, Any]] = {}
    code = STOPPED if played.stopped else 0
    try:
        if not code:
            probe(given, ground, jobs, probed)
    except KeyboardInterrupt:
        code = STOPPED
    except (Refusal, RuntimeError) as refusal:  # the rounds are worth their table
        note(f"bench: {refusal}")
        code = REFUSED
    rows = table(played.rounds)
    return [
        run_of(
            setting,
            software(torch, given.device),
            len(played.rounds),
            clock.name,
            rows,
            code == STOPPED,
            probed,
        )
    ], code


def probe(
    given: argparse.Namespace,
    ground: Ground,
    jobs: Mapping[Key, Job],
    found: dict[str, dict[str, Any]],
) -> None:
    """What was asked for beside the time, into found by case, plain_b1 and so on among them."""
    for key, job in jobs.items():
        told = found.setdefault(name_of(key), {})
        if given.counts:
            note(f"counted: {name_of(key)}", passing=True)
            told |= counted(job)
        if given.syncs:
            note(f"watched for waits: {name_of(key)}", passing=True)
            told["first_wait"] = first_wait(job, ground.unet, ground.torch.cuda)
        if given.memory:
            note(f"peak memory: {name_of(key)}", passing=True)
            told["peak"] = peak_of(given, key)
    note("", passing=True)


def software(torch: Any, device: str) -> dict[str, str]:
    import comfyui_version

    return {
        "host": comfyui_version.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
    }


def processor() -> str:
    """The CPU's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Told:
    """Where the rounds are, on the terminal; after the first, how long the others will take."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.start, self.turn = rounds, time.monotonic(), 0

    def __call__(self, turn: int, key: Key) -> None:
        if turn != self.turn:
            took, left = (time.monotonic() - self.start) / turn, self.rounds + 1 - turn
            note(f"a round takes {took:.0f} s; {left} to go: about {took * left / 60:.1f} minutes")
            self.turn = turn
        note(
            f"round {turn} of {self.rounds}{' (thrown away)' * (not turn)}: {name_of(key)}",
            passing=True,
        )


def note(text: str, passing: bool = False) -> None:
    """A line for who waits; passing ones only on a terminal, one over the other."""
    if sys.stderr.isatty():
        print(
            f"\r\033[K{'  ' * passing}{text}",
            end="" if passing else "\n",
            file=sys.stderr,
            flush=True,
        )
    elif not passing:
        print(text, file=sys.stderr, flush=True)


# children ------------------------------------------------------------------------------------------------------------------------


def child(given: argparse.Namespace, *more: str, attention: str | None = None) -> list[str]:
    """The command of a child that measures the same setting."""
    told = {f.name: getattr(given, f.name) for f in fields(Setting)} | {
        "attention": attention or given.attention,
        "host": given.host,
    }
    return [
        sys.executable,
        str(Path(__file__).resolve()),
        *(word for name, value in told.items() for word in (f"--{name}", str(value))),
        *more,
    ]


def both(given: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """One child after the other, since the host chooses its attention when it starts; each prints its own table -> runs, exit code."""
    runs: list[dict[str, Any]] = []
    more = [word for key in given.keys for word in ("--case", name_of(key))] + [
        "--rounds",
        str(given.rounds),
    ]
    more += [f"--{name}" for name in ("memory", "counts", "syncs") if getattr(given, name)]
    with tempfile.TemporaryDirectory(prefix="kindred-bench-") as folder:
        for attention in ATTENTION:
            told = Path(folder) / f"{attention}.json"
            with subprocess.Popen(
                child(given, *more, "--json", str(told), attention=attention)
            ) as process:
                try:
                    code = process.wait()
                except KeyboardInterrupt:
                    process.terminate()
                    try:
                        code = process.wait(PATIENCE)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        code = STOPPED
            runs += json.loads(told.read_text("utf-8"))["runs"] if told.is_file() else []
            if code and (told.is_file() or code == STOPPED):
                return runs, code
            if code:
                raise Refusal(
                    f"the measurement with --attention {attention} ended with code {code}; its own words are above. Run it alone "
                    "to see more."
                )
            print(flush=True)
    return runs, 0


def peak_of(given: argparse.Namespace, key: Key) -> int:
    """Peak memory of a child that samples this case once."""
    done = subprocess.run(
        child(given, "--one", name_of(key)),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise Refusal(
            f"--memory: the process that measured {name_of(key)} ended with code {done.returncode}; memory may have run out. "
            "Give a smaller --latent, or leave out --memory."
        )
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def tell_peak(given: argparse.Namespace) -> int:
    """In a child: everything is made ready, the peak is forgotten where the system can (Linux), and the case runs once."""
    import torch

    case, _, pictures = given.one.rpartition("_b")
    if case not in (PLAIN, *CASES):
        raise Refusal(f"--one {given.one}: there is no such case")
    clock: Clock = clock_of("cpu", torch)
    job = Ground(given.host, setting_of(given), own_weights=True).job((case, int(pictures)), clock)
    gc.collect()
    anew = forget_peak()
    job()
    print(json.dumps({"peak": peak_of_process(), "without_the_preparations": anew}))
    return 0


if __name__ == "__main__":
    run_program(main)
