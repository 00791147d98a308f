"""Which tokens of a layer a reference keeps, how they lie in a row, and how a row comes to the
device.

Axes: r reference pictures, y x token grid, n = y*x tokens, l kept tokens over all r, c channels, s
values of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..network.blocks import BlockId, Grid, block_name


@dataclass(frozen=True)
class Layer:
    """A self-attention layer whose tokens a bank holds; channels: those of to_k's input, or of keys
    and values together.
    """

    block: BlockId
    grid: Grid
    channels: int


GOLDEN = 0.6180339887498949  # its multiples fall apart from one another as evenly as can be


def thinned(positions: Tensor, share: float) -> Tensor:
    """About `share` of the positions [l], at least one, spread evenly over them."""
    if share >= 1 or not len(positions):
        return positions
    count = max(round(len(positions) * share), 1)
    order = (torch.arange(len(positions), dtype=torch.float64) * GOLDEN).frac().argsort()
    return positions[order[:count].sort().values]


def kept_of(block: BlockId, grid: Grid, tokens: Tensor, kept: Tensor) -> Tensor:
    """tokens [r n c] of a block, kept [l] flat positions over r*n -> [l c]; ValueError where n is
    not that of the grid.
    """
    (y, x), n = grid, tokens.shape[1]
    if n != y * x:  # on CUDA a wrong index would take the whole server down
        raise ValueError(
            f"Kindred: block {block_name(block)} gave {n} tokens where the reference has {y}x{x}. "
            f"A node that "
            "changes the grid (Deep Shrink, token merging) is on the model: remove it."
        )
    return gather(tokens, kept.to(tokens.device))


def split_row(
    row: Tensor, layers: Sequence[Layer], lengths: Mapping[Grid, int]
) -> dict[BlockId, Tensor]:
    """A row [s] of kept tokens -> views [l c] per layer."""
    parts = row.split([lengths[layer.grid] * layer.channels for layer in layers])
    return {layer.block: part.view(-1, layer.channels) for layer, part in zip(layers, parts)}


def gather(tokens: Tensor, kept: Tensor) -> Tensor:
    """tokens [r n c], kept [l] flat positions over r*n -> [l c]."""
    return tokens.reshape(-1, tokens.shape[-1]).index_select(0, kept)


class RowReader:
    """Rows of a bank on a device; on CUDA the next one is copied behind the step that computes.

    Samplers go from noise to picture, so the next row is the one before; another one that is asked
    for is copied then.
    """

    def __init__(self, device: torch.device, pins: bool = True) -> None:
        """pins: rows may be put into pinned memory first; else, or where there is none left, the
        host waits for each copy.
        """
        self.device, self.pins = device, pins
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[tuple[int, int], tuple[Tensor, torch.cuda.Event]] = {}

    def __call__(self, rows: Tensor | Sequence[Tensor], step: int) -> Tensor:
        if self._stream is None:
            return rows[step].to(self.device)
        if (id(rows), step) not in self._ahead:
            self._begin(rows, step)
        row, copied = self._ahead.pop((id(rows), step))
        here = torch.cuda.current_stream(self.device)
        here.wait_event(copied)
        row.record_stream(here)
        # a guess that was wrong
        self._ahead = {key: held for key, held in self._ahead.items() if key[0] != id(rows)}
        if step:
            self._begin(rows, step - 1)
        return row

    def _begin(self, rows: Tensor | Sequence[Tensor], step: int) -> None:
        row = rows[step]
        with torch.cuda.stream(self._stream):
            far = self._pinned(row).to(self.device, non_blocking=True)
            self._ahead[id(rows), step] = far, self._stream.record_event()

    def _pinned(self, row: Tensor) -> Tensor:
        if not self.pins or not len(row) or row.is_pinned():
            return row
        try:
            return row.pin_memory()
        except RuntimeError:  # systems bound how much there may be
            self.pins = False
            return row
