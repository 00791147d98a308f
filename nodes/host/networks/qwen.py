"""Qwen-Image's kin: double blocks alone, every block named by the host."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import Backbone, Stands
from .parts import Row, blocks, known, side


def qwen(network: Any, model: ModelPatcher) -> Backbone:
    """Qwen-Image and MageFlow: text, picture, references."""
    return known(
        model,
        calls=blocks("double", network.transformer_blocks),
        named=True,
        patch=side(network.patch_size),
    )


def joy(network: Any, model: ModelPatcher) -> Backbone:
    """JoyImage: picture, references, text; the text's keys have no position."""
    return known(
        model,
        calls=blocks("double", network.double_blocks),
        named=True,
        patch=side(network.patch_size),
        stands=Stands.FIRST,
        text_last=True,  # the host does not say how many tokens its references take
    )


NETWORKS: dict[str, Row] = {
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": qwen,
    "comfy.ldm.mage_flow.model.MageFlowTransformer2DModel": qwen,
    "comfy.ldm.joyimage.model.JoyImageTransformer3DModel": joy,
}
