"""Numbers that compare pictures."""

from __future__ import annotations

from math import inf, log10

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio of two tensors of one shape, in dB: 10 log10(peak^2 / mean square error).

    `peak` is the greatest value a sample can have (1 for images in 0..1; for latents the range, max - min, of the original).
    Equal tensors give infinity. Raises ValueError if the shapes differ or peak is not positive.
    """
    if a.shape != b.shape:
        raise ValueError(f"PSNR: needs two tensors of one shape; got {list(a.shape)} and {list(b.shape)}.")
    if not peak > 0:
        raise ValueError(f"PSNR: the peak must be above 0; got {peak}.")
    error = (a.double() - b.double()).square().mean().item()
    return 10 * log10(peak**2 / error) if error else inf


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of every row of a [n c] with every row of b [m c] -> float64 [n m], in -1..1: no factor, nothing cut off at 0.

    Raises ValueError where the widths differ, and for a row that is zero or not finite: it has no direction.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"Cosine similarity: needs two tables of rows of one width; got {list(a.shape)} and {list(b.shape)}.")
    units = []
    for rows in (a.double(), b.double()):
        lengths = rows.norm(dim=1, keepdim=True)
        wrong = ~(lengths.isfinite() & (lengths > 0)).flatten()
        if wrong.any():
            raise ValueError(f"Cosine similarity: row {int(wrong.nonzero()[0])} of {len(rows)} is zero, NaN or infinite.")
        units.append(rows / lengths)
    return (units[0] @ units[1].T).clamp(-1, 1)


def mean_with_others(similarity: Tensor) -> Tensor:
    """Similarity [b b] of every picture with every other -> [b], each one's mean with the others; itself is left out.

    Raises ValueError for fewer than 2 pictures, or where the table is not square.
    """
    b = len(similarity)
    if similarity.shape != (b, b):
        raise ValueError(f"Consistency: needs a square table of similarities; got {list(similarity.shape)}.")
    if b < 2:
        raise ValueError(f"Consistency compares pictures with one another and takes at least 2; it got {b}.")
    others = ~torch.eye(b, dtype=torch.bool, device=similarity.device)
    return similarity.double()[others].view(b, b - 1).mean(1)


def mean_of_pairs(similarity: Tensor) -> float:
    """Consistency: the mean similarity of all pairs of different pictures, from a symmetric table [b b] (paper B, section 5.3)."""
    return float(mean_with_others(similarity).mean())
