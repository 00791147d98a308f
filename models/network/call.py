"""One pass of a transformer, and where the picture stands in each of its attention calls."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..reference.bank import BlockId, Grid
from .backbone import CROSS, Backbone


@dataclass(frozen=True)
class Joint:
    """What a call of a joint softmax holds beside the picture's tokens."""

    picture: slice  # of its keys
    mask: Tensor | None = None  # the host's own, on its keys


@dataclass
class Pass:
    """A pass of the network: its attention calls are counted, since most families tell none of them."""

    backbone: Backbone
    latent: Grid  # cells of what the network was given
    seen: int = 0

    def next(self, told: BlockId | None, keys: int) -> BlockId | None:
        """The block of the next call, None where it holds no whole picture.

        told: what the host says of it, if anything; keys: how many it has. With fewer than the picture's where a block's are
        due it is another node's, and not counted; a block that reads the text alone may have fewer.
        """
        if self.backbone.named:
            self.seen += 1
            return told if told in self.backbone.blocks else None
        calls = self.backbone.calls
        block = calls[self.seen] if self.seen < len(calls) else None
        if block is not None and block[0] != CROSS and keys < self.grid[0] * self.grid[1]:
            return None
        self.seen += 1
        return block

    @property
    def grid(self) -> Grid:
        """Tokens (y, x) of the picture."""
        return self.backbone.grid(self.latent)
