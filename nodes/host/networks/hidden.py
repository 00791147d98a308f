"""Networks that hide their attention from the host's override (nodes/host/hearing.py): PixArt,
HunyuanDiT, Ernie-Image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....models.network.backbone import Backbone, Stands
from ....models.network.blocks import BlockId
from ....models.network.unplaced import Unplaced
from ..hearing import deaf
from .parts import Row, blocks, known, refused, self_and_cross, side

REMOVE = "Remove the node that patches it."


def _hidden(
    model: ModelPatcher, calls: tuple[BlockId, ...], places: list[str], **facts: Any
) -> Backbone:
    """A network whose calls are made by the modules at these places; refused where another pack's
    forward stands there that cannot be heard.
    """
    if place := deaf(model, tuple(places)):
        why = f"another node put an attention of its own at {place}, which asks no other node"
        return refused(model, why, REMOVE)
    return known(model, calls=calls, hidden=tuple(places), named=True, **facts)


def _apart(model: ModelPatcher, network: Any, names: tuple[str, str]) -> Backbone:
    """Blocks in which the picture attends to itself, then reads the text, by modules of these
    names.
    """
    places = [f"blocks.{index}.{n}" for index, _ in enumerate(network.blocks) for n in names]
    calls = self_and_cross(network.blocks)
    return _hidden(model, calls, places, joint=False, patch=side(network.patch_size))


def pixart(network: Any, model: ModelPatcher) -> Backbone:
    """PixArt-alpha and -Sigma: positions are added to the picture's hidden states."""
    return _apart(model, network, ("attn", "cross_attn"))


def hunyuan(network: Any, model: ModelPatcher) -> Backbone:
    """HunyuanDiT: keys and queries are normed and rotated, the text's keys normed alone.

    The text is BERT's rows, those of the CONDITIONING, and mT5's, which stand beside it.
    """
    return _apart(model, network, ("attn1", "attn2"))


def ernie(network: Any, model: ModelPatcher) -> Backbone:
    """Ernie-Image: picture, text; the picture at (T, y, x) behind a text of T tokens.

    Its rotary code gives both channels of a pair an angle of its own, so keys are kept before it.
    """
    return _hidden(
        model,
        blocks("single", network.layers),
        [f"layers.{index}.self_attention" for index, _ in enumerate(network.layers)],
        patch=side(network.patch_size),
        stands=Stands.FIRST,
        unplaced=Unplaced(_keys, _places(network.pos_embed, model)),
    )


def _keys(attention: Any, x: Tensor) -> Tensor:
    """The normed keys of Ernie's attention, x [b n c] -> [b n (h d)]."""
    keys = attention.to_k(x).unflatten(-1, (attention.heads, attention.head_dim))
    return attention.norm_k(keys).flatten(2)


def _places(embedder: Any, model: ModelPatcher) -> Callable[[int, Tensor], Tensor]:
    """Unplaced.places by the network's own embedder, with what a node scales and shifts of it
    (ScaleROPE).
    """
    scales = model.model_options.get("transformer_options", {}).get("rope_options") or {}
    scale = [1.0, *(scales.get(f"scale_{axis}", 1.0) for axis in "yx")]
    shift = [scales.get(f"shift_{axis}", 0.0) for axis in "tyx"]

    def places(text: int, cells: Tensor) -> Tensor:
        at = torch.cat((torch.full_like(cells[:, :1], text), cells), 1).float()
        positions = at * at.new_tensor(scale) + at.new_tensor(shift)
        return embedder(positions[None])[0, :, 0]

    return places


NETWORKS: dict[str, Row] = {
    "comfy.ldm.pixart.pixartms.PixArtMS": pixart,
    "comfy.ldm.hydit.models.HunYuanDiT": hunyuan,
    "comfy.ldm.ernie.model.ErnieImageModel": ernie,
}
