"""The newest ComfyUI frontend that the package index has, beside the environment and never in it.

Standard library only: dev.py imports it before anything is installed. `dev.py test --newest-frontend` starts the host of the browser tests
with it (KINDRED_FRONTEND names its folder); what it gave last stands in docs/compatibility.md.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from environment import Progress, Refusal, cache_folder, only_one, pip

PACKAGE = "comfyui-frontend-package"
VARIABLE = "KINDRED_FRONTEND"  # a folder with an index.html; unset: the environment's own
FOLDER = "newest-frontend"  # in the cache folder
WITHOUT = " Without --newest-frontend the tests take the pinned frontend, which is there already."


@dataclass(frozen=True)
class Frontend:
    """A frontend on disk."""

    version: str
    root: Path  # what the host's --front-end-root takes


def find(folder: Path) -> Frontend:
    """What pip has put into `folder`; Refusal where that is no frontend."""
    index = next(folder.glob("*/static/index.html"), None)
    metadata = next(folder.glob("*.dist-info/METADATA"), None)
    version = metadata and re.search(r"^Version: (\S+)$", metadata.read_text("utf-8"), re.M)
    if index is None or not version:
        raise Refusal(
            f"{folder} holds {', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}, but no static/index.html of "
            f"{PACKAGE}: look at what your package index gives under that name."
        )
    return Frontend(version[1], index.parent)


def fetch(python: Path) -> Frontend:
    """The newest one, fetched anew by the pip of `python`; Refusal says why it could not be."""
    home = cache_folder() / FOLDER
    log = home.with_suffix(".log")
    with only_one(home.with_suffix(".lock")), Progress("newest frontend") as progress:
        shutil.rmtree(home, ignore_errors=True)
        log.unlink(missing_ok=True)
        install = ["install", "--no-deps", "--no-compile", "--only-binary", ":all:", "--upgrade"]
        try:
            pip(python, [*install, "--target", str(home), PACKAGE], log, progress)
        except Refusal as why:
            raise Refusal(f"{why}{WITHOUT}") from why
        return find(home)
