"""What is told of pictures by their pixels alone: what they copy of a photo, and how they vary."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

SMALL = (
    8  # pixels of a side to which pictures are shrunk before they are compared from seed to seed
)


def correlation(images: Any, photo: Any) -> list[float]:
    """Pearson's correlation of every picture's pixels [b y x 3] with those of [b or 1 y x 3]."""
    from torch.nn.functional import normalize

    rows = [one.double().flatten(1) for one in (images, photo)]
    units = [normalize(row - row.mean(1, keepdim=True), dim=1) for row in rows]
    return (units[0] * units[1]).sum(1).tolist()


def copied(images: Any, photo: Any, as_asked: Any) -> list[float]:
    """Likeness to the photo's pixels beyond what a true picture of the same subject has.

    images, as_asked: [b y x 3], pictures and renderings of what each was asked for. 0: no more
    like the photo [1 y x 3] than the truth is; 1 or so: the photo itself.
    """
    pairs = zip(correlation(images, photo), correlation(as_asked, photo), strict=True)
    return [own - true for own, true in pairs]


def small(images: Any) -> list[list[int]]:
    """Pictures [b y x 3] in 0..1 as 8 x 8 colours in 0..255, which a journal can keep."""
    from torch.nn.functional import adaptive_avg_pool2d

    shrunk = adaptive_avg_pool2d(images.movedim(3, 1).float(), SMALL)
    return shrunk.mul(255).round().int().flatten(1).tolist()


def varied(seeds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Measurements of one case, a seed each, with how far the same prompt's pictures differ from
    seed to seed: the mean difference of their colours, in 0..1, over all pairs.
    """
    reduced = [values.get("small") for values in seeds]
    if len(reduced) < 2 or None in reduced:
        return [*seeds]
    by_prompt = list(zip(*reduced, strict=True))
    differences = [difference(pictures) for pictures in by_prompt]
    return [{**values, "diversity": differences} for values in seeds]


def difference(pictures: Sequence[Sequence[int]]) -> float:
    """Mean absolute difference of all pairs of rows in 0..255, in 0..1."""
    from itertools import combinations

    gaps = [
        sum(abs(a - b) for a, b in zip(one, other)) / len(one)
        for one, other in combinations(pictures, 2)
    ]
    return sum(gaps) / len(gaps) / 255


def as_png(photo: Any) -> bytes:
    """IMAGE [1 y x 3] -> a .png file's bytes."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(photo[0].mul(255).round().byte().cpu().numpy()).save(file, "PNG")
    return file.getvalue()
