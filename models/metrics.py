"""Numbers that compare pictures, and what is said of many of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isnan, log10, nan, sqrt
from statistics import fmean, stdev

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio of two tensors of one shape, in dB: 10 log10(peak^2 / mean square
    error).

    `peak` is the greatest value a sample can have (1 for images in 0..1; for latents the range, max
    - min, of the original). Equal tensors give infinity. Raises ValueError if the shapes differ or
    peak is not positive.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"PSNR: needs two tensors of one shape; got {list(a.shape)} and {list(b.shape)}."
        )
    if not peak > 0:
        raise ValueError(f"PSNR: the peak must be above 0; got {peak}.")
    error = (a.double() - b.double()).square().mean().item()
    return -inf if error == inf else 10 * log10(peak**2 / error) if error else inf


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of every row of a [n c] with every row of b [m c] -> float64 [n m], in -1..1: no
    factor, nothing cut off at 0.

    Raises ValueError where the widths differ, and for a row that is zero or not finite: it has no
    direction.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"Cosine similarity: needs two tables of rows of one width; got {list(a.shape)} and "
            f"{list(b.shape)}."
        )
    units = []
    for rows in (a.double(), b.double()):
        lengths = rows.norm(dim=1, keepdim=True)
        wrong = ~(lengths.isfinite() & (lengths > 0)).flatten()
        if wrong.any():
            raise ValueError(
                f"Cosine similarity: row {int(wrong.nonzero()[0])} of {len(rows)} is zero, NaN or "
                f"infinite."
            )
        units.append(rows / lengths)
    return (units[0] @ units[1].T).clamp(-1, 1)


def mean_with_others(similarity: Tensor) -> Tensor:
    """Similarity [b b] of every picture with every other -> [b], each one's mean with the others;
    itself is left out.

    Raises ValueError for fewer than 2 pictures, or where the table is not square.
    """
    b = len(similarity)
    if similarity.shape != (b, b):
        raise ValueError(
            f"Consistency: needs a square table of similarities; got {list(similarity.shape)}."
        )
    if b < 2:
        raise ValueError(
            f"Consistency compares pictures with one another and takes at least 2; it got {b}."
        )
    others = ~torch.eye(b, dtype=torch.bool, device=similarity.device)
    return similarity.double()[others].view(b, b - 1).mean(1)


def mean_of_pairs(similarity: Tensor) -> float:
    """Consistency: the mean similarity of all pairs of different pictures, from a symmetric table
    [b b] (paper B, section 5.3).
    """
    return float(mean_with_others(similarity).mean())


def paired_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of each row of a [n c] with the same row of b [n c] -> float64 [n], in -1..1: of
    pictures and their own texts the CLIP score.

    Raw ones: CLIPScore's factor of 2.5 and its cut at 0 are left out, since the 0.21 to 0.38 of
    paper A's tables can only be read so (method.md 2.5). Raises ValueError where the shapes differ,
    and for a row without a direction.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"Paired cosines: needs two tables of one shape; got {list(a.shape)} and "
            f"{list(b.shape)}."
        )
    return cosine_similarity(a, b).diagonal()


# faces --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FaceIdentity:
    """How near the face of each of b pictures is to the faces of photos; a picture's numbers are
    means over the photos with a face.

    cosine in -1..1, distance (in 0..2 where vectors are brought to unit length), closeness = 2 -
    distance: the paper's table gives one number that is higher for better, and cosine and closeness
    are what it may be (method.md 2.5). All three are NaN where a face is missing, in the picture or
    in every photo; detected says which pictures have one, and its mean, the detection rate, belongs
    beside them.
    """

    cosine: tuple[float, ...]
    distance: tuple[float, ...]
    detected: tuple[bool, ...]

    @property
    def closeness(self) -> tuple[float, ...]:
        return tuple(2 - d for d in self.distance)


def face_distance(cosine: Tensor) -> Tensor:
    """Cosines in -1..1 -> the Euclidean distance of two vectors of unit length that have it, sqrt(2
    - 2 cos), in 0..2.
    """
    return (2 - 2 * cosine).clamp(min=0).sqrt()


def face_identity(
    pictures: Sequence[Tensor | None], photos: Sequence[Tensor | None], unit: bool = True
) -> FaceIdentity:
    """Embeddings [c] of the face in every picture and every photo, of any length; None where no
    face was found.

    unit: distances are of vectors of unit length, as FaceNet's are; False: of the vectors as they
    are, as dlib's (of length 1.4 or so).

    Raises ValueError where those of pictures and of photos differ in width, and for an embedding
    that is zero or not finite.
    """
    shown = [face for face in pictures if face is not None]
    known = [face for face in photos if face is not None]
    values = iter(())
    if shown and known:
        rows = torch.stack(shown).double(), torch.stack(known).double()
        cosines = cosine_similarity(*rows)
        distances = face_distance(cosines) if unit else torch.cdist(*rows)
        values = iter(zip(cosines.mean(1).tolist(), distances.mean(1).tolist()))
    pairs = [(nan, nan) if face is None else next(values, (nan, nan)) for face in pictures]
    return FaceIdentity(
        tuple(c for c, _ in pairs),
        tuple(d for _, d in pairs),
        tuple(face is not None for face in pictures),
    )


# what is said of many -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """A mean over units, its standard error (NaN below 2 of them), and their count (without any,
    the mean is NaN).
    """

    mean: float
    error: float
    count: int

    @staticmethod
    def over(groups: Iterable[Iterable[float]]) -> Mean:
        """Each group is one unit's numbers, such as one identity's, and counts once: its pictures
        are no independent tries.

        NaN is a number that could not be measured: it counts nowhere, and neither does a group of
        nothing else. The error is the spread of the units' means (over n - 1), divided by sqrt(n).
        """
        known = [[value for value in group if not isnan(value)] for group in groups]
        means = [fmean(group) for group in known if group]
        n = len(means)
        return Mean(fmean(means) if n else nan, stdev(means) / sqrt(n) if n > 1 else nan, n)


def share_of_the_way(value: float, plain: float, ceiling: float) -> float:
    """How far a score has come from the plain model's to the best there can be: 0 is plain, 1 the
    ceiling; NaN where those are one.
    """
    return (value - plain) / (ceiling - plain) if ceiling != plain else nan
