"""Random-weight models of the host's own configurations, at any size, for laws that hold for every weight.

"tiny" and "tiny_v" (v-prediction) are SD1.5's layout at 32 channels and 7 attention blocks, "tiny_xl" is SDXL's with depth 2;
"sd15", "sd21" (v-prediction) and "sdxl" are the real ones. ODD are the host's other text-to-image UNets, each with a part that
another lacks or has too; OTHER_WORK are UNets that make no pictures from text. Nothing here keeps a full-size model alive.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

TINY = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 64,
}
SHARED = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "dtype": torch.float32,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
FAMILIES = {
    "sd15": {
        "adm_in_channels": None,
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "context_dim": 768,
        "num_heads": 8,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    "sd21": {
        "adm_in_channels": None,
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": True,
        "context_dim": 1024,
        "num_head_channels": 64,
        "num_heads": -1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    "sdxl": {
        "num_classes": "sequential",
        "adm_in_channels": 2816,
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "channel_mult": [1, 2, 4],
        "transformer_depth_middle": 10,
        "use_linear_in_transformer": True,
        "context_dim": 2048,
        "num_head_channels": 64,
        "num_heads": -1,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
}
FAMILIES["tiny"] = FAMILIES["tiny_v"] = FAMILIES["sd15"] | TINY | {"num_heads": 4}
FAMILIES["tiny_xl"] = (
    FAMILIES["sdxl"]
    | TINY
    | {
        "num_head_channels": 16,
        "transformer_depth": [0, 2],
        "transformer_depth_output": [0, 0, 2, 2],
        "transformer_depth_middle": 2,
    }
)
# no middle block; one without attention; attention at one level alone; a first level whose attn1 reads the text (SDXS 0.9)
ODD = {
    "tiny_koala": FAMILIES["tiny_xl"] | {"transformer_depth_middle": -2},
    "tiny_vega": FAMILIES["tiny_xl"] | {"transformer_depth_middle": -1},
    "tiny_level": FAMILIES["tiny"]
    | {
        "transformer_depth": [0, 1],
        "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": -2,
    },
    "tiny_fine": FAMILIES["tiny"]
    | {
        "transformer_depth": [1, 0],
        "transformer_depth_output": [1, 1, 0, 0],
        "transformer_depth_middle": -1,
    },
    "tiny_flat": FAMILIES["tiny"]
    | {
        "channel_mult": [1],
        "num_res_blocks": [1],
        "transformer_depth": [1],
        "transformer_depth_output": [1, 1],
    },
    "tiny_xs": FAMILIES["tiny"]
    | {
        "transformer_depth_middle": -2,
        "disable_self_attentions": [True, False],
        "use_linear_in_transformer": True,
    },
    "tiny_blocks": FAMILIES["tiny"] | {"resblock_updown": True},
    "tiny_refiner": FAMILIES["tiny_xl"] | {"adm_in_channels": 2560},
    "tiny_unclip": FAMILIES["tiny"]
    | {"num_classes": "sequential", "adm_in_channels": 1536, "use_linear_in_transformer": True},
    "tiny_inpaint": FAMILIES["tiny"] | {"in_channels": 9},
    "tiny_ip2p": FAMILIES["tiny"] | {"in_channels": 8},
    "tiny_xl_ip2p": FAMILIES["tiny_xl"] | {"in_channels": 8},
}
VIDEO = FAMILIES["tiny"] | {
    "in_channels": 8,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
    "disable_temporal_crossattention": False,
}
OTHER_WORK = {
    "tiny_svd": VIDEO | {"adm_in_channels": 768},
    "tiny_sv3d_u": VIDEO | {"adm_in_channels": 256},
    "tiny_sv3d_p": VIDEO | {"adm_in_channels": 1280},
    "tiny_zero123": FAMILIES["tiny"] | {"in_channels": 8},
    "tiny_x4": FAMILIES["tiny"]
    | {"in_channels": 7, "num_classes": 1000, "disable_self_attentions": [True, False]},
    "tiny_lotus": FAMILIES["tiny"]
    | {"num_classes": "sequential", "adm_in_channels": 4, "use_linear_in_transformer": True},
    "tiny_sdpose": FAMILIES["tiny"] | {"heatmap_head": True},
}
FAMILIES |= ODD | OTHER_WORK
TILE = 1_000_003  # a prime, so that no layer's rows repeat


def parent(root: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return root.get_submodule(path), leaf


def fill(unet: torch.nn.Module, seed: int, gain: float) -> None:
    """Give a UNet on the meta device random weights: views of one buffer per fan-in, so 2.6 billion parameters take 0.6 GB.

    A weight is normal with gain / sqrt(fan-in); norms are 1, biases 0.
    """
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(seed))
    wanted = {name: p for name, p in unet.named_parameters() if p.ndim > 1}
    slack, starts = 4096, count(seed * 17)
    buffers: dict[int, Tensor] = {}
    for fan in {p[0].numel() for p in wanted.values()}:
        size = slack + max(p.numel() for p in wanted.values() if p[0].numel() == fan)
        buffers[fan] = tile.mul(gain / fan**0.5).repeat(-(-size // TILE))[:size]
    for name, old in list(unet.named_parameters()):
        if name in wanted:
            start = 37 * next(starts) % slack
            value = buffers[old[0].numel()][start : start + old.numel()].view(old.shape)
        else:
            value = torch.full(old.shape, 1.0 if name.endswith("weight") else 0.0)
        module, leaf = parent(unet, name)
        setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))


def kinds() -> dict[str, tuple[Any, Callable[[Any, torch.device], Any]]]:
    """Per family the host's configuration and how its model is made of one: (configuration, device) -> BaseModel."""
    import comfy.model_base as base
    import comfy.supported_models as known

    def plain(config: Any, device: torch.device) -> Any:
        return base.BaseModel(config, device=device)

    def velocity(config: Any, device: torch.device) -> Any:
        return base.BaseModel(config, model_type=base.ModelType.V_PREDICTION, device=device)

    def of(kind: Any, **how: Any) -> Callable[[Any, torch.device], Any]:
        return lambda config, device: kind(config, device=device, **how)

    def inpainting(config: Any, device: torch.device) -> Any:
        model = plain(config, device)
        model.set_inpaint()
        return model

    augmented = {
        "noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
        "timestep_dim": 768,
    }
    projection = {"cc_projection_weight": torch.ones(64, 68), "cc_projection_bias": torch.zeros(64)}
    return {
        "sd15": (known.SD15, plain),
        "tiny": (known.SD15, plain),
        "tiny_v": (known.SD15, velocity),
        "sd21": (known.SD20, velocity),
        "sdxl": (known.SDXL, of(base.SDXL)),
        "tiny_xl": (known.SDXL, of(base.SDXL)),
        "tiny_koala": (known.KOALA_700M, of(base.SDXL)),
        "tiny_vega": (known.Segmind_Vega, of(base.SDXL)),
        "tiny_level": (known.SD15, plain),
        "tiny_fine": (known.SD15, plain),
        "tiny_flat": (known.SD15, plain),
        "tiny_xs": (known.SD20, plain),
        "tiny_blocks": (known.SD15, plain),
        "tiny_refiner": (known.SDXLRefiner, of(base.SDXLRefiner)),
        "tiny_unclip": (known.SD21UnclipL, of(base.SD21UNCLIP, noise_aug_config=augmented)),
        "tiny_inpaint": (known.SD15, inpainting),
        "tiny_ip2p": (known.SD15_instructpix2pix, of(base.SD15_instructpix2pix)),
        "tiny_xl_ip2p": (known.SDXL_instructpix2pix, of(base.SDXL_instructpix2pix)),
        "tiny_svd": (known.SVD_img2vid, of(base.SVD_img2vid)),
        "tiny_sv3d_u": (known.SV3D_u, of(base.SV3D_u)),
        "tiny_sv3d_p": (known.SV3D_p, of(base.SV3D_p)),
        "tiny_zero123": (known.Stable_Zero123, of(base.Stable_Zero123, **projection)),
        "tiny_x4": (known.SD_X4Upscaler, of(base.SD_X4Upscaler)),
        "tiny_lotus": (known.LotusD, of(base.Lotus)),
        "tiny_sdpose": (known.SD15, plain),
    }


