"""The pictures of a training: checked, captioned, cut to squares, and told from other pictures
(Concept Encoder Train).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .draws import Examples

NODE = "Concept Encoder Train"


def check_images(images: Sequence[Tensor]) -> None:
    """images: each [b Y X c] in 0..1. ValueError for no pictures, a batch that is none, NaN."""
    if not sum(len(batch) for batch in images):
        raise ValueError(
            f"{NODE}: there are no pictures. Wire Load Image, or Load Image Dataset from Folder "
            f"for many, into images."
        )
    for number, batch in enumerate(images, 1):
        if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4) or 0 in batch.shape[1:]:
            raise ValueError(
                f"{NODE}: batch {number} of images is {list(batch.shape)}; a picture is [b y x 3]. "
                f"Wire an IMAGE into it."
            )
        if not torch.isfinite(batch).all():
            raise ValueError(
                f"{NODE}: {int((~torch.isfinite(batch)).sum())} values of batch {number} of images "
                f"are NaN or infinite. "
                "Look at the picture with Preview Image and make it again."
            )


def captions_of(prompts: Sequence[str], count: int) -> list[str]:
    """A prompt for each of `count` pictures: one for all, or one line or list item each; ValueError
    where the counts differ.
    """
    lines = (
        list(prompts)
        if len(prompts) > 1
        else [line for line in prompts[0].splitlines() if line.strip()] or [""]
    )
    if len(lines) not in (1, count):
        raise ValueError(
            f"{NODE}: there are {len(lines)} prompts for {count} pictures. Write one line for all "
            f"of them, such as "
            "'a photo of a face', or a line for each."
        )
    return [text.strip() for text in (lines * count if len(lines) == 1 else lines)]


def centre_square(image: Tensor) -> Tensor:
    """[Y X c] -> [s s c], as wide as its shorter side."""
    side = min(image.shape[:2])
    top, left = ((n - side) // 2 for n in image.shape[:2])
    return image[top : top + side, left : left + side]


def digest(examples: Examples) -> str:
    """What tells one set of training pictures from another."""
    content = hashlib.blake2b(examples.pixels.numpy().tobytes(), digest_size=4)
    content.update(repr((list(examples.prompts), list(examples.subjects))).encode())
    return f"{len(examples)} {content.hexdigest()}"
