"""Collects the tokens of a reference pass into a bank.

Axes: r reference pictures, n tokens, l kept tokens over all r, c channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor

from ..network.blocks import BlockId, Grid
from ..network.call import Half
from ..noise.inversion import InversionTrajectory
from .bank import ReferenceBank, ReferencePrompt
from .rows import Layer, kept_of, thinned

LARGE = 4e9  # bytes of main memory worth a warning
# bytes that an automatic bank takes for keys and values; SD1.5 has 0.58 GB, SDXL 5.2
KEYS_VALUES_UP_TO = 1e9
log = logging.getLogger(__name__)


class Keeps(str, Enum):
    """What a bank holds of a token: to project it is 0.4 % of an SD1.5 step for each half."""

    AUTO = "automatic"  # keys and values where they take no more than KEYS_VALUES_UP_TO
    HIDDEN = "hidden states"
    KEYS_VALUES = "keys and values"  # twice the memory

    def projects(self, size: float) -> bool:
        """Whether hidden states of so many bytes are kept as keys and values."""
        return self is Keeps.KEYS_VALUES or self is Keeps.AUTO and 2 * size <= KEYS_VALUES_UP_TO


# tokens [l c] of a block, in host memory -> its keys and values side by side
Project = Callable[[BlockId, Tensor], Tensor]


@dataclass
class BankBuilder:
    """Collects the tokens of a running reference pass; `finish` gathers them once the masks are
    known.

    masks: of a grid, where they are known before: then nothing else is ever held.
    """

    precision: torch.dtype | None = None  # None keeps the dtype the model computes in
    masks: Mapping[Grid, Tensor] | None = None
    share: float = 1.0
    keeps: Keeps = Keeps.HIDDEN
    _steps: dict[tuple[Half, int], dict[BlockId, Tensor]] = field(default_factory=dict)
    _kept: dict[tuple[Grid, torch.device], Tensor] = field(default_factory=dict)

    def add(
        self,
        half: Half,
        step: int,
        tokens: Mapping[BlockId, Tensor],
        steps: int = 1,
        grids: Mapping[BlockId, Grid] | None = None,
    ) -> None:
        """tokens: [r n c] per block, grids: theirs, where masks are known; copied to host memory.

        steps: how many such calls will come, for the warning of a large bank.
        """
        if self.masks is not None:
            tokens = {
                block: kept_of(block, grids[block], t, self._positions(grids[block], t.device))
                for block, t in tokens.items()
            }
        if not self._steps:
            self._warn(sum(t.numel() * t.element_size() for t in tokens.values()) * steps)
        self._steps[half, step] = {
            b: t.to("cpu", self.precision or t.dtype, copy=True) for b, t in tokens.items()
        }

    def _warn(self, size: float) -> None:
        """Say so where a whole pass holds more than LARGE bytes."""
        if size <= LARGE:
            return
        when, less = " until the mask is known", "a wired mask"
        if self.masks:
            when, less = "", "a smaller token_share"
        log.warning(
            "Kindred: the reference pass holds up to %.1f GB of main memory%s. Fewer blocks, %s or "
            "precision float16 need "
            "less.",
            size / 1e9,
            when,
            less,
        )

    def _positions(self, grid: Grid, device: torch.device) -> Tensor:
        if (grid, device) not in self._kept:
            self._kept[grid, device] = thinned(
                self.masks[grid].flatten().nonzero().squeeze(1), self.share
            ).to(device)
        return self._kept[grid, device]

    def finish(
        self,
        grids: Mapping[BlockId, Grid],
        masks: Mapping[Grid, Tensor],
        trajectory: InversionTrajectory,
        prompts: Mapping[Half, ReferencePrompt],
        model_key: str,
        maps: Tensor | None,
        project: Project | None = None,
    ) -> ReferenceBank:
        """Gather the masked tokens of every step into one row per step; full tokens are freed as
        they are read.
        """
        first = next(iter(self._steps.values()))
        layers = tuple(
            Layer(block, grids[block], tokens.shape[-1]) for block, tokens in first.items()
        )
        bank = ReferenceBank(
            trajectory, prompts, layers, masks, {}, model_key, maps, share=self.share
        )
        size = sum(
            len(bank.kept[layer.grid]) * layer.channels * first[layer.block].element_size()
            for layer in layers
        ) * len(self._steps)
        if not self.keeps.projects(size):
            project = None
        features, widths = {}, {}
        for half in dict.fromkeys(h for h, _ in self._steps):
            features[half], widths = self._rows(half, bank, project)
        layers = tuple(replace(layer, channels=widths[layer.block]) for layer in layers)
        return replace(bank, layers=layers, features=features)

    def _rows(
        self, half: Half, bank: ReferenceBank, project: Project | None
    ) -> tuple[Tensor, dict[BlockId, int]]:
        """All steps of one half [t s], and how many channels each block has in them."""
        steps = sorted(s for h, s in self._steps if h is half)
        rows, widths = None, {}
        for i, step in enumerate(steps):
            tokens = self._steps.pop((half, step))
            tokens = tokens if self.masks is not None else bank.keep(tokens)
            if project is not None:
                tokens = {block: project(block, t).to(t) for block, t in tokens.items()}
            row = torch.cat([t.flatten() for t in tokens.values()])
            if rows is None:
                rows = row.new_empty(len(steps), len(row))
                widths = {block: t.shape[-1] for block, t in tokens.items()}
            rows[i] = row
        return rows, widths
