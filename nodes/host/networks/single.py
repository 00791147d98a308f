"""Networks without kin: Lens, PixelDiT, Ideogram 4."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import ALONE, Backbone, Stands
from .parts import Row, blocks, known, side


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
    )


def pixeldit(network: Any, model: ModelPatcher) -> Backbone:
    """PixelDiT: joint blocks over patches of pixels, then blocks of the picture alone."""
    calls = blocks("double", network.patch_blocks) + blocks(ALONE, network.pixel_blocks)
    return known(model, calls=calls, patch=side(network.patch_size), stands=Stands.LAST)


def ideogram(network: Any, model: ModelPatcher) -> Backbone:
    """Ideogram 4: text, picture. Its patch of two cells is taken by the autoencoder; its guider may
    sample the negative elsewhere.
    """
    return known(model, calls=blocks("single", network.layers), patch=1, stands=Stands.LAST)


NETWORKS: dict[str, Row] = {
    "comfy.ldm.lens.model.LensTransformer2DModel": lens,
    "comfy.ldm.pixeldit.model.PixDiT_T2I": pixeldit,
    "comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel": ideogram,
}
