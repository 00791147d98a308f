"""What one judge says of pictures: how alike they are, how like a reference, and how far they show
what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import mean_of_pairs
from .subject.masks import resize_user_mask

NODE = "Consistency Score"
# of the colours; cosines of CLIP's pictures are seldom lower
READER_SCALE, CLIP_SCALE = (0.0, 1.0), (0.4, 1.0)


@dataclass(frozen=True)
class Scores:
    """What one judge says of b pictures. A number that was not measured is None here, and 0 at the
    node's outputs.
    """

    judge: str
    pairs: Tensor  # similarity of every picture with every other [b b]
    known: Tensor | None  # with every picture of the reference [b r]
    texts: tuple[float | None, ...]  # agreement of each picture with its prompt; None: not measured
    no_text: str  # why it was not
    labels: tuple[str, ...]  # what each picture was taken for, where the judge says so
    scale: tuple[float, float]

    @property
    def consistency(self) -> float | None:
        return mean_of_pairs(self.pairs) if len(self.pairs) > 1 else None

    @property
    def identity(self) -> float | None:
        return None if self.known is None else float(self.known.mean())

    @property
    def text(self) -> float | None:
        known = [value for value in self.texts if value is not None]
        return sum(known) / len(known) if known else None

    def figures(self) -> list[tuple[str, float | None, str]]:
        """Each number with its name and what it is of, or why there is none."""
        b, pairs = len(self.pairs), len(self.pairs) * (len(self.pairs) - 1) // 2
        references = 0 if self.known is None else self.known.shape[1]
        judged = sum(value is not None for value in self.texts)
        kind = (
            "mean cosine of picture and prompt"
            if self.scale == CLIP_SCALE
            else "share with class and scene as asked"
        )
        return [
            (
                "consistency",
                self.consistency,
                counted(pairs, "pair", "mean of ") if b > 1 else "one picture, no pairs",
            ),
            (
                "identity",
                self.identity,
                counted(references, "reference picture", "mean with ")
                if references
                else "no reference",
            ),
            (
                "text",
                self.text,
                kind if judged == b else f"{kind} ({judged} of {b})" if judged else self.no_text,
            ),
        ]


def counted(count: int, what: str, before: str = "") -> str:
    return f"{before}{count} {what}{'' if count == 1 else 's'}"


def cut_out(
    images: Tensor, masks: Tensor | None, colour: Sequence[float], name: str
) -> Sequence[Tensor]:
    """The subject of every picture [Y X 3]: a square about its mask, the rest in one colour.
    Without masks the pictures themselves.
    """
    if masks is None:
        return images
    masks = masks.detach().float().cpu().reshape(-1, *masks.shape[-2:])
    if len(masks) not in (1, len(images)):
        raise ValueError(
            f"{NODE}: {name} has {len(masks)} masks for {counted(len(images), 'picture')}. Wire "
            f"one for all of them, or one "
            "for each."
        )
    inside = resize_user_mask(masks, tuple(images.shape[1:3])).expand(len(images), -1, -1)
    return [
        squared(image, mask, colour, number, name)
        for number, (image, mask) in enumerate(zip(images, inside), 1)
    ]


def squared(image: Tensor, mask: Tensor, colour: Sequence[float], number: int, name: str) -> Tensor:
    """The subject of one picture [Y X 3] under its mask bool [Y X], in the middle of a square;
    ValueError for an empty mask.
    """
    if not mask.any():
        raise ValueError(
            f"{NODE}: mask {number} of {name} is empty, so there is no subject to judge. Look at "
            f"it with Preview Mask, "
            f"and mark the subject or unwire {name}."
        )
    (top, bottom), (left, right) = (
        (int(at.min()), int(at.max()) + 1) for at in mask.nonzero().unbind(1)
    )
    y, x = bottom - top, right - left
    side = round(1.1 * max(y, x))
    square = torch.tensor(colour, dtype=image.dtype).expand(side, side, 3).clone()
    down, along = (side - y) // 2, (side - x) // 2
    square[down : down + y, along : along + x] = torch.where(
        mask[top:bottom, left:right, None], image[top:bottom, left:right], square[:y, :x]
    )
    return square
