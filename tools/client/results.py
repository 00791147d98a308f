"""Where programs put what they make. A folder that one of them makes in this repository is none of the repository's files."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IN_GIT = (
    "; git ignores one that is made here, not one that is there already"  # for the help of --out
)


def make_folder(path: Path) -> Path:
    """Make it with its parents: -> `path`. Inside the repository the topmost new one gets a .gitignore that ignores all of it.

    One that was there is left as it is: whoever names it may want the files in git. Raises OSError.
    """
    new = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    if new and new[-1].resolve().parent.is_relative_to(ROOT):
        (new[-1] / ".gitignore").write_text("*\n", "utf-8")
    return path


def prepare(folder: Path | None, *files: Path | None) -> None:
    """Make an output folder and those of single files, before the work: SystemExit where one cannot be, or a file is a folder."""
    try:
        for place in (folder, *(file and file.parent for file in files)):
            if place is not None:
                make_folder(place)
    except OSError as error:
        raise SystemExit(
            f"{error.filename} cannot be a folder ({error.strerror}). Give another --out or --json."
        ) from None
    for file in files:
        if file is not None and file.is_dir():
            raise SystemExit(
                f"{file} is a folder, and a file is to be written. Give another --json."
            )
