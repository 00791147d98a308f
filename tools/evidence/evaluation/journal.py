"""What was measured, one line per measurement, so that a stopped run goes on where it was and nothing is measured twice."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkout import ROOT

# what decides a picture or its score: the pack, the miniature and the programs that drive them
DECIDES = (
    "nodes/**/*.py",
    "models/**/*.py",
    "miniature/*.py",
    "miniature/weights/**/*.safetensors",
    "tools/workshop/miniature_host.py",
    "tools/workshop/boot.py",
    "tools/workshop/pictures.py",
    *(
        f"tools/evidence/evaluation/{name}.py"
        for name in (
            "personalize",
            "pixels",
            "rivals",
            "rival_training",
            "story",
            "story_rivals",
            "own",
            "real",
            "judges",
            "faces",
        )
    ),
)


def fingerprint(host: Path) -> str:
    """Twelve hex digits of the code, the weights and the versions (ComfyUI's, torch's) that decide a measurement."""
    digest = hashlib.sha256(importlib.metadata.version("torch").encode())
    if (release := host / "comfyui_version.py").is_file():
        digest.update(release.read_bytes())
    for path in sorted({path for pattern in DECIDES for path in ROOT.glob(pattern)}):
        digest.update(
            f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()[:12]


class Journal:
    """Measurements by what they are of; a file of JSON lines that only grows.

    A line that a kill cut short is dropped, and measured again. Raises SystemExit for a file that is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.entries = path, dict[str, Mapping[str, Any]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        for number, line in enumerate(lines[:-1], 1):
            try:
                entry = json.loads(line)
                self.entries[self.key(entry["of"])] = entry["values"]
            except (ValueError, KeyError, TypeError):
                raise SystemExit(
                    f"evaluate: line {number} of {path} is no measurement. Take it out, or give another --out."
                ) from None
        if lines[-1]:
            with path.open("rb+") as file:
                file.truncate(path.stat().st_size - len(lines[-1]))

    @staticmethod
    def key(of: Mapping[str, Any]) -> str:
        return json.dumps(of, sort_keys=True)

    def get(self, of: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What was measured of this, or None."""
        return self.entries.get(self.key(of))

    def add(self, of: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Keep a measurement; it is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"of": of, "values": values}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[self.key(of)] = values
