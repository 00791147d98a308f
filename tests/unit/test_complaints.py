"""docs/complaints.md and docs/compatibility.md name tests that are there; every number of the reading list is answered."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "complaints.md").read_text("utf-8").splitlines()
    if re.match(r"\| \d", line)
]
NAMED = sorted({name for row in ROWS for name in re.findall(r"`([^`]+::[^`]+)`", row[2])})


def test_every_named_test_is_there_and_runs() -> None:
    """At the top of its file, and neither skipped nor expected to fail; where a host, a browser or time is wanted, that says so itself."""
    stands = {}
    for file in {name.partition("::")[0] for name in NAMED}:
        for node in ast.parse((ROOT / "tests" / file).read_text("utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                stands[f"{file}::{node.name}"] = " ".join(map(ast.unparse, node.decorator_list))
    assert len(NAMED) > 90 and not [
        name for name in NAMED if re.search(r"mark\.(skip|xfail)\b", stands.get(name, "mark.skip"))
    ]


def test_every_number_is_answered_once_by_a_test_or_a_limit() -> None:
    assert sorted(int(n) for row in ROWS for n in row[0].split(",")) == list(range(1, 116))
    assert all(
        row[2].count("::") == len(re.findall(r"`[^`]+::[^`]+`", row[2])) for row in ROWS
    )  # else nobody looks for it
    assert all(
        len(row) == 4 and row[1] and ("::" in row[2] or row[2] == "none" and row[3]) for row in ROWS
    )


def test_every_test_that_the_compatibility_page_names_is_there() -> None:
    """A row's test stands in a file of the tests; a row without a name of its own says "the same"."""
    page = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
    stands = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef)
    } | {path.name for path in (ROOT / "tests").rglob("*.py")}
    named = re.findall(r"`(?:tests/\w+/)?(test_\w+(?:\.py)?)`", page)
    assert len(named) > 60 and not [name for name in named if name not in stands]


def test_no_neighbour_has_two_rows() -> None:
    """By the packs that a row names in brackets: what is said of one stands in one place."""
    lines = (ROOT / "docs" / "compatibility.md").read_text("utf-8").splitlines()
    heads = [
        line.split("|")[1].strip() for line in lines if line.count("|") == 6 and "`test_" in line
    ]
    packs = [
        pack
        for head in heads
        for pack in re.findall(
            r"StyleAligned|NegPip|IP-Adapter|Layered Diffusion|Sage Attention", head
        )
    ]
    assert len(packs) > 3 and len(packs) == len(set(packs))
