"""What was measured of a checkpoint's blocks, and which of them it recommends.

Recommended are the vital blocks, whose bypass does the most damage (docs/method.md 4.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..network.blocks import BlockId, block_name
from .prober import Change, Figures

MEASURED = "measured"  # the preset's name in an input `blocks`


@dataclass(frozen=True)
class Measurement:
    """Figures of every block of one checkpoint, in the order in which the network runs them.

    Raises ValueError where they do not fit together.
    """

    model_key: str
    blocks: tuple[BlockId, ...]
    figures: Figures  # of MOVED some blocks or none, of the others all
    sigmas: tuple[float, ...]
    size: tuple[int, int]  # cells (y, x) of the latents
    day: str  # of the measurement, 2026-11-29

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("no block was measured")
        for change in (Change.BYPASSED, Change.LENT):
            if self.figures[change].keys() != {*self.blocks}:
                raise ValueError(f"not every block was {change.value}")
        if not self.figures[Change.MOVED].keys() <= {*self.blocks}:
            raise ValueError("other blocks were moved than measured")

    @property
    def vital(self) -> tuple[BlockId, ...]:
        """The half of the blocks whose bypass does the most damage, without those that do none."""
        bypassed = self.figures[Change.BYPASSED]
        most = _ranked(self.blocks, bypassed, most=True)[: -(-len(self.blocks) // 2)]
        return self._in_order(block for block in most if bypassed[block] > 0)

    @property
    def content(self) -> tuple[BlockId, ...]:
        """The half of the blocks that mind positions the least; empty where none was moved."""
        moved = self.figures[Change.MOVED]
        least = _ranked(self.blocks, moved, most=False)
        return self._in_order(least[: -(-len(least) // 2)])

    @property
    def position(self) -> tuple[BlockId, ...]:
        """The other half."""
        return tuple(
            b for b in self.blocks if b in self.figures[Change.MOVED] and b not in self.content
        )

    @property
    def lent(self) -> tuple[BlockId, ...]:
        """The half of the blocks that a lent picture changes the most."""
        most = _ranked(self.blocks, self.figures[Change.LENT], most=True)
        return self._in_order(most[: -(-len(most) // 2)])

    @property
    def measured(self) -> tuple[BlockId, ...]:
        """The vital ones; all where none does anything."""
        return self.vital or self.blocks

    @property
    def presets(self) -> Mapping[str, tuple[BlockId, ...]]:
        """What an input `blocks` may be given; those that hold a block."""
        named = {
            MEASURED: self.measured,
            f"{MEASURED} vital": self.vital,
            f"{MEASURED} content": self.content,
            f"{MEASURED} position": self.position,
            f"{MEASURED} lent": self.lent,
        }
        return {name: blocks for name, blocks in named.items() if blocks}

    def _in_order(self, blocks: object) -> tuple[BlockId, ...]:
        chosen = {*blocks}
        return tuple(block for block in self.blocks if block in chosen)

    def report(self) -> str:
        """The figures as a table of text, and above it what they recommend."""
        lines = [
            f"{self.model_key}: {len(self.blocks)} blocks at sigma "
            f"{', '.join(f'{s:.3g}' for s in self.sigmas)}, measured {self.day}"
        ]
        for name, blocks in self.presets.items():
            lines.append(f"{name}: {', '.join(map(block_name, blocks))}")
        lines.append("")
        lines.append("| block | bypassed | moved | lent |")
        lines.append("|---|---:|---:|---:|")
        return "\n".join([*lines, *map(self._row, self.blocks)])

    def _row(self, block: BlockId) -> str:
        values = [self.figures[change].get(block) for change in Change]
        cells = " | ".join("-" if value is None else f"{value:.3f}" for value in values)
        return f"| {block_name(block)} | {cells} |"


def _ranked(
    blocks: Sequence[BlockId], figures: Mapping[BlockId, float], most: bool
) -> list[BlockId]:
    """Those with a figure, the greatest or the least first; equal ones as the network runs them."""
    known = [block for block in blocks if block in figures]
    return sorted(known, key=lambda block: -figures[block] if most else figures[block])
