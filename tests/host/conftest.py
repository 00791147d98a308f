"""The real ComfyUI in this process, on the CPU, with the pack loaded by the host's own loader.

It is loaded when pytest collects this folder, so that `from kindred.models... import ...` at the top of a test gives the
very classes that the host holds. Fixtures: `pack` (the package), `host` (the host's `nodes` module), `node` (id -> class).
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from boot import boot
from gate import left_to_the_long_form, long

sys.path.append(str(Path(__file__).resolve().parent))  # tests import studio from here

HOST = os.environ.get("KINDRED_HOST")
REASON = "no host: KINDRED_HOST names a ComfyUI folder (python3 dev.py test sets it)"


def booted(host: Path) -> ModuleType:
    """The host's `nodes` module, or a usage error: a host that was named and does not run is no reason to skip."""
    try:
        return boot(host)
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error


NODES = booted(Path(HOST)) if HOST else None


class Absent(pytest.Module):
    """A test file whose imports would fail without a host: one skip with the reason."""

    def collect(self) -> list:
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    return None if HOST else Absent.from_parent(parent, path=module_path)


@pytest.hookimpl(trylast=True)  # of what -k has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = set() if long() else left_to_the_long_form([item.nodeid for item in items])
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left])
        items[:] = [item for item in items if item.nodeid not in left]


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """The pack as the host loaded it: pack.nodes.inversion, pack.models.masks, ..."""
    return sys.modules["kindred"]


@pytest.fixture(scope="session")
def host() -> ModuleType:
    """The host's `nodes` module: NODE_CLASS_MAPPINGS, common_ksampler, CheckpointLoaderSimple, ..."""
    return NODES


@pytest.fixture(scope="session")
def node(host: ModuleType) -> Callable[[str], type]:
    """node("KindredDDIMInvert") -> the class that the host would run."""
    return host.NODE_CLASS_MAPPINGS.__getitem__


def snapshot() -> dict[str, tuple[int, int]]:
    """Every file in the host's base directory, with size and time, but the thumbnails that Load Reference shows."""
    import folder_paths

    thumbnails = set(Path(folder_paths.get_temp_directory()).glob("kindred_reference_*_.png"))
    return {
        str(p): (p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in Path(folder_paths.base_path).rglob("*")
        if not p.is_dir() and p not in thumbnails
    }


@pytest.fixture(scope="module")
def frozen_heap() -> Iterator[None]:
    """The host's own objects are no garbage, and looking through them takes longer than a run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def born(monkeypatch: pytest.MonkeyPatch) -> list:
    """Weak references to everything of ours that begins with a run."""
    from disturbances import births

    return births(monkeypatch)


@pytest.fixture
def nothing_else_changes() -> Iterator[None]:
    """After the test the plain picture is as before it, and so is every file of the host's folders."""
    import torch
    from networks import random_model
    from studio import plain, sample

    before = snapshot()
    yield
    assert torch.equal(sample(random_model("tiny")), plain()) and snapshot() == before


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Path]]:
    """place(kind): its models folder; what a test puts there goes with it, before anybody looks whether all is as it was."""
    import folder_paths

    if "nothing_else_changes" in request.fixturenames:
        request.getfixturevalue("nothing_else_changes")
    made: list[tuple[Path, set[Path]]] = []

    def give(kind: str) -> Path:
        folder = Path(folder_paths.models_dir) / kind
        folder.mkdir(parents=True, exist_ok=True)
        made.append((folder, set(folder.iterdir())))
        return folder

    yield give
    for folder, before in reversed(made):
        for path in set(folder.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
