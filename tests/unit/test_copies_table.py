"""The table of waits and copies in docs/performance.md is written from a report of the tests."""

from __future__ import annotations

from pathlib import Path

import copies_table


def test_a_report_is_read_and_becomes_the_table(tmp_path: Path) -> None:
    report, given = tmp_path / "report.xml", {"a story": (1, 0, 2, 8), "plain": (0, 0, 0, 0)}
    cases = [
        f'<testcase name="{way}"><properties><property name="way" value="{way}"/>'
        + "".join(
            f'<property name="{column}" value="{value}"/>'
            for column, value in zip(copies_table.COLUMNS, cost)
        )
        + "</properties></testcase>"
        for way, cost in given.items()
    ]
    report.write_text(
        f'<testsuites><testsuite>{"".join(cases)}<testcase name="x"/></testsuite></testsuites>'
    )
    assert copies_table.costs(report) == given
    written = copies_table.table(given)
    assert "| a story | 1 | 0 | 2 | 8 |\n| plain | 0 | 0 | 0 | 0 |" in written


def test_the_page_has_its_place() -> None:
    page = copies_table.PAGE.read_text("utf-8")
    assert page.count(copies_table.BEGIN) == page.count(copies_table.END) == 1
