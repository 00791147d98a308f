"""Draws the example hint of the ControlNet: `python -m miniature.silhouette` writes silhouette.png, a cat, white on black."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .control import EXAMPLE
from .program import run_program
from .world import Identity, render

WHO, CLASS, SCENE, SEED = Identity(0.0, 1.0, 1.0, 0.5, "plain", "none", 0.0), "cat", "meadow", 9


def example() -> np.ndarray:
    """uint8 [y x 3]; colours and scene leave no trace in it."""
    return (
        np.where(render(WHO, CLASS, SCENE, SEED).mask, 255, 0)
        .astype(np.uint8)[..., None]
        .repeat(3, 2)
    )


def main() -> None:
    Image.fromarray(example()).save(EXAMPLE, optimize=True)


if __name__ == "__main__":
    run_program(main)
