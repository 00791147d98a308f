"""The blocks of a MODEL whose attention can be read, whatever its network."""

from __future__ import annotations

import comfy.model_sampling
from comfy.model_patcher import ModelPatcher

from ...models.network.backbone import Backbone
from ...models.network.blocks import BlockId
from ...models.network.sites import BlockSite
from ...models.noise.path import Diffusion, Flow
from .model import attention_sites, draws_by_unet, network, noise_of, require_unet
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


def require_invertible(model: ModelPatcher, node: str) -> Diffusion | Flow:
    """The noise path of a model that draws pictures from text; ValueError for others. A transformer
    is known by its flow, or by its network.
    """
    sampling = model.get_model_object("model_sampling")
    if draws_by_unet(model) or isinstance(sampling, comfy.model_sampling.EPS):
        require_backbone(model, node)
    return noise_of(model, node)


def require_plain_positions(model: ModelPatcher, node: str, setting: str) -> None:
    """ValueError where another node stretches or moves the positions of a transformer's tokens;
    setting: of ours, that needs them as the network has them.
    """
    changed = model.model_options.get("transformer_options", {}).get("rope_options")
    if changed:
        said = ", ".join(f"{name} {value}" for name, value in changed.items())
        raise ValueError(
            f"{node}: {setting}, but another node changes the model's positions ({said:.200}). "
            "Remove ScaleROPE, or choose positions own."
        )
