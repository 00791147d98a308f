"""What users install: the files that git tracks, less those that .comfyignore names, as `comfy node pack` puts them together.

python3 tools/archive.py    lists them with their sizes
"""
from __future__ import annotations

import fnmatch
import subprocess
from pathlib import Path, PurePosixPath

from terminal import run_program

ROOT = Path(__file__).resolve().parent.parent


def files(*suffixes: str) -> list[str]:
    """Paths, relative to the root, of what git tracks or would track; ends of names narrow them down."""
    told = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                          capture_output=True, encoding="utf-8", errors="surrogateescape")
    if told.returncode == 0:
        names = [name for name in told.stdout.split("\0") if name and (ROOT / name).is_file()]
    else:  # an unpacked archive, no git
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]
        names = [name for name in names if not any(part.startswith(".") or part == "__pycache__" for part in Path(name).parts)]
    return sorted(name for name in names if not suffixes or name.endswith(suffixes))


def ignored(name: str) -> bool:
    """Whether .comfyignore keeps `name` out of the archive; of gitignore's syntax: folders, one-star names, exceptions, last rule wins.

    As in gitignore a rule without a slash before its end holds in every folder: docs/ would be web/docs/ too.
    """
    out, places = False, PurePosixPath(name)
    for line in (ROOT / ".comfyignore").read_text("utf-8").splitlines():
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
