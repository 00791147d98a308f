"""The room without the host."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent))  # tests import small_unet from here


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """tools/client/automate.py waits a moment where it waits seconds."""
    from automating import hurry

    hurry(monkeypatch)


@pytest.fixture
def automated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """Runs that program: its exit code, its report, what it said."""
    from automating import program

    return program(tmp_path, capsys)
