"""The real frontend in a headless Chromium, on a real server. Fixtures: `server`, `chromium`, `canvas` (once per renderer and file).

Screenshots are kept in the folder KINDRED_SHOTS; else in a temporary one of pytest. KINDRED_FRONTEND: a frontend's folder instead of the
environment's (python3 dev.py test --newest-frontend sets it).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from canvas import Browser, Canvas, NoBrowser, browser
from checkout import ROOT
from host_server import HostServer
from newest_frontend import VARIABLE

sys.path.append(str(Path(__file__).resolve().parent))  # tests import hands from here
HOST, FRONTEND = os.environ.get("KINDRED_HOST"), os.environ.get(VARIABLE)
NO_BROWSER = 77  # exit code of a run that had none: dev.py says so in its last line
WHY = pytest.StashKey[str]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus) -> None:
    if exitstatus == 0 and WHY in session.config.stash:
        session.exitstatus = NO_BROWSER


def pytest_terminal_summary(terminalreporter, config) -> None:
    if WHY in config.stash:
        terminalreporter.section("THE BROWSER TESTS DID NOT RUN", red=True, bold=True)
        terminalreporter.line(config.stash[WHY])


@pytest.fixture(scope="session")
def server() -> Iterator[HostServer]:
    """One server for the whole room, with small random files for the workflows that name people's own."""
    if not HOST:
        pytest.skip("no host: KINDRED_HOST names a ComfyUI folder (python3 dev.py test sets it)")
    frontend = ["--front-end-root", FRONTEND] if FRONTEND else []
    small = [ROOT / "tests" / "small_models"]
    with HostServer(cpu=True, threads=1, packs=small, arguments=frontend) as running:
        yield running


@pytest.fixture(scope="session")
def chromium(request) -> Iterator[Browser]:
    """Installed where it may be; else the whole room is skipped, and says so loudly."""
    try:
        with browser() as started:
            yield started
    except NoBrowser as why:
        request.config.stash[WHY] = str(why)
        pytest.skip(f"no browser: {why}")


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "vue"])
def canvas(request, server: HostServer, chromium: Browser) -> Iterator[Canvas]:
    """A fresh user's page, in each of the two renderers; the tests of a file share it."""
    with chromium.page(server.url, vue=request.param) as page:
        yield page


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    """Where screenshots are kept."""
    folder = Path(os.environ.get("KINDRED_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def tidied(request) -> None:
    """A test starts without the complaints and overlays of the one before."""
    if "canvas" in request.fixturenames:
        request.getfixturevalue("canvas").tidy()
