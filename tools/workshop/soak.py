"""Hundreds of mixed prompts to one ComfyUI: its memory stays flat, nothing gets slower, the same seeds give the same pictures.

A round has every kind once: plain, each injection alone and both, live reading, stories, anchors with one more picture, references saved
and loaded, scores, an inversion, a prompt that fails and one that is interrupted. Every round has other seeds and another size, so that
nothing comes from the host's cache; the last has the first one's. Then a fresh server draws the first round as well, and both draw two
more rounds in turns. Prints a table; exit code 1 where a law is broken.

Where the C library is glibc, the servers are told to give freed blocks back at once: its free lists find their size at any time, in steps
of a few percent, and what is held is asked here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

from checkout import version
from client import Client, HostError, Interrupted, NodeFailed, Progress, PromptRefused
from host_server import HostServer
from results import prepare
from soaking.laws import Late, Law, Reading, beside_fresh, judged, memory, slowdown, typical
from soaking.mix import ENDS, MIX, NEEDS, PICTURES, SAVERS, SIZES, Graph, Turn, rounds_of
from terminal import run_program

REFUSED, STOPPED = 2, 130
PATIENCE = 900  # seconds for one prompt
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}  # to glibc; any other C library ignores it


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--prompts",
        type=int,
        default=300,
        help=f"default %(default)s; made up to whole rounds (all kinds: {len(MIX)}), two at least",
    )
    add(
        "--kind",
        nargs="+",
        choices=tuple(MIX),
        default=list(MIX),
        metavar="NAME",
        help=f"of prompts, of {', '.join(MIX)} (default: all)",
    )
    add(
        "--steps",
        type=int,
        default=4,
        help="of every sampler, 4 at least, a divisor of 1000 (default %(default)s)",
    )
    add(
        "--flat",
        type=float,
        default=0.03,
        metavar="SHARE",
        help="that memory may grow after the warm-up (default %(default)s)",
    )
    add(
        "--slower",
        type=float,
        default=1.1,
        metavar="TIMES",
        help="that a prompt may take at the end (default %(default)s)",
    )
    add(
        "--quick",
        action="store_true",
        help="a fresh server draws the plain picture alone, and times are not judged",
    )
    add(
        "--threads",
        type=int,
        default=int(os.environ.get("OMP_NUM_THREADS") or 1),
        help="of each server; default: OMP_NUM_THREADS, else 1",
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write figures and every prompt's reading into this file",
    )
    add(
        "--host",
        type=Path,
        default=os.environ.get("KINDRED_HOST"),
        help="ComfyUI's folder (dev.py gives it)",
    )
    args = parser.parse_args(argv)
    if not args.host:
        parser.error("--host is missing; run it as: python3 dev.py soak")
    if args.steps < 4 or 1000 % args.steps:
        parser.error(
            f"--steps is {args.steps}; give a divisor of 1000 of 4 or more: a story has two stages, and ddim_uniform then has as "
            "many steps as asked for"
        )
    args.kind = [kind for kind in MIX if kind in args.kind]
    for kind in args.kind:
        if (needed := NEEDS.get(kind)) and needed not in args.kind:
            parser.error(f"--kind {kind} reads what {needed} writes: name both")
    if args.quick and "check" not in args.kind:
        parser.error("--quick compares the kind check with a fresh server: name it too")
    for name, least in (("prompts", 1), ("threads", 1), ("flat", 0), ("slower", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; give {least} or more")
    return args


@dataclass
class Soak:
    """One server's prompts."""

    server: HostServer
    steps: int
    saved: dict[str, str] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)

    def send(self, kind: str, turn: int, number: int) -> Reading:
        """One prompt of the round `turn` with the seeds of round `number`. HostError where it does not end as its kind should."""
        place = Turn(number, self.steps, self.saved)
        graph, client = MIX[kind](place), self.server.client
        worked, began = work_of(self.server.process.pid), time.monotonic()
        try:
            outputs = ended(client, graph, ENDS.get(kind))
        except HostError as error:
            raise HostError(f"{kind} in round {turn + 1}: {error}") from error
        seconds = time.monotonic() - began
        worked = seconds if worked is None else work_of(self.server.process.pid) - worked
        if kind in SAVERS:
            name = outputs[SAVERS[kind]]["text"][0].partition(",")[0]
            self.saved[kind] = name.removeprefix("kindred/")
        digest = None if kind in ENDS else digest_of(client, outputs[PICTURES]["images"])
        reading = Reading(
            kind,
            turn,
            number,
            SIZES[place.number % len(SIZES)] if kind != "check" else SIZES[0],
            seconds,
            worked,
            resident(self.server.process.pid),
            digest,
        )
        self.readings.append(reading)
        return reading


def ended(client: Client, graph: Graph, how: str | None) -> Mapping[str, Any]:
    """The outputs of a prompt that ends as it should: None with pictures that were sampled now, failed, or interrupted."""
    seen: set[str] = set()

    def follow(progress: Progress) -> None:
        if not progress.maximum:
            return
        seen.add(graph[progress.node]["class_type"])
        if (
            how == "interrupted"
            and graph[progress.node]["class_type"] == "KSampler"
            and progress.value >= 2
        ):
            client.interrupt()

    try:
        outputs = client.run(graph, follow, timeout=PATIENCE)
    except (NodeFailed, PromptRefused):
        if how == "failed":
            return {}
        raise
    except Interrupted:
        if how == "interrupted":
            return {}
        raise
    if how:
        raise HostError(
            f"a prompt that should have {'failed' if how == 'failed' else 'been interrupted'} ended well"
        )
    if "KSampler" not in seen:
        raise HostError("the host answered from its cache, so this would be no measurement")
    return outputs


