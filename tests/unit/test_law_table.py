"""The tables of laws in docs/networks.md: written by a run of the tests, for every family that is read."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import law_table
import pytest
from network_laws import EXEMPT, LAWS, TABLES, Law


def written() -> str:
    """The part of the page that the program writes."""
    page = law_table.PAGE.read_text("utf-8")
    return page[page.index(law_table.BEGIN) : page.index(law_table.END)]


def rows_of(text: str, title: str) -> tuple[list[str], Mapping[str, list[str]]]:
    """The headings of one table, and its cells by family."""
    lines = text[text.index(f"| {title} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.removesuffix("|")[1:].split("|")] for line in lines]
    (_, *headings), _, *rows = cells
    return headings, {family: values for family, *values in rows}


def asked(family: str, law: Law) -> bool:
    return not any(family in e.families and law.name in e.laws for e in EXEMPT)


@pytest.mark.parametrize("title", TABLES)
def test_every_family_keeps_every_law_or_has_a_reason(title: str) -> None:
    headings, rows = rows_of(written(), title)
    assert headings == [law.name for law in TABLES[title]]
    assert [*rows] == law_table.families_read() and len(rows) >= 24
    for family, cells in rows.items():
        for law, cell in zip(TABLES[title], cells, strict=True):
            right = cell.isdecimal() if asked(family, law) else cell in "ABCDEFGH" and cell
            assert right, (family, law.name, cell)


def test_at_least_24_families_keep_all_of_it() -> None:
    exempt = frozenset().union(*(e.families for e in EXEMPT))
    assert len({*law_table.families_read()} - exempt) >= 24


def test_every_letter_has_its_reason() -> None:
    text = written()
    assert all(line in text for line in law_table.reasons())
    families, names = {*law_table.families_read()}, {*LAWS}
    assert all(e.families <= families and e.laws <= names for e in EXEMPT)


def test_every_law_is_a_test_and_is_explained() -> None:
    laws = [law for table in TABLES.values() for law in table]
    assert len(laws) == len(LAWS)  # no name twice
    for law in laws:
        assert f"* *{law.name}*: {law.meaning}." in written()
        file, _, test = law.test.partition("::")
        tree = ast.parse((law_table.ROOT / law_table.ROOM / file).read_text("utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, law


def test_a_report_is_read_by_family_and_law(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    law = LAWS["itself"].test.partition("::")[2]
    case = '<testcase classname="tests.host.test_transformers" name="{}"{}'
    report.write_text(
        "<testsuites><testsuite>"
        + case.format(f"{law}[Flux]", "/>")
        + case.format(f"{law}[heun-Flux]", "><failure/></testcase>")
        + case.format(f"{law}[SD3]", "><error/></testcase>")
        + case.format("test_other[Flux]", "/>")
        + "</testsuite></testsuites>"
    )
    later = tmp_path / "later.xml"
    later.write_text(
        f"<testsuites><testsuite>{case.format(f'{law}[SD3]', '/>')}</testsuite></testsuites>"
    )
    families = ["Flux", "SD3"]
    text = law_table.tables(law_table.outcomes([report, later], families), families)
    headings, rows = rows_of(text, "A reference from one photo")
    place = headings.index("itself")
    assert rows["Flux"][place] == "**1 of 2**" and rows["SD3"][place] == "1"
    stands = headings.index("stands")
    assert rows["Flux"][stands] == "" and rows["SD3"][stands] == "A"
