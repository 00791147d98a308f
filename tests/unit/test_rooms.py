"""The three rooms of tools/: each takes only from itself and from those before it, and the client from nobody."""

import subprocess
import sys
from pathlib import PurePosixPath

import pytest
from archive import ROOT, files
from test_architecture import STDLIB, imports

ROOMS = ("client", "workshop", "evidence")
TOOLS = [PurePosixPath(name) for name in files(".py") if name.startswith("tools/")]


def modules(room: str) -> set[str]:
    """What lies in a room under names that the others import."""
    return {path.parts[2].removesuffix(".py") for path in TOOLS if path.parts[1] == room}


def breaches(room: str, taken: set[str]) -> list[str]:
    """Imports of a room's files, wherever they stand, that name something of `taken`."""
    return [
        f"{path}:{line}: {module}"
        for path in TOOLS
        if path.parts[1] == room
        for level, module, line in imports(str(path))
        if level == 0 and module.split(".")[0] in taken
    ]


def test_every_file_lies_in_a_room_under_a_name_of_its_own() -> None:
    assert {path.parts[1] for path in TOOLS} == set(ROOMS)
    assert sum(len(modules(room)) for room in ROOMS) == len(set().union(*map(modules, ROOMS)))


def test_the_client_needs_the_standard_library_and_itself() -> None:
    alone = STDLIB | modules("client")
    taken = {m.split(".")[0] for p in TOOLS for _, m, _ in imports(str(p))} - alone
    assert "torch" in taken and "boot" in taken
    assert not breaches("client", taken)


def test_the_workshop_knows_no_evidence() -> None:
    assert not breaches("workshop", modules("evidence"))
    assert breaches("evidence", modules("workshop"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_rooms_names_are_nobody_elses(room: str) -> None:
    """A module of the standard library by the same name would be hidden, or hide it."""
    assert not modules(room) & STDLIB


def test_the_client_runs_where_only_its_own_folder_is() -> None:
    """No site-packages, no other room."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); import automate, jobs, shelf, plans"
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(ROOT / "tools" / "client")], check=True
    )
