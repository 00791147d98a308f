"""Where a network's attention is: each block's module, its grid, and how kept tokens become keys
and values there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .backbone import Backbone
from .blocks import BlockId, select_blocks
from .rope import turned
from .unplaced import placed

# method.md 2.2: word maps are read where the grid is a quarter of the latent (16x16 at 512 px)
MASK_DIVISOR = 4


def keys_values(attn: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Kept tokens [b l c] of a layer -> k, v [b l (h d)]; a bank may hold them already, side by
    side in [b l 2*(h d)].
    """
    if tokens.shape[-1] == attn.to_k.in_features:
        return attn.to_k(tokens), attn.to_v(tokens)
    k, v = tokens.chunk(2, -1)
    return k, v


@dataclass(frozen=True)
class BlockSite:
    """A block with attention: its module, and how many times smaller than the latent its grid is.

    module: of a UNet (attn1, attn2); None in a transformer, whose keys and values are taken as they
    come.
    """

    module: nn.Module | None
    divisor: int
    # False: its attn1 reads the text too, as in the first level of SDXS 0.9
    self_attention: bool = True
    backbone: Backbone | None = None

    def keys_values(
        self,
        tokens: Tensor,
        texts: tuple[int | None, int | None] = (None, None),
        code: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Kept tokens [b l c] -> k, v [b l (h d)]; texts: how long it was beside the reference, and
        is here, for keys that it moves; code: as of `placed`, for keys that are kept without.
        """
        if self.backbone is None:
            return keys_values(self.module.attn1, tokens)
        k, v = tokens.chunk(2, -1)
        if code is not None:
            return placed(k, code), v
        there, here = (None if t is None else self.backbone.text_tokens(t) for t in texts)
        turn = self.backbone.turn
        if turn is not None and any(turn.axes) and None not in (there, here) and there != here:
            k = turned(k, turn, here - there)
        return k, v


def map_blocks(wanted: str, sites: Mapping[BlockId, BlockSite], node: str) -> tuple[BlockId, ...]:
    """The blocks whose cross-attention locates the subject; auto: every block at a quarter of the
    latent, or the coarsest there is.

    Of a transformer, blocks in which the picture reads the text; auto: those that its backbone
    knows to locate best.
    """
    if (backbone := next((site.backbone for site in sites.values()), None)) is not None:
        if wanted.strip().lower() == "auto":
            return backbone.locating
        return select_blocks(wanted, backbone.reading, node)
    if wanted.strip().lower() != "auto":
        return select_blocks(wanted, tuple(sites), node)
    divisor = map_divisor(sites)
    return tuple(block for block, site in sites.items() if site.divisor == divisor)


def map_divisor(sites: Mapping[BlockId, BlockSite]) -> int:
    return min(MASK_DIVISOR, max(site.divisor for site in sites.values()))


def require_placed_keys(sites: Mapping[BlockId, BlockSite], node: str) -> None:
    """ValueError for a network whose keys are kept without positions: a story does not place kept
    ones again yet.
    """
    backbone = next((site.backbone for site in sites.values()), None)
    if backbone is not None and backbone.unplaced is not None:
        raise ValueError(
            f"{node}: in {backbone.family} a story can read neither saved anchors nor photos yet "
            "(its keys carry positions of their own). Sample all pictures of the story "
            "in one batch, without a reference, or read a photo by Masked Self-Attn Inject."
        )


def family_of(sites: Mapping[BlockId, BlockSite]) -> str | None:
    """The name of a transformer's kind; None for a UNet."""
    return next((site.backbone.family for site in sites.values() if site.backbone), None)