def build_model(family: str, seed: int = 0, gain: float = 0.8, weights: bool = True) -> Any:
    """A fresh ModelPatcher of a family in float32, its weights drawn small enough to stay finite; or without: on the meta device."""
    import comfy.ops
    from comfy.model_patcher import ModelPatcher

    kind, make = kinds()[family]
    if (
        family in ODD | OTHER_WORK and "num_head_channels" in kind.unet_extra_config
    ):  # made for wider layers
        kind = type(
            kind.__name__, (kind,), {"unet_extra_config": {"num_heads": 4, "num_head_channels": -1}}
        )
    config = kind(dict(SHARED | FAMILIES[family]))
    config.custom_operations = comfy.ops.manual_cast
    model = make(config, torch.device("meta"))
    if weights:
        fill(model.diffusion_model, seed, gain)
    model.device = torch.device("cpu")
    return ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


@cache
def random_model(family: str = "tiny", seed: int = 0, gain: float = 0.8) -> Any:
    """A shared ModelPatcher of a tiny family. Tests that patch weights take a build_model of their own."""
    if not family.startswith("tiny"):
        raise ValueError(f"only tiny models are kept; build_model({family!r}) and let go of it")
    return build_model(family, seed, gain)


def random_prompt(
    family: str,
    seed: int = 0,
    tokens: int = 77,
    subject: Any = None,
    text: str = "a photo of a cat",
) -> list:
    """CONDITIONING of random features; subject: SubjectTokens of the pack, kept where Subject Prompts keeps them."""
    generator = torch.Generator().manual_seed(seed)
    extras: dict[str, Any] = {"kindred_text": text}
    if FAMILIES[family]["adm_in_channels"] in (2816, 2560):
        extras["pooled_output"] = torch.randn(1, 1280, generator=generator)
    if subject is not None:
        extras["kindred_subject"] = subject
    return [[torch.randn(1, tokens, FAMILIES[family]["context_dim"], generator=generator), extras]]
