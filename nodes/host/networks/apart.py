"""Networks whose picture attends to itself in a softmax of its own and reads the text by
cross-attention.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import Backbone
from ....models.network.rope import Turn
from .parts import Row, by_frequencies, kinds, known, refused, self_and_cross, side, silent, turn


def predict2(network: Any, model: ModelPatcher) -> Backbone:
    """Cosmos Predict 2 (text to image) and Anima; Anima's text adapter calls no attention that can
    be heard.
    """
    if getattr(model.model, "image_to_video", False):
        return refused(model, "it makes videos")
    return known(
        model,
        calls=self_and_cross(network.blocks),
        joint=False,
        patch=side(network.patch_spatial),
        turn=Turn((0.0, 0.0, 0.0), by_frequencies(*_frequencies(network.pos_embedder)), True),
    )


def _frequencies(code: Any) -> tuple[torch.Tensor, ...]:
    """Of time, rows and columns, of Predict 2's rotary embedder."""
    space, time = code.dim_spatial_range.cpu().double(), code.dim_temporal_range.cpu().double()
    factors = (code.t_ntk_factor, time), (code.h_ntk_factor, space), (code.w_ntk_factor, space)
    return tuple((10000.0 * factor) ** -powers for factor, powers in factors)


def kandinsky(network: Any, model: ModelPatcher) -> Backbone:
    """Kandinsky 5 Image: blocks of the text alone first. The same class makes videos."""
    if "comfy.model_base.Kandinsky5Image" not in kinds(model.model):
        return refused(model, "it makes videos")
    calls = silent(network.text_transformer_blocks) + self_and_cross(
        network.visual_transformer_blocks
    )
    # rows and columns are as far apart as one another
    apart = 1 / network.rope_scale_factor[-1]
    return known(
        model,
        calls=calls,
        joint=False,
        patch=side(network.patch_size),
        turn=turn(network.rope_embedder_3d, along=lambda side: torch.arange(side) * apart),
    )


NETWORKS: dict[str, Row] = {
    "comfy.ldm.cosmos.predict2.MiniTrainDIT": predict2,
    "comfy.ldm.kandinsky5.model.Kandinsky5": kandinsky,
}
