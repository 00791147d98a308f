"""Qwen-Image's kin: double blocks alone, every block named by the host."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import Backbone, Stands
from ....models.network.rope import Turn
from .parts import Row, about_zero, blocks, by_frequencies, known, side, turn


def qwen(network: Any, model: ModelPatcher) -> Backbone:
    """Qwen-Image: text, picture, references; positions are counted from the picture's middle."""
    return known(
        model,
        calls=blocks("double", network.transformer_blocks),
        named=True,
        patch=side(network.patch_size),
        turn=turn(network.pe_embedder, along=about_zero()),
    )


def mage(network: Any, model: ModelPatcher) -> Backbone:
    """MageFlow: as Qwen-Image, with the middle of an odd side one token further."""
    return known(
        model,
        calls=blocks("double", network.transformer_blocks),
        named=True,
        patch=side(network.patch_size),
        turn=turn(network.pe_embedder, along=about_zero(more_below=True)),
    )


def _frequencies(network: Any) -> list[torch.Tensor]:
    """Of each axis of JoyImage's code."""
    return [
        network.theta ** -(torch.arange(0, dim, 2).double() / dim) for dim in network.rope_dim_list
    ]


def joy(network: Any, model: ModelPatcher) -> Backbone:
    """JoyImage: picture, references, text; the text's keys have no position."""
    return known(
        model,
        calls=blocks("double", network.double_blocks),
        named=True,
        patch=side(network.patch_size),
        stands=Stands.FIRST,
        turn=Turn((0.0, 0.0, 0.0), by_frequencies(*_frequencies(network))),
        text_last=True,  # the host does not say how many tokens its references take
    )


NETWORKS: dict[str, Row] = {
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": qwen,
    "comfy.ldm.mage_flow.model.MageFlowTransformer2DModel": mage,
    "comfy.ldm.joyimage.model.JoyImageTransformer3DModel": joy,
}
