"""Networks whose picture attends to itself in a softmax of its own and reads the text by
cross-attention.
"""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import Backbone
from .parts import Row, kinds, known, refused, self_and_cross, side, silent


def predict2(network: Any, model: ModelPatcher) -> Backbone:
    """Cosmos Predict 2 (text to image) and Anima; Anima's text adapter calls no attention that can
    be heard.
    """
    if getattr(model.model, "image_to_video", False):
        return refused(model, "it makes videos")
    return known(
        model, calls=self_and_cross(network.blocks), joint=False, patch=side(network.patch_spatial)
    )


def kandinsky(network: Any, model: ModelPatcher) -> Backbone:
    """Kandinsky 5 Image: blocks of the text alone first. The same class makes videos."""
    if "comfy.model_base.Kandinsky5Image" not in kinds(model.model):
        return refused(model, "it makes videos")
    calls = silent(network.text_transformer_blocks) + self_and_cross(
        network.visual_transformer_blocks
    )
    return known(model, calls=calls, joint=False, patch=side(network.patch_size))


NETWORKS: dict[str, Row] = {
    "comfy.ldm.cosmos.predict2.MiniTrainDIT": predict2,
    "comfy.ldm.kandinsky5.model.Kandinsky5": kandinsky,
}
