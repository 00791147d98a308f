"""What Kindred costs beside the plain sampler, measured in one run.

Each case runs between two plain runs of as many pictures (plain, case, plain, case, plain, ...), and each ratio is to their mean. The first
round is thrown away. On a CPU the clock is the process' own time, on CUDA the device's events. Models have random weights in the host's
own configurations and the subject is a drawn square: the arithmetic does not care. Ctrl-C prints the table of the rounds that were
finished.

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

from benching.catalogue import (
    CASES,
    DEFAULT,
    FLOW_DEFAULT,
    FLOWS,
    GROUPS,
    PLAIN,
    UNETS,
    Key,
    chosen,
    left_out,
    name_of,
    refuse_missing,
)
from benching.clocks import Clock, clock_of, forget_peak, peak_of_process
from benching.flow_ground import FlowGround
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
    add(
        "--family",
        choices=(*UNETS, *FLOWS),
        default="sd15",
        help="flux and sd35 have their real width and six blocks",
    )
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
    args = parser.parse_args(argv)
    args.host = Path(
        args.host or parser.error("--host is missing; run it as: python3 dev.py bench")
    )
    args.steps = args.steps if args.steps is not None else 50 if args.device == "cuda" else 2
    args.dtype = args.dtype or ("fp16" if args.device == "cuda" else "fp32")
    for name, least in (("latent", 8), ("steps", 2), ("rounds", 1), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; give {least} or more")
    if not 0 < args.subject <= 1:
        parser.error(
            f"--subject is {args.subject}; give a share of the picture above 0 and up to 1, such as 0.25"
        )
    if min(args.pictures, default=1) < 1:
        parser.error(f"--pictures is {min(args.pictures)}; give 1 or more")
    if args.memory and args.device == "cuda":
        parser.error(
            "--memory is for --device cpu; on CUDA every run tells the allocator's peak by itself, so leave it out"
        )
    if args.syncs and args.device != "cuda":
        parser.error(
            f"--syncs asks a CUDA device, but --device is {args.device}. Add --device cuda, or take --counts instead"
        )
    if args.update and not args.update.is_file():
        parser.error(f"--update {args.update}: there is no such page")
    try:
        usual = FLOW_DEFAULT if args.family in FLOWS else DEFAULT
        args.keys = chosen(args.case, args.pictures, args.steps, usual)
        refuse_missing(args.family, args.keys)
    except ValueError as error:
        parser.error(str(error))
    return args


def setting_of(args: argparse.Namespace) -> Setting:
    return Setting(**{f.name: getattr(args, f.name) for f in fields(Setting)})


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments(argv)
    prepare(None, args.json)
    try:
        with stoppable():
            if args.one:
                return tell_peak(args)
            runs, code = both(args) if args.attention == "both" else alone(args)
    except (Refusal, RuntimeError) as refusal:
        print(f"\nbench: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(
            "\nbench: stopped before the first round was finished, so there is nothing to tell.",
            file=sys.stderr,
        )
        return STOPPED
    return deliver(args, runs, code, command_of(argv))


def deliver(args: argparse.Namespace, runs: list[dict[str, Any]], code: int, command: str) -> int:
    """The table on the terminal (of two attention settings, each child has printed its own), the JSON, the page -> exit code."""
    if args.attention != "both":
        print(f"{command}\n\n{markdown(runs[0])}" if runs else "", flush=True)
    try:
        if args.json and runs:
            write_json(args.json, report(runs, command))
        if args.update and not code:  # a page shows whole measurements
            write_page(args.update, args.block or args.family, block(runs, command))
    except (OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return REFUSED
    return code


def ground_of(args: argparse.Namespace, own_weights: bool = False) -> Ground:
    kind = FlowGround if args.family in FLOWS else Ground
    return kind(args.host, setting_of(args), own_weights)


# one setting ---------------------------------------------------------------------------------------------------------------------


def alone(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Measure in this process -> the run, exit code."""
    import torch

    setting, clock = setting_of(args), clock_of(args.device, torch)
    if missing := left_out(args.case, args.steps):
        note(f"Left out, since they need more than {args.steps} steps: {', '.join(missing)}.")
    ground = ground_of(args)
    note(ground.estimate(args.keys))
    jobs: dict[Key, Job] = {}
    for key in args.keys:  # plain first, then what is compared with it
        jobs.setdefault((PLAIN, key[1]), ground.job((PLAIN, key[1]), clock))
        note(f"made ready: {name_of(key)}", passing=True)
        jobs[key] = ground.job(key, clock)
    played = play(jobs, args.rounds, Rounds(args.rounds))
    note("", passing=True)
    if not played.rounds:
        raise KeyboardInterrupt
    probed: dict[str, dict[str, Any]] = {}
    code = STOPPED if played.stopped else 0
    try:
        if not code:
            probe(args, ground, jobs, probed)
    except KeyboardInterrupt:
        code = STOPPED
    except (Refusal, RuntimeError) as refusal:  # the rounds are worth their table
        note(f"bench: {refusal}")
        code = REFUSED
    rows = table(played.rounds, args.family)
    return [
        run_of(
            setting,
            software(torch, args.device),
            len(played.rounds),
            clock.name,
            rows,
            code == STOPPED,
            probed,
        )
    ], code


