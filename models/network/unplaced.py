"""Keys of a network whose rotary code no turn can undo: they are kept without positions, and placed
where they are wanted.

Such a code gives both channels of a pair an angle of its own, so what leads from one place to
another is another map for every token, and for some there is none.
Axes: b rows, l tokens, h heads, d head width; channel i is paired with i + d/2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unplaced:
    """How such a network makes keys, and what its code does to them, by its own modules."""

    # an attention's module, hidden states [b n c] -> its keys before the code [b n (h d)]
    keys: Callable[[Any, Tensor], Tensor]
    # tokens of the text, cells (y, x) [l 2] -> the code there [l d/2 2 2] in float32
    places: Callable[[int, Tensor], Tensor]


def placed(keys: Tensor, code: Tensor) -> Tensor:
    """Keys without positions [b l (h d)], each under the matrices of its own place, code
    [l d/2 2 2].

    Computed in float32, or in float64 if the keys are. ValueError where the channels are no whole
    number of heads of d.
    """
    wide, d = torch.promote_types(keys.dtype, torch.float32), 2 * code.shape[1]
    if keys.shape[-1] % d:
        raise ValueError(
            f"Kindred: keys of {keys.shape[-1]} channels are no whole number of heads of {d}."
        )
    code = code.to(wide)[:, None]  # [l 1 d/2 2 2]
    first, second = keys.to(wide).unflatten(-1, (-1, d)).chunk(2, -1)
    pairs = [code[..., i, 0] * first + code[..., i, 1] * second for i in (0, 1)]
    return torch.cat(pairs, -1).flatten(2).to(keys.dtype)
