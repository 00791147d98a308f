"""The two miniatures that tables are measured on, and what each of them has for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .rows import CONCEPT, Row
from .tables import Table

UNET, FLOW = "unet", "flow"
ENCODER, A_UNET, JOINT = "a concept encoder", "a UNet", "joint attention"
HAS = {UNET: {ENCODER, A_UNET}, FLOW: {JOINT}}
REMEDY = "Take --miniature {}, or other tables."


def other(miniature: str) -> str:
    return FLOW if miniature == UNET else UNET


def lacks(table: Table, miniature: str) -> str:
    """What a table needs and this miniature has not; "" where it lacks nothing."""
    return "" if not table.needs or table.needs in HAS[miniature] else table.needs


def sets_concept(row: Row) -> bool:
    return bool(row.of(CONCEPT))


def fitted(table: Table, miniature: str) -> Table:
    """A table whose rows this miniature can be measured on: without the concept encoder's inputs where it has none.

    A row that then is what one before it is, is left out.
    """
    if ENCODER in HAS[miniature]:
        return table
    rows: dict[object, Row] = {}
    for row in table.rows:
        kept = tuple((name, value) for name, value in row.inputs if name not in CONCEPT)
        rows.setdefault(kept, replace(row, inputs=kept))
    return replace(table, rows=tuple(rows.values()))


def left_out(table: Table, miniature: str) -> list[str]:
    """The rows that `fitted` leaves out of a table."""
    kept = {row.name for row in fitted(table, miniature).rows}
    return [row.name for row in table.rows if row.name not in kept]


def fitting(
    tables: Sequence[Table], miniature: str, by_name: bool
) -> tuple[list[Table], list[str]]:
    """The tables that this miniature can be measured on, and a sentence about every one that is less than it was.

    by_name: they were asked for by their names. SystemExit where one of those, or all, cannot be.
    """
    fit, said = [], []
    for table in tables:
        if need := lacks(table, miniature):
            sentence = f"{table.name} needs {need}, which the {miniature} miniature does not have"
            if by_name:
                raise SystemExit(f"evaluate: {sentence}. {REMEDY.format(other(miniature))}")
            said.append(f"{sentence}: left out.")
            continue
        if gone := left_out(table, miniature):
            said.append(
                f"{table.name} is without {', '.join(gone)}: the {miniature} miniature does not have {ENCODER}."
            )
        fit.append(fitted(table, miniature))
    if not fit:
        raise SystemExit(
            f"evaluate: the {miniature} miniature does not have {', '.join(needs(tables))}, which all of it needs. "
            + REMEDY.format(other(miniature))
        )
    return fit, said


def needs(tables: Sequence[Table]) -> Iterator[str]:
    """What tables need, each once."""
    yield from dict.fromkeys(table.needs for table in tables if table.needs)


def refuse(rows: Sequence[Row], miniature: str) -> None:
    """SystemExit for rows of one's own that this miniature has not what they need for."""
    if A_UNET not in HAS[miniature] and (
        wrong := [r for r in rows if r.get("freeu", "no") != "no"]
    ):
        raise SystemExit(
            f"evaluate: row {wrong[0].name!r} sets freeu, which needs {A_UNET}, and the {miniature} "
            f"miniature is none. Take --miniature {other(miniature)}."
        )
    if miniature == FLOW and (wrong := [row for row in rows if row.get("rival", "none") != "none"]):
        raise SystemExit(
            f"evaluate: row {wrong[0].name!r} sets rival, which the {UNET} miniature alone is "
            f"measured by. Take --miniature {UNET}."
        )
    if ENCODER not in HAS[miniature] and (wrong := [row for row in rows if sets_concept(row)]):
        names = ", ".join(name for name, _ in wrong[0].inputs if name in CONCEPT)
        raise SystemExit(
            f"evaluate: row {wrong[0].name!r} sets {names}, but the {miniature} miniature does not have {ENCODER}. "
            f"Leave it out, or take --miniature {other(miniature)}."
        )
