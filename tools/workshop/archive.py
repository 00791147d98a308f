"""What users install: the files that git tracks, less those that .comfyignore names, as `comfy node pack` puts them together.

python3 tools/workshop/archive.py    lists them with their sizes
"""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

from terminal import run_program

ROOT = Path(__file__).resolve().parents[2]
# names another repository, as git itself does for its hooks and aliases; what `git rev-parse --local-env-vars` tells, less settings
ELSEWHERE = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_NAMESPACE",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_GRAFT_FILE",
    "GIT_SHALLOW_FILE",
)


def git(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """git in this repository, or in that of `cwd`, whatever the environment says. Code 128 where there is no repository or no git."""
    settings = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    try:
        return subprocess.run(
            ["git", *words],
            cwd=cwd or ROOT,
            env=settings,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
        )
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(words, 128, "", str(error))


def files(*suffixes: str) -> list[str]:
    """Paths, relative to the root, of what git tracks or would track; ends of names narrow them down."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed.returncode == 0 and (ROOT / ".git").exists():
        names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    else:  # an unpacked archive: no git, or that of a folder around it
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]
        names = [
            name
            for name in names
            if not any(part.startswith(".") or part == "__pycache__" for part in Path(name).parts)
        ]
        rules = {
            path.parent.relative_to(ROOT): path.read_text("utf-8")
            for path in ROOT.rglob(".gitignore")
        }
        names = [
            name
            for name in names
            if not any(
                excluded(Path(name).relative_to(place).as_posix(), text)
                for place, text in rules.items()
                if Path(name).is_relative_to(place)
            )
        ]
    return sorted(name for name in names if not suffixes or name.endswith(suffixes))


def ignored(name: str) -> bool:
    """Whether .comfyignore keeps `name` out of the archive."""
    return excluded(name, (ROOT / ".comfyignore").read_text("utf-8"))


def excluded(name: str, rules: str) -> bool:
    """Whether rules leave `name` out; of gitignore's syntax: folders, one-star names, exceptions, last rule wins.

    As in gitignore a rule without a slash before its end holds in every folder: docs/ would be web/docs/ too.
    """
    out, places = False, PurePosixPath(name)
    for line in rules.splitlines():
        pattern = line.split("#")[0].strip()
        if not pattern:
            continue
        rule = pattern.removeprefix("!")
        parts = rule.strip("/").split("/")
        anchored = "/" in rule.rstrip("/")
        for place in (*places.parents, *([] if rule.endswith("/") else [places])):
            have = place.parts if anchored else place.parts[-1:]
            if len(have) == len(parts) and all(map(fnmatch.fnmatchcase, have, parts)):
                out = rule == pattern
    return out


def shipped(*suffixes: str) -> list[str]:
    """The files of the archive."""
    return [name for name in files(*suffixes) if not ignored(name)]


def main() -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in shipped()}
    print("\n".join(f"{size:>12,}  {name}" for name, size in sizes.items()))
    print(f"{sum(sizes.values()):>12,}  bytes in {len(sizes)} files")


if __name__ == "__main__":
    run_program(main)
