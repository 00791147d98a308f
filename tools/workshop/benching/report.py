"""The table, the figures for other programs, and the block of a page that the program rewrites by itself."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkout import version

from benching.catalogue import CASES, MEMORY_TARGET, ONE_ROW, PLAIN, name_of, target
from benching.ground import Setting
from benching.rounds import QUIET, Row

DEFAULT_ATTENTION = "pytorch"
NOT_TOLD = (
    "--host",
    "--json",
    "--update",
    "--block",
)  # of a command: where things lie changes no figure
Run = dict[str, Any]  # what one setting gave, as it stands in the JSON


def run_of(
    setting: Setting,
    software: Mapping[str, str],
    rounds: int,
    clock: str,
    rows: Sequence[Row],
    stopped: bool = False,
    probed: Mapping[str, Mapping[str, Any]] | None = None,
) -> Run:
    """probed: by case, "plain_b1" too, what the rounds without a clock told: flops, ops, waits, peak, first_wait."""
    probed = probed or {}
    cases = []
    for row in rows:
        mine = probed.get(name_of((row.case, row.pictures)), {})
        theirs = probed.get(f"{PLAIN}_b{row.pictures}", {})
        cases.append(case_of(setting, row, mine, theirs))
    return {
        "settings": asdict(setting),
        "software": dict(software),
        "clock": clock,
        "rounds": rounds,
        "stopped": stopped,
        "cases": cases,
    }


def case_of(
    setting: Setting, row: Row, mine: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, Any]:
    """A row as it stands in the JSON; mine, theirs: what was probed of it and of plain."""
    case = asdict(row) | {
        "quiet": row.quiet,
        "target": target(setting.device, setting.family, (row.case, row.pictures)),
        "memory": row.memory,
    }
    if "peak" in mine and "peak" in theirs:
        case |= {
            "peak": mine["peak"],
            "plain_peak": theirs["peak"],
            "memory": mine["peak"] / theirs["peak"],
        }
    # else a part counts more than it does in fifty steps
    whole = len(CASES[row.case].calls) == 1 or setting.steps == 50
    if "flops" in mine and "flops" in theirs and whole:
        case["counts"] = {
            "flops": mine["flops"] / theirs["flops"],
            **{
                f"{what}_per_step": (mine[what] - theirs[what]) / row.plain_calls
                for what in ("ops", "waits")
            },
            "largest": mine["largest"],
            "plain_largest": theirs["largest"],
        }
    if "first_wait" in mine and "first_wait" in theirs:
        case |= {"first_wait": mine["first_wait"], "plain_first_wait": theirs["first_wait"]}
    return case


def figures(runs: Sequence[Run]) -> dict[str, float]:
    """Flat names for other programs: time.sd15.cached_b1; an attention that is not the default is named at the end."""
    values: dict[str, float] = {}
    for run in runs:
        family, attention = run["settings"]["family"], run["settings"]["attention"]
        end = "" if attention == DEFAULT_ATTENTION else f".{attention}"
        for c in run["cases"]:
            name = f"{family}.{name_of((c['case'], c['pictures']))}{end}"
            values |= {
                f"time.{name}": c["ratio"]["median"],
                f"time_at_50.{name}": c["at_50"],
                f"unet_calls.{name}": c["calls"],
            }
            if c["memory"]:
                values[f"memory.{name}"] = c["memory"]
            if "counts" in c:
                values |= {f"{what}.{name}": value for what, value in c["counts"].items()}
    return values


def report(runs: Sequence[Run], command: str) -> dict[str, Any]:
    return {
        "command": "bench",
        "version": version(),
        "seed": 1,
        "figures": figures(runs),
        "line": command,
        "runs": list(runs),
    }


def command_of(arguments: Sequence[str]) -> str:
    """The line that measures this again."""
    kept, skip = [], False
    for word in arguments:
        if not skip and word.partition("=")[0] not in NOT_TOLD:
            kept.append(word)
        skip = not skip and word in NOT_TOLD  # its value follows
    return shlex.join(["python3", "dev.py", "bench", *kept])


# in words ------------------------------------------------------------------------------------------------------------------------


def headline(run: Run) -> str:
    s, soft = run["settings"], run["software"]
    return (
        f"{s['family']}, {s['latent'] * 8} x {s['latent'] * 8} pixels, {s['steps']} steps {guidance(s['family'])}, {s['dtype']}, "
        "subject on "
        f"{s['subject']:.0%} of the picture, {run['clock']}, {run['rounds']} round{'s' * (run['rounds'] != 1)} after one that is "
        f"thrown away{', stopped by hand' * run['stopped']}. {soft['machine']}, "
        f"{s['threads']} thread{'s' * (s['threads'] != 1)}; "
        f"ComfyUI {soft['host']} with {s['attention']} attention, torch {soft['torch']}."
    )


def guidance(family: str) -> str:
    """As people run it: FLUX.1 dev has its guidance inside, so a step is one row of the network."""
    return "at CFG 1" if family in ONE_ROW else "with CFG"


def markdown(run: Run) -> str:
    """One run as a table, its setting above, what is wrong with it below."""
    cases = run["cases"]
    columns = columns_of(cases)
    lines = [
        " | ".join(columns),
        " | ".join(["---", *["---:"] * (len(columns) - 1)]),
        *(" | ".join(str(tell(c)) for tell in columns.values()) for c in cases),
    ]
    return "\n".join(
        [
            headline(run),
            "",
            *(f"| {line} |" for line in lines),
            *[""] * bool(remarks(run)),
            *remarks(run),
        ]
    )


def columns_of(cases: Sequence[Mapping[str, Any]]) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
    """Title -> what stands there of a case; of what was measured in none, no column."""
    columns: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "case": lambda c: c["case"],
        "pictures": lambda c: c["pictures"],
        "times plain": lambda c: f"{c['ratio']['median']:.3f}",
        "standard error": lambda c: (
            "" if c["ratio"]["error"] is None else f"{c['ratio']['error']:.3f}"
        ),
        "least": lambda c: f"{c['ratio']['least']:.3f}",
        "most": lambda c: f"{c['ratio']['most']:.3f}",
        "at 50 steps": lambda c: f"{c['at_50']:.3f}",
        "target": lambda c: f"{c['target']:.2f}" if c["target"] else "",
        "UNet calls (plain)": lambda c: f"{c['calls']} ({c['plain_calls']})",
        "rows (plain)": lambda c: f"{c['rows']} ({c['plain_rows']})",
    }
    if any(c["memory"] for c in cases):
        columns[f"peak memory, target {MEMORY_TARGET}"] = lambda c: (
            f"{c['memory']:.3f} ({c['peak'] / 1e9:.2f} GB, {(c['peak'] - c['plain_peak']) / 1e9:+.2f})"
            if c["memory"]
            else ""
        )
    if any("counts" in c for c in cases):
        columns |= {
            title: lambda c, what=what, form=form: (
                format(c["counts"][what], form) if "counts" in c else ""
            )
            for title, what, form in (
                ("FLOPs", "flops", ".3f"),
                ("ops per step", "ops_per_step", "+.0f"),
                ("waits per step", "waits_per_step", "+.1f"),
            )
        }
    if any("first_wait" in c for c in cases):
        columns["first wait inside a UNet call"] = lambda c: (
            c.get("first_wait", "") or ("none" if "first_wait" in c else "")
        )
    return columns


def remarks(run: Run) -> list[str]:
    """What a reader must know before believing the table."""
    sentences, cases = [], run["cases"]
    for n in sorted({c["pictures"] for c in cases if not c["quiet"]}):
        spread = max(c["plain_spread"] for c in cases if c["pictures"] == n)
        sentences.append(
            f"With {n} picture{'s' * (n > 1)} the plain sampler's own times spread over {spread:.0%} of their median, more than "
            f"{QUIET:.0%}: something else used this machine, and the standard errors hold what it did. More --rounds make them smaller."
        )
    if run["rounds"] == 1:
        sentences.append("One round has no standard error: give --rounds 5 for a table to rely on.")
    sentences += [
        f"{c['case']} with {c['pictures']} made NaN or infinite values: its time may not be that of a real run."
        for c in cases
        if not c["finite"]
    ]
    waits = sorted({c["plain_first_wait"] for c in cases if c.get("plain_first_wait")})
    sentences += [
        f"The plain UNet call waits for the device itself, at {w}: what our cases do behind it cannot be seen."
        for w in waits
    ]
    return sentences


def listed() -> str:
    """The cases, for --help and docs."""
    return "\n".join(f"  {case.name:<15} {case.what}" for case in CASES.values())


# the block of a page ---------------------------------------------------------------------------------------------------------------


def block(runs: Sequence[Run], command: str) -> str:
    return "\n".join(["```", command, "```", "", "\n\n".join(markdown(run) for run in runs)])


def updated(page: str, name: str, text: str) -> str:
    """The page with the text between its two markers; ValueError names the blocks it has where this one is not among them."""
    first, last = markers(name)
    if page.count(first) != 1 or page.count(last) != 1 or page.index(last) < page.index(first):
        raise ValueError(
            f"it has no block {name!r} to rewrite: write the two lines\n{first}\n{last}\nwhere the table belongs, or name "
            "another with --block."
        )
    head, tail = page.split(first)[0], page.split(last)[1]
    return f"{head}{first}\n\n{text}\n\n{last}{tail}"


def markers(name: str) -> tuple[str, str]:
    return (
        f"<!-- bench {name}: written by dev.py bench --update -->",
        f"<!-- end of bench {name} -->",
    )


def write_page(path: Path, name: str, text: str) -> None:
    """Rewrite one block of a page. ValueError names the page."""
    try:
        page = updated(path.read_text("utf-8"), name, text)
    except (OSError, ValueError) as error:
        raise ValueError(f"--update {path}: {error}") from error
    path.write_text(page, "utf-8", newline="\n")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
