"""FLUX's kin: double blocks, then single ones, text before picture, every block named by
the host.
"""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import Backbone, Stands
from ....models.network.rope import Turn
from .parts import Row, blocks, kinds, known, refused, side, silent, turn


def _double_single(network: Any) -> tuple[tuple[str, int, int], ...]:
    return blocks("double", network.double_blocks) + blocks("single", network.single_blocks)


def _turn(network: Any, moves: bool) -> Turn:
    """Positions of as many axes as the checkpoint's code has; references of the host's own stand
    so many apart as it says.
    """
    axes = (0.0,) * len(network.params.axes_dim)
    return turn(
        network.pe_embedder,
        (0.0, 1.0, 1.0) if moves else axes,
        first=(1.0, 0.0, 0.0) if moves else None,
        step=network.params.ref_index_scale,
    )


def flux(network: Any, model: ModelPatcher) -> Backbone:
    """FLUX.1, FLUX.2 and LongCat-Image, which the host runs with one class.

    LongCat's own BaseModel puts the picture at (1, y + T, x + T) behind a text of T tokens;
    FLUX.2's puts zeros before the text, up to 512 rows.
    """
    of = kinds(model.model)
    moves = "comfy.model_base.LongCatImage" in of
    return known(
        model,
        calls=_double_single(network),
        named=True,
        patch=side(network.patch_size),
        text_last="comfy.model_base.Flux2" in of,
        turn=_turn(network, moves),
    )


def chroma(network: Any, model: ModelPatcher) -> Backbone:
    """Chroma and Radiance; they pass over reference latents."""
    return known(
        model,
        calls=_double_single(network),
        named=True,
        patch=side(network.patch_size),
        stands=Stands.LAST,
        turn=turn(network.pe_embedder),
    )


def hunyuan(network: Any, model: ModelPatcher) -> Backbone:
    """HunyuanImage 2.1: two refiners of the text first. The same class makes videos, and refines
    pictures in a second pass.
    """
    of = kinds(model.model)
    if "comfy.model_base.HunyuanImage21" not in of:
        return refused(model, "it makes videos")
    if "comfy.model_base.HunyuanImage21Refiner" in of:
        return refused(model, "it refines a finished picture and reads no prompt of its own")
    refiners = network.txt_in.individual_token_refiner.blocks
    return known(
        model,
        calls=silent(refiners) + _double_single(network),
        named=True,
        patch=side(network.patch_size),
        stands=Stands.LAST,
        turn=turn(network.pe_embedder, (0.0, 0.0), plane=0),  # rows and columns alone
    )


def krea2(network: Any, model: ModelPatcher) -> Backbone:
    """Krea 2: the layers of the text model are fused first, twice over layers and twice over
    tokens.
    """
    fusion = network.txtfusion
    return known(
        model,
        calls=silent(fusion.layerwise_blocks, fusion.refiner_blocks)
        + blocks("single", network.blocks),
        named=True,
        patch=side(network.patch),
        turn=turn(network.pe_embedder),
    )


NETWORKS: dict[str, Row] = {
    "comfy.ldm.flux.model.Flux": flux,
    "comfy.ldm.chroma.model.Chroma": chroma,
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": hunyuan,
    "comfy.ldm.krea2.model.SingleStreamDiT": krea2,
}
