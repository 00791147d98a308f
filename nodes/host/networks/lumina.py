"""Lumina 2's kin: refiners of the text and of the picture, then joint blocks; the picture's keys
move with the text's length.
"""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import ALONE, Backbone, Stands
from ....models.network.blocks import BlockId
from .parts import Row, blocks, known, side, silent, turn


def lumina(network: Any, model: ModelPatcher) -> Backbone:
    """Lumina 2, Z-Image and its pixel variant: the picture at (T + 1, y, x), padded to a multiple
    of tokens in Z-Image.
    """
    calls = silent(network.context_refiner, network.noise_refiner) + blocks(
        "double", network.layers
    )
    return known(
        model,
        calls=calls,
        named=True,
        patch=side(network.patch_size),
        stands=Stands.LAST,
        references=False,
        multiple=network.pad_tokens_multiple or 1,
        turn=turn(network.rope_embedder, (1.0, 0.0, 0.0), first=(1.0, 0.0, 0.0)),
    )


def omnigen(network: Any, model: ModelPatcher) -> Backbone:
    """OmniGen 2: the picture at (T, y, x) behind the text and the references; the host names no
    block.
    """
    calls = silent(network.context_refiner, network.noise_refiner) + blocks(
        "single", network.layers
    )
    return known(
        model,
        calls=calls,
        patch=side(network.patch_size),
        stands=Stands.LAST,
        references=False,
        turn=turn(network.rope_embedder.rope_embedder, (1.0, 0.0, 0.0)),
    )


def boogu(network: Any, model: ModelPatcher) -> Backbone:
    """Boogu: as OmniGen 2, with double blocks before, whose second call holds the picture alone."""
    double: tuple[BlockId, ...] = tuple(
        (stage, index, 0)
        for index, _ in enumerate(network.double_stream_layers)
        for stage in ("double", ALONE)
    )
    calls = (
        silent(network.context_refiner, network.noise_refiner)
        + double
        + blocks("single", network.single_stream_layers)
    )
    return known(
        model,
        calls=calls,
        patch=side(network.patch_size),
        stands=Stands.LAST,
        references=False,
        turn=turn(network.rope_embedder.rope_embedder, (1.0, 0.0, 0.0)),
    )


NETWORKS: dict[str, Row] = {
    "comfy.ldm.lumina.model.NextDiT": lumina,
    "comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel": omnigen,
    "comfy.ldm.boogu.model.BooguTransformer2DModel": boogu,
}
