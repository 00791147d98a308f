"""What both demos say: the progress while a host works, and the figures afterwards."""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkout import version
from client import Client, Progress


@dataclass
class Stopwatch:
    """Seconds per node, from the progress messages of a run; draws one line while it runs."""

    titles: Mapping[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    running: str | None = None
    since: float = field(default_factory=time.monotonic)

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.node != self.running:
            if self.running:
                self.seconds[self.running] = self.seconds.get(self.running, 0.0) + now - self.since
            self.running, self.since = progress.node, now
        self.steps[progress.node] = max(progress.value, self.steps.get(progress.node, 0))
        count = f" {progress.value}/{progress.maximum}" if progress.maximum else ""
        sys.stderr.write(f"\r\033[K  {self.titles.get(progress.node, progress.node)}{count}")
        sys.stderr.flush()

    def stop(self) -> None:
        self(Progress("", 0, 0))
        sys.stderr.write("\r\033[K")


def with_progress(client: Client, graph: Mapping[str, Any], watch: Stopwatch) -> dict[str, Any]:
    """Outputs by node; a job may take a day."""
    outputs = client.run(graph, watch, timeout=24 * 3600)
    watch.stop()
    return outputs


def native_size(checkpoint: Path) -> int:
    """Pixels the checkpoint was trained at, from the tensor names in its header (SDXL 1024, SD2.x 768, else 512)."""
    with checkpoint.open("rb") as file:
        if checkpoint.suffix != ".safetensors":
            return 512
        length = struct.unpack("<Q", file.read(8))[0]
        names = file.read(min(length, 1 << 24))
    if b"conditioner.embedders.1." in names:
        return 1024
    return 768 if b"cond_stage_model.model." in names else 512


def report(
    args: argparse.Namespace,
    command: str,
    settings: Mapping[str, Any],
    figures: Mapping[str, float],
    shown: str,
) -> None:
    """report.json, a copy of it where --json says, the figures on the terminal, and what to open.

    shown: what the sheet shows, in words.
    """
    content = {
        "command": command,
        "version": version(),
        "seed": args.seed,
        **settings,
        "figures": figures,
    }
    for path in filter(None, (args.out / "report.json", args.json)):
        path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    for name, value in sorted(figures.items()):
        print(f"  {name:24} {value:.3f}")
    print(f"\nOpen {(args.out / 'sheet.png').resolve()}: {shown}.")
