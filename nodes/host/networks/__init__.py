"""Which network a MODEL computes with, and what it is to the methods. A family is one function and
one row; docs/adding_a_network.md.
"""

from __future__ import annotations

from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import Backbone
from ..model import network
from . import apart, flux, hidden, hidream, lumina, qwen, sd3, single
from .parts import LISTED, Row, kinds, refused

# by the full name of the network's class or of one that it derives from
NETWORKS: dict[str, Row] = {
    **flux.NETWORKS,
    **qwen.NETWORKS,
    **sd3.NETWORKS,
    **lumina.NETWORKS,
    **hidream.NETWORKS,
    **apart.NETWORKS,
    **single.NETWORKS,
    **hidden.NETWORKS,
}

VIDEO, SOUND, SHAPES = "it makes videos", "it makes sound", "it makes shapes"
LARGER, LOOKING = "it enlarges a finished picture", "it looks at pictures and draws none"

# why a network cannot be read, by the package or the class that it comes from
UNHEARD: dict[str, str] = {
    "comfy.ldm.wan": VIDEO,
    "comfy.ldm.lightricks": VIDEO,
    "comfy.ldm.genmo": VIDEO,
    "comfy.ldm.cosmos.model": VIDEO,
    "comfy.ldm.cogvideo": VIDEO,
    "comfy.ldm.minimax": VIDEO,
    "comfy.ldm.seedvr": LARGER,
    "comfy.ldm.pixeldit.pid": LARGER,
    "comfy.ldm.audio": SOUND,
    "comfy.ldm.ace": SOUND,
    "comfy.ldm.hunyuan3d": SHAPES,
    "comfy.ldm.hunyuan3dv2_1": SHAPES,
    "comfy.ldm.triposplat": SHAPES,
    "comfy.ldm.rt_detr": LOOKING,
    "comfy.ldm.sam3": LOOKING,
    "comfy.ldm.depth_anything_3": LOOKING,
    "comfy.ldm.cascade": "Stable Cascade's stages are UNets of another kind",
}
# SVDQuant's networks run kernels of their own, which hand on no transformer options
# (ComfyUI-nunchaku)
FOREIGN = ("ComfyFluxWrapper", "NunchakuQwenImageTransformer2DModel")
FUSED = "its attention runs inside kernels of its own (nunchaku), where no other node is asked"
OWN_WEIGHTS = "Load the same model in bf16, fp8 or GGUF instead."


def _below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _row(names: tuple[str, ...]) -> Row | str | None:
    """The nearest ancestor's row, or why it is refused; None for a network that nobody has
    described.
    """
    for name in names:
        if name.rpartition(".")[2] in FOREIGN:
            return FUSED
        for package, why in UNHEARD.items():
            if _below(name, package):
                return why
        if name in NETWORKS:
            return NETWORKS[name]
    return None


def recognise(model: ModelPatcher) -> Backbone | None:
    """What a MODEL's network is to the methods; None where it is a UNet, which has code of its own.

    A network that cannot be read comes with `unheard`, a reason and a remedy; require_network makes
    an error of it.
    """
    net: Any = network(model)
    if isinstance(net, UNetModel):
        return None
    row = _row(kinds(net))
    if callable(row):
        return row(net, model)
    if row is not None:
        return refused(model, row, OWN_WEIGHTS if row is FUSED else LISTED)
    remedy = (
        "Remove the node that puts a network of its own there."
        if "diffusion_model" in model.object_patches
        else LISTED
    )
    return refused(model, f"Kindred does not know the network {type(net).__name__}", remedy)


def require_listening(model: BaseModel) -> None:
    """ValueError behind a pass in which nothing was heard, where its network is another pack's: an
    heir of the host's class is known by that, until it runs.
    """
    kind = type(getattr(model.diffusion_model, "_orig_mod", model.diffusion_model))
    if kind.__module__.partition(".")[0] == "comfy":
        return
    raise ValueError(
        f"Kindred: {type(model.model_config).__name__} cannot be read: it runs in "
        f"{kind.__module__}.{kind.__qualname__}, which asks for none of its attention where other "
        f"nodes could hear it. {OWN_WEIGHTS}"
    )


def require_network(model: ModelPatcher, node: str) -> Backbone | None:
    """As recognise; ValueError says which family cannot be read, why, and what to do instead."""
    backbone = recognise(model)
    if backbone is not None and backbone.unheard:
        raise ValueError(f"{node}: {backbone.family} cannot be read: {backbone.unheard}")
    return backbone
