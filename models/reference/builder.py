"""Collects the tokens of a reference pass into a bank.

Axes: r reference pictures, n tokens, l kept tokens over all r, c channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import reduce

import torch
from torch import Tensor

from ..copies import RowWriter, sent
from ..network.blocks import BlockId, Grid
from ..network.call import Half
from ..noise.inversion import InversionTrajectory
from .bank import ReferenceBank, ReferencePrompt
from .rows import Layer, RowReader, kept_of, split_row, thinned

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


# tokens [l c] of a block -> its keys and values side by side, where they are computed
Project = Callable[[BlockId, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Row:
    """What is held of one half at one step: the blocks' tokens one after another.

    values: [s] in host memory, complete once the builder's copies are; shapes: of each block's
    tokens, [l c] where the masks are known, else [r n c].
    """

    values: Tensor
    shapes: dict[BlockId, torch.Size]

    def tokens(self) -> dict[BlockId, Tensor]:
        """Views of them."""
        parts = self.values.split([shape.numel() for shape in self.shapes.values()])
        return {b: part.view(shape) for (b, shape), part in zip(self.shapes.items(), parts)}


@dataclass
class BankBuilder:
    """Collects the tokens of a running reference pass; `finish` gathers them once the masks are
    known.

    masks: of a grid, where they are known before: then nothing else is ever held, and keys and
    values are made before they are copied. project: None where tokens are keys and values as they
    come. pins: copies may go through pinned memory.
    """

    precision: torch.dtype | None = None  # None keeps the dtype the model computes in
    masks: Mapping[Grid, Tensor] | None = None
    share: float = 1.0
    keeps: Keeps = Keeps.HIDDEN
    project: Project | None = None
    pins: bool = True
    _steps: dict[tuple[Half, int], _Row] = field(default_factory=dict)
    _kept: dict[tuple[Grid, torch.device], Tensor] = field(default_factory=dict)
    # where and in what the model computes
    _computed: tuple[torch.device, torch.dtype] = (torch.device("cpu"), torch.float32)

    def __post_init__(self) -> None:
        self._copies = RowWriter(self.pins)

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
            self._warn(sum(t.nbytes for t in tokens.values()) * steps)
        first = next(iter(tokens.values()))
        self._computed = first.device, first.dtype
        stored = self._stored(tokens)
        size = sum(t.numel() for t in tokens.values()) * stored.itemsize * steps
        if self.masks is not None and self._projects(size):
            tokens = self._projected({b: t.to(stored) for b, t in tokens.items()})
        shapes = {block: t.shape for block, t in tokens.items()}
        values = torch.empty(sum(shape.numel() for shape in shapes.values()), dtype=stored)
        self._copies(list(tokens.values()), values)
        self._steps[half, step] = _Row(values, shapes)

    def _stored(self, tokens: Mapping[BlockId, Tensor]) -> torch.dtype:
        """The dtype of what is kept."""
        return self.precision or reduce(torch.promote_types, (t.dtype for t in tokens.values()))

    def _projects(self, size: float) -> bool:
        """Whether hidden states of so many bytes become keys and values."""
        return self.project is not None and self.keeps.projects(size)

    def _projected(self, tokens: Mapping[BlockId, Tensor]) -> dict[BlockId, Tensor]:
        """Tokens [l c] as they are stored, on the device -> their keys and values."""
        dtype = self._computed[1]
        return {block: self.project(block, t.to(dtype)).to(t) for block, t in tokens.items()}

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
            positions = self.masks[grid].flatten().nonzero().squeeze(1)
            self._kept[grid, device] = sent(thinned(positions, self.share), device)
        return self._kept[grid, device]

    def finish(
        self,
        grids: Mapping[BlockId, Grid],
        masks: Mapping[Grid, Tensor],
        trajectory: InversionTrajectory,
        prompts: Mapping[Half, ReferencePrompt],
        model_key: str,
        maps: Tensor | None,
    ) -> ReferenceBank:
        """Gather the masked tokens of every step into one row per step; full tokens are freed as
        they are read.
        """
        self._copies.finish()
        first = next(iter(self._steps.values()))
        layers = tuple(
            Layer(block, grids[block], shape[-1]) for block, shape in first.shapes.items()
        )
        bank = ReferenceBank(
            trajectory, prompts, layers, masks, {}, model_key, maps, share=self.share
        )
        if self.masks is None:
            size = first.values.itemsize * sum(
                len(bank.kept[layer.grid]) * layer.channels for layer in layers
            )
            if self._projects(size * len(self._steps)):
                return self._with_keys_values(bank)
        halves = dict.fromkeys(half for half, _ in self._steps)
        return replace(bank, features={half: self._features(half, bank) for half in halves})

    def _features(self, half: Half, bank: ReferenceBank) -> Tensor:
        """All steps of one half as they are held [t s]."""
        steps = sorted(s for h, s in self._steps if h is half)
        features = None
        for i, step in enumerate(steps):
            row = self._row(half, step, bank)
            if features is None:
                features = row.new_empty(len(steps), len(row))
            features[i] = row
        return features

    def _row(self, half: Half, step: int, bank: ReferenceBank) -> Tensor:
        """The kept tokens of one half at one step [s]; what is held of it is let go."""
        held = self._steps.pop((half, step))
        if self.masks is not None:
            return held.values
        return torch.cat([t.flatten() for t in bank.keep(held.tokens()).values()])

    def _with_keys_values(self, bank: ReferenceBank) -> ReferenceBank:
        """The bank of keys and values: each step's tokens go to the device in one copy, while the
        one before is computed.
        """
        rows = _Kept(self, bank)
        read, features, layers = RowReader(self._computed[0], self.pins), {}, bank.layers
        lengths = {grid: len(positions) for grid, positions in bank.kept.items()}
        for step in reversed(range(len(rows))):
            for half, row in zip(rows.halves, read(rows, step).chunk(len(rows.halves))):
                projected = self._projected(split_row(row, bank.layers, lengths))
                if half not in features:
                    size = sum(t.numel() for t in projected.values())
                    features[half] = torch.empty(len(rows), size, dtype=row.dtype)
                self._copies(list(projected.values()), features[half][step])
                layers = tuple(
                    replace(x, channels=projected[x.block].shape[-1]) for x in bank.layers
                )
        self._copies.finish()
        return replace(bank, layers=layers, features=features)


class _Kept(Sequence[Tensor]):
    """The kept tokens of all halves at each step [halves * s], gathered when they are asked for."""

    def __init__(self, builder: BankBuilder, bank: ReferenceBank) -> None:
        self.builder, self.bank = builder, bank
        self.halves = tuple(dict.fromkeys(half for half, _ in builder._steps))
        self.steps = sorted({step for _, step in builder._steps})

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> Tensor:
        step = self.steps[i]
        return torch.cat([self.builder._row(half, step, self.bank) for half in self.halves])
