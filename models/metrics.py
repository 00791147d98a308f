"""Numbers that compare pictures."""

from __future__ import annotations

from math import inf, log10

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
