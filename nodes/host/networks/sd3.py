"""Stable Diffusion 3's kin: text before picture, positions in the hidden states instead of the
keys, calls known by their number.
"""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import ALONE, Backbone, Stands
from ....models.network.blocks import BlockId
from .parts import Row, blocks, known, side


def sd3(network: Any, model: ModelPatcher) -> Backbone:
    """SD3 and SD3.5. In 3.5 medium's first blocks a second call holds the picture alone
    (x_block_self_attn).
    """
    calls: list[BlockId] = []
    for index, block in enumerate(network.joint_blocks):
        calls.append(("double", index, 0))
        if block.x_block.x_block_self_attn:
            calls.append((ALONE, index, 0))
    return known(model, calls=tuple(calls), patch=side(network.patch_size), stands=Stands.LAST)


def aura(network: Any, model: ModelPatcher) -> Backbone:
    """AuraFlow: eight registers, text, picture."""
    calls = blocks("double", network.double_layers) + blocks("single", network.single_layers)
    return known(
        model,
        calls=calls,
        patch=side(network.patch_size),
        stands=Stands.LAST,
        prefix=network.register_tokens.shape[1],
    )


NETWORKS: dict[str, Row] = {
    "comfy.ldm.modules.diffusionmodules.mmdit.MMDiT": sd3,
    "comfy.ldm.aura.mmdit.MMDiT": aura,
}
