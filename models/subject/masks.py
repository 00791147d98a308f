"""Where the subject is: token maps of cross-attention, their thresholds, and masks at every layer's
grid.

A: arXiv 2403.11284, section 2.2, eq. 4-5 (its normalisation and threshold are unstated). B:
ConsiStory, arXiv 2402.03286, appendix B, eq. 7 (Otsu; the soft map is resized, then binarised at
each size). Otsu: IEEE Trans. SMC 9(1), 1979.
Axes: b batch rows, r references or images, h heads, n image tokens (y x row by row), m text tokens,
d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..copies import sent

OTSU_BINS = 256
# a spread below this share of a map's greatest value is how float32 rounded, which differs by
# processor
ROUNDING = 1e-6

Threshold = float | Literal["otsu"]


def token_weights(
    positions: Sequence[Sequence[int]], tokens: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Text positions per row -> [b m] float32, 1 at a row's positions and 0 elsewhere, m =
    `tokens`.

    Build it once for a run: token_map takes it in place of positions, and copies nothing to the
    device in a layer. Raises ValueError for a position outside the text.
    """
    chosen = torch.zeros(len(positions), tokens)
    for row, at in zip(chosen, positions, strict=True):
        outside = [p for p in at if not 0 <= p < tokens]
        if outside:
            raise ValueError(
                f"Token map: the text has {tokens} tokens; there is none at position {outside[0]}."
            )
        row[list(at)] = 1.0
    return sent(chosen, device)


def token_map(
    q: Tensor,
    k: Tensor,
    positions: Sequence[Sequence[int]] | Tensor,
    heads: int,
    bias: Tensor | None = None,
) -> Tensor:
    """How much each image token looks at the word: q [b n (h d)], k [b m (h d)] -> [b n] float32 in
    0..1.

    Mean over heads of softmax(q k^T / sqrt(d)), summed over the row's positions
    (eq. 4; one sequence serves all rows). Where the host repeated the text, positions holds every
    repeat: the sum is then the unrepeated one (law I13). Positions may be the [1|b m] of
    token_weights, or [1|b m w] of several words -> [b n w]. A row without positions maps to 0.
    bias: what the network adds to the logits, [1|b 1|h 1|n m], so that keys which it hides (pads)
    take no share.
    Holds [b h n m] float32, never a layer's past.
    """
    if not isinstance(positions, Tensor):
        positions = token_weights(positions, k.shape[1], q.device)
    q, k = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    # float32 throughout: half precision overflows in the logits
    logits = q @ k.transpose(-1, -2)
    seen = torch.softmax(logits if bias is None else logits + bias.float(), -1)
    if positions.ndim == 3:
        return (seen @ positions.to(seen)[:, None]).mean(1)
    return (seen @ positions.to(seen)[:, None, :, None]).squeeze(-1).mean(1)


def otsu_threshold(soft: Tensor, axes: int = 2) -> Tensor:
    """Otsu's threshold of each map [.. y x] -> [..] float64: the mask is soft > threshold,
    strictly.

    The last `axes` axes are one map (one axis: [.. n]). The split of a 256-bin histogram over
    [min, max] with the greatest variance between classes, as a bin centre; equal to
    skimage.filters.threshold_otsu on float64 (law I16). A constant map gives its value, hence an
    empty mask; any other, a mask neither empty nor full. Runs on the device, reads nothing back.
    """
    axes = min(axes, soft.ndim)
    flat = soft.double().flatten(-axes).reshape(-1, soft.shape[-axes:].numel()).contiguous()
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    edges = (
        torch.arange(OTSU_BINS + 1, dtype=torch.float64, device=flat.device)
        * ((high - low) / OTSU_BINS)
        + low
    )
    edges[:, -1:] = high
    centres = (edges[:, :-1] + edges[:, 1:]) / 2

    # the last bin holds its right edge too
    at = (torch.searchsorted(edges, flat, right=True) - 1).clamp(0, OTSU_BINS - 1)
    counts = torch.zeros_like(centres).scatter_add_(1, at, torch.ones_like(flat))
    below, above = counts.cumsum(-1), counts.flip(-1).cumsum(-1).flip(-1)
    mass = counts * centres
    mean_below = mass.cumsum(-1) / below.clamp(min=1)
    mean_above = (mass.flip(-1).cumsum(-1) / above.flip(-1).clamp(min=1)).flip(-1)
    between = below[:, :-1] * above[:, 1:] * (mean_below[:, :-1] - mean_above[:, 1:]) ** 2

    # constant: every centre is the value
    return centres.gather(1, between.argmax(-1, keepdim=True)).reshape(soft.shape[:-axes])


