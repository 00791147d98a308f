"""Networks whose picture attends to itself in a softmax of its own and reads the text by
cross-attention.
"""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import ALONE, CROSS, Backbone
from ....models.network.blocks import BlockId
from .parts import Row, kinds, known, refused, side, silent


def _self_and_cross(layers: Any) -> tuple[BlockId | None, ...]:
    """Two calls a block: the picture's own, then the text's."""
    return tuple((stage, index, 0) for index, _ in enumerate(layers) for stage in (ALONE, CROSS))


def predict2(network: Any, model: ModelPatcher) -> Backbone:
    """Cosmos Predict 2 (text to image) and Anima; Anima's text adapter calls no attention that can
    be heard.
    """
    if getattr(model.model, "image_to_video", False):
        return refused(model, "it makes videos")
    return known(
        model, calls=_self_and_cross(network.blocks), joint=False, patch=side(network.patch_spatial)
    )


def kandinsky(network: Any, model: ModelPatcher) -> Backbone:
    """Kandinsky 5 Image: blocks of the text alone first. The same class makes videos."""
    if "comfy.model_base.Kandinsky5Image" not in kinds(model.model):
        return refused(model, "it makes videos")
    calls = silent(network.text_transformer_blocks) + _self_and_cross(
        network.visual_transformer_blocks
    )
    return known(model, calls=calls, joint=False, patch=side(network.patch_size))


NETWORKS: dict[str, Row] = {
    "comfy.ldm.cosmos.predict2.MiniTrainDIT": predict2,
    "comfy.ldm.kandinsky5.model.Kandinsky5": kandinsky,
}
