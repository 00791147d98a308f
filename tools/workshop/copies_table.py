"""Writes the table of waits and copies in docs/performance.md from a run of the tests.

python3 tools/workshop/copies_table.py              runs them (a minute) and writes the table
python3 tools/workshop/copies_table.py --from FILE  takes the JUnit report of a run that there was

Runs in the environment of dev.py, or with KINDRED_HOST in the Python at hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

from terminal import run_program

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- copies: tools/workshop/copies_table.py writes this -->"
END = "<!-- end of copies -->"
TESTS = "tests/host/test_pretended_device.py::test_waits_and_copies_of_a_step"
COLUMNS = ("waits", "down", "up", "once")  # properties of each test


def costs(report: Path) -> dict[str, tuple[int, ...]]:
    """What each way costs, in the order of a JUnit report's tests."""
    by_way = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        if "way" in properties:
            by_way[properties["way"]] = tuple(int(properties[column]) for column in COLUMNS)
    return by_way


def table(ways: Mapping[str, Sequence[int]]) -> str:
    """The page's part between its two marks."""
    lines = [
        "| | waits a step | copies down a step | copies up a step | waits once a run |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [f"| {way} | {' | '.join(map(str, cost))} |" for way, cost in ways.items()]
    return "\n".join([BEGIN, *lines, END])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="report", type=Path, metavar="FILE", help="a JUnit report")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report, code = chosen.report or Path(folder, "report.xml"), 0
        if chosen.report is None:
            options = ["-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
            options.append(f"--junitxml={report}")
            command = [sys.executable, "-m", "pytest", TESTS, *options]
            code = subprocess.run(command, cwd=ROOT).returncode
        written = table(costs(report))
    page = PAGE.read_text("utf-8")
    before, after = page[: page.index(BEGIN)], page[page.index(END) + len(END) :]
    PAGE.write_text(before + written + after, "utf-8")
    return code


if __name__ == "__main__":
    run_program(main)
