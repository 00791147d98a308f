"""The flow miniature's transformer for training: the host's own Flux class, and the captions as the frozen text encoder writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .denoiser import add_host, build_text, load_tokenizer
from .layout import FLOW_LAYOUT
from .pack import CHECKPOINT, TABLE
from .world import CLASSES

SILENT = (
    "img_mod.lin",
    "txt_mod.lin",
    "modulation.lin",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)


def build_flow(host: Path) -> nn.Module:
    """The host's Flux in the miniature's layout, freshly initialised; modulations and the last layer start at zero, as DiT's do."""
    add_host(host)
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    flow = Flux(
        image_model="flux",
        **FLOW_LAYOUT,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            nn.Linear.reset_parameters(module)
    for name, parameter in flow.named_parameters():
        if name.rpartition(".")[0].endswith(SILENT):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1 and not name.endswith("bias"):  # the norms of queries and keys
            nn.init.ones_(parameter)
    return flow


def class_rows(host: Path, captions: Sequence[str]) -> Tensor:
    """The row of each caption's class word among its tokens [captions]; 0 where it has none."""
    tokens, alone = (
        load_tokenizer(host)(texts) for texts in (list(captions), [f"a {c}" for c in CLASSES])
    )
    named = torch.isin(tokens, alone[:, 2])  # behind the start token and "a"
    return torch.where(named.any(1), named.int().argmax(1), 0)


@torch.no_grad()
def captions_encoded(
    host: Path, captions: Sequence[str], path: Path = CHECKPOINT
) -> tuple[Tensor, Tensor]:
    """The UNet miniature's frozen text encoder -> context [captions 77 64] and pooled [captions 64], as the host gives them."""
    from safetensors.torch import load_file

    prefix, inner = (
        "cond_stage_model.transformer.text_model.",
        "text_model.",
    )  # which newer transformers leave out
    weights = {
        name.removeprefix(prefix): value.float()
        for name, value in load_file(path).items()
        if name.startswith(prefix)
    }
    text = build_text(TABLE)
    known = {
        name: weights[name.removeprefix(inner)]
        for name in text.state_dict()
        if name.removeprefix(inner) in weights
    }
    missing = [
        name
        for name in text.load_state_dict(known, strict=False).missing_keys
        if not name.endswith("position_ids")
    ]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)} of its text encoder. Take the shipped checkpoint."
        )
    tokens = load_tokenizer(host)(list(captions))
    hidden = torch.cat([text(input_ids=part).last_hidden_state for part in tokens.split(64)])
    ends = (tokens == 49407).int().argmax(1)  # the first end token, where CLIP pools
    return hidden, hidden[torch.arange(len(tokens)), ends]
