"""One noise level of a story: where the subjects are, which of their tokens others see, and who
reads them.

Axes: b pictures, w words, n tokens of a grid (y x, row by row), l kept tokens, c channels, r
anchors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention.parts import References
from ..attention.references import ReferenceTokens
from ..copies import sent
from ..network.blocks import BlockId, Grid
from ..network.call import AttnCall, Half
from ..subject.maps import apart_masks, positions_of, subject_masks
from ..subject.masks import resize_user_mask
from .plan import NODE, Schedule, StorySettings, dropped, shared_groups
from .sources import AnchorSource

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Gated:
    """One of several subjects: per group of pictures the flat positions it reads of it, and bool
    [b n], the tokens that may.
    """

    reads: list[tuple[tuple[int, int], Tensor]]
    gate: Tensor

    def references(
        self,
        call: AttnCall,
        k: Tensor,
        v: Tensor,
        parts: Sequence[int],
        settings: StorySettings,
    ) -> list[References]:
        """What the listed parts of a call read, k v [b m c] of which the picture's are meant."""
        mask = self.gate.float().expand(len(call.texts), -1, -1)
        own = [call.parts(call.of_picture(t)) for t in (k, v)]

        def tokens(part: int, index: Tensor) -> ReferenceTokens:
            kv = (t[part].flatten(0, 1).index_select(0, index)[None] for t in own)
            return ReferenceTokens(*kv, settings.weight, dims_text=settings.dims_text)

        return [
            References({}, mask, by_part={i: tokens(i, index) for i in parts}, pictures=who)
            for who, index in self.reads
        ]


@dataclass
class Step:
    """What is made once in a step, when it is asked for first."""

    settings: StorySettings
    schedule: Schedule
    pictures: int
    device: torch.device
    user_masks: Tensor | None = None  # [1|b Y X] in 0..1, host memory
    anchors: AnchorSource | None = None  # else the first pictures of the batch
    said: set[str] = field(default_factory=set)  # warnings of the whole run
    stage: int = 0
    sigma: float = 0.0
    soft: Tensor | None = None  # the words' mean maps [b w y x] in host memory; None: not known yet
    _masks: dict[Grid, Tensor | None] = field(default_factory=dict)
    _kept: dict[Grid, list[Tensor]] = field(default_factory=dict)
    _all_kept: dict[Grid, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _shared: dict[Grid, list[tuple[tuple[int, int], Tensor]]] = field(default_factory=dict)
    _gated: dict[Grid, list[Gated]] = field(default_factory=dict)
    _subject: dict[Grid, Tensor | None] = field(default_factory=dict)
    _tokens: Mapping[Half, Mapping[BlockId, Tensor]] | None = None
    _outputs: Mapping[BlockId, Tensor] | None = None

    @property
    def anchor_count(self) -> int:
        """Pictures of the batch that others read."""
        return 0 if self.anchors else min(self.settings.anchors or self.pictures, self.pictures)

    def masks(self, grid: Grid) -> Tensor | None:
        """Where the subjects are: bool [b y x] in host memory; None before anything is known."""
        if grid not in self._masks:
            self._masks[grid] = self._masks_at(grid)
        return self._masks[grid]

    def _masks_at(self, grid: Grid) -> Tensor | None:
        if self.user_masks is not None:
            return resize_user_mask(self.user_masks, grid).expand(self.pictures, -1, -1)
        if self.soft is None:
            return None
        masks = subject_masks(self.soft, grid, self.settings.threshold)
        if not masks.any() and "dark" not in self.said:
            self.said.add("dark")
            log.warning(
                "%s: the subject's word lights up nowhere, so nothing is shared at this step. "
                "Describe the subject more "
                "plainly, or wire masks.",
                NODE,
            )
        return masks

    def subject(self, grid: Grid) -> Tensor | None:
        """The masks [b n] on the device."""
        if grid not in self._subject:
            masks = self.masks(grid)
            self._subject[grid] = None if masks is None else sent(masks.flatten(1), self.device)
        return self._subject[grid]

    def kept(self, grid: Grid) -> list[Tensor]:
        """Per anchor of the batch, the flat positions [l] among b*n that others see: its mask after
        dropout.
        """
        if grid not in self._kept:
            self._kept[grid] = self._kept_at(grid)
        return self._kept[grid]

    def _kept_at(self, grid: Grid) -> list[Tensor]:
        masks = self.masks(grid)
        if masks is None:
            return [torch.zeros(0, dtype=torch.long)] * self.anchor_count
        return self._left_of(masks, grid)

    def _left_of(self, masks: Tensor, grid: Grid) -> list[Tensor]:
        """What dropout leaves of the masks [b y x], as of kept."""
        count = self.anchor_count
        seed, share = self.settings.seed, self.settings.dropout
        step = self.schedule.step(self.sigma)
        seen = [masks[i] & ~dropped(seed, i, step, grid, share).view(grid) for i in range(count)]
        return positions_of(torch.stack(seen), range(count))

    def all_kept(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The same of all anchors together, [l] in host memory and on the device."""
        if grid not in self._all_kept:
            kept = torch.cat(self.kept(grid))
            self._all_kept[grid] = kept, sent(kept, self.device)
        return self._all_kept[grid]

    def shared(self, grid: Grid) -> list[tuple[tuple[int, int], Tensor]]:
        """Per group of pictures the flat positions it reads, on the device; groups that read
        nothing are left out.
        """
        if grid not in self._shared:
            self._shared[grid] = self._reads(self.kept(grid))
        return self._shared[grid]

    def _reads(self, kept: Sequence[Tensor]) -> list[tuple[tuple[int, int], Tensor]]:
        groups = shared_groups(self.pictures, self.settings.anchors)
        reads = {who: torch.cat([kept[j] for j in read]) for who, read in groups if read}
        reads = {who: index for who, index in reads.items() if len(index)}
        if not reads:
            return []
        there = sent(torch.cat(list(reads.values())), self.device)
        return list(zip(reads, there.split([len(index) for index in reads.values()])))

    def words(self, grid: Grid) -> Tensor | None:
        """Where each of several subjects is, no token in two: bool [b w y x] in host memory; None
        where there is but one, and where masks are wired.
        """
        if self.user_masks is not None or self.soft is None or self.soft.shape[1] < 2:
            return None
        return apart_masks(self.soft, grid, self.settings.threshold)

    def gated(self, grid: Grid) -> list[Gated]:
        """For each of several subjects what is read of it, and who may read it: tokens of the same
        subject and those of none.
        """
        if grid not in self._gated:
            words = self.words(grid)
            self._gated[grid] = [] if words is None else self._gated_at(words, grid)
        return self._gated[grid]

    def _gated_at(self, words: Tensor, grid: Grid) -> list[Gated]:
        none = ~words.any(1)
        gates = sent((words | none[:, None]).flatten(2), self.device)  # [b w n]
        return [
            Gated(self._reads(self._left_of(words[:, w], grid)), gates[:, w])
            for w in range(words.shape[1])
        ]

    def tokens(self) -> Mapping[Half, Mapping[BlockId, Tensor]]:
        """Tokens [l c] of anchors that are not in the batch."""
        if self._tokens is None:
            self._tokens = self.anchors.tokens(
                self.sigma, self.schedule.step(self.sigma), self.stage == 1
            )
        return self._tokens

    def outputs(self) -> Mapping[BlockId, Tensor]:
        """Self-attention outputs [l' c] of anchors that are not in the batch."""
        if self._outputs is None:
            self._outputs = self.anchors.outputs(self.sigma)
        return self._outputs
