"""Saved references: where they lie, and where the next one goes."""
from __future__ import annotations

from pathlib import Path
from unicodedata import category

import folder_paths

REFERENCES = "kindred_references"  # their folder beside checkpoints and loras


def register_references(shipped: Path) -> None:
    """models/kindred_references, the place in the output folder where Save Reference writes unless told otherwise, and the pack's own."""
    paths, endings = folder_paths.folder_names_and_paths.setdefault(REFERENCES, ([], set()))
    endings.add(".safetensors")
    for folder in (Path(folder_paths.models_dir) / REFERENCES, Path(folder_paths.get_output_directory()) / "kindred", shipped):
        folder_paths.add_model_folder_path(REFERENCES, str(folder))


def reference_files() -> list[str]:
    """Read from the disk each time: the host's cached list misses a file of the same clock tick, and fails when a folder is gone."""
    return folder_paths.get_filename_list_(REFERENCES)[0]


def reference_path(name: str) -> Path:
    """The file behind a name of the list; FileNotFoundError in the host's words where it is gone, ValueError where there are two."""
    path = Path(folder_paths.get_full_path_or_raise(REFERENCES, name))
    found = {file.resolve() for folder in folder_paths.get_folder_paths(REFERENCES) if (file := Path(folder, name)).is_file()}
    if len(found) > 1:
        raise ValueError(f"{name} is the name of {len(found)} files: {', '.join(map(str, sorted(found)))}. Rename all but one.")
    return path


def new_reference_path(prefix: str) -> tuple[Path, str]:
    """A path that does not exist yet, numbered as the host numbers what it saves, and its name below the output folder.

    Raises the host's own Exception for a prefix that leads out of the output folder, ValueError for one that no file can have.
    """
    try:
        if not nameable(prefix):
            raise ValueError("it holds characters that cannot be seen")
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
        while (path := Path(folder, f"{name}_{counter:05}_.safetensors")).exists():  # the host counts from 1 where a prefix ends in a slash
            counter += 1
        (path.parent / f".{path.name}.{'0' * 16}").exists()  # as long as the name it is written under
    except (ValueError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"filename_prefix is {prefix!r:.60}, which no file can be called ({why}). Give a short name such as "
                         "kindred/reference.") from error
    return path, Path(subfolder, path.name).as_posix()


def nameable(text: str) -> bool:
    """No NUL, line end or half character in it: some systems take them, no person can type them."""
    return not any(category(c) in ("Cc", "Cs") for c in text)


def is_listed(path: Path) -> bool:
    return any(path.resolve().is_relative_to(Path(folder).resolve()) for folder in folder_paths.get_folder_paths(REFERENCES))
