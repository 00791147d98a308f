"""A measurement as a small JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import whole
from ..identity import read_key, tell_key
from ..network.blocks import BlockId, block_name
from .measurement import Measurement
from .prober import Change

KIND, VERSION = "kindred blocks", 1
LARGEST = 4_000_000  # bytes of a file that can be one


def save_measurement(measurement: Measurement, path: Path) -> None:
    """Write it whole or not at all; an older one of this name is replaced. OSError as the disk
    gives it.
    """
    with whole(path) as partial:
        partial.write_text(json.dumps(as_json(measurement), indent=1), encoding="utf-8")


def as_json(measurement: Measurement) -> dict[str, Any]:
    """Plain values. `presets` are for readers; they follow from the figures."""
    names = {name: [*map(block_name, b)] for name, b in measurement.presets.items()}
    return {
        "kind": KIND,
        "version": VERSION,
        "model": str(measurement.model_key),
        "day": measurement.day,
        "presets": names,
        "sigmas": [*measurement.sigmas],
        "size": [*measurement.size],
        "blocks": [[*block] for block in measurement.blocks],
        "figures": {
            change.value: [measurement.figures[change].get(b) for b in measurement.blocks]
            for change in Change
        },
        "key": tell_key(measurement.model_key),
    }


def load_measurement(path: Path) -> Measurement:
    """ValueError, in words, for a file that is none, is damaged or of another version; OSError as
    the disk gives it.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.name} is too large for a measurement of blocks")
    try:
        content = json.loads(path.read_text("utf-8"))
        kind, version = content["kind"], content["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path.name} is no measurement of blocks, or it is damaged") from error
    if kind != KIND or version != VERSION:
        raise ValueError(
            f"{path.name} is {kind!r:.40} of version {version!r:.10}, but this Kindred reads "
            f"{KIND!r} of version {VERSION}"
        )
    try:
        return _measurement(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is damaged ({error})"[:300]) from error


def _measurement(content: Mapping[str, Any]) -> Measurement:
    blocks = tuple(map(_block, content["blocks"]))
    figures = {}
    for change in Change:
        values = content["figures"][change.value]
        if len(values) != len(blocks):
            raise ValueError(f"{len(values)} figures for {len(blocks)} blocks")
        figures[change] = {b: _number(v) for b, v in zip(blocks, values) if v is not None}
    y, x = content["size"]
    return Measurement(
        read_key(content["key"]),
        blocks,
        figures,
        tuple(map(_number, content["sigmas"])),
        (int(y), int(x)),
        str(content["day"])[:40],
    )


def _block(value: Any) -> BlockId:
    stage, index, depth = value
    if not (isinstance(stage, str) and type(index) is int and type(depth) is int):
        raise TypeError("a block without a name")
    return stage, index, depth


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is no figure")
    return float(value)
