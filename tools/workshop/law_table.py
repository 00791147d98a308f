"""Writes the tables of laws in docs/networks.md: every family of transformers against every law,
from a run of the tests.

python3 tools/workshop/law_table.py             runs them (half an hour) and writes the tables
python3 tools/workshop/law_table.py --from FILE... takes the JUnit reports of runs that there were; of
a case that is in several the last counts

Runs in the environment of dev.py, or with KINDRED_HOST in the Python at hand.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

from network_laws import EXEMPT, LAWS, TABLES
from terminal import run_program

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "networks.md"
BEGIN, END = "<!-- laws: tools/workshop/law_table.py writes this -->", "<!-- end of laws -->"
ROOM = "tests/host"


def family_of(name: str, families: Sequence[str]) -> str | None:
    """The family in a test's parameters: "test_x[heun-Flux]" -> "Flux"."""
    parameters = re.search(r"\[(.*)\]$", name)
    if not parameters:
        return None
    inner = parameters[1]
    return next(
        (f for f in families if inner == f or inner.endswith(f"-{f}") or inner.startswith(f"{f}-")),
        None,
    )


def outcomes(
    reports: Sequence[Path], families: Sequence[str]
) -> Mapping[tuple[str, str], list[bool]]:
    """(family, test) -> whether each of its cases passed, of JUnit reports; of a case that is in
    several the last counts.
    """
    passed: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    for report in reports:
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            name, file = case.get("name", ""), case.get("classname", "").rpartition(".")[2]
            family = family_of(name, families)
            if family is not None:
                test = f"{file}.py::{name.partition('[')[0]}"
                failed = any(child.tag in ("failure", "error", "skipped") for child in case)
                passed[family, test][name] = not failed
    return {key: list(cases.values()) for key, cases in passed.items()}


def tables(passed: Mapping[tuple[str, str], list[bool]], families: Sequence[str]) -> str:
    """The page's part between its two marks."""
    parts = [table(title, passed, families) for title in TABLES]
    return "\n".join([BEGIN, "\n\n".join(parts), "", *reasons(), END])


def table(title: str, passed: Mapping[tuple[str, str], list[bool]], families: Sequence[str]) -> str:
    """One subject's laws, a row for each family, and what they say."""
    laws = TABLES[title]
    lines = [
        f"| {title} | {' | '.join(law.name for law in laws)} |",
        f"| --- |{' --- |' * len(laws)}",
    ]
    for family in families:
        cells = [_cell(passed.get((family, law.test), []), family, law.name) for law in laws]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"* *{law.name}*: {law.meaning}." for law in laws)])


def reasons() -> list[str]:
    """Why a cell holds a letter."""
    return [f"* {_letter(i)}: {one.reason}." for i, one in enumerate(EXEMPT)]


def _letter(index: int) -> str:
    return "ABCDEFGH"[index]


def _cell(cases: list[bool], family: str, law: str) -> str:
    """How many cases of a law hold; a letter where the law does not ask this family."""
    if not cases:
        exempt = (i for i, e in enumerate(EXEMPT) if family in e.families and law in e.laws)
        return next(map(_letter, exempt), "")
    return str(len(cases)) if all(cases) else f"**{sum(cases)} of {len(cases)}**"


def families_read() -> list[str]:
    """The names of the tiny networks that are read, in their order."""
    text = (ROOT / ROOM / "tiny_networks.py").read_text("utf-8")
    rows = text[text.index("READ: dict") : text.index("REFUSED: dict")]
    return re.findall(r'^    "([^"]+)": Family\(', rows, re.MULTILINE)


def ask_the_laws(report: Path) -> int:
    """Run their tests; pytest's exit code."""
    files = dict.fromkeys(law.test.split("::")[0] for law in LAWS.values())
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *(f"{ROOM}/{file}" for file in files), *options]
    every = os.environ | {"KINDRED_LONG": "1"}  # not a part of the families
    return subprocess.run(command, cwd=ROOT, env=every).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="reports", type=Path, metavar="FILE", nargs="+", help="JUnit reports"
    )
    chosen = parser.parse_args(arguments)
    families = families_read()
    with tempfile.TemporaryDirectory() as folder:
        reports, code = chosen.reports or [Path(folder, "report.xml")], 0
        if not chosen.reports:
            code = ask_the_laws(reports[0])
        written = tables(outcomes(reports, families), families)
    page = PAGE.read_text("utf-8")
    before, after = page[: page.index(BEGIN)], page[page.index(END) + len(END) :]
    PAGE.write_text(before + written + after, "utf-8")
    return code


if __name__ == "__main__":
    run_program(main)
