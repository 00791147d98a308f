"""docs/complaints.md names tests that are there, and every number of the reading list."""
from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in
        (ROOT / "docs" / "complaints.md").read_text("utf-8").splitlines() if re.match(r"\| \d", line)]
NAMED = sorted({name for row in ROWS for name in re.findall(r"`([^`]+::[^`]+)`", row[2])})


def test_every_named_test_is_there_and_runs() -> None:
    """At the top of its file, and neither skipped nor expected to fail; where a host, a browser or time is wanted, that says so itself."""
    stands = {}
    for file in {name.partition("::")[0] for name in NAMED}:
        for node in ast.parse((ROOT / "tests" / file).read_text("utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                stands[f"{file}::{node.name}"] = " ".join(map(ast.unparse, node.decorator_list))
    assert len(NAMED) > 90 and not [name for name in NAMED if re.search(r"mark\.(skip|xfail)\b", stands.get(name, "mark.skip"))]


def test_every_number_is_answered_once_by_a_test_or_a_limit() -> None:
    assert sorted(int(n) for row in ROWS for n in row[0].split(",")) == list(range(1, 95))
    assert all(row[2].count("::") == len(re.findall(r"`[^`]+::[^`]+`", row[2])) for row in ROWS)  # else nobody looks for it
    assert all(len(row) == 4 and row[1] and ("::" in row[2] or row[2] == "none" and row[3]) for row in ROWS)
