"""HiDream I1 and O1."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import Backbone, Stands
from .parts import Row, blocks, known, side


def i1(network: Any, model: ModelPatcher) -> Backbone:
    """HiDream-I1: the picture, then T5, Llama's last layer and the block's own layer of it; calls
    known by their number.
    """
    calls = blocks("double", network.double_stream_blocks) + blocks(
        "single", network.single_stream_blocks
    )
    return known(model, calls=calls, patch=side(network.patch_size), stands=Stands.FIRST)


def o1(network: Any, model: ModelPatcher) -> Backbone:
    """HiDream-O1: the queries are those of the time token and the picture alone, the keys are
    everybody's; pixels, no latents.

    Reference pictures stand behind the picture and, through the vision tower, inside the text.
    """
    return known(
        model,
        calls=blocks("double", network.language_model.layers),
        named=True,
        patch=side(network.patch_size),
        stands=Stands.LAST,
        references=False,
    )


NETWORKS: dict[str, Row] = {
    "comfy.ldm.hidream.model.HiDreamImageTransformer2DModel": i1,
    "comfy.ldm.hidream_o1.model.HiDreamO1Transformer": o1,
}
