"""Tables from measurements: means and standard errors over identities or sets, beside the floor and the ceiling."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import TYPE_CHECKING, Any

from .rows import Row

if TYPE_CHECKING:
    from kindred.models.metrics import Mean

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One measured quantity of a table."""

    key: str  # of the values
    title: str
    figure: str = ""  # its name in the flat figures; none: not among them
    digits: int = 2
    error: bool = False  # show the standard error beside it
    to_plain: bool = False  # show it as a multiple of the plain row's


@dataclass(frozen=True)
class Ground:
    """What a task is measured by."""

    task: str
    columns: tuple[Column, ...]
    identity: str  # the column that has a floor and a ceiling
    text: tuple[str, ...]  # a picture's agreement with its prompt is the least of these
    units: tuple[str, str]  # what a case is: one, several
    text_title: str = "pictures with scene and class as asked"
    parts: tuple[Column, ...] = ()  # what `identity` is made of, in a table of its own


MINIATURE = {
    "personalize": Ground(
        "personalize",
        (
            Column("identity", "identity", "identity", 3, error=True),
            Column("scene", "scene right", "scene_accuracy"),
            Column("class", "class right", "class_accuracy"),
            Column("whole", "whole subject", "whole_subject"),
        ),
        "identity",
        ("scene", "class"),
        ("identity", "identities"),
        parts=(
            Column("body", "body colour"),
            Column("second_hue", "second hue"),
            Column("pattern", "pattern"),
            Column("hat", "hat"),
        ),
    ),
    "story": Ground(
        "story",
        (
            Column("consistency", "consistency", "consistency", 3, error=True),
            Column("scene", "scene right", "scene_accuracy"),
            Column("class", "class right", "class_accuracy"),
            Column("whole", "whole subject", "whole_subject"),
            Column("layout_spread", "layout spread", "layout_spread", to_plain=True),
            Column("unet_calls", "UNet calls", digits=0),
        ),
        "consistency",
        ("scene", "class"),
        ("set", "sets"),
    ),
}


# of the rivals' tables, beside what every table has: what a method costs, and what it copies
COSTS = (
    Column("copied", "copied pixels", "copied"),
    Column("diversity", "diversity", "diversity", 3),
    Column("loss_left", "loss left", "loss_left"),
    Column("seconds_concept", "s per concept", digits=1),
    Column("seconds", "s per picture"),
    Column("kept_kib", "kept, KiB", digits=1),
)
MINIATURE["table_1"] = replace(
    MINIATURE["personalize"], columns=(*MINIATURE["personalize"].columns, *COSTS)
)
MINIATURE["table_story"] = replace(
    MINIATURE["story"], columns=(*MINIATURE["story"].columns, *COSTS[2:])
)
# of the presets: how much of the photo is copied, and the errors of the parts
for _name in ("settings_presets", "presets"):
    MINIATURE[_name] = replace(
        MINIATURE["personalize"],
        columns=(*MINIATURE["personalize"].columns, COSTS[0]),
        parts=tuple(replace(part, error=True) for part in MINIATURE["personalize"].parts),
    )


@dataclass(frozen=True)
class Table:
    """Rows that are compared, on which cases; the first row is the plain one."""

    name: str
    title: str
    task: str
    rows: tuple[Row, ...]
    count: int
    first: int = 0
    needs: str = ""  # of the miniature, in the words of miniatures.py
    axis: str = (
        ""  # what the number in a row's name is, where rows differ by one and are drawn as curves
    )


