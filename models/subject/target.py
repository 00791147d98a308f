"""Where in the new picture an injection may act."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..copies import sent
from ..network.blocks import Grid
from ..network.call import AttnCall
from .masks import resize_user_mask


@dataclass
class TargetMask:
    """Where in the new picture an injection may act: mask [1|b y x] at its own size, white is
    where; kept per grid.
    """

    mask: Tensor
    node: str  # whose errors these are
    _at: dict[tuple[Grid, Grid, tuple[Any, ...]], Tensor] = field(default_factory=dict)

    def __call__(self, call: AttnCall, q: Tensor) -> Tensor:
        """-> [parts 1|b n] at the call's grid; the call of an area prompt is cropped, and the mask
        with it; where the sampler resizes
        the picture, the mask is resized to what it asks about. ValueError on tiles and parts.
        """
        self._require_whole(call, q)
        areas = tuple(part.area for part in call.texts)
        key = (call.latent, call.grid, areas)
        if key not in self._at:
            whole = resize_user_mask(self.mask, call.latent).float()
            crops = [
                whole if a is None else whole[:, a[2] : a[2] + a[0], a[3] : a[3] + a[1]]
                for a in areas
            ]
            masks = torch.stack([resize_user_mask(crop, call.grid).flatten(1) for crop in crops])
            self._at[key] = sent(masks, q.device, q.dtype)
        return self._at[key]

    def _require_whole(self, call: AttnCall, q: Tensor) -> None:
        """ValueError on tiles and parts, and where there is no mask for each picture."""
        if call.grid[0] * call.grid[1] != q.shape[1]:
            raise ValueError(
                f"{self.node}: a target mask needs whole pictures, but a node before the sampler "
                f"cut them into tiles "
                f"({q.shape[1]} tokens for a grid of {call.grid[0]}x{call.grid[1]}: HyperTile does "
                f"this). "
                "Remove that node or the target mask."
            )
        if whole := call.cut:
            raise ValueError(
                f"{self.node}: a target mask needs whole pictures, but a node before the sampler "
                f"cut them into tiles "
                f"({call.network_size[0]}x{call.network_size[1]} of a latent of "
                f"{whole[0]}x{whole[1]}: tiled diffusion does this). "
                "Remove that node or the target mask."
            )
        if call.part:
            raise ValueError(
                f"{self.node}: a target mask needs whole pictures, but {call.part}. Choose another "
                f"sampler, or remove the "
                "target mask."
            )
        rows = q.shape[0] // len(call.texts)
        if self.mask.shape[0] not in (1, rows):
            raise ValueError(
                f"{self.node}: {self.mask.shape[0]} target masks for {rows} pictures. Wire one "
                f"mask, or one per picture."
            )
