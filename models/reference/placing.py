"""Where the kept tokens of a reference stand for the picture that reads them: D (1) of
docs/method.md 4.1.

Axes: r reference pictures, y x token grid, l kept tokens over all r, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..network.blocks import Grid
from ..network.rope import Positions, Turn, rotated


@dataclass(frozen=True)
class Place:
    """A reference beside a picture: both grids, and how long a text each is beside."""

    reference: Grid
    picture: Grid
    text: int  # tokens beside the reference
    here: int  # and beside the picture

    @classmethod
    def of(cls, turn: Turn, reference: Grid, picture: Grid, texts: tuple[int, int]) -> Place:
        """The same for all texts where they move nothing."""
        there, here = texts if any(turn.axes) else (0, 0)
        return cls(reference, picture, there, here)


@dataclass
class Placing:
    """Puts the keys of a reference where `positions` says, and remembers how."""

    positions: Positions
    pictures: int  # r
    _known: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def keys(self, k: Tensor, turn: Turn, place: Place, kept: Tensor) -> Tensor:
        """Keys [b l (h d)] as they come -> as if they were made there; kept: flat positions [l]
        over r*y*x.
        """
        key = id(turn), place, id(kept), k.device
        if key not in self._known:
            self._known[key] = self._matrices(turn, place, kept, k.device)
        return rotated(k, self._known[key], turn.halves)

    def _matrices(self, turn: Turn, place: Place, kept: Tensor, device: torch.device) -> Tensor:
        """[l d/2 2 2] from where each kept token stood to where it stands."""
        kept = kept.cpu()
        there = turn.places(place.reference, place.text)
        stands = [
            turn.placed(self.positions, place.reference, place.picture, place.here, number)
            for number in range(self.pictures)
        ]
        here = None if self.positions is Positions.NONE else torch.cat(stands)[kept]
        return turn.between(there[kept % len(there)], here, device)