@dataclass
class Filled:
    """A table with what was measured so far."""

    table: Table
    ground: Ground
    measurements: dict[str, dict[int, list[Values]]]  # by row and case: a measurement per seed
    floor: float = math.nan
    ceiling: float = math.nan
    parts_ceiling: Mapping[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, Mean]] = field(init=False)

    def __post_init__(self) -> None:
        self.scores = {
            name: {
                column.key: self.score(name, column.key)
                for column in (*self.ground.columns, *self.ground.parts)
            }
            | {"text": self.text(name), "seconds": self.score(name, "seconds")}
            for name in self.measurements
        }

    def score(self, row: str, key: str) -> Mean:
        from kindred.models.metrics import Mean

        return Mean.over(
            [
                [v for values in seeds for v in listed(values.get(key, math.nan))]
                for seeds in self.measurements[row].values()
            ]
        )

    def text(self, row: str) -> Mean:
        """How far pictures are as asked: the other axis of the front."""
        from kindred.models.metrics import Mean

        return Mean.over(
            [
                [
                    min(parts)
                    for values in seeds
                    for parts in zip(
                        *(values.get(key, ()) for key in self.ground.text), strict=True
                    )
                ]
                for seeds in self.measurements[row].values()
            ]
        )

    @property
    def plain(self) -> str:
        return self.table.rows[0].name

    @property
    def bounded(self) -> bool:
        return not math.isnan(self.ceiling)

    def way(self, row: str) -> float:
        """The share of the way from plain to the ceiling that a row goes; NaN where one of them is not known."""
        from kindred.models.metrics import share_of_the_way

        plain, value = (
            self.scores[name][self.ground.identity].mean if name in self.scores else math.nan
            for name in (self.plain, row)
        )
        return share_of_the_way(value, plain, self.ceiling)

    def cells(self, row: str) -> Iterator[str]:
        scores = self.scores[row]
        for column in self.ground.columns:
            mean = scores[column.key].mean
            if column.to_plain:
                mean /= (
                    self.scores[self.plain][column.key].mean if self.plain in self.scores else 0
                ) or math.nan
            yield rounded(mean, column.digits)
            if column.error:
                yield rounded(scores[column.key].error, column.digits)
            if column.key == self.ground.identity and self.bounded:
                yield f"{self.way(row):.2f}"

    def titles(self) -> Iterator[str]:
        for column in self.ground.columns:
            yield column.title
            yield from ["s.e."] * column.error
            if column.key == self.ground.identity and self.bounded:
                yield "of the way"

    def markdown(self) -> str:
        """The table with a line above it that says what it is of."""
        cases = max((len(seeds) for seeds in self.measurements.values()), default=0)
        seeds = max(
            (len(values) for seeds in self.measurements.values() for values in seeds.values()),
            default=0,
        )
        bounds = f"; floor {self.floor:.3f}, ceiling {self.ceiling:.3f}" if self.bounded else ""
        lines = [
            f"**{self.table.title}**: {cases} {self.ground.units[cases != 1]}, {seeds} seed{'s' * (seeds > 1)}{bounds}",
            "",
            "| | " + " | ".join(self.titles()) + " |",
            "|---|" + "---:|" * len(list(self.titles())),
        ]
        lines += [
            f"| {row.name} | {' | '.join(self.cells(row.name))} |"
            for row in self.table.rows
            if row.name in self.measurements
        ]
        return "\n".join(lines)

    def by_part(self) -> str:
        """What identity is made of, row by row, and what of it the known answer shows; empty where it has no parts."""
        if not self.ground.parts:
            return ""
        lines = [
            "What it is made of:",
            "",
            "| | " + " | ".join(part.title for part in self.ground.parts) + " |",
            "|---|" + "---:|" * len(self.ground.parts),
        ]
        lines += [
            f"| {name} | {' | '.join(self.part(name, part) for part in self.ground.parts)} |"
            for name in (*self.scores, "ceiling")
        ]
        return "\n".join(lines)

    def part(self, row: str, part: Column) -> str:
        """A part of identity in a row or at the ceiling, with its standard error where it is asked for."""
        if row not in self.scores:
            return rounded(self.parts_ceiling.get(part.key, math.nan), 2)
        score = self.scores[row][part.key]
        error = rounded(score.error, 2) if part.error else ""
        return rounded(score.mean, 2) + (f" ({error})" if error else "")

    def judged_by(self) -> str:
        """What each column is and which file of the user's it comes from; empty on the miniature, which has one judge."""
        said = {
            name: by
            for seeds in self.measurements.values()
            for judged in seeds.values()
            for values in judged
            for name, by in values.get("judged_by", {}).items()
        }
        return "\n".join(
            f"- {column.title}: {said[column.key]}"
            for column in self.ground.columns
            if column.key in said
        )

    def csv(self) -> str:
        """Every mean and standard error at full precision."""
        out = StringIO()
        writer = csv.writer(out, lineterminator="\n")
        keys = list(
            dict.fromkeys(
                [
                    *(column.key for column in (*self.ground.columns, *self.ground.parts)),
                    "text",
                    "seconds",
                ]
            )
        )
        writer.writerow(
            [
                "row",
                "inputs",
                "of_the_way",
                *(f"{key}{part}" for key in keys for part in ("", "_error", "_count")),
            ]
        )
        for row in self.table.rows:
            if row.name in self.measurements:
                scores = [self.scores[row.name][key] for key in keys]
                writer.writerow(
                    [
                        row.name,
                        " ".join(f"{name}={value}" for name, value in row.inputs),
                        self.way(row.name),
                        *(number for s in scores for number in (s.mean, s.error, s.count)),
                    ]
                )
        return out.getvalue()

    def figures(self) -> dict[str, float]:
        """Flat names and numbers; what could not be measured is absent."""
        identity = next(
            column.figure for column in self.ground.columns if column.key == self.ground.identity
        )
        means = {
            f"{identity}.floor": self.floor,
            f"{identity}.ceiling": self.ceiling,
            f"count.{self.ground.units[1]}": max(
                (len(seeds) for seeds in self.measurements.values()), default=0
            ),
        }
        for row, scores in self.scores.items():
            means |= {
                f"{column.figure}.{row}": scores[column.key].mean
                for column in self.ground.columns
                if column.figure
            }
            means |= {
                f"error.{identity}.{row}": scores[self.ground.identity].error,
                f"seconds.{row}": scores["seconds"].mean,
            }
            if "unet_calls" in scores:
                means[f"unet_calls.{row}"] = scores["unet_calls"].mean
            if not math.isnan(overlap := self.score(row, "mask_iou").mean):
                means.setdefault(
                    "mask.iou", overlap
                )  # of the first row that finds the subject by its word
            if not math.isnan(reading := self.score(row, "seconds_reference").mean):
                means.setdefault("seconds.inversion", reading)
                means.setdefault("seconds.sampling", scores["seconds"].mean)
        return {name: value for name, value in means.items() if not math.isnan(value)}


def rounded(number: float, digits: int) -> str:
    """A number, or nothing where there is none."""
    return "" if math.isnan(number) else f"{number:.{digits}f}"


def listed(value: float | Sequence[float]) -> Sequence[float]:
    return [value] if isinstance(value, (int, float)) else value
