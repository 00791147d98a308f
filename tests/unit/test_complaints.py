"""docs/complaints.md names tests that are there, and every number of the reading list."""
from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in
        (ROOT / "docs" / "complaints.md").read_text("utf-8").splitlines() if re.match(r"\| \d", line)]
NAMED = sorted({name for row in ROWS for name in re.findall(r"`([^`]+::[^`]+)`", row[2])})


def test_every_named_test_is_there() -> None:
    files = {file: (ROOT / "tests" / file).read_text("utf-8") for file in {name.partition("::")[0] for name in NAMED}}
    gone = [name for name in NAMED if not re.search(rf"^(async )?def {name.partition('::')[2]}\(", files[name.partition("::")[0]], re.M)]
    assert len(NAMED) > 90 and not gone


def test_every_number_is_answered_once_by_a_test_or_a_limit() -> None:
    assert sorted(int(n) for row in ROWS for n in row[0].split(",")) == list(range(1, 95))
    assert all(len(row) == 4 and row[1] and ("::" in row[2] or row[2] == "none" and row[3]) for row in ROWS)
