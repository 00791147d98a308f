"""Which token of one picture shows the same part of the subject as which token of another, and what
is done with it.

ConsiStory, arXiv 2402.03286: section 4.3, eq. 5-6 (features of the best match are mixed in),
appendix B, eq. 8-9 (matches by cosine similarity of smoothed DIFT features), appendix E (keys of
real pictures take the statistics of those that read them).
Axes: b pictures that read, s pictures that are read, n and n' their image tokens (y x row by row),
l kept tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import otsu_threshold

CHUNK = 1024  # target tokens at a time: 50 MB of similarities to 12k source tokens
NO_MATCH = 2.0  # the greatest cosine distance
# of telling_channels: how many of its deviations a channel's mean may be from 0
MASSIVE = 10.0
CONSTANT = 1e-5  # a channel's spread, as a share of its largest value, that is rounding alone


@dataclass(frozen=True, eq=False)
class Matches:
    """Where each token of the pictures that read finds its like.

    source: [b n] int64, flat position among the s*n' tokens of the sources. distance: [b n]
    float32, cosine distance in
    0..2; 2 where the picture has no source token. keep: [b n] bool, subject of the target and
    nearer than the gate.
    """

    source: Tensor
    distance: Tensor
    keep: Tensor


def smooth(features: Tensor) -> Tensor:
    """Features [b c y x] -> same shape and dtype: each channel under a 3x3 Gaussian of sigma 1 that
    sums to 1.

    Zero padding, which darkens the border but turns no feature vector of a constant map (law I30).
    float32 inside.
    """
    side = torch.exp(
        -0.5 * torch.arange(-1.0, 2.0, dtype=torch.float32, device=features.device) ** 2
    )
    side = side / side.sum()
    channels = features.shape[1]
    kernel = torch.outer(side, side).expand(channels, 1, 3, 3)
    return F.conv2d(features.float(), kernel, padding=1, groups=channels).to(features.dtype)


def _directions(features: Tensor) -> Tensor:
    """[.. c] -> [.. c] float32 of length 1; a token of zeros stays one."""
    features = features.float()
    features = features / features.abs().amax(-1, keepdim=True).clamp(
        min=torch.finfo(torch.float32).tiny
    )  # no square overflows
    return F.normalize(features, dim=-1)


def _cosine_distance(u: Tensor, v: Tensor) -> Tensor:
    """Directions [n c], pair by pair -> [n] float32 in 0..2; a token of zeros is at 1 from
    everything.

    Half the squared chord is 1 - cos, but exactly 0 for equal directions, and the same both ways
    and in every chunk: the rounding of a large product would give Otsu a map of noise to split.
    """
    chord = ((u - v).square().sum(-1) / 2).clamp(max=NO_MATCH)
    blind = (u == 0).all(-1) | (v == 0).all(-1)
    return chord.masked_fill(blind, 1.0)


def telling_channels(features: Tensor) -> Tensor:
    """Features [r n c] of a transformer -> bool [c]: the channels that tell one token from another.

    Left out are massive ones, which are about as great in all tokens and so make all look alike
    (arXiv 2505.18584): those whose mean over all r*n tokens is more than MASSIVE of their
    deviations from 0. Where none is left, all are. float32 inside, on the features' device.
    """
    spread, mean = torch.std_mean(features.flatten(0, 1).float(), 0, correction=0)
    telling = mean.abs() <= MASSIVE * spread
    return telling | ~telling.any()


def correspond(
    targets: Tensor, target_masks: Tensor, sources: Tensor, kept: Sequence[Tensor]
) -> Matches:
    """Each target token's most similar source token, over all sources at once (eq. 5, 8, 9), and
    whether it is near enough.

    targets: [b n c] features of the pictures that read; target_masks: bool [b n], their subjects;
    sources: [s n' c] features of the pictures that are read; kept[i]: int64 [l_i], the flat
    positions among s*n' that picture i may match. The gate keeps subject tokens whose distance is
    strictly below Otsu's threshold over all n tokens of their picture; equal distances keep none,
    and so does a picture without sources (law I28: source 0, distance 2). float32 throughout (the
    official code compares in half precision). All on one device; only the distances are read back,
    once; holds [CHUNK l_i] similarities, never [n n'].
    Raises ValueError unless there is one `kept` per picture.
    """
    if len(kept) != len(targets):
        raise ValueError(
            f"Correspondence: {len(targets)} pictures read, but source tokens are given for "
            f"{len(kept)}."
        )
    places = torch.zeros(targets.shape[:2], dtype=torch.int64, device=targets.device)
    distance = torch.full(targets.shape[:2], NO_MATCH, dtype=torch.float32, device=targets.device)
    tokens = sources.flatten(0, 1)
    for i, (picture, positions) in enumerate(zip(targets, kept, strict=True)):
        if positions.shape[0] == 0:
            continue
        there = _directions(tokens.index_select(0, positions))
        for start in range(0, picture.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            here = _directions(picture[rows])
            best = (here @ there.T).argmax(-1)
            places[i, rows] = positions.index_select(0, best)
            distance[i, rows] = _cosine_distance(here, there.index_select(0, best))
    distances = distance.cpu().double()  # some devices have no float64
    near = distances < otsu_threshold(distances, axes=1)[:, None]
    return Matches(places, distance, target_masks & near.to(target_masks.device))


def inject(
    x: Tensor, snapshot: Tensor, matches_source: Tensor, targets: Tensor, alpha: float
) -> Tensor:
    """Eq. 6: x [b n c], self-attention outputs after to_out -> [b n c], its tokens `targets` mixed
    with their matches.

    snapshot: [l c], the outputs that are read, all from before any of them is written: so no
    picture's result depends on its place in the batch (law I22). targets: int64 [k], flat positions
    among b*n, each at most once; matches_source: int64 [k], the row of `snapshot` for each.
    x[targets] becomes (1 - alpha) x[targets] + alpha snapshot[matches_source]; every other token
    keeps its bits, x itself is never written. alpha 0 or k = 0 returns x (law I28).
    """
    if alpha == 0 or targets.shape[0] == 0:
        return x
    flat = x.flatten(0, 1)
    mixed = torch.lerp(
        flat.index_select(0, targets), snapshot.index_select(0, matches_source).to(x.dtype), alpha
    )
    return flat.index_copy(0, targets, mixed).view_as(x)


def adain(x: Tensor, like: Tensor, where: Tensor | None = None) -> Tensor:
    """Keys x [1|b l c] -> [b l c] with the mean and standard deviation of like [b n c], channel by
    channel over tokens.

    Appendix E, of the keys of inverted photos; heads are not split, so a channel is a head-channel.
    where: bool [b n], the tokens of `like` that count (its subject, as x is the photo's); a picture
    without any leaves x as it is. A channel whose spread is below CONSTANT times its largest value
    counts as constant and takes the mean of `like` (so does l = 1). No token on
    either side: x as it is. float32 inside; the result has x's dtype.
    """
    shape = (like.shape[0], *x.shape[1:])
    if x.shape[1] == 0 or like.shape[1] == 0:
        return x.expand(shape)
    own, other = x.float(), like.float()
    # of a population: one token has a spread, 0
    own_spread, own_mean = torch.std_mean(own, 1, correction=0, keepdim=True)
    if where is None:
        spread, mean = torch.std_mean(other, 1, correction=0, keepdim=True)
    else:
        counted = where.to(other)[..., None]
        total = counted.sum(1, keepdim=True)
        mean = (other * counted).sum(1, keepdim=True) / total.clamp(min=1)
        spread = (
            ((other - mean).square() * counted).sum(1, keepdim=True) / total.clamp(min=1)
        ).sqrt()
        spread, mean = (
            torch.where(total > 0, a, b) for a, b in ((spread, own_spread), (mean, own_mean))
        )
    floor = (CONSTANT * own.abs().amax(1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)
    return ((own - own_mean) / own_spread.maximum(floor) * spread + mean).to(x.dtype)
