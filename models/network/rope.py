"""Where tokens stand in a network's rotary code, and keys that are put elsewhere: D (1) of
docs/method.md 4.1.

Keys come rotated, so they are turned: R(p') R(p)^T R(p) k = R(p') k.
Axes: b rows of a call, l tokens, a axes of a position, h heads, d head width, y x grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .blocks import Grid


class Positions(str, Enum):
    """Where the tokens of a reference stand for the picture that reads them."""

    OWN = "own"  # where they stood in the photo
    CENTRED = "centred"  # the photo's middle on the picture's middle
    ASIDE = "aside"  # right of the picture, as if one canvas held both
    APART = "apart"  # one step along the time axis; aside where there is none
    NONE = "none"  # nowhere: tokens are compared by what they hold alone


@dataclass(frozen=True)
class Turn:
    """The rotary code of a network's picture tokens: how their positions rotate keys.

    The token in row i and column j stands at first + T axes, with along(y)[i] and along(x)[j] more
    on the two axes of the plane, for T text tokens. What all positions share is of no effect but
    for rounding.
    rotation: positions [l a] -> rotation matrices [l d/2 2 2] in float32, of the network's own
    rotary embedder.
    halves: channel i is paired with i + d/2; else neighbours are paired.
    """

    axes: tuple[float, ...]  # what one more text token adds to the picture's position
    rotation: Callable[[Tensor], Tensor]
    halves: bool = False
    first: tuple[float, ...] | None = None  # of the first token beside no text; None: the origin
    plane: int = 1  # the axis of rows; that of columns is the next, time's the first before it
    along: Callable[[int], Tensor] = torch.arange  # how many tokens -> their places [n] on an axis
    step: float = 1.0  # from a picture to a reference along the time axis
    _known: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    def matrix(self, shift: float, device: torch.device) -> Tensor:
        """[d/2 2 2] of a text that is `shift` tokens longer; made once, as a device would wait for
        each.
        """
        if (shift, device) not in self._known:
            step = torch.tensor([self.axes], dtype=torch.float32, device=device) * shift
            self._known[shift, device] = self.rotation(step)[0]
        return self._known[shift, device]

    @property
    def timed(self) -> bool:
        """Whether there is a time axis."""
        return self.plane > 0

    def places(self, grid: Grid, text: int) -> Tensor:
        """The positions [y*x a] of a picture of this grid beside so many text tokens."""
        return self._laid(self.along(grid[0]), self.along(grid[1]), text)

    def _laid(self, rows: Tensor, columns: Tensor, text: int, time: float = 0.0) -> Tensor:
        first = self.first or (0.0,) * len(self.axes)
        base = torch.tensor(first) + text * torch.tensor(self.axes)
        if self.timed:
            base[0] += time
        laid = base.repeat(len(rows), len(columns), 1)
        laid[..., self.plane] += rows[:, None]
        laid[..., self.plane + 1] += columns
        return laid.flatten(0, 1)

    def placed(
        self, positions: Positions, reference: Grid, picture: Grid, text: int, number: int = 0
    ) -> Tensor | None:
        """Where the tokens of a reference of one grid stand for a picture of another, [y*x a]; None
        where they stand nowhere.

        number: of the reference's picture; each further one stands one place further aside or
        apart.
        """
        if positions is Positions.NONE:
            return None
        if positions is Positions.OWN:
            return self.places(reference, text)
        if positions is Positions.APART and self.timed:
            along = [self.along(side) for side in reference]
            return self._laid(*along, text, (number + 1) * self.step)
        middle = [(p - r) // 2 for p, r in zip(picture, reference)]
        if positions is not Positions.CENTRED:
            middle[1] = picture[1] + number * reference[1]
        sides = zip(picture, reference, middle)
        rows, columns = (_continued(self.along(p), start, r) for p, r, start in sides)
        return self._laid(rows, columns, text)

    def out_of_place(self, grid: Grid, text: int, device: torch.device) -> Callable[..., Tensor]:
        """What takes the positions of a picture's tokens off its queries, [b y*x (h d)] -> the
        same; one object for equal arguments.
        """
        key = "queries", grid, text, device
        if key not in self._known:
            back = self.between(self.places(grid, text), None, device)

            def unplaced(q: Tensor) -> Tensor:
                return rotated(q, back, self.halves)

            self._known[key] = unplaced
        return self._known[key]

    def between(self, there: Tensor, here: Tensor | None, device: torch.device) -> Tensor:
        """The matrices [l d/2 2 2] from positions [l a] to others; None: to no position."""
        back = self.rotation(there.to(device)).mT
        return back if here is None else self.rotation(here.to(device)) @ back


def _continued(places: Tensor, start: int, count: int) -> Tensor:
    """The places [count] of tokens that go on as those of a side do, from number `start` on."""
    step = places[1] - places[0] if len(places) > 1 else 1
    return places[0] + step * torch.arange(start, start + count)


def rotated(keys: Tensor, matrices: Tensor, halves: bool = False) -> Tensor:
    """Keys [b l (h d)] rotated by one matrix a token [l d/2 2 2], or by one for all [d/2 2 2].

    Computed in float32, or in float64 if the keys are. ValueError where the channels are no whole
    number of heads of d.
    """
    wide = torch.promote_types(keys.dtype, torch.float32)
    matrices = matrices.to(wide)
    d = 2 * matrices.shape[-3]
    if keys.shape[-1] % d:
        raise ValueError(
            f"Kindred: keys of {keys.shape[-1]} channels are no whole number of heads of {d}."
        )
    heads = keys.to(wide).unflatten(-1, (-1, d))
    pairs = (
        heads.unflatten(-1, (2, d // 2)).movedim(-2, -1)
        if halves
        else heads.unflatten(-1, (d // 2, 2))
    )
    if matrices.ndim == 3:
        turned_pairs = torch.einsum("dij,...dj->...di", matrices, pairs)
    else:
        turned_pairs = torch.einsum("ldij,blhdj->blhdi", matrices, pairs)
    back = turned_pairs.movedim(-1, -2).flatten(-2) if halves else turned_pairs.flatten(-2)
    return back.flatten(-2).to(keys.dtype)


def turned(keys: Tensor, turn: Turn, shift: float) -> Tensor:
    """Rotated keys [b m (h d)] as they would be beside a text of `shift` more tokens: R(p') k =
    R(p' - p) R(p) k.
    """
    return rotated(keys, turn.matrix(shift, keys.device), turn.halves)
