"""What a reference holds, drawn over its pictures: masks, heat maps, and matching parts in one
colour.

Colours that mean a place or a size are even steps for the eye: OKLCH (Björn Ottosson, "A perceptual
color space for image processing", 2020). Axes: b pictures, Y X pixels, y x token grid, n = y*x
tokens row by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .subject.masks import resize_soft, says_something

OUTLINE = (1.0, 0.8, 0.1)  # around a mask, on the grey side of its edge
DIMMED = 0.45  # how bright the grey around the subject is
HEAT = (
    (0.25, 0.06, 290.0),
    (0.45, 0.18, 330.0),
    (0.65, 0.2, 25.0),
    (0.82, 0.17, 75.0),
    (0.97, 0.08, 105.0),
)  # cold to hot, OKLCH
ALPHA = 0.7  # of a colour over the picture
# of matches: left to right (short of a circle), top to bottom
HUES, LIGHTNESS, CHROMA = (
    (15.0, 315.0),
    (0.88, 0.5),
    0.15,
)
LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709
TO_LMS = (
    (1.0, 0.3963377774, 0.2158037573),
    (1.0, -0.1055613458, -0.0638541728),
    (1.0, -0.0894841775, -1.2914855480),
)
TO_RGB = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)


def draw_masks(images: Tensor, masks: Tensor) -> Tensor:
    """images [b Y X 3] in 0..1, masks bool [b y x] -> [b Y X 3]: the rest grey and dim, a line just
    outside the subject's cells.

    Every pixel of the subject is its own. Raises ValueError where the counts differ.
    """
    _same_count(images, masks, "masks")
    inside = _cells(masks.bool(), images)
    thick = max(1, min(images.shape[1:3]) // 160)
    near = F.max_pool2d(inside[:, None].float(), 2 * thick + 1, 1, thick)[:, 0] > 0
    around = torch.where(near[..., None], images.new_tensor(OUTLINE), DIMMED * _grey(images))
    return torch.where(inside[..., None], images, around)


def draw_heat(images: Tensor, maps: Tensor) -> Tensor:
    """images [b Y X 3] in 0..1, maps [b y x] -> [b Y X 3]: each map from its least to its greatest
    as colour over the grey picture.

    A constant map says nothing: its picture stays as it is. Raises ValueError where the counts
    differ.
    """
    _same_count(images, maps, "maps")
    maps = maps.float().to(images.device)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    varied = says_something(maps)
    shares = (maps - low) / (high - low).where(varied, torch.ones_like(low))
    shares = resize_soft(shares, (images.shape[1], images.shape[2])).clamp(0, 1)
    drawn = torch.lerp(_grey(images).expand_as(images), heat_colours(shares).to(images), ALPHA)
    return torch.where(varied[..., None], drawn, images)


def draw_matches(
    images: Tensor, grid: tuple[int, int], subjects: Tensor, source: Tensor, keep: Tensor
) -> Tensor:
    """Where the first picture's subject is found again: images [b Y X 3] in 0..1 -> [b Y X 3],
    equal parts in equal colours.

    subjects bool [b n]; source int64 [b n], positions among the n tokens of the first picture; keep
    bool [b n], which of them hold. The first picture's subject shows every place's colour (its own
    source and keep are not read); elsewhere a kept token has its source's, the rest of a subject is
    grey, and all else dim. Raises ValueError where shapes or positions do not fit.
    """
    _same_count(images, subjects, "subjects")
    n = grid[0] * grid[1]
    if not subjects.shape == source.shape == keep.shape or subjects.shape[1] != n:
        raise ValueError(
            f"Overlay: a grid of {grid[0]}x{grid[1]} has {n} tokens; got subjects "
            f"{list(subjects.shape)}, source "
            f"{list(source.shape)}, keep {list(keep.shape)}."
        )
    subjects, source, keep = (x.to(images.device) for x in (subjects.bool(), source, keep.bool()))
    source = torch.cat([torch.arange(n, device=source.device)[None], source[1:].where(keep[1:], 0)])
    if n and not 0 <= int(source.min()) <= int(source.max()) < n:
        raise ValueError(
            f"Overlay: a match at position {int(source.max())}; the first picture has {n} tokens."
        )
    coloured = torch.cat([subjects[:1], keep[1:]])
    colours = torch.where(
        coloured[..., None],
        place_colours(subjects[0].view(grid)).flatten(0, 1)[source].to(images),
        0.5,
    )
    grey = _grey(images).expand_as(images)
    drawn = torch.lerp(grey, _cells(colours.unflatten(1, grid), images), ALPHA)
    return torch.where(
        _cells((subjects | coloured).unflatten(1, grid), images)[..., None], drawn, DIMMED * grey
    )


def heat_colours(shares: Tensor) -> Tensor:
    """Numbers [..] in 0..1 -> colours [.. 3]: dark violet, red, orange, pale yellow; lighter is
    more.
    """
    ramp = oklch(torch.tensor(HEAT, device=shares.device))
    at = shares.float() * (len(HEAT) - 1)
    below = at.floor().long().clamp(0, len(HEAT) - 2)
    return torch.lerp(ramp[below], ramp[below + 1], (at - below)[..., None])


def place_colours(subject: Tensor) -> Tensor:
    """A subject bool [y x] -> colours [y x 3] of every cell by its place in the subject's box; grey
    where there is no subject.
    """
    if not subject.any():
        return torch.full((*subject.shape, 3), 0.5, device=subject.device)

    def across(axis: int) -> Tensor:
        inside = subject.any(1 - axis).nonzero().squeeze(1)
        first, last = int(inside[0]), int(inside[-1])
        return (
            (torch.arange(subject.shape[axis], device=subject.device) - first)
            / max(last - first, 1)
        ).clamp(0, 1)

    down, right = torch.meshgrid(across(0), across(1), indexing="ij")
    lightness = LIGHTNESS[0] + (LIGHTNESS[1] - LIGHTNESS[0]) * down
    return oklch(
        torch.stack(
            [lightness, torch.full_like(down, CHROMA), HUES[0] + (HUES[1] - HUES[0]) * right], -1
        )
    )


def oklch(colours: Tensor) -> Tensor:
    """Lightness 0..1, chroma, hue in degrees [.. 3] -> sRGB [.. 3], clipped to 0..1."""
    lightness, chroma, hue = colours.unbind(-1)
    hue = hue.deg2rad()
    lab = torch.stack([lightness, chroma * hue.cos(), chroma * hue.sin()], -1)
    linear = ((lab @ lab.new_tensor(TO_LMS).T) ** 3 @ lab.new_tensor(TO_RGB).T).clamp(0, 1)
    return torch.where(
        linear <= 0.0031308,
        12.92 * linear,
        1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055,
    ).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """[b Y X 3] -> [b Y X 1]."""
    return (images @ images.new_tensor(LUMA))[..., None].clamp(0, 1)


def _cells(values: Tensor, images: Tensor) -> Tensor:
    """values [b y x ..] -> [b Y X ..] at the pictures' size: each pixel has its own cell's, so that
    one sees the true cells.
    """
    y, x = (
        (2 * torch.arange(pixels, device=images.device) + 1) * cells // (2 * pixels)
        for pixels, cells in zip(images.shape[1:3], values.shape[1:3])
    )
    return values.to(images.device)[:, y[:, None], x]


def _same_count(images: Tensor, drawn: Tensor, what: str) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(drawn):
        raise ValueError(
            f"Overlay: pictures must be [b y x 3] with as many {what}; got {list(images.shape)} "
            f"and {list(drawn.shape)}."
        )