def digest_of(client: Client, images: Sequence[Mapping[str, str]]) -> str:
    """Of the pixels alone: a file also holds its workflow."""
    from PIL import Image

    digest = hashlib.sha256()
    for image in images:
        picture = Image.open(BytesIO(client.view(image)))
        digest.update(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
    return digest.hexdigest()


def resident(pid: int, status: str = "/proc/{}/status") -> int:
    """Bytes of main memory that a process holds now."""
    with contextlib.suppress(FileNotFoundError):
        lines = Path(status.format(pid)).read_text("utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    import psutil  # the host's own; where there is no /proc

    return psutil.Process(pid).memory_info().rss


def work_of(pid: int, stat: str = "/proc/{}/stat") -> float | None:
    """Seconds that a process has had of the processors: others that run beside it are not in it. None where the system does not tell."""
    try:
        fields = Path(stat.format(pid)).read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def in_the_environment(settings: Mapping[str, str]) -> Iterator[None]:
    """For the processes that are started inside."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def server_of(args: argparse.Namespace) -> HostServer:
    return HostServer(args.host, threads=args.threads)


def soak(
    args: argparse.Namespace, note: Callable[[str], None]
) -> tuple[Soak, list[Reading], Late | None]:
    """Every prompt -> the old server's, a fresh one's of the first round, and both servers' of one more round in turns."""
    rounds, kinds = rounds_of(args.prompts, len(args.kind)), args.kind
    with server_of(args) as server:
        old = Soak(server, args.steps)
        for turn in range(rounds):
            for kind in kinds:
                old.send(kind, turn, 0 if turn == rounds - 1 else turn)
            last = old.readings[-1]
            note(
                f"round {turn + 1} of {rounds}: {len(old.readings)} prompts, {last.resident / 1e6:.0f} MB, "
                f"{sum(r.seconds for r in old.readings[-len(kinds) :]):.0f} s"
            )
        with server_of(args) as other:
            fresh = Soak(other, args.steps)
            first = [fresh.send(kind, 0, 0) for kind in (["check"] if args.quick else kinds)]
            if args.quick:
                return old, first, None
            kept, late = list(old.readings), ([], [])
            for turn in (rounds, rounds + 1):
                for kind in kinds:
                    for side, one in zip(late, (old, fresh)):
                        side.append(one.send(kind, turn, turn))
                note(f"a round of both servers in turns: {turn - rounds + 1} of 2")
            old.readings = kept
    return old, first, late


def table(readings: Sequence[Reading], late: Late | None) -> str:
    since, beside = slowdown(readings), beside_fresh(*late) if late else {}
    lines = [
        "| kind | prompts | work, first third | last third | ratio | old over fresh server |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in dict.fromkeys(r.kind for r in readings):
        sent = sum(r.kind == kind for r in readings)
        early = (
            f"{since[kind][0]:.2f} s | {since[kind][1]:.2f} s | {since[kind][2]:.3f}"
            if kind in since
            else "| | "
        )
        lines.append(
            f"| {kind} | {sent} | {early} | {format(beside[kind][2], '.3f') if kind in beside else ''} |"
        )
    return "\n".join(lines)


def figures_of(
    readings: Sequence[Reading], late: Late | None, laws: Sequence[Law]
) -> dict[str, float]:
    held = memory(readings)
    figures = {
        "memory.first_mb": held.thirds[0] / 1e6,
        "memory.last_mb": held.thirds[2] / 1e6,
        "memory.growth": held.growth,
        "memory.slope_mb_per_100": held.slope / 1e6,
        "count.prompts": float(len(readings)),
        "count.broken": float(sum(not law.kept for law in laws)),
        "seconds.total": sum(r.seconds for r in readings),
    }
    if late:
        figures |= {
            "time.last_over_first": typical(slowdown(readings)),
            "time.old_over_fresh": typical(beside_fresh(*late)),
        }
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    prepare(None, args.json)
    try:
        with in_the_environment(GIVE_BACK):
            old, first, late = soak(args, lambda text: print(text, file=sys.stderr, flush=True))
    except HostError as error:
        print(f"\nsoak: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("\nsoak: stopped; what was measured so far says nothing yet.", file=sys.stderr)
        return STOPPED
    laws = judged(old.readings, first, late, args.flat, args.slower)
    print(f"{table(old.readings, late)}\n")
    for law in laws:
        print(f"{'ok    ' if law.kept else 'BROKEN'}  {law.name}: {law.says}")
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "command": f"soak --prompts {args.prompts} --steps {args.steps} --kind {' '.join(args.kind)}",
                    "version": version(),
                    "seed": 0,
                    "figures": figures_of(old.readings, late, laws),
                    "laws": [asdict(law) for law in laws],
                    "readings": [asdict(r) for r in old.readings],
                },
                indent=1,
            )
            + "\n",
            "utf-8",
        )
    return int(not all(law.kept for law in laws))


if __name__ == "__main__":
    run_program(main)