def says_something(soft: Tensor) -> Tensor:
    """Soft maps [r y x] -> bool [r 1 1]: False for a constant map, the rounding of its values
    aside.
    """
    low, high = soft.amin((-2, -1), keepdim=True), soft.amax((-2, -1), keepdim=True)
    return high - low > ROUNDING * torch.maximum(low.abs(), high.abs())


def binarise(soft: Tensor, threshold: Threshold = "otsu") -> Tensor:
    """Soft maps [r y x] -> bool [r y x], True strictly above the threshold.

    "otsu": each map's own. A number theta in 0..1 acts on the map normalised from its minimum to
    its maximum (A states neither; method default: Otsu, or 0.3). A map that is constant but for
    rounding is empty both ways. Raises ValueError for theta outside 0..1.
    """
    soft = soft.double()
    if threshold == "otsu":
        return (soft > otsu_threshold(soft)[..., None, None]) & says_something(soft)
    if isinstance(threshold, str) or not 0 <= threshold <= 1:
        raise ValueError(f'Mask threshold: "otsu" or a number from 0 to 1; got {threshold!r}.')
    low, high = soft.amin((-2, -1), keepdim=True), soft.amax((-2, -1), keepdim=True)
    # undivided, so a constant map is no NaN
    return (soft - low > threshold * (high - low)) & says_something(soft)


def resize_soft(soft: Tensor, grid: tuple[int, int]) -> Tensor:
    """Soft maps [r y x] -> [r y' x'] float32 at grid (y', x'): bilinear, pixel centres, antialiased
    where it shrinks.

    The ratio is that of the sizes, as in the decoder's own upsampling to its skip (ceil halves on
    the way down). The same grid returns the map unchanged.
    """
    soft = soft.float()
    if tuple(soft.shape[-2:]) == tuple(grid):
        return soft
    shrinks = grid[0] < soft.shape[-2] or grid[1] < soft.shape[-1]
    return F.interpolate(
        soft[:, None], size=tuple(grid), mode="bilinear", align_corners=False, antialias=shrinks
    )[:, 0]


def mask_for_grid(soft: Tensor, grid: tuple[int, int], threshold: Threshold = "otsu") -> Tensor:
    """Soft maps [r y x] -> bool [r y' x'] at a layer's grid: resized soft, binarised at that size
    (B, appendix B).
    """
    return binarise(resize_soft(soft, grid), threshold)


def resize_user_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A drawn mask [r y x] in 0..1 -> bool [r y' x']: a cell is in when more than half of its area
    is.

    A subject too thin for any cell keeps its best one, so that a mask with anything above 0.5 in it
    never becomes empty.
    """
    area = F.adaptive_avg_pool2d(mask.float()[:, None], tuple(grid))[:, 0]
    inside = area > 0.5
    flat = area.flatten(1)
    best = F.one_hot(flat.argmax(1), flat.shape[1]).bool() & (
        mask.flatten(1).amax(1, keepdim=True) > 0.5
    )
    lost = ~inside.any((1, 2))
    return inside | (lost[:, None, None] & best.unflatten(1, tuple(grid)))


def union(masks: Sequence[Tensor] | Tensor) -> Tensor:
    """Bool masks, t of [r y x] -> [r y x], True where any is. Raises ValueError for none."""
    if len(masks) == 0:
        raise ValueError("Mask union: 0 masks given; it needs at least 1.")
    return torch.stack(tuple(masks)).any(0)


def union_of_first(
    maps_by_step: Sequence[Tensor], tau: int, threshold: Threshold, grid: tuple[int, int]
) -> Tensor:
    """A, eq. 5: soft maps [r y x] of the steps so far, in denoising order -> bool [r y' x'] at
    grid.

    The union of the masks of the first min(steps, tau) steps; the paper has tau = 2 (early masks
    locate the concept better, its Fig. 3). It grows until tau and then stays. Raises ValueError if
    there is no map or tau is below 1.
    """
    if len(maps_by_step) == 0 or tau < 1:
        raise ValueError(
            f"Mask union: needs 1 map and tau of 1 at least; got {len(maps_by_step)} maps and tau "
            f"= {tau}."
        )
    return union([mask_for_grid(soft, grid, threshold) for soft in maps_by_step[:tau]])


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of bool masks [.. y x] -> [..] float32 in 0..1, intersection over union; 1 where both
    are empty.
    """
    a, b = a.bool(), b.bool()
    both, either = (a & b).sum((-2, -1)), (a | b).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)
