"""The folder that the outputs of jobs are saved in, from the standard library."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from changes import Graph, title
from client import Answered, Client
from jobs import Job, Voice
from results import make_folder

SAVE_REFERENCE, LOAD_REFERENCE = "KindredSaveReference", "KindredLoadReference"


@dataclass
class Shelf:
    """The folder that everything is saved in: NUMBER_TITLE_INDEX, the job's number counting on from what is there."""

    folder: Path
    first: int = 1

    def __post_init__(self) -> None:
        make_folder(self.folder)
        numbers = [
            int(match[1])
            for path in self.folder.iterdir()
            if (match := re.match(r"(\d{5,})_", path.name))
        ]
        self.first = max(numbers, default=0) + 1

    def keep(self, job: Job, name: str, index: int, suffix: str, data: bytes) -> str:
        """Write one file under a name that was free. OSError where it could not be written; then nothing is left of it."""
        letters = sys.getfilesystemencoding()
        words = re.sub(r"\W+", "_", name.encode(letters, "ignore").decode(letters)).strip("_")[:60]
        stem = f"{self.first + job.number - 1:05}_{words or 'output'}"
        path, file = self.folder / f"{stem}_{index}{suffix}", None
        while file is None:
            try:
                file = path.open("xb")
            except FileExistsError:  # somebody's, perhaps of this very moment
                index += 1
                path = self.folder / f"{stem}_{index}{suffix}"
            except OSError as error:
                raise OSError(f"{path} could not be written: {error}") from error
        try:
            with file:
                file.write(data)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(f"{path} could not be written: {error}") from error
        return str(path)


def files_of(
    graph: Graph, outputs: Mapping[str, Any]
) -> Iterator[tuple[str, int, Mapping[str, str] | str]]:
    """(title, index, file or text) of all that the nodes gave; a saved subject is a file too, and the
    pictures that Load Reference shows of what it read are no result.
    """
    for node in sorted(
        outputs, key=[*graph, *outputs].index
    ):  # as the workflow has them, whichever came first
        name, index = title(graph, node), 0
        kind = graph.get(node, {}).get("class_type")
        for things in outputs[node].values():
            for thing in things if isinstance(things, list) else ():
                picture = isinstance(thing, dict) and "filename" in thing
                if isinstance(thing, str) or (picture and kind != LOAD_REFERENCE):
                    index += 1
                    yield name, index, thing
                if isinstance(thing, str) and kind == SAVE_REFERENCE:
                    folder, _, file = (
                        thing.partition(".safetensors")[0] + ".safetensors"
                    ).rpartition("/")
                    yield name, index, {"filename": file, "subfolder": folder, "type": "output"}


def keeper(shelf: Shelf, voice: Voice) -> Callable[[Client, Job, Graph, Mapping[str, Any]], None]:
    """Fetches everything, then saves it: a host that goes away in between leaves no half of a job."""

    def keep(client: Client, job: Job, graph: Graph, outputs: Mapping[str, Any]) -> None:
        fetched = []
        for name, index, thing in files_of(graph, outputs):
            if isinstance(thing, str):
                fetched.append((name, index, ".txt", thing.encode()))
                continue
            try:
                fetched.append((name, index, Path(thing["filename"]).suffix, client.view(thing)))
            except Answered as error:
                if thing.get("type") != "temp":  # previews do not survive a restart
                    raise
                voice.say(client.url, f"{name}: {error}")
        for name, index, suffix, data in fetched:
            job.files.append(shelf.keep(job, name, index, suffix, data))

    return keep
