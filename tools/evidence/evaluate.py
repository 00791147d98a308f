"""The papers' tables, measured: on the miniature, where identity is exactly known, or on a checkpoint of yours.

Without arguments: paper A's Table 2 and Fig. 6 (the weights W_S and W_C, with and without the mask) on held-out identities, paper B's
ablation and its points by dropout on held-out sets of four scenes; the miniature's attribute reader judges. Tables, figures, plots and
the first pictures go into one folder (--out), together with a journal: the same command resumes where it stopped, and measures
nothing twice. The miniature's numbers depend on neither the machine's cores nor --processes.

--table takes some of the tables, --task all of paper A's (personalize) or B's (story), or the miniature's own figures (miniature).
--miniature flow measures the flow miniature, a transformer; what it has not yet for a table is said before the work.
--variant "name: input=value, ..." is a row of your own, beside plain. For personalize: inputs of Ref-UNet Feature Capture and Masked
Self-Attn Inject, concept.INPUT for Cross-Attn Detail Inject (on where one is given), self=off, mask=true or none (the renderer's own
mask, no mask), photo=another (the control: another identity's photo), inverted=yes (DDIM Invert first, with its method), cfg. For
story: inputs of ConsiStory Shared Attention, node=off, mask=none, cfg, freeu=yes (ComfyUI's FreeU before it, with the paper's numbers).
rival=NAME is what people would use instead, as the rows of table_1 and table_story have it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[1:1] = [str(Path(__file__).resolve().parents[1] / room) for room in ("client", "workshop")]

from checkout import as_kindred, version
from evaluation import own, real
from evaluation.ground import BOUNDS, SHOWN, Job, Miniature, Setting
from evaluation.journal import Journal, fingerprint
from evaluation.miniatures import UNET
from evaluation.options import chosen, parse
from evaluation.pixels import varied
from evaluation.tables import MINIATURE, Filled, Ground, Table, listed
from results import prepare
from terminal import run_program
from workers import WorkerError, pooled, stoppable

PLAINLY_NAMED = (
    "table_2",
    "ablation",
    "story",
    "own",
)  # tables whose figures have names without the table's
PICTURES = 20  # of every class and scene, for --task miniature
LIKENESS = (
    "dino",
    "dino_consistency",
    "face_cosine",
)  # what stands for identity where CLIP does not judge


def jobs_of(tables: Sequence[Table], seeds: int, setting: Setting, pictures: Path) -> Iterator[Job]:
    """Every measurement once, case by case, so that a process makes a case's references once."""
    seen: set[Any] = set()
    for task in ("personalize", "story"):
        mine = [table for table in tables if table.task == task]
        for case in sorted({case for table in mine for case in cases(table)}):
            for seed in range(seeds):
                for row in (
                    BOUNDS,
                    *(row for table in mine if case in cases(table) for row in table.rows),
                ):
                    key = (task, row.inputs, case, None if row == BOUNDS else seed)
                    if key not in seen:
                        seen.add(key)
                        shown = seed == 0 and any(
                            case < table.first + SHOWN for table in mine if case in cases(table)
                        )
                        job = Job(task, row, case, seed)
                        yield (
                            replace(job, pictures=pictures / strip(setting.of(job)))
                            if shown
                            else job
                        )


def cases(table: Table) -> range:
    return range(table.first, table.first + table.count)


def strip(of: Mapping[str, Any]) -> str:
    """The file of a measurement's pictures: other settings, another one."""
    return f"{of['task']}_{hashlib.sha256(Journal.key(of).encode()).hexdigest()[:16]}.png"


def measure(
    args: argparse.Namespace, tables: Sequence[Table], journal: Journal, setting: Setting
) -> bool:
    """Measures what the journal does not have of the tables; False where Ctrl-C ended it first."""
    jobs = list(jobs_of(tables, args.seeds, setting, args.out / "pictures"))
    make = partial(real.Real if args.files else Miniature, setting)
    return work_off(jobs, make, args.processes, journal, setting)


