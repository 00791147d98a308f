"""The pages for people: short where they have to be, and no link of theirs leads nowhere."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest
from archive import ROOT, files

PAGES = files(".md")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")


def text(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)


def anchors(page: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", text(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    for link in LINK.findall(text(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / PurePosixPath(page).parent / path).resolve() if path else ROOT / page
        if page.startswith("web/docs/") and path.startswith("images/"):
            target = ROOT / "web" / "docs" / path  # ComfyUI serves them from beside the pages
        assert target.is_file(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), f"{page}: {link}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_the_readme_answers_questions_in_the_order_they_come() -> None:
    """What it does is above the first heading; the rest as a newcomer asks."""
    heads = re.findall(r"^## (.+)$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert heads == [
        "Does it work?",
        "Install",
        "Your first three pictures",
        "Your own photo",
        "Your own checkpoint",
        "A story",
        "Saved subjects",
        "Troubleshooting",
        "Behind it",
    ]


def test_the_changelog_parts_each_version_into_new_changed_and_fixed() -> None:
    versions = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.M)[1:]
    assert versions
    for version in versions:
        heads = re.findall(r"^### (.+)$", version, re.M)
        assert heads == [head for head in ("New", "Changed", "Fixed") if head in heads] and heads
        assert not re.search(r"^- ", version.partition("\n### ")[0], re.M), version[:40]
