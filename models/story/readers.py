"""Who reads a story's wired reference: anchors of an earlier run, or inverted photos
(arXiv 2402.03286, 4.4 and appendix E).

Axes: r anchors, n tokens of a grid, l kept tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..copies import sent
from ..network.blocks import BlockId, Grid
from ..network.call import Asker, Half, Part, grid_of
from ..reference.bank import ReferenceBank
from ..reference.recorder import Recorder
from ..reference.rows import RowReader, split_row
from ..subject.correspondence import smooth
from ..subject.masks import resize_user_mask
from .plan import NODE, Schedule, dropped
from .sources import Layout


class StoryRun(Protocol):
    """What a story needs to know of its sampler run."""

    steps: int
    sigmas: tuple[float, ...]  # descending, without the last 0
    pictures: int  # in the sampled batch
    latent: Grid
    parts: Mapping[Any, Part]
    rows: RowReader | None
    asker: Asker

    @property
    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]: ...
    def timesteps(self) -> tuple[float, ...]: ...
    def at(self, *percents: float) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class PhotoPasses:
    """Passes of the network over a bank's photos at a sigma."""

    # (bank, sigma, halves) -> the kept tokens [l c] of every block, per half
    tokens: Callable[
        [ReferenceBank, float, frozenset[Half]], Mapping[Half, Mapping[BlockId, Tensor]]
    ]
    watch: Callable[[ReferenceBank, float, frozenset[Half], Recorder], None]


@dataclass
class GeneratedAnchors:
    """Anchors of an earlier run, an AnchorSource: exactly the tokens that pictures beside them read
    then.
    """

    bank: ReferenceBank
    run: StoryRun
    halves: tuple[Half, ...]
    aligned: ClassVar[bool] = False

    def row(self, sigma: float) -> int:
        row = self.bank.step_of(sigma)
        if row is None:
            known = self.bank.trajectory
            raise ValueError(
                f"{NODE}: this sampler asks for noise level {sigma:.4g} "
                f"({len(self.run.sigmas)} steps), which the anchors do not have: they were made "
                f"with {known.schedule} ({len(known.sigmas) - 1} noise levels). Take the sampler, "
                "scheduler and steps of the anchors, or make anchors with these."
            )
        return row

    def tokens(
        self, sigma: float, step: int, first: bool
    ) -> Mapping[Half, Mapping[BlockId, Tensor]]:
        row = self.row(sigma)
        return {
            half: self.bank.tokens(half, row, *self.run.device_and_dtype, first, self.run.rows)
            for half in self.halves
        }

    def text(self, half: Half) -> int | None:
        return self.bank.prompts[half].cross.shape[1]

    def loudness(self, block: BlockId) -> float:
        return 1.0

    def outputs(self, sigma: float) -> Mapping[BlockId, Tensor]:
        a = self.bank.anchors
        device, dtype = self.run.device_and_dtype
        read = self.run.rows or RowReader(device)
        stored = read(a.outputs, self.row(sigma)).to(dtype)
        return split_row(
            stored, a.output_layers, {layer.grid: len(a.subject) for layer in a.output_layers}
        )

    def features(self) -> tuple[Tensor, Tensor]:
        return self.bank.anchors.features, self.bank.anchors.subject


@dataclass
class PhotoAnchors:
    """Inverted photos as anchors, an AnchorSource (appendix E): they see nobody; what the bank does
    not hold is read live.
    """

    bank: ReferenceBank
    run: StoryRun
    halves: tuple[Half, ...]
    layout: Layout
    schedule: Schedule
    passes: PhotoPasses
    aligned: ClassVar[bool] = True
    _live: tuple[float, Recorder] | None = None

    def tokens(
        self, sigma: float, step: int, first: bool
    ) -> Mapping[Half, Mapping[BlockId, Tensor]]:
        """Dropout is drawn as for anchors of the batch."""
        tokens = self.passes.tokens(self.bank, sigma, frozenset(self.halves))
        kept: dict[Grid, Tensor] = {}
        for layer in self.bank.layers:
            if layer.grid not in kept:
                kept[layer.grid] = self._kept(step, layer.grid)
        grids = {layer.block: layer.grid for layer in self.bank.layers}
        return {
            half: {b: t.index_select(0, kept[grids[b]]) for b, t in tokens[half].items()}
            for half in self.halves
        }

    def _kept(self, step: int, grid: Grid) -> Tensor:
        """Which of the bank's kept tokens of a grid [l] are left at a step, on the device."""
        settings = self.schedule.settings
        drop = torch.cat(
            [
                dropped(settings.seed, i, step, grid, settings.dropout)
                for i in range(self.bank.pictures)
            ]
        )
        index = (~drop[self.bank.kept[grid]]).nonzero().squeeze(1)
        return sent(index, self.run.device_and_dtype[0])

    def text(self, half: Half) -> int | None:
        return self.bank.prompts[half].cross.shape[1]

    def loudness(self, block: BlockId) -> float:
        return self.bank.loudness[self.bank.grids[block]]

    def watched(self, sigma: float) -> Recorder:
        """What a pass over the photos at this sigma showed of outputs and features."""
        if self._live is None or self._live[0] != sigma:
            recorder = Recorder((), outputs=self.layout.output_blocks, features_at=self.layout.tap)
            self.passes.watch(self.bank, sigma, frozenset({Half.COND}), recorder)
            self._live = sigma, recorder
        return self._live[1]

    def outputs(self, sigma: float) -> Mapping[BlockId, Tensor]:
        subject = sent(self.subject(), self.run.device_and_dtype[0])
        return {
            b: x.flatten(0, 1).index_select(0, subject)
            for b, x in self.watched(sigma).outputs.items()
        }

    def features(self) -> tuple[Tensor, Tensor]:
        features = smooth(self.watched(self.schedule.features_at).features.float())
        return features.flatten(2).movedim(1, 2), self.subject()

    def subject(self) -> Tensor:
        """The flat positions [l] of the subject among r*n at the features' grid."""
        whole = tuple(self.bank.trajectory.latents.shape[-2:])
        grid = grid_of(whole, self.layout.divisor)
        masks = (
            self.bank.masks[grid]
            if grid in self.bank.masks
            else resize_user_mask(self.bank.masks[whole].float(), grid)
        )
        return masks.flatten().nonzero().squeeze(1)