def work_off(
    jobs: Sequence[Job],
    make: Callable[[], Callable[[Job], Any]],
    processes: int,
    journal: Journal,
    setting: Setting,
) -> bool:
    """Measures the jobs that the journal does not have; False where Ctrl-C ended it first."""
    from tqdm import tqdm

    todo = [job for job in jobs if journal.get(setting.of(job)) is None]
    if not todo:
        return True
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(todo), unit="row", dynamic_ncols=True
    ) as bar:
        try:
            with stoppable():
                for job, values in pooled(todo, make, min(processes, len(todo))):
                    journal.add(setting.of(job), values)
                    bar.set_postfix_str(str(job), refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            return False
    return True


def measured(
    ground: Ground, measurements: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
) -> Ground:
    """The columns that were measured: a judge may not have been given."""
    keys = {
        key
        for row in measurements.values()
        for seeds in row.values()
        for values in seeds
        for key in values
    }
    columns = tuple(column for column in ground.columns if column.key in keys)
    shown = {column.key for column in columns}
    return replace(
        ground,
        columns=columns,
        identity=next(key for key in (ground.identity, *LIKENESS) if key in shown),
        parts=tuple(part for part in ground.parts if part.key in keys),
    )


def fill(
    tables: Sequence[Table],
    seeds: int,
    journal: Journal,
    setting: Setting,
    grounds: Mapping[str, Ground] = MINIATURE,
) -> list[Filled]:
    """The tables with what the journal has of them: the cases that all of a table's rows have, like with like."""
    filled = []
    for table in tables:
        figures: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
        for row in table.rows:
            kept = {
                case: [
                    values
                    for seed in range(seeds)
                    if (values := journal.get(setting.of(Job(table.task, row, case, seed))))
                ]
                for case in cases(table)
            }
            if kept := {
                case: varied(values) for case, values in kept.items() if len(values) == seeds
            }:
                figures[row.name] = kept
        shared = set.intersection(*(set(kept) for kept in figures.values())) if figures else set()
        if shared:
            figures = {
                name: {case: kept[case] for case in kept if case in shared}
                for name, kept in figures.items()
            }
            known = [
                values
                for case in sorted(shared)
                if (values := journal.get(setting.of(Job(table.task, BOUNDS, case, 0))))
            ]
            ground = grounds.get(table.name, grounds[table.task])
            filled.append(bounded(table, measured(ground, figures), figures, known))
    return filled


def bounded(
    table: Table,
    ground: Ground,
    measurements: dict[str, dict[int, list[Mapping[str, Any]]]],
    known: Sequence[Mapping[str, Any]],
) -> Filled:
    """A table with its floor and its ceiling; known: what the judge gives where the answer is known, a case each."""
    from evaluation.story import floor_of

    def mean_of(key: str) -> float:
        return mean([value for values in known if key in values for value in listed(values[key])])

    readings = [
        values["reading"]
        for seeds in measurements.get(table.rows[0].name, {}).values()
        for values in seeds[:1]
        if "reading" in values
    ]
    return Filled(
        table,
        ground,
        measurements,
        floor_of(readings) if readings else mean_of("floor"),
        mean_of("ceiling"),
        {part.key: mean_of(part.key) for part in ground.parts},
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def tabulate(args: argparse.Namespace) -> int:
    """Measure, print the tables and write the folder -> exit code."""
    try:
        import evaluation.report  # noqa: F401  said before hours of measuring
    except ImportError as missing:
        raise SystemExit(
            f"evaluate: the plots need {missing.name}. Install it into this Python: pip install {missing.name}"
        ) from None
    tables, common = chosen(args), (args.host, args.steps, args.cfg, fingerprint(args.host))
    setting = (
        real.RealSetting(*common, args.files)
        if args.files
        else Setting(*common, miniature=args.miniature)
    )
    began = time.monotonic()
    prepare(args.out, args.json)
    with alone(args.out):
        journal = Journal(args.out / "journal.jsonl")
        failed, whole = "", False
        try:
            whole = measure(args, tables, journal, setting)
        except WorkerError as error:
            failed = str(error)
    filled = fill(tables, args.seeds, journal, setting, real.REAL if args.files else MINIATURE)
    figures = {"seconds.total": time.monotonic() - began}
    for one in filled:
        print(f"\n{one.markdown()}")
        own = "" if one.table.name in PLAINLY_NAMED else f"{one.table.name}."
        figures |= {f"{own}{name}": value for name, value in one.figures().items()}
    if filled:
        write_folder(args, filled, setting, whole, figures)
    if not whole:
        print(f"evaluate: {failed or 'stopped'}; the same command resumes here.", file=sys.stderr)
    return 0 if whole else 1 if failed else 130


def write_folder(
    args: argparse.Namespace,
    filled: Sequence[Filled],
    setting: Setting,
    whole: bool,
    figures: Mapping[str, float],
) -> None:
    """Tables, plots, sheets and the report into --out, the report into --json too; whole: not stopped before its end."""
    from evaluation.report import write
    from evaluation.sheets import sheets

    report = {
        "command": args.command,
        "version": version(),
        "code": setting.code,
        "seed": 0,
        "steps": args.steps,
        "cfg": args.cfg,
        **({} if args.files else {"miniature": args.miniature}),
        "complete": whole,
        "figures": figures,
    }
    pictures = sheets(
        filled, lambda *which: args.out / "pictures" / strip(setting.of(Job(*which, seed=0)))
    )
    write(args.out, filled, report, pictures, {"table_2": real.PAPER_A} if args.files else {})
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(f"\n{args.out / 'report.md'}")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else measures into this folder. SystemExit where somebody does."""
    from filelock import FileLock, Timeout  # ComfyUI brings it

    try:
        with FileLock(folder / "journal.lock", timeout=0):
            yield
    except Timeout:
        raise SystemExit(
            f"evaluate: another run measures into {folder}. Wait for it, or give another --out."
        ) from None


def miniature(args: argparse.Namespace) -> int:
    """The miniature's own figures -> exit code."""
    prepare(None, args.json)
    figures = (unet_figures if args.miniature == UNET else flow_figures)(args)
    if figures is None:
        print("evaluate: stopped; the same command resumes here.", file=sys.stderr)
        return 130
    for name, value in sorted(figures.items()):
        print(f"  {name:28} {value:.3f}")
    if args.json:
        report = {"command": args.command, "version": version(), "seed": 0, "figures": figures}
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


def unet_figures(args: argparse.Namespace) -> dict[str, float]:
    from boot import boot

    boot(args.host)
    from kindred.miniature.measure import measure as figures_of

    return figures_of(args.host, args.count or PICTURES)


def flow_figures(args: argparse.Namespace) -> dict[str, float] | None:
    """None where Ctrl-C ended it; what was measured until then is in the journal of --out."""
    as_kindred()
    from kindred.miniature.pack import FLOW_CHECKPOINT

    common = (args.host, args.steps, args.cfg, fingerprint(args.host))
    setting = Setting(*common, miniature=args.miniature)
    jobs, make = own.jobs(args.count or PICTURES), partial(own.OwnFigures, setting)
    prepare(args.out)
    with alone(args.out):
        journal = Journal(args.out / "journal.jsonl")
        try:
            whole = work_off(jobs, make, args.processes, journal, setting)
        except WorkerError as error:
            raise SystemExit(f"evaluate: {error}") from error
    if not whole:
        return None
    results = {job: journal.get(setting.of(job)) for job in jobs}
    return own.figures(results, FLOW_CHECKPOINT.stat().st_size / 2**20)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv, __doc__)
    if args.task == "miniature":
        return miniature(args)
    as_kindred()
    return tabulate(args)


if __name__ == "__main__":
    run_program(main)
