"""What a comment or docstring cites stands on a page that the repository ships."""

from __future__ import annotations

import ast
import io
import re
import tokenize

import pytest
from archive import ROOT, files

PAGE = (ROOT / "docs" / "method.md").read_text("utf-8")
SECTIONS = set(re.findall(r"^#{2,3} (\d(?:\.\d)?)\.? ", PAGE, re.M))
LAWS = set(re.findall(r"^- \*\*(I\d+)\*\* ", PAGE, re.M))
TRANSFORMERS = set(
    re.findall(r"^\| D \((\d+)\) \|", PAGE, re.M)
)  # the papers' own equations are checked below
DIFFERENCES = set(re.findall(r"^\| (Q\d+) \|", PAGE, re.M))
CODE = sorted(
    name
    for name in files(".py")
    if name.split("/")[0] in ("models", "nodes", "miniature", "tools", "tests")
)
PAGES = {name.rsplit("/", 1)[-1] for name in files(".md")}


def prose(source: str) -> list[str]:
    """Comments and docstrings of a file."""
    said = [
        t.string
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            said.append(ast.get_docstring(node) or "")
    return [re.sub(r"\s+", " ", text) for text in said]


def unresolved(text: str) -> list[str]:
    """What a piece of prose cites and no page holds."""
    missing = [
        f"section {s}"
        for s in re.findall(r"method\.md,? (?:section )?(\d(?:\.\d)?)", text)
        if s not in SECTIONS
    ]
    for first, last in re.findall(r"\bI(\d+)(?:-I?| to I)(\d+)\b", text):
        missing += [f"I{n}" for n in range(int(first), int(last) + 1) if f"I{n}" not in LAWS]
    missing += [law for law in re.findall(r"\bI\d+\b", text) if law not in LAWS]
    missing += [f"D ({n})" for n in re.findall(r"\bD \((\d+)\)", text) if n not in TRANSFORMERS]
    missing += [q for q in re.findall(r"\bQ\d+\b", text) if q not in DIFFERENCES]
    missing += [page for page in re.findall(r"\b([a-z_]+\.md)\b", text) if page not in PAGES]
    missing += re.findall(
        r"(?<!method)\.md,? (?:section )?\d\.\d", text
    )  # only method.md has numbered sections
    return missing


@pytest.mark.parametrize("name", CODE)
def test_what_is_cited_stands_on_a_shipped_page(name: str) -> None:
    found = {m for text in prose((ROOT / name).read_text("utf-8")) for m in unresolved(text)}
    assert not found, f"{name} cites {sorted(found)}"


@pytest.mark.parametrize(
    "text",
    [
        "as method.md 9.1 has it",
        "law I66",
        "laws I60-I67",
        "Q12",
        "D (5)",
        "host.md has it",
        "performance.md 1.3",
    ],
)
def test_a_citation_of_nothing_is_found(text: str) -> None:
    assert unresolved(text)


def test_the_page_holds_both_papers_equations_and_every_law() -> None:
    assert set(re.findall(r"^\| A \((\d+)\) \|", PAGE, re.M)) == {str(n) for n in range(1, 11)}
    assert set(re.findall(r"^\| B \((\d)\) \|", PAGE, re.M)) == {str(n) for n in range(1, 10)}
    assert TRANSFORMERS == {str(n) for n in (1, 2, 3, 4, 10)}
    assert LAWS == {f"I{n}" for n in range(1, 66)} and DIFFERENCES == {
        f"Q{n}" for n in range(1, 12)
    }
