"""Random-weight models of the host's own configurations, at any size, for laws that hold for every weight."""
from __future__ import annotations

from functools import cache
from typing import Any

import torch

TINY = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
             "transformer_depth_middle": 1, "context_dim": 64}
SHARED = {"image_size": 32, "in_channels": 4, "out_channels": 4, "dtype": torch.float32, "use_spatial_transformer": True, "legacy": False,
          "use_temporal_attention": False, "use_temporal_resblock": False}
FULL = {
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
FULL["tiny"] = FULL["sd15"] | TINY | {"num_heads": 4}


@cache
def random_model(family: str, seed: int = 0) -> Any:
    """A ModelPatcher of "tiny", "sd15", "sd21" (v-prediction) or "sdxl" whose weights are drawn small enough to stay finite."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models as known
    config = {"sd15": known.SD15, "tiny": known.SD15, "sd21": known.SD20, "sdxl": known.SDXL}[family](dict(SHARED | FULL[family]))
    config.custom_operations = comfy.ops.manual_cast
    if family == "sdxl":
        model = comfy.model_base.SDXL(config, device="cpu")
    else:
        kind = comfy.model_base.ModelType.V_PREDICTION if family == "sd21" else comfy.model_base.ModelType.EPS
        model = comfy.model_base.BaseModel(config, model_type=kind, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.8 / fan ** 0.5))
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return comfy.model_patcher.ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


def random_prompt(family: str, seed: int = 0, tokens: int = 77, subject: Any = None, text: str = "a photo of a cat") -> list:
    """CONDITIONING of random features; subject: SubjectTokens of the pack, kept where Subject Prompts keeps them."""
    generator = torch.Generator().manual_seed(seed)
    extras: dict[str, Any] = {"kindred_text": text}
    if family == "sdxl":
        extras["pooled_output"] = torch.randn(1, 1280, generator=generator)
    if subject is not None:
        extras["kindred_subject"] = subject
    return [[torch.randn(1, tokens, FULL[family]["context_dim"], generator=generator), extras]]
