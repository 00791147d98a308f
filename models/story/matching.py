"""Which subject tokens of a story's pictures are alike, and so are mixed (arXiv 2402.03286, eq. 5,
8, 9).

Axes: b pictures, r pictures that are read, n tokens of a grid (y x, row by row), l kept tokens, c
channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..copies import sent
from ..subject.correspondence import correspond, smooth, telling_channels
from ..subject.maps import positions_of
from .plan import NODE, shared_groups

log = logging.getLogger(__name__)


@dataclass
class Comparison:
    """DIFT's features of a run's pictures, and once they are compared, which of their tokens are
    injected from where.
    """

    sigma: float | None = None  # the noise level that the features come from
    features: Tensor | None = None  # [b n c]
    targets: Tensor | None = None  # [k] flat positions among b*n
    sources: Tensor | None = None  # [k] rows that they are injected from
    _call: int | None = None  # of the model, that the features come from

    def read(self, h: Tensor, sigma: float, call: int) -> None:
        """h [b c y x] of the cond half; of one call of the model the last counts, of several the
        first.
        """
        if self.features is not None and self._call != call:
            return
        self.sigma, self._call = sigma, call or None
        self.features = smooth(h.float()).flatten(2).movedim(1, 2)


def candidates_in_batch(masks: Tensor, anchors: int, count: int) -> list[Tensor]:
    """Per picture the flat positions [l] of the subject among r*n that it is compared with.

    masks: bool [b y x] in host memory; anchors: as of StorySettings; count: r, pictures of the
    batch that others read.
    """
    per_picture, candidates = positions_of(masks, range(count)), []
    for (first, last), read in shared_groups(len(masks), anchors):
        positions = [per_picture[j] for j in read]
        joined = torch.cat(positions) if positions else torch.zeros(0, dtype=torch.long)
        candidates += [joined] * (last - first)
    return candidates


def match(
    features: Tensor,
    masks: Sequence[Tensor],
    sources: Tensor,
    candidates: Sequence[Sequence[Tensor]],
    transformer: bool = False,
) -> tuple[Tensor, Tensor]:
    """features [b n c], sources [r n c] -> flat positions [k] among b*n that are mixed, and among
    r*n that they are mixed with, in host memory.

    masks: bool [b y x], candidates: flat positions for each picture, both of each subject; where
    two subjects lie on one token the nearest match counts. transformer: massive channels of the
    sources are left out.
    """
    device = features.device
    if transformer:
        telling = telling_channels(sources).nonzero().squeeze(1)
        features, sources = features[..., telling], sources[..., telling]
    matches = [
        correspond(
            features, sent(here.flatten(1), device), sources, [sent(i, device) for i in theirs]
        )
        for here, theirs in zip(masks, candidates, strict=True)
    ]
    keep, distance, source = (
        torch.stack([getattr(m, name) for m in matches]).flatten(1)
        for name in ("keep", "distance", "source")
    )
    nearest = distance.masked_fill(~keep, torch.inf).argmin(0, keepdim=True)
    best = torch.where(keep.any(0), source.gather(0, nearest)[0], -1).cpu()  # once for the run
    targets = (best >= 0).nonzero().squeeze(1)
    subject = torch.stack(list(masks)).any(0)
    log.info("%s: %d of %d subject tokens found their like", NODE, len(targets), int(subject.sum()))
    return targets, best[targets]


def say_unmatched(compared: bool, followed: bool) -> None:
    """Warn that no features are injected; compared: there were features, followed: the word was."""
    if compared and not followed:
        log.warning(
            "%s: the subject's word could not be followed, so no features are injected: "
            "another node computes the "
            "network's cross-attention by itself. Remove that node, or wire masks of the "
            "subject.",
            NODE,
        )
    else:
        log.warning(
            "%s: the pictures could not be compared, so no features are injected: this sampler "
            "run ends before, or a node "
            "that skips calls (EasyCache, LazyCache) skipped the one in which they are.",
            NODE,
        )
