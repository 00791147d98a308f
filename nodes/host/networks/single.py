"""Networks without kin: Lens, PixelDiT, Ideogram 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.flux.math import rope
from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import ALONE, Backbone, Stands
from ....models.network.rope import Turn
from .parts import Row, about_zero, blocks, known, matrices, side, turn


def lens(network: Any, model: ModelPatcher) -> Backbone:
    """Lens: picture, then text. Its patch of two cells is taken by the autoencoder: a cell of the
    latent is a token.
    """
    return known(
        model,
        calls=blocks("double", network.transformer_blocks),
        named=True,
        patch=1,
        stands=Stands.FIRST,
        turn=turn(network.pos_embed, along=about_zero(more_below=True)),
    )


def pixeldit(network: Any, model: ModelPatcher) -> Backbone:
    """PixelDiT: joint blocks over patches of pixels, then blocks of the picture alone."""
    calls = blocks("double", network.patch_blocks) + blocks(ALONE, network.pixel_blocks)
    widths = [network.hidden_size // network.num_groups]
    for block in network.pixel_blocks[:1]:
        widths.append(block.attn_dim // block.num_heads)
    turns = [
        Turn((0.0, 0.0), _over_the_picture(width), plane=0, along=_stretched) for width in widths
    ]
    return known(
        model,
        calls=calls,
        patch=side(network.patch_size),
        stands=Stands.LAST,
        turn=turns[0],
        turn_alone=turns[-1],
    )


def _stretched(side: int) -> torch.Tensor:
    """PixelDiT's positions go from 0 to 16 over the picture, however many tokens it has."""
    return torch.linspace(0, 16, side)


def _over_the_picture(width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """PixelDiT's rotation of heads of this width: pairs of channels take columns and rows in
    turn.
    """

    def rotation(positions: torch.Tensor) -> torch.Tensor:
        rows, columns = (rope(positions[None, :, axis], width // 2, 10000.0)[0] for axis in (0, 1))
        return torch.stack((columns, rows), 2).flatten(1, 2)

    return rotation


def ideogram(network: Any, model: ModelPatcher) -> Backbone:
    """Ideogram 4: text, picture. Its patch of two cells is taken by the autoencoder; its guider may
    sample the negative elsewhere.
    """
    # an older host has neither
    from comfy.ldm.ideogram4.model import IMAGE_POSITION_OFFSET
    from comfy.text_encoders.llama import precompute_freqs_cis

    offset = float(IMAGE_POSITION_OFFSET)

    def rotation(positions: torch.Tensor) -> torch.Tensor:
        code = precompute_freqs_cis(
            network.head_dim,
            positions.transpose(0, 1),
            network.rope_theta,
            rope_dims=network.mrope_section,
            interleaved_mrope=True,
            device=positions.device,
        )
        return matrices(code)

    return known(
        model,
        calls=blocks("single", network.layers),
        patch=1,
        stands=Stands.LAST,
        turn=Turn((0.0, 0.0, 0.0), rotation, halves=True, first=(offset, offset, offset)),
    )


NETWORKS: dict[str, Row] = {
    "comfy.ldm.lens.model.LensTransformer2DModel": lens,
    "comfy.ldm.pixeldit.model.PixDiT_T2I": pixeldit,
    "comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel": ideogram,
}
