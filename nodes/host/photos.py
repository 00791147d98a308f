"""Pictures from the host's folders: the input folder as Load Image lists it, and the pack's
examples in the temp folder.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

import folder_paths
from torch import Tensor

import nodes


def example_name(picture: Path) -> str:
    """The name under which the host finds an offered example."""
    return f"kindred_{picture.name} [temp]"


def offer_example(picture: Path) -> None:
    """Lay an example of the shipped workflows into the host's temp folder, which the host itself
    empties at start and exit.
    """
    target = Path(folder_paths.get_temp_directory(), f"kindred_{picture.name}")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # another thread may read the name, or do the same, meanwhile
        part = target.with_suffix(f".{uuid.uuid4().hex}")
        try:
            shutil.copyfile(picture, part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def input_pictures() -> list[str]:
    """What Load Image lists."""
    folder = Path(folder_paths.get_input_directory())
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return sorted(folder_paths.filter_files_content_types(names, ["image"]))


def picture_exists(name: str) -> bool:
    """Also no for a folder, which the host's own question takes for a picture."""
    return (
        bool(folder_paths.exists_annotated_filepath(name))
        and Path(folder_paths.get_annotated_filepath(name)).is_file()
    )


def is_painted(name: str) -> bool:
    """Whether the page's mask editor wrote this picture, by the name that it gives."""
    return Path(name).name.startswith("clipspace-")


def load_picture(name: str) -> tuple[Tensor, Tensor]:
    """IMAGE [b y x 3] and how transparent it is [b y x], by the host's own loader; of a picture
    without transparency [b 64 64] of 0.
    """
    pictures, clear = nodes.LoadImage().load_image(name)
    return pictures[..., :3], clear


def picture_fingerprint(name: str) -> str:
    """Changes with the file's content."""
    return nodes.LoadImage.IS_CHANGED(name)
