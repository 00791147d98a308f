"""What other nodes do to a picture's tokens and keys beside which no subject can be shared.

Axes: b pictures, n query tokens, m keys, c channels, y x grid.
"""

from __future__ import annotations

from torch import Tensor

from ..network.blocks import Grid, block_name
from ..network.call import AttnCall
from .plan import NODE


def require_whole(call: AttnCall, x: Tensor, pictures: int, grid: Grid) -> None:
    """A part x [b n c] must hold every picture, whole, or positions would mean other things:
    ValueError.

    grid: the tokens that the latent's size makes in this block.
    """
    if call.unknown:
        raise ValueError(f"{NODE}: {call.unknown}")
    if x.shape[0] != pictures:
        raise ValueError(
            f"{NODE}: the model was given {x.shape[0]} pictures at once, but the batch has "
            f"{pictures}. Pictures that "
            "share a subject must be sampled together: remove the node that splits them (context "
            "windows, HyperTile)."
        )
    rows, columns = grid
    if call.cut:
        raise ValueError(
            f"{NODE}: the model was given {call.network_size[0]}x{call.network_size[1]} of a "
            f"latent of {call.cut[0]}x{call.cut[1]}. "
            "Pictures that share a subject must be sampled whole: remove the node that cuts them "
            "(tiled diffusion)."
        )
    if x.shape[1] > rows * columns and call.grid == (rows, columns):
        raise ValueError(
            f"{NODE}: in block {block_name(call.block)} each picture has {x.shape[1]} keys where "
            f"its own {rows}x{columns} "
            f"tokens make {rows * columns}: another node lengthened them (StyleAligned shares "
            f"every picture with all). "
            "Remove that node; this one shares the subject alone."
        )
    if x.shape[1] != rows * columns or call.grid != (rows, columns):
        raise ValueError(
            f"{NODE}: block {block_name(call.block)} has {x.shape[1]} tokens "
            f"({call.grid[0]}x{call.grid[1]}) where the "
            f"latent's size makes {rows}x{columns}. A node that changes the grid (Deep Shrink), "
            f"merges or tiles tokens is "
            "on the model: remove it."
        )


def require_own_keys(call: AttnCall, q: Tensor, k: Tensor, pictures: int, grid: Grid) -> None:
    """A picture's keys must be its own tokens alone, q [b n c], k [b m c]: ValueError."""
    if k.shape[1] < q.shape[1]:
        raise ValueError(
            f"{NODE}: another node shortened the keys of self-attention: block "
            f"{block_name(call.block)} has {k.shape[1]} "
            f"keys for {q.shape[1]} tokens ({call.grid[0]}x{call.grid[1]}), and which of them are "
            f"left cannot be told. "
            "Remove that node."
        )
    require_whole(call, k, pictures, grid)
