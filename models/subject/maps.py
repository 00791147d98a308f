"""The subject's words in the cross-attention of a run so far, and the masks that follow from them
(arXiv 2402.03286, 4.5).

Axes: b pictures, w subject words, n tokens of a grid (y x, row by row), l kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..copies import fetched
from ..network.blocks import BlockId, Grid
from .masks import Threshold, binarise, resize_soft

LAST_STEPS = 20  # the masks' running mean reaches this far back (method.md 3.2)


def subject_masks(soft: Tensor, grid: Grid, threshold: Threshold = "otsu") -> Tensor:
    """Soft maps [b w y x] -> bool [b y' x'] at a grid: resized soft, binarised there, united over
    the words (eq. 7, 4.5).
    """
    return word_masks(soft, grid, threshold).any(1)


def word_masks(soft: Tensor, grid: Grid, threshold: Threshold = "otsu") -> Tensor:
    """The same for each word alone: bool [b w y' x']."""
    b, w = soft.shape[:2]
    return binarise(resize_soft(soft.flatten(0, 1), grid), threshold).unflatten(0, (b, w))


def apart_masks(soft: Tensor, grid: Grid, threshold: Threshold = "otsu") -> Tensor:
    """The same where no token is of two words: it is of the one whose map is nearest to its
    greatest value there, of equal ones the first.
    """
    masks, maps = word_masks(soft, grid, threshold), resize_soft(soft.flatten(0, 1), grid)
    least = torch.finfo(maps.dtype).tiny
    heights = maps.unflatten(0, soft.shape[:2]) / maps.amax((1, 2)).clamp(min=least).view(
        *soft.shape[:2], 1, 1
    )
    highest = heights.masked_fill(~masks, -1.0).argmax(1, keepdim=True)
    return masks & torch.zeros_like(masks).scatter_(1, highest, True)


@dataclass
class SubjectMaps:
    """The words' cross-attention maps of every noise level so far, each kept once however often it
    is asked (I37).
    """

    _raw: dict[float, dict[tuple[BlockId, object], Tensor]] = field(default_factory=dict)
    # the call of the model that each came with
    _calls: dict[tuple[BlockId, object], int | None] = field(default_factory=dict)
    _mean: dict[float, Tensor] = field(default_factory=dict)
    # noise levels, and their mean in host memory, for the question that is asked next
    _read: tuple[list[float], Tensor] | None = None

    def begin(self, sigma: float) -> None:
        """The model is about to be asked at this noise level: what it said there before no longer
        counts.
        """
        for held in (self._raw, self._mean):
            held.pop(sigma, None)

    def add(
        self, sigma: float, block: BlockId, part: object, maps: Tensor, call: int | None = None
    ) -> None:
        """maps [b w y x] of one cross-attention of one part of the batch. Of one call of the model
        the last counts, else the first.
        """
        held, key = self._raw.setdefault(sigma, {}), (block, part)
        if key not in held or (call is not None and self._calls.get(key) == call):
            held[key], self._calls[key] = maps, call

    def forget(self, sigma: float) -> None:
        """Drop this noise level and all below it."""
        for held in (self._raw, self._mean):
            for s in [s for s in held if s <= sigma]:
                del held[s]

    def at(self, sigma: float) -> Tensor:
        """Mean over blocks and parts [b w y x], at the finest of their grids, where it was
        computed.
        """
        if sigma in self._raw:
            self._mean[sigma] = _mean_map(list(self._raw.pop(sigma).values()))
        return self._mean[sigma]

    @property
    def sigmas(self) -> list[float]:
        return sorted({*self._raw, *self._mean}, reverse=True)

    def read_with(self, level: Tensor) -> float:
        """A number [1] on the device, in float32 at most, and in the same wait the mean that `mean`
        gives for the noise level next below all of these.
        """
        before = self.sigmas[-LAST_STEPS:]
        if not before:
            return float(level)
        mean = _mean_map([self.at(s) for s in before])
        read, maps = fetched([level, mean])
        self._read = before, maps.view(mean.shape)
        return read.item()

    def mean(self, sigma: float, inclusive: bool = False) -> Tensor | None:
        """Running mean [b w y x] in host memory of the last 20 noise levels above `sigma`; None:
        there are none.
        """
        before = [s for s in self.sigmas if s > sigma or (inclusive and s == sigma)][-LAST_STEPS:]
        (levels, read), self._read = self._read or ((), None), None
        if not before:
            return None
        if before == levels:
            return read
        return _mean_map([self.at(s) for s in before]).cpu()


def _mean_map(maps: Sequence[Tensor]) -> Tensor:
    """Maps [b w y x] of unlike grids and numbers of words -> their mean at the finest grid; a word
    is 0 where it is not named.
    """
    finest, w = max(tuple(m.shape[-2:]) for m in maps), max(m.shape[1] for m in maps)
    resized = [resize_soft(m.flatten(0, 1), finest).unflatten(0, m.shape[:2]) for m in maps]
    return torch.stack(
        [m if m.shape[1] == w else F.pad(m, (0, 0, 0, 0, 0, w - m.shape[1])) for m in resized]
    ).mean(0)


def positions_of(masks: Tensor, pictures: Sequence[int]) -> list[Tensor]:
    """bool [b y x] in host memory -> per listed picture, the flat positions [l] of its subject
    among b*n.
    """
    n = masks.shape[-2] * masks.shape[-1]
    return [masks[i].flatten().nonzero().squeeze(1) + i * n for i in pictures]
