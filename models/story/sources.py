"""What a story reads beside its own batch: anchors of other runs, the vanilla pass, and where a
model's features are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..network.blocks import BlockId
from ..network.call import AttnCall, Half
from ..network.watch import Watcher


class AnchorSource(Protocol):
    """Anchors that are not in the batch: generated earlier, or inverted photos."""

    aligned: bool  # their keys still have to be aligned (appendix E)

    def tokens(
        self, sigma: float, step: int, first: bool
    ) -> Mapping[Half, Mapping[BlockId, Tensor]]:
        """Kept tokens [l c] after dropout; first: of the first stage."""

    def text(self, half: Half) -> int | None:
        """How many tokens of text stood beside them."""

    def loudness(self, block: BlockId) -> float:
        """How many of the subject's tokens each kept one stands for."""

    def outputs(self, sigma: float) -> Mapping[BlockId, Tensor]:
        """Self-attention outputs [l' c] of the subject's tokens, before injection."""

    def features(self) -> tuple[Tensor, Tensor]:
        """DIFT features [r n c], and the subject's flat positions [l'] among r*n, in host
        memory.
        """


@dataclass(frozen=True)
class Layout:
    """Where a model's features are: per block the divisor of its grid, the feature layers, the tap
    of DIFT.
    """

    divisors: Mapping[BlockId, int]
    # self-attentions whose outputs are injected: encoder and decoder at half the maps' divisor
    output_blocks: frozenset[BlockId]
    # whose features are DIFT's: the output block that they come into, or of a transformer the block
    # whose attention answers them
    tap: int | BlockId
    divisor: int  # of both
    transformer: bool = False


class QueryRecorder(Watcher):
    """The vanilla pass of eq. (4): normed tokens of the shared layers, as to_q has no bias, so that
    blending them blends queries (I43); of a transformer the picture's queries themselves.
    """

    def __init__(self, blocks: frozenset[BlockId]) -> None:
        self.query_blocks, self.tokens = blocks, {}

    def self_tokens(self, call: AttnCall, n: Tensor) -> Tensor:
        if call.joint is None and call.block in self.query_blocks:
            self.tokens[call.block] = n
        return n

    def queries(self, call: AttnCall, q: Tensor) -> Tensor:
        self.tokens[call.block] = q.clone()  # else a view that keeps the whole projection alive
        return q
