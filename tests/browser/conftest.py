"""The real frontend in a headless Chromium, on a real server. Fixtures: `server`, `chromium`, `canvas` (once per renderer and file).

Screenshots are kept in the folder KINDRED_SHOTS; else in a temporary one of pytest.
"""
from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from canvas import Browser, Canvas, NoBrowser, browser
from client import HostServer

HOST = os.environ.get("KINDRED_HOST")


@pytest.fixture(scope="session")
def server() -> Iterator[HostServer]:
    """One server for the whole room."""
    if not HOST:
        pytest.skip("no host: KINDRED_HOST names a ComfyUI folder (python3 dev.py test sets it)")
    with HostServer(cpu=True, threads=1) as running:
        yield running


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Installed where it may be; else the whole room is skipped, and says so loudly."""
    try:
        with browser() as started:
            yield started
    except NoBrowser as why:
        warnings.warn(f"THE BROWSER TESTS DID NOT RUN: {why}", stacklevel=1)
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