def probe(
    args: argparse.Namespace,
    ground: Ground,
    jobs: Mapping[Key, Job],
    results: dict[str, dict[str, Any]],
) -> None:
    """What was asked for beside the time, into results by case, plain_b1 and so on among them."""
    for key, job in jobs.items():
        figures = results.setdefault(name_of(key), {})
        if args.counts:
            note(f"counted: {name_of(key)}", passing=True)
            figures |= counted(job)
        if args.syncs:
            note(f"watched for waits: {name_of(key)}", passing=True)
            figures["first_wait"] = first_wait(job, ground.unet, ground.torch.cuda)
        if args.memory:
            note(f"peak memory: {name_of(key)}", passing=True)
            figures["peak"] = peak_of(args, key)
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


class Rounds:
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


def child(args: argparse.Namespace, *more: str, attention: str | None = None) -> list[str]:
    """The command of a child that measures the same setting."""
    options = {f.name: getattr(args, f.name) for f in fields(Setting)} | {
        "attention": attention or args.attention,
        "host": args.host,
    }
    return [
        sys.executable,
        str(Path(__file__).resolve()),
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        *more,
    ]


def both(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """One child after the other, since the host chooses its attention when it starts; each prints its own table -> runs, exit code."""
    runs: list[dict[str, Any]] = []
    more = [word for key in args.keys for word in ("--case", name_of(key))] + [
        "--rounds",
        str(args.rounds),
    ]
    more += [f"--{name}" for name in ("memory", "counts", "syncs") if getattr(args, name)]
    with tempfile.TemporaryDirectory(prefix="kindred-bench-") as folder:
        for attention in ATTENTION:
            report = Path(folder) / f"{attention}.json"
            with subprocess.Popen(
                child(args, *more, "--json", str(report), attention=attention)
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
            runs += json.loads(report.read_text("utf-8"))["runs"] if report.is_file() else []
            if code and (report.is_file() or code == STOPPED):
                return runs, code
            if code:
                raise Refusal(
                    f"the measurement with --attention {attention} ended with code {code}; its own words are above. Run it alone "
                    "to see more."
                )
            print(flush=True)
    return runs, 0


def peak_of(args: argparse.Namespace, key: Key) -> int:
    """Peak memory of a child that samples this case once."""
    done = subprocess.run(
        child(args, "--one", name_of(key)),
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


def tell_peak(args: argparse.Namespace) -> int:
    """In a child: everything is made ready, the peak is forgotten where the system can (Linux), and the case runs once."""
    import torch

    case, _, pictures = args.one.rpartition("_b")
    if case not in (PLAIN, *CASES):
        raise Refusal(f"--one {args.one}: there is no such case")
    clock: Clock = clock_of("cpu", torch)
    job = ground_of(args, own_weights=True).job((case, int(pictures)), clock)
    gc.collect()
    anew = forget_peak()
    job()
    print(json.dumps({"peak": peak_of_process(), "without_the_preparations": anew}))
    return 0


if __name__ == "__main__":
    run_program(main)
