"""The training set as arrays: many renderings made once, in parallel, and kept in one .npz beside the checkpoints."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .world import (
    CLASSES,
    HATS,
    HELD_OUT,
    PATTERNS,
    SCENES,
    Rendering,
    random_rendering,
    world_hash,
)

LABELS = ("class", "scene", "pattern", "hat")  # indices into CLASSES, SCENES, PATTERNS, HATS
COLOURS = ("hue", "saturation", "value", "second_hue", "hat_hue")  # 0..1


@dataclass(frozen=True)
class Renderings:
    """Pictures and all that is true about them."""

    images: np.ndarray  # uint8 [b y x 3]
    masks: np.ndarray  # bool [b y x]
    labels: np.ndarray  # int64 [b 4] in the order of LABELS
    colours: np.ndarray  # float32 [b 5] in the order of COLOURS

    def __len__(self) -> int:
        return len(self.images)


def stack(pictures: list[Rendering]) -> Renderings:
    """Renderings -> arrays."""
    labels = [
        (
            CLASSES.index(p.class_name),
            SCENES.index(p.scene),
            PATTERNS.index(p.identity.pattern),
            HATS.index(p.identity.hat),
        )
        for p in pictures
    ]
    colours = [[getattr(p.identity, name) for name in COLOURS] for p in pictures]
    return Renderings(
        np.stack([p.image for p in pictures]),
        np.stack([p.mask for p in pictures]),
        np.asarray(labels, dtype=np.int64),
        np.asarray(colours, dtype=np.float32),
    )


def render_range(first: int, count: int) -> Renderings:
    """random_rendering(first) ... random_rendering(first + count - 1)."""
    return stack([random_rendering(seed) for seed in range(first, first + count)])


def held_out(count: int, offset: int = 0) -> Renderings:
    """Renderings whose identities and seeds no training sees."""
    return render_range(HELD_OUT + offset, count)


def training_set(folder: Path, count: int) -> Renderings:
    """Seeds 0..count-1, rendered once into `folder` and read back afterwards. 49 kB a picture in memory."""
    path = folder / f"renderings-{world_hash()}-{count}.npz"
    if not path.exists():
        chunk = 256
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            parts = list(
                pool.map(
                    render_range,
                    range(0, count, chunk),
                    [min(chunk, count - first) for first in range(0, count, chunk)],
                )
            )
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(
            partial,
            **{
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in Renderings.__dataclass_fields__
            },
        )
        partial.rename(path)
    with np.load(path) as arrays:
        return Renderings(**{name: arrays[name] for name in Renderings.__dataclass_fields__})
