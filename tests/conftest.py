"""For every room: the checkout is importable as `kindred`, torch has one thread and a known seed."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [
    place for place in sys.path if Path(place or ".").resolve() != ROOT
]  # `python -m pytest` puts it there
sys.path += [str(ROOT / "tools" / room) for room in ("client", "workshop", "evidence")]
sys.path.append(str(ROOT / "tests"))

from checkout import as_kindred  # noqa: E402
from environment import STRAYS  # noqa: E402
from terminal import lasting, restore_signals  # noqa: E402

as_kindred()
restore_signals()  # every child would inherit them
for stray in STRAYS:
    os.environ.pop(stray, None)


@pytest.fixture(scope="session")
def root() -> Path:
    """The pack's folder."""
    return ROOT


@pytest.fixture(autouse=True)
def known_seed() -> None:
    """Each test starts from the same random state and one thread, if it uses torch at all."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before the reporter takes sys.stdout
def pytest_configure(config: pytest.Config) -> None:
    """A report that nobody reads ends no test. Property tests: the same examples every time, no clock, no folder in the checkout."""
    sys.stdout = lasting(sys.stdout)
    try:
        from hypothesis import settings
    except ImportError:
        return
    settings.register_profile(
        "kindred", derandomize=True, deadline=None, database=None, max_examples=25
    )
    settings.load_profile("kindred")
