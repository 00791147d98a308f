"""Who takes part in a pass of the network: injections, which are read in it, and watchers, which
see what passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from ..attention.parts import References
from ..attention.sharing import Sharing
from .blocks import BlockId
from .call import AttnCall, Part
from .sites import BlockSite


class ActiveInjection(Protocol):
    """An injection during one run: everything of it that changes. node: whose; wants: it should be
    read at this step.
    """

    node: str
    wants: bool

    def begin_step(self, sigma: float) -> None: ...
    def concerns(self, call: AttnCall) -> bool: ...  # an attention that it is read in
    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> Iterable[References | Sharing]: ...


class Watcher:
    """Sees what passes through the UNet, and may change what it is handed where it returns it."""

    complete = False  # this pass has nothing more to show
    blocks: frozenset[BlockId] = frozenset()  # whose self-attention it waits for
    map_blocks: frozenset[BlockId] = frozenset()  # and whose cross-attention
    # of a transformer alone: whose queries it is handed, and the answers of whose attention
    query_blocks: frozenset[BlockId] = frozenset()
    output_blocks: frozenset[BlockId] = frozenset()
    # where features are read: a UNet's output block, or a transformer's block
    tap: int | BlockId | None = None

    def begin_pass(self) -> None:
        """The UNet begins a pass that ends once all its watchers are complete."""

    def self_tokens(self, call: AttnCall, n: Tensor) -> Tensor:
        """Normed tokens [b n c] before a self-attention's to_q (its keys and values keep what they
        were) -> what to_q reads.
        """
        return n

    def queries(self, call: AttnCall, q: Tensor) -> Tensor:
        """A transformer's queries [b n (h d)] of the picture, positions in them -> what it looks
        with.
        """
        return q

    def cross(self, call: AttnCall, q: Tensor, k: Tensor, heads: int) -> None:
        """Queries [b n (h d)] and text keys [b m (h d)] of a cross-attention."""

    def self_output(self, call: AttnCall, out: Tensor) -> Tensor:
        """Outputs [b n c] of a self-attention after to_out, before the residual -> what is added.

        Of a transformer the picture's outputs before the projection.
        """
        return out

    def alters(self, block: BlockId) -> bool:
        """Whether it changes what the block's self-attention is computed of."""
        return False

    def altered(
        self, call: AttnCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b n (h d)], keys and values [b m (h d)] of a block whose attention it alters ->
        what the kernel gets.
        """
        return q, k, v

    def output_block(self, index: int | BlockId, h: Tensor, parts: Sequence[Part]) -> None:
        """Features h [b c y x] that output block `index` is about to join with its skip.

        Of a transformer, the picture's answers of the attention of block `index`.
        """


class PassEnds(Exception):
    """Leaves the UNet where its watchers have seen all they wait for."""
