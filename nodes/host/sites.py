"""The blocks of a MODEL whose attention can be read, whatever its network."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ...models.network.backbone import Backbone
from ...models.network.blocks import BlockId
from ...models.network.sites import BlockSite
from .model import attention_sites, network, require_unet
from .networks import require_network


def sites_of(model: ModelPatcher, backbone: Backbone | None) -> dict[BlockId, BlockSite]:
    """In the order in which the network runs them; backbone: of a transformer, None for a UNet."""
    if backbone is None:
        return attention_sites(network(model))
    return {block: BlockSite(None, backbone.patch, backbone=backbone) for block in backbone.blocks}


def require_backbone(model: ModelPatcher, node: str) -> Backbone | None:
    """None for a UNet that makes pictures from text; ValueError in words for a network that cannot
    be read.
    """
    backbone = require_network(model, node)
    if backbone is None:
        require_unet(model, node)
    return backbone


def require_sites(model: ModelPatcher, node: str) -> dict[BlockId, BlockSite]:
    """The sites of a network that can be read; ValueError in words for one that cannot."""
    return sites_of(model, require_backbone(model, node))
