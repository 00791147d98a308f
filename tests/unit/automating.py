"""tools/client/automate.py run as a program of a test: its workflow, its clock, its report."""

from __future__ import annotations

import json

import automate
import jobs
from automate import main

GRAPH = {
    "1": {"class_type": "Load", "inputs": {"image": "a.png"}, "_meta": {"title": "Photo"}},
    "2": {
        "class_type": "Draw",
        "inputs": {"prompts": "a cat", "seed": 7, "steps": 12},
        "_meta": {"title": "Draw it"},
    },
    "3": {"class_type": "Method", "inputs": {"seed": 0}},
    "4": {
        "class_type": "KindredLoadReference",
        "inputs": {"file": "old.safetensors"},
        "_meta": {"title": "Subject"},
    },
}


def hurry(monkeypatch) -> None:
    """Short waits between questions, and no signals."""
    for name, seconds in (("POLL", 0.2), ("SILENCE", 0.02), ("FIRST", 0.02)):
        monkeypatch.setattr(jobs, name, seconds)
    monkeypatch.setattr(
        automate.signal, "signal", lambda *_: None
    )  # main is not the main program here


def program(tmp_path, capsys):
    """Runs it, with that workflow, against the hosts that it is called with: its exit code, its report, what it said."""
    (tmp_path / "w.json").write_text(json.dumps(GRAPH), "utf-8")

    def run(*hosts, words=(), patience=5):
        servers = [
            word
            for host in hosts
            for word in ("--server", host if isinstance(host, str) else host.url)
        ]
        code = main(
            [
                str(tmp_path / "w.json"),
                *servers,
                "--out",
                str(tmp_path / "out"),
                "--patience",
                str(patience),
                "--json",
                *words,
            ]
        )
        out, err = capsys.readouterr()
        report = json.loads(out) if out else None
        assert report is None or report["exit_code"] == code
        return code, report, err

    return run
