"""The table of laws in docs/networks.md: written by a run of the tests, for every family that is read."""

from __future__ import annotations

import ast
from pathlib import Path

import law_table


def written() -> list[list[str]]:
    """The rows of the table as it stands on the page."""
    page = law_table.PAGE.read_text("utf-8")
    part = page[page.index(law_table.BEGIN) : page.index(law_table.END)]
    rows = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


# whose keys hold no positions that turn, and the laws that therefore do not ask them
UNPLACED = {"SD3", "SD3.5", "AuraFlow", "PixArtSigma", "HunyuanDiT", "ErnieImage"}
OF_POSITIONS = {"turned", "stands"}
# whose queries are heard with their positions on them, so that no concept is read
WITHOUT_CONCEPTS = {"HunyuanDiT", "ErnieImage"}
OF_CONCEPTS = {"concept", "silent", "rows", "split", "both"}


def test_every_family_that_is_read_is_in_the_table_and_keeps_every_law() -> None:
    heading, _, *rows = written()
    assert heading == ["family", *law_table.LAWS]
    assert [row[0] for row in rows] == law_table.families_read() and len(rows) >= 24
    for family, *cells in rows:
        left_out = OF_POSITIONS if family in UNPLACED else set()
        left_out = left_out | (OF_CONCEPTS if family in WITHOUT_CONCEPTS else set())
        empty = {law for law, cell in zip(heading[1:], cells) if not cell.isdecimal()}
        assert empty == left_out, family


def test_every_law_is_a_test_and_is_explained() -> None:
    assert law_table.MEANINGS.keys() == law_table.LAWS.keys()
    for law in law_table.LAWS.values():
        file, _, test = law.partition("::")
        tree = ast.parse((law_table.ROOT / law_table.ROOM / file).read_text("utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, law


def test_a_report_is_read_by_family_and_law(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    law = law_table.LAWS["itself"].partition("::")[2]
    case = '<testcase classname="tests.host.test_transformers" name="{}"{}'
    report.write_text(
        "<testsuites><testsuite>"
        + case.format(f"{law}[Flux]", "/>")
        + case.format(f"{law}[heun-Flux]", "><failure/></testcase>")
        + case.format(f"{law}[Flux2]", "/>")
        + case.format("test_other[Flux]", "/>")
        + "</testsuite></testsuites>"
    )
    rows = law_table.table(law_table.outcomes(report, ["Flux", "Flux2"]), ["Flux", "Flux2"])
    one, other = (line.split("|") for line in rows.splitlines() if line.startswith("| Flux"))
    place = [*law_table.LAWS].index("itself") + 2
    assert one[place] == " **1 of 2** " and other[place] == " 1 " and one[place + 1] == "  "
