"""The papers' tables, measured: on the miniature, where identity is exactly known, or on a checkpoint of yours.

Without arguments: paper A's Table 2 and Fig. 6 (the weights W_S and W_C, with and without the mask) on held-out identities, paper B's
ablation and its points by dropout on held-out sets of four scenes; the miniature's attribute reader judges. Tables, figures, plots and
the first pictures go into one folder (--out), together with a journal: the same command goes on where it was stopped, and measures
nothing twice. The miniature's numbers depend on neither the machine's cores nor --processes.

--table takes some of the tables, --task all of paper A's (personalize) or B's (story), or the miniature's own figures (miniature).
--variant "name: input=value, ..." is a row of your own, beside plain. For personalize: inputs of Ref-UNet Feature Capture and Masked
Self-Attn Inject, concept.INPUT for Cross-Attn Detail Inject (on where one is given), self=off, mask=true or none (the renderer's own
mask, no mask), inverted=yes (DDIM Invert first), cfg. For story: inputs of ConsiStory Shared Attention, node=off, mask=none, cfg,
freeu=yes (ComfyUI's FreeU before it, with the paper's numbers).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from checkout import as_kindred, version
from evaluation import real
from evaluation.catalogue import DEFAULT, PLAIN, TABLES
from evaluation.ground import BOUNDS, SHOWN, Job, Miniature, Setting
from evaluation.journal import Journal, fingerprint
from evaluation.rows import Row
from evaluation.tables import MINIATURE, Filled, Ground, Table, listed
from evaluation.workers import WorkerError, pooled, stoppable
from results import IN_GIT, prepare
from terminal import run_program

PLAINLY_NAMED = (
    "table_2",
    "ablation",
    "story",
    "own",
)  # tables whose figures have names without the table's
LIKENESS = (
    "dino",
    "dino_consistency",
    "face_cosine",
)  # what stands for identity where CLIP does not judge


def chosen(given: argparse.Namespace) -> list[Table]:
    """The tables to measure, with this run's cases. SystemExit where the words do not fit together."""
    if given.variant:
        if given.task not in ("personalize", "story"):
            raise SystemExit(
                "evaluate: --variant needs --task personalize or --task story: the inputs are that task's."
            )
        rows = (PLAIN[given.task], *(Row.parse(given.task, text) for text in given.variant))
        if twice := sorted({a.name for a, b in combinations(rows, 2) if a.name == b.name}):
            raise SystemExit(
                f"evaluate: two rows are called {', '.join(twice)}. Give each a name of its own."
            )
        known = (
            real.tables(given.files, given.task)[0].count
            if given.files
            else 12
            if given.task == "personalize"
            else 6
        )
        tables = [Table("own", "Rows of your own", given.task, rows, known)]
        if given.files:
            real.refuse(rows, given.files)
    elif given.files:
        tables = real.tables(given.files, given.task)
    else:
        names = given.table or [
            name for name in DEFAULT if given.task in ("all", TABLES[name].task)
        ]
        tables = [TABLES[name] for name in names]
    if given.files:
        return [replace(t, count=min(given.count or t.count, t.count)) for t in tables]
    return [
        replace(
            t, count=given.count or t.count, first=t.first if given.first is None else given.first
        )
        for t in tables
    ]


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
    given: argparse.Namespace, tables: Sequence[Table], journal: Journal, setting: Setting
) -> bool:
    """Measures what the journal does not have; False where Ctrl-C ended it first."""
    from tqdm import tqdm

    jobs = list(jobs_of(tables, given.seeds, setting, given.out / "pictures"))
    todo = [job for job in jobs if journal.get(setting.of(job)) is None]
    if not todo:
        return True
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(todo), unit="row", dynamic_ncols=True
    ) as bar:
        try:
            with stoppable():
                for job, values in pooled(
                    todo,
                    partial(real.Real if given.files else Miniature, setting),
                    min(given.processes, len(todo)),
                ):
                    journal.add(setting.of(job), values)
                    bar.set_postfix_str(str(job), refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            return False
    return True


def measured(
    ground: Ground, found: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
) -> Ground:
    """The columns that were measured: a judge may not have been given."""
    keys = {
        key
        for row in found.values()
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
        found: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
        for row in table.rows:
            kept = {
                case: [
                    values
                    for seed in range(seeds)
                    if (values := journal.get(setting.of(Job(table.task, row, case, seed))))
                ]
                for case in cases(table)
            }
            if kept := {case: values for case, values in kept.items() if len(values) == seeds}:
                found[row.name] = kept
        shared = set.intersection(*(set(kept) for kept in found.values())) if found else set()
        if shared:
            found = {
                name: {case: kept[case] for case in kept if case in shared}
                for name, kept in found.items()
            }
            known = [
                values
                for case in sorted(shared)
                if (values := journal.get(setting.of(Job(table.task, BOUNDS, case, 0))))
            ]
            filled.append(bounded(table, measured(grounds[table.task], found), found, known))
    return filled


def bounded(
    table: Table,
    ground: Ground,
    found: dict[str, dict[int, list[Mapping[str, Any]]]],
    known: Sequence[Mapping[str, Any]],
) -> Filled:
    """A table with its floor and its ceiling; known: what the judge gives where the answer is known, a case each."""
    from evaluation.story import floor_of

    def mean_of(key: str) -> float:
        return mean([value for values in known if key in values for value in listed(values[key])])

    readings = [
        values["reading"]
        for made in found.get(table.rows[0].name, {}).values()
        for values in made[:1]
        if "reading" in values
    ]
    return Filled(
        table,
        ground,
        found,
        floor_of(readings) if readings else mean_of("floor"),
        mean_of("ceiling"),
        {part.key: mean_of(part.key) for part in ground.parts},
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def tabulate(given: argparse.Namespace) -> int:
    """Measure, print the tables and write the folder -> exit code."""
    try:
        from evaluation.report import write
    except ImportError as missing:
        raise SystemExit(
            f"evaluate: the plots need {missing.name}. Install it into this Python: pip install {missing.name}"
        ) from None
    tables, common = chosen(given), (given.host, given.steps, given.cfg, fingerprint(given.host))
    setting = real.RealSetting(*common, given.files) if given.files else Setting(*common)
    began = time.monotonic()
    prepare(given.out, given.json)
    with alone(given.out):
        journal = Journal(given.out / "journal.jsonl")
        failed, whole = "", False
        try:
            whole = measure(given, tables, journal, setting)
        except WorkerError as error:
            failed = str(error)
    filled = fill(tables, given.seeds, journal, setting, real.REAL if given.files else MINIATURE)
    figures = {"seconds.total": time.monotonic() - began}
    for one in filled:
        print(f"\n{one.markdown()}")
        own = "" if one.table.name in PLAINLY_NAMED else f"{one.table.name}."
        figures |= {f"{own}{name}": value for name, value in one.figures().items()}
    if filled:
        from evaluation.sheets import sheets

        report = {
            "command": given.command,
            "version": version(),
            "code": setting.code,
            "seed": 0,
            "steps": given.steps,
            "cfg": given.cfg,
            "complete": whole,
            "figures": figures,
        }
        pictures = sheets(
            filled, lambda *which: given.out / "pictures" / strip(setting.of(Job(*which, seed=0)))
        )
        write(given.out, filled, report, pictures, {"table_2": real.PAPER_A} if given.files else {})
        if given.json:
            given.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        print(f"\n{given.out / 'report.md'}")
    if not whole:
        print(
            f"evaluate: {failed or 'stopped'}; the same command goes on from here.", file=sys.stderr
        )
    return 0 if whole else 1 if failed else 130


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


def miniature(given: argparse.Namespace) -> int:
    """The miniature's own figures."""
    from boot import boot

    boot(given.host)
    from kindred.miniature.measure import measure as figures_of

    prepare(None, given.json)
    figures = figures_of(given.host, given.count or 20)
    for name, value in sorted(figures.items()):
        print(f"  {name:28} {value:.3f}")
    if given.json:
        report = {"command": given.command, "version": version(), "seed": 0, "figures": figures}
        given.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--task", choices=("all", "personalize", "story", "miniature"), default="all"
    )
    parser.add_argument(
        "--table", action="append", choices=sorted(TABLES), help="repeat it for several"
    )
    parser.add_argument(
        "--variant", action="append", help='"name: input=value, ..."; repeat it for more rows'
    )
    parser.add_argument(
        "--count",
        type=int,
        help="identities or sets of every table (miniature: pictures per class and scene)",
    )
    parser.add_argument(
        "--first",
        type=int,
        help="the first of them (default: the table's; defaults were chosen on 1000 and up)",
    )
    parser.add_argument(
        "--seeds", type=int, default=2, help="noises for each identity or set (default %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="of the sampler (default: 25 on the miniature, which give the numbers of 50; else 50)",
    )
    parser.add_argument(
        "--cfg", type=float, help="guidance (default 4 for the miniature, 7.5 for a checkpoint)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="that measure at once (default: the cores, 8 at most; 1 for a checkpoint)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("kindred-evaluation"),
        help=f"folder (default %(default)s{IN_GIT})",
    )
    parser.add_argument("--json", type=Path, help="write the figures into this file too")
    parser.add_argument(
        "--host",
        type=Path,
        default=os.environ.get("KINDRED_HOST"),
        help="ComfyUI's folder (dev.py gives it)",
    )
    own = parser.add_argument_group(
        "a checkpoint of yours",
        "All of these are paths. Judges whose file is missing are left out.",
    )
    own.add_argument("--checkpoint", type=Path, help="SD1.5, SD2.x or SDXL")
    own.add_argument(
        "--prompts",
        type=Path,
        help="a line per prompt, {subject} for the word; for stories a blank line between sets",
    )
    own.add_argument(
        "--references",
        type=Path,
        help="a folder of photos; one in a subfolder shows what the subfolder is called",
    )
    own.add_argument(
        "--subject", default="", help="the word for the subject, such as cat or woman (no path)"
    )
    own.add_argument(
        "--concept-encoder",
        type=Path,
        help="of this checkpoint; without it there is self-attention injection alone",
    )
    own.add_argument(
        "--concept-vision", type=Path, help="the CLIP Vision that IP-Adapter full-face weights need"
    )
    own.add_argument(
        "--clip-vision",
        type=Path,
        help="judges likeness to the photo: CLIP's picture tower, such as ViT-L/14's",
    )
    own.add_argument(
        "--clip-text",
        type=Path,
        help="judges agreement with the prompt: the text half of the same CLIP, such as clip_l",
    )
    own.add_argument(
        "--aesthetic",
        type=Path,
        help="judges quality: LAION's improved aesthetic head for ViT-L/14",
    )
    own.add_argument(
        "--dino", type=Path, help="judges likeness: a DINOv2 that the host's Load CLIP Vision reads"
    )
    own.add_argument(
        "--faces",
        type=Path,
        help="judges whose face it is: FaceNet's weights; needs pip install --no-deps facenet-pytorch",
    )
    own.add_argument(
        "--size",
        type=int,
        default=0,
        help="pixels of a side (default: what the checkpoint was trained at)",
    )
    own.add_argument(
        "--batch",
        type=int,
        default=4,
        help="pictures that are sampled at once (default %(default)s)",
    )
    given = parser.parse_args(argv)
    given.files = files_of(given, parser)
    given.steps = given.steps if given.steps is not None else 50 if given.files else 25
    given.cfg = given.cfg if given.cfg is not None else 7.5 if given.files else 4.0
    given.processes = (
        given.processes
        if given.processes is not None
        else 1
        if given.files
        else min(8, os.cpu_count() or 1)
    )
    given.command = " ".join(["evaluate", *(sys.argv[1:] if argv is None else argv)])
    for name, least in (
        ("count", 1 if given.files else 2),
        ("batch", 1),
        ("seeds", 1),
        ("steps", 1),
        ("processes", 1),
        ("first", 0),
    ):
        if (value := getattr(given, name)) is not None and value < least:
            parser.error(
                f"--{name} is {value}, but takes {least} at least"
                + (
                    ": the floor compares every identity with another one"
                    if name == "count"
                    else ""
                )
            )
    for option, without, why in (
        ("table", given.variant, "--variant makes a table of its own"),
        ("table", given.task != "all", "--task takes all tables of one paper"),
        ("variant", given.task == "miniature", "--task miniature has no rows"),
        ("first", given.files, "a checkpoint's cases are your photos, from the first on"),
    ):
        if getattr(given, option) not in (None, []) and without:
            parser.error(f"--{option} does nothing here: {why}")
    given.host = Path(
        given.host or parser.error("--host is missing; run it as: python3 dev.py evaluate")
    )
    return given


def files_of(given: argparse.Namespace, parser: argparse.ArgumentParser) -> real.Files | None:
    """What a run on the user's checkpoint reads; None for the miniature."""
    names = [field.name for field in fields(real.Files)]
    if not given.checkpoint:
        if lonely := [name for name in names if getattr(given, name) and name != "batch"]:
            parser.error(
                f"--{lonely[0].replace('_', '-')} needs a --checkpoint: the miniature has its own"
            )
        return None
    if not given.prompts:
        parser.error("--checkpoint needs --prompts, a file with a prompt on each line")
    if given.table or given.task == "miniature":
        parser.error(
            f"{'--table' if given.table else '--task miniature'} is the miniature's; take --variant for rows of your own"
        )
    return real.Files(**{name: getattr(given, name) for name in names})


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    if given.task == "miniature":
        return miniature(given)
    as_kindred()
    return tabulate(given)


if __name__ == "__main__":
    run_program(main)
