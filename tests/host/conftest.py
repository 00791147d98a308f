"""The real ComfyUI in this process, on the CPU, with the pack loaded by the host's own loader.

It is loaded when pytest collects this folder, so that `from kindred.models... import ...` at the top of a test gives the
very classes that the host holds. Fixtures: `pack` (the package), `host` (the host's `nodes` module), `node` (id -> class).
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from boot import boot

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


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if HOST else Absent.from_parent(parent, path=module_path)


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
