"""The host's ways to keep results from prompt to prompt: under each of them the same pictures, the first time and again.

One server to a mode; a mode decides which nodes run anew and whose outputs are handed out again, or dropped while a prompt still runs.
"""

from __future__ import annotations

import os
import time
from io import BytesIO
from pathlib import Path

import demo
import numpy as np
import pytest
from client import outcome
from host_server import HostServer
from PIL import Image
from soaking.mix import MIX, PICTURES, SAVERS, Graph, Turn, own

STEPS = 4
# the second time out of the cache where it still is, else anew
ORDER = (
    "check",
    "saves",
    "loads",
    "both",
    "anchored",
    "more",
    "told",
    "other seed",
    "both",
    "saves",
    "anchored",
    "more",
    "inverted",
    "check",
)
MODES = {
    "everything": ["--cache-lru", "500"],
    "nothing": ["--cache-none"],
    "no RAM left": ["--cache-ram", "100000", "100000"],
}
if os.environ.get("KINDRED_LONG") == "1":  # these keep what the usual one keeps
    MODES |= {
        "classic": ["--cache-classic"],
        "one result": ["--cache-lru", "1"],
        "high RAM": ["--high-ram"],
    }


def graph_of(kind: str, saved: dict[str, str]) -> Graph:
    """A prompt of the soak, all of them of the first round; or the one that saves a reference with another seed for the sampler alone."""
    turn = Turn(0, STEPS, saved)
    if kind in MIX:
        return MIX[kind](turn)
    graph = own(turn)
    graph[demo.SAMPLER]["inputs"]["seed"] = 5
    return graph


def finished(client, graph: Graph) -> tuple[dict, int]:
    """What the host keeps of the prompt, and how many results it had kept for it."""
    key, end = client.queue(graph), time.monotonic() + 300
    while (history := client.history(key)) is None:
        assert time.monotonic() < end, "the prompt does not come to an end"
        time.sleep(0.05)
    return outcome(history), next(
        len(data["nodes"])
        for kind, data in history["status"]["messages"]
        if kind == "execution_cached"
    )


def told_by(server: HostServer) -> tuple[list[list[np.ndarray]], list[bytes], int]:
    """The pictures of every prompt, the files that were saved, and how many results came from the cache."""
    saved, drawn, files, cached = {}, [], [], 0
    for kind in ORDER:
        outputs, kept = finished(server.client, graph_of(kind, saved))
        cached += kept
        drawn.append(
            [
                np.asarray(Image.open(BytesIO(server.client.view(i))))
                for i in outputs[PICTURES]["images"]
            ]
        )
        if kind in SAVERS:
            name = outputs[SAVERS[kind]]["text"][0].partition(",")[0]
            saved[kind] = name.removeprefix("kindred/")
            files.append((Path(server.base) / "output" / name).read_bytes())
    return drawn, files, cached


@pytest.fixture(scope="module")
def usual(server):
    """As a host draws that was started without any of it; it is left without these results and files."""
    before = set(server.base.glob("output/**/*.safetensors"))
    server.client.free()
    yield told_by(server)
    for path in set(server.base.glob("output/**/*.safetensors")) - before:
        path.unlink()


@pytest.mark.parametrize("mode", MODES)
def test_every_cache_mode_draws_what_the_usual_one_draws(usual, mode):
    """Also the second time, and beside references that came out of the cache; what is saved is the same file, to the byte."""
    with HostServer(cpu=True, threads=1, arguments=MODES[mode]) as server:
        drawn, files, cached = told_by(server)
    for kind, one, other in zip(ORDER, usual[0], drawn, strict=True):
        assert len(one) == len(other) > 0 and all(map(np.array_equal, one, other)), kind
    assert files == usual[1] and len(set(files)) == 2  # twice the photo's, twice the anchors'
    assert (cached == 0) == (mode in ("nothing", "no RAM left"))
