"""HiDream I1 and O1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import Backbone, Stands
from ....models.network.rope import Turn
from .parts import Row, blocks, known, matrices, side, turn


def i1(network: Any, model: ModelPatcher) -> Backbone:
    """HiDream-I1: the picture, then T5, Llama's last layer and the block's own layer of it; calls
    known by their number.
    """
    calls = blocks("double", network.double_stream_blocks) + blocks(
        "single", network.single_stream_blocks
    )
    return known(
        model,
        calls=calls,
        patch=side(network.patch_size),
        stands=Stands.FIRST,
        turn=turn(network.pe_embedder),
    )


def _rotation(network: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of O1's language model: positions [l a] -> [l d/2 2 2]."""

    def rotation(positions: torch.Tensor) -> torch.Tensor:
        places = positions.transpose(0, 1)
        return matrices(network.language_model.compute_freqs_cis(places, places.device))

    return rotation


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
        turn=Turn((0.0, 0.0, 0.0), _rotation(network), halves=True),
        references=False,
    )


NETWORKS: dict[str, Row] = {
    "comfy.ldm.hidream.model.HiDreamImageTransformer2DModel": i1,
    "comfy.ldm.hidream_o1.model.HiDreamO1Transformer": o1,
}
