"""Saved references: where they lie, and where the next one goes."""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from unicodedata import category

import folder_paths

from ...models.claims import dead, first_free

REFERENCES = "kindred_references"  # their folder beside checkpoints and loras


def register_references(shipped: Path) -> None:
    """models/kindred_references, the place in the output folder where Save Reference writes unless
    told otherwise, and the pack's own.
    """
    paths, endings = folder_paths.folder_names_and_paths.setdefault(REFERENCES, ([], set()))
    endings.add(".safetensors")
    for folder in (
        Path(folder_paths.models_dir) / REFERENCES,
        Path(folder_paths.get_output_directory()) / "kindred",
        shipped,
    ):
        folder_paths.add_model_folder_path(REFERENCES, str(folder))


def reference_files() -> list[str]:
    """Read from the disk each time: the host's cached list misses a file of the same clock tick,
    and fails when a folder is gone.
    """
    return folder_paths.get_filename_list_(REFERENCES)[0]


def reference_path(name: str) -> Path:
    """The file behind a name of the list; FileNotFoundError in the host's words where it is gone,
    ValueError where there are two.
    """
    path = Path(folder_paths.get_full_path_or_raise(REFERENCES, name))
    files = {
        file.resolve()
        for folder in folder_paths.get_folder_paths(REFERENCES)
        if (file := Path(folder, name)).is_file()
    }
    if len(files) > 1:
        raise ValueError(
            f"{name} is the name of {len(files)} files: {', '.join(map(str, sorted(files)))}. "
            f"Rename all but one."
        )
    return path


@contextmanager
def new_reference_path(prefix: str) -> Iterator[tuple[Path, str]]:
    """A path that no file has, numbered as the host numbers what it saves, and its name below the
    output folder; no other process gets it while the block runs.

    `%date:yyyy-MM-dd%` is filled in as the canvas does. Raises the host's own Exception for a
    prefix that leads out of the output folder, ValueError for one that no file can have, OSError
    where the system refuses the folder.
    """
    folder, name, counter, subfolder = _numbered(prefix)
    # the host counts from 1 where a prefix ends in a slash
    paths = (Path(folder, f"{name}_{n:05}_.safetensors") for n in count(counter))
    for left in Path(folder).glob(f".{glob.escape(name)}_*_.safetensors.*"):
        if left.suffix in (".claim", ".lock"):  # of a process that was killed behind its last step
            dead(left)
    with ExitStack() as stack:
        try:
            path = stack.enter_context(first_free(paths))
        except OSError as error:
            raise OSError(
                error.errno, f"{folder} cannot be written to: {error.strerror or error}"
            ) from error
        yield path, Path(subfolder, path.name).as_posix()


def _numbered(prefix: str) -> tuple[str, str, int, str]:
    """The folder, the name, the first number and the subfolder of a prefix."""
    try:
        if not nameable(prefix):
            raise ValueError("it holds characters that cannot be seen")
        if not os.path.basename(os.path.normpath(prefix)).strip(" ."):
            raise ValueError("it is empty")
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            dated(prefix, datetime.now()), folder_paths.get_output_directory()
        )
        # as long as the name it is written under
        Path(folder, f".{name}_{counter:05}_.safetensors.{'0' * 24}").exists()
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (
            errno.ENAMETOOLONG,
            errno.EINVAL,
            errno.EILSEQ,
        ):
            raise OSError(
                error.errno,
                f"the folder of filename_prefix {prefix!r:.60} cannot be used: {error.strerror}"
                f"{f' ({error.filename})' if error.filename else ''}",
            ) from error
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"filename_prefix is {prefix!r:.60}, which no file can be called ({why}). Give a short "
            f"name such as "
            "kindred/reference."
        ) from error
    return folder, name, counter, subfolder


def dated(prefix: str, now: datetime) -> str:
    """`%date:yyyy-MM-dd hh:mm:ss%` filled in, as the canvas does before it sends a prompt; over the
    API nobody else would.
    """
    numbers = {"M": now.month, "d": now.day, "h": now.hour, "m": now.minute, "s": now.second}

    def part(match: re.Match[str]) -> str:
        letters = match[0]
        if letters[0] == "y":
            return f"{now.year:04}"[4 - len(letters) :]
        return f"{numbers[letters[0]]:0{len(letters)}}"

    return re.sub(
        r"%date:([^%]+)%",
        lambda match: re.sub("yyyy|yy|MM?|dd?|hh?|mm?|ss?", part, match[1]),
        prefix,
    )


def nameable(text: str) -> bool:
    """No NUL, line end or half character in it: some systems take them, no person can type them."""
    return not any(category(c) in ("Cc", "Cs") for c in text)


def is_listed(path: Path) -> bool:
    return any(
        path.resolve().is_relative_to(Path(folder).resolve())
        for folder in folder_paths.get_folder_paths(REFERENCES)
    )
