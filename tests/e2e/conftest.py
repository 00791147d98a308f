"""The real ComfyUI as a server on the CPU, asked through its API. Fixtures: `server` (HostServer), `client` (Client)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import Client
from host_server import HostServer

sys.path.append(str(Path(__file__).resolve().parent))  # tests import prompt_mutants from here
HOST = os.environ.get("KINDRED_HOST")


@pytest.fixture(scope="session")
def server() -> Iterator[HostServer]:
    """One server for the whole run; server.base is its base directory, server.tail() the end of its log."""
    if not HOST:
        pytest.skip("no host: KINDRED_HOST names a ComfyUI folder (python3 dev.py test sets it)")
    with HostServer(cpu=True, threads=1) as running:  # another stage runs beside this one
        yield running


@pytest.fixture(scope="session")
def client(server: HostServer) -> Client:
    return server.client
