"""How wide a transformer's queries are, by the full name of the network's class: h d of one token
in the blocks where the picture reads the text.

HunyuanDiT and Ernie-Image are left out: their queries are heard with a code on them that is not
taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from .parts import kinds

WIDTHS: dict[str, Callable[[Any], int]] = {
    "comfy.ldm.flux.model.Flux": attrgetter("hidden_size"),
    "comfy.ldm.chroma.model.Chroma": attrgetter("hidden_size"),
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": attrgetter("hidden_size"),
    "comfy.ldm.krea2.model.SingleStreamDiT": lambda net: net.blocks[0].attn.wq.out_features,
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": attrgetter("inner_dim"),
    "comfy.ldm.mage_flow.model.MageFlowTransformer2DModel": attrgetter("inner_dim"),
    "comfy.ldm.joyimage.model.JoyImageTransformer3DModel": (
        lambda net: net.double_blocks[0].attn.img_attn_qkv.out_features // 3
    ),
    "comfy.ldm.modules.diffusionmodules.mmdit.MMDiT": attrgetter("hidden_size"),
    "comfy.ldm.aura.mmdit.MMDiT": lambda net: net.register_tokens.shape[-1],
    "comfy.ldm.lumina.model.NextDiT": attrgetter("dim"),
    "comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel": attrgetter("hidden_size"),
    "comfy.ldm.boogu.model.BooguTransformer2DModel": attrgetter("hidden_size"),
    "comfy.ldm.hidream.model.HiDreamImageTransformer2DModel": attrgetter("inner_dim"),
    "comfy.ldm.hidream_o1.model.HiDreamO1Transformer": (
        lambda net: net.language_model.layers[0].self_attn.inner_size
    ),
    "comfy.ldm.cosmos.predict2.MiniTrainDIT": attrgetter("model_channels"),
    "comfy.ldm.kandinsky5.model.Kandinsky5": attrgetter("model_dim"),
    "comfy.ldm.pixart.pixartms.PixArtMS": attrgetter("hidden_size"),
    "comfy.ldm.lens.model.LensTransformer2DModel": attrgetter("inner_dim"),
    "comfy.ldm.pixeldit.model.PixDiT_T2I": attrgetter("hidden_size"),
    "comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel": (
        lambda net: net.layers[0].attention.hidden_size
    ),
}


def width_of(network: Any) -> int:
    """Channels of a query; 0 for a class of no family in the table."""
    known = (WIDTHS[name] for name in kinds(network) if name in WIDTHS)
    return int(next(known, lambda net: 0)(network))
