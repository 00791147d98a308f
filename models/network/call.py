"""One pass of a transformer, and where the picture stands in each of its attention calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..reference.bank import BlockId, Grid
from .backbone import ALONE, CROSS, Backbone


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
    seen: int = 0  # calls, where the family is counted
    done: set[BlockId] = field(
        default_factory=set
    )  # blocks whose own call came, where they are named

    def next(self, told: BlockId | None, keys: int) -> BlockId | None:
        """The block of the next call, None where it holds no whole picture.

        told: what the host says of it, if anything; keys: how many it has. A named block's own call is its first with keys for
        the whole picture. Where blocks are counted, a call with fewer where a block's is due is another node's, and not counted;
        a block that reads the text alone may have fewer.
        """
        whole = keys >= self.grid[0] * self.grid[1]
        if self.backbone.named:
            if not whole or told in self.done or told not in self.backbone.blocks:
                return None
            self.done.add(told)
            return told
        calls = self.backbone.calls
        block = calls[self.seen] if self.seen < len(calls) else None
        if block is not None and block[0] != CROSS and not whole:
            return None
        self.seen += 1
        return block

    def calls_of(self, stage: str, index: int) -> slice | None:
        """Which calls of a counted pass are those of one block; None where the family has no such block."""
        calls = self.backbone.calls
        if (stage, index, 0) not in calls:
            return None
        first = calls.index((stage, index, 0))
        last = first + 1
        while last < len(calls) and calls[last] in ((ALONE, index, 0), (CROSS, index, 0)):
            last += 1
        return slice(first, last)

    @property
    def grid(self) -> Grid:
        """Tokens (y, x) of the picture."""
        return self.backbone.grid(self.latent)
