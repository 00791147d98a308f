"""The commands of the README and of docs/development.md, one after another in one clone: none leaves
what another one, git or the archive takes for the repository's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import archive
import pytest
from archive import ROOT, files

PAGES = ("README.md", "docs/development.md")
# what each is given here so that it is quick; the commands themselves are the pages'
QUICK = {
    "demo": ["--steps", "4"],
    "demo --story": [
        "--steps",
        "6",
        "--out",
        "docs/story/first",
        "--json",
        "docs/story/figures.json",
    ],
    "test": ["--fast", "-k", "test_archive"],  # after those that leave something
    "evaluate": [
        "--task",
        "personalize",
        "--variant",
        "mine: weight=1",
        "--count",
        "2",
        "--seeds",
        "1",
        "--steps",
        "4",
        "--processes",
        "1",
    ],
    "bench": ["--latent", "8", "--rounds", "1", "--case", "cached_b1", "--json", "bench.json"],
}


def commands() -> list[str]:
    """The dev.py commands of the pages' blocks, in their order, each once; a comment can name one too."""
    text = "\n".join((ROOT / page).read_text("utf-8") for page in PAGES)
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    found = [
        name
        for block in blocks
        for name in re.findall(r"(?:dev\.py |# )(\w+(?: --story)?)(?=\s|:)", block)
    ]
    return [
        name
        for name in dict.fromkeys(found)
        if name.split()[0] in {key.split()[0] for key in QUICK} | {"serve", "soak", "setup"}
    ]


def git(clone: Path, *words: str) -> str:
    who = [
        "-c",
        "user.name=a tester",
        "-c",
        "user.email=tester@localhost",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "core.hooksPath=",
    ]
    done = archive.git(*who, *words, cwd=clone)
    assert done.returncode == 0, done
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would track, in a repository of its own."""
    place = tmp_path_factory.mktemp("clone") / "kindred"
    for name in files():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / name)
    git(place, "init", "-q")
    git(place, "add", "-A")
    git(place, "commit", "-q", "-m", "all")
    return place


def test_every_command_of_the_pages_is_run_here() -> None:
    assert set(commands()) == set(QUICK)


@pytest.mark.slow
def test_the_pages_commands_run_in_their_order_in_one_clone(clone: Path) -> None:
    before = subprocess.run(
        [sys.executable, "tools/workshop/archive.py"], cwd=clone, capture_output=True, text=True
    ).stdout
    for name in commands():
        command, *more = name.split()
        words = [
            "dev.py",
            command,
            "--host",
            os.environ["KINDRED_HOST"],
            "--python",
            sys.executable,
            *more,
            *QUICK[name],
        ]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=clone,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}"
        assert git(clone, "status", "--porcelain") == "", name
        assert (
            subprocess.run(
                [sys.executable, "tools/workshop/archive.py"],
                cwd=clone,
                capture_output=True,
                text=True,
            ).stdout
            == before
        ), name
