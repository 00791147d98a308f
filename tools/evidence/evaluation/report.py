"""The folder of an evaluation: tables as markdown and CSV, figures as JSON, plots, and sheets of the first pictures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import curves, front
from .points import Axis, Point
from .tables import Filled


def write(
    folder: Path,
    filled: Sequence[Filled],
    report: Mapping[str, Any],
    pictures: Mapping[str, Any],
    notes: Mapping[str, str],
) -> list[Path]:
    """Everything into `folder`; returns what was written. `pictures` and `notes`: the sheet and the words below a table, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def put(name: str, text: str) -> None:
        written.append(folder / name)
        written[-1].write_text(text, "utf-8")

    parts = []
    for one in filled:
        name = one.table.name
        put(f"{name}.csv", one.csv())
        drawn = plots(folder, one)
        if name in pictures:
            drawn.append(folder / f"{name}_pictures.jpg")
            pictures[name].save(drawn[-1], quality=90)
        written += drawn
        words = filter(None, (one.by_part(), one.judged_by(), notes.get(name, "")))
        parts += [
            f"## {one.table.title}",
            one.markdown(),
            *words,
            *(f"![{path.stem}]({path.name})" for path in drawn),
        ]
    put("report.json", json.dumps(dict(report), indent=2) + "\n")
    put("report.md", page(report, parts, filled))
    return written


def page(report: Mapping[str, Any], parts: Sequence[str], filled: Sequence[Filled]) -> str:
    """report.md: its head, the parts of the tables, and the seconds."""
    stopped = (
        []
        if report["complete"]
        else ["**Stopped before its end**: every table shows the cases that all of its rows have."]
    )
    head = f"`{report['command']}`, version {report['version']}, code {report['code']}"
    end = ["## What a picture took", time_table(filled)]
    return "\n\n".join(["# Evaluation", head, *stopped, *parts, *end]) + "\n"


def time_table(filled: Sequence[Filled]) -> str:
    """Seconds per picture: the one thing that another run measures otherwise."""
    lines = ["| table | row | seconds per picture |", "|---|---|---:|"]
    lines += [
        f"| {one.table.name} | {row} | {scores['seconds'].mean:.1f} |"
        for one in filled
        for row, scores in one.scores.items()
    ]
    return "\n".join(lines)


def plots(folder: Path, one: Filled) -> list[Path]:
    """Identity against text, a point per row; and curves where rows are named "W 0.5"."""
    key = one.ground.identity
    title = next(column.title for column in one.ground.columns if column.key == key)
    series: dict[str, list[Point]] = {}
    lines: dict[str, list[Point]] = {}
    for row in one.table.rows:
        if row.name not in one.scores:
            continue
        text, identity = one.scores[row.name]["text"], one.scores[row.name][key]
        line, number = family(row.name) if one.table.axis else (row.name, None)
        series.setdefault(line, []).append(
            Point(row.name, text.mean, identity.mean, text.error, identity.error)
        )
        if number is not None:
            for what, score in ((title, identity), ("as asked", text)):
                lines.setdefault(f"{line}: {what}", []).append(
                    Point(row.name, number, score.mean, 0.0, score.error)
                )
    files = [folder / f"{one.table.name}_front.png"]
    height = Axis(
        title, *(None if math.isnan(bound) else bound for bound in (one.floor, one.ceiling))
    )
    front(files[0], one.table.title, series, Axis(one.ground.text_title), height)
    if any(len(points) > 1 for points in lines.values()):
        files.append(folder / f"{one.table.name}_curves.png")
        curves(
            files[1],
            one.table.title,
            lines,
            Axis(one.table.axis),
            Axis(f"{title}, and share as asked"),
            one.table.axis == "weight",
        )
    return files


def family(name: str) -> tuple[str, float | None]:
    """ "W_S 2, no mask" -> ("W_S, no mask", 2.0): the line that a row stands on, and where."""
    number = re.search(r" (\d+(?:\.\d+)?)(?=,|$)", name)
    return (name.replace(number[0], "", 1), float(number[1])) if number else (name, None)
