"""The flow miniature's transformer for training: the host's own Flux class, and the captions as the frozen text encoder writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import add_host, build_text, load_tokenizer
from .layout import FLOW_LAYOUT
from .pack import CHECKPOINT, TABLE

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


def attend(
    func: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """Plain matrix products [b h n d] -> [b n (h d)], in the host's override: faster in the backward pass on a CPU."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def velocity(flow: nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """x [b c y x] at noise level sigma [b] in 0..1, context [b 77 64], pooled [b 64] -> dx/dsigma [b c y x]."""
    return flow(
        x, sigma, context, pooled, transformer_options={"optimized_attention_override": attend}
    )


@contextmanager
def training(host: Path) -> Iterator[None]:
    """The host's rotary kernels have a gradient only while it trains, and its blocks write into what the backward pass reads."""
    add_host(host)
    import comfy.model_management

    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            yield
    finally:
        comfy.model_management.in_training = before


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
