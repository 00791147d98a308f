"""A photo and its subject's mask through one window: cropped, padded and scaled alike.

Axes: b frames, c channels, y x pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from ..network.blocks import Grid

# around a subject, as shares of its own extent: where the photo is wide enough, and where not
MARGIN, NARROW = 0.25, 0.05


class Fit(Enum):
    """How a photo of another shape comes to the size that is wanted."""

    AS_IT_IS = "as it is"
    CENTRE = "crop at the centre"
    SUBJECT = "crop at the subject"
    PAD = "pad"


@dataclass(frozen=True)
class Window:
    """A rectangle of a photo in pixels; beyond the photo's edges it is padded."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """x [b c y x] -> [b c height width]; beyond its edges as at the edge."""
        rows = torch.arange(self.top, self.top + self.height).clamp(0, x.shape[-2] - 1)
        columns = torch.arange(self.left, self.left + self.width).clamp(0, x.shape[-1] - 1)
        return x[..., rows.to(x.device), :][..., columns.to(x.device)]

    def inside(self, x: Tensor) -> Tensor:
        """The same of a mask x [b c y x], which is 0 beyond the photo's edges."""
        rows = torch.arange(self.top, self.top + self.height)
        columns = torch.arange(self.left, self.left + self.width)
        held = ((rows >= 0) & (rows < x.shape[-2]))[:, None] & (columns >= 0)
        held &= columns < x.shape[-1]
        return self.of(x) * held.to(x)


def window_of(size: Grid, target: Grid, fit: Fit, subject: Window | None = None) -> Window:
    """The part of a photo of `size` that fills a picture of the shape of `target`.

    crop at the subject: as close around it as the target's pixels allow without enlarging, never
    wider than the photo, unless the subject itself is; without one, at the centre.
    Raises ValueError for a size without a pixel.
    """
    if min(*size, *target) < 1:
        raise ValueError(f"a photo of {size} cannot fill a picture of {target} pixels (y, x).")
    crop, whole = (
        choose(size[0] / target[0], size[1] / target[1]) for choose in (min, max)
    )  # the photo's pixels per pixel of the picture
    scale, middle = whole if fit is Fit.PAD else crop, (size[0] / 2, size[1] / 2)
    if fit is Fit.SUBJECT and subject is not None:
        needs = max(subject.height / target[0], subject.width / target[1])
        padded = min(needs * (1 + NARROW), whole)
        scale = padded if needs > crop else min(crop, max(1.0, needs * (1 + MARGIN)))
        middle = subject.top + subject.height / 2, subject.left + subject.width / 2
    extents = [max(round(n * scale), 1) for n in target]
    top, left = (_begin(m, e, n) for m, e, n in zip(middle, extents, size))
    return Window(top, left, *extents)


def _begin(middle: float, extent: int, size: int) -> int:
    """Where an extent around a middle begins: inside of the photo, or around it where it
    is longer.
    """
    if extent >= size:
        return -((extent - size) // 2)
    return min(max(round(middle - extent / 2), 0), size - extent)


def bounds(mask: Tensor) -> Window | None:
    """The rectangle around what is above 1/2 in any frame of a mask [b y x]; None where
    nothing is.
    """
    held = (mask > 0.5).any(0)
    rows, columns = held.any(1).nonzero(), held.any(0).nonzero()
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    return Window(top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)


def fitted(pictures: Tensor, mask: Tensor, target: Grid, fit: Fit) -> tuple[Tensor, Tensor]:
    """Pictures [b y x c] and their mask [b y x], both in 0..1 -> the same at the target's size.

    as it is: both as they are. A mask without anything may be of any size.
    """
    if fit is Fit.AS_IT_IS:
        return pictures, mask
    size = tuple(pictures.shape[1:3])
    if tuple(mask.shape[1:]) != size:  # of a photo without transparency
        mask = mask.new_zeros(len(pictures), *size)
    window = window_of(size, target, fit, bounds(mask))
    drawn = _scaled(window.of(pictures.movedim(-1, 1)), target, "bicubic").movedim(1, -1)
    return drawn, _scaled(window.inside(mask[:, None]), target, "bilinear")[:, 0]


def _scaled(x: Tensor, target: Grid, mode: str) -> Tensor:
    """[b c y x] at another size, in 0..1; untouched where it has that size."""
    if tuple(x.shape[-2:]) == tuple(target):
        return x
    wide = F.interpolate(x.float(), tuple(target), mode=mode, antialias=True, align_corners=False)
    return wide.clamp(0, 1).to(x)


# transparency -------------------------------------------------------------------------------------


def is_cut_out(transparent: Tensor) -> bool:
    """Whether a photo's transparency [b y x] is what was cut away: most of the photo's edge, and
    not all of it.
    """
    clear = transparent > 0.5
    edge = torch.cat([clear[:, 0], clear[:, -1], clear[:, 1:-1, 0], clear[:, 1:-1, -1]], 1)
    return bool(edge.float().mean() > 0.5 and not clear.all())


def over_white(pictures: Tensor, opaque: Tensor) -> Tensor:
    """Pictures [b y x c] where opaque [b y x] is 1, white where it is 0."""
    share = opaque[..., None].to(pictures)
    return pictures * share + (1 - share)
