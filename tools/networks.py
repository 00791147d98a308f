"""Random-weight models of the host's own configurations, at any size, for laws that hold for every weight.

"tiny" and "tiny_v" (v-prediction) are SD1.5's layout at 32 channels and 7 attention blocks, "tiny_xl" is SDXL's with depth 2;
"sd15", "sd21" (v-prediction) and "sdxl" are the real ones. Nothing here keeps a full-size model alive.
"""
from __future__ import annotations

from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

TINY = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 64}
SHARED = {"image_size": 32, "in_channels": 4, "out_channels": 4, "dtype": torch.float32, "use_spatial_transformer": True, "legacy": False,
          "use_temporal_attention": False, "use_temporal_resblock": False}
FAMILIES = {
    "sd15": {"adm_in_channels": None, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
             "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1, "use_linear_in_transformer": False,
             "context_dim": 768, "num_heads": 8,
             "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]},
    "sd21": {"adm_in_channels": None, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
             "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1, "use_linear_in_transformer": True,
             "context_dim": 1024, "num_head_channels": 64,
             "num_heads": -1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]},
    "sdxl": {"num_classes": "sequential", "adm_in_channels": 2816, "model_channels": 320, "num_res_blocks": [2, 2, 2],
             "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10,
             "use_linear_in_transformer": True,
             "context_dim": 2048, "num_head_channels": 64, "num_heads": -1, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]},
}
FAMILIES["tiny"] = FAMILIES["tiny_v"] = FAMILIES["sd15"] | TINY | {"num_heads": 4}
FAMILIES["tiny_xl"] = FAMILIES["sdxl"] | TINY | {"num_head_channels": 16, "transformer_depth": [0, 2],
                                                 "transformer_depth_output": [0, 0, 2, 2], "transformer_depth_middle": 2}
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
        buffers[fan] = tile.mul(gain / fan ** 0.5).repeat(-(-size // TILE))[:size]
    for name, old in list(unet.named_parameters()):
        if name in wanted:
            start = 37 * next(starts) % slack
            value = buffers[old[0].numel()][start:start + old.numel()].view(old.shape)
        else:
            value = torch.full(old.shape, 1.0 if name.endswith("weight") else 0.0)
        module, leaf = parent(unet, name)
        setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))


def build_model(family: str, seed: int = 0, gain: float = 0.8, weights: bool = True) -> Any:
    """A fresh ModelPatcher of a family in float32, its weights drawn small enough to stay finite; or without: on the meta device."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models as known
    kinds = {"sd15": known.SD15, "tiny": known.SD15, "tiny_v": known.SD15, "sd21": known.SD20, "sdxl": known.SDXL, "tiny_xl": known.SDXL}
    config = kinds[family](dict(SHARED | FAMILIES[family]))
    config.custom_operations = comfy.ops.manual_cast
    meta = torch.device("meta")
    if family in ("sdxl", "tiny_xl"):
        model = comfy.model_base.SDXL(config, device=meta)
    else:
        kind = comfy.model_base.ModelType.V_PREDICTION if family in ("sd21", "tiny_v") else comfy.model_base.ModelType.EPS
        model = comfy.model_base.BaseModel(config, model_type=kind, device=meta)
    if weights:
        fill(model.diffusion_model, seed, gain)
    model.device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


@cache
def random_model(family: str = "tiny", seed: int = 0, gain: float = 0.8) -> Any:
    """A shared ModelPatcher of a tiny family. Tests that patch weights take a build_model of their own."""
    if not family.startswith("tiny"):
        raise ValueError(f"only tiny models are kept; build_model({family!r}) and let go of it")
    return build_model(family, seed, gain)


def random_prompt(family: str, seed: int = 0, tokens: int = 77, subject: Any = None, text: str = "a photo of a cat") -> list:
    """CONDITIONING of random features; subject: SubjectTokens of the pack, kept where Subject Prompts keeps them."""
    generator = torch.Generator().manual_seed(seed)
    extras: dict[str, Any] = {"kindred_text": text}
    if family in ("sdxl", "tiny_xl"):
        extras["pooled_output"] = torch.randn(1, 1280, generator=generator)
    if subject is not None:
        extras["kindred_subject"] = subject
    return [[torch.randn(1, tokens, FAMILIES[family]["context_dim"], generator=generator), extras]]
