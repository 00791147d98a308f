"""SigLIP's pooling head, which ComfyUI's CLIP Vision leaves out: one query reads a picture's tokens
(arXiv 2303.15343; names as in transformers).

Axes: b pictures, n tokens, d channels.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import torn, unread
from ..safetensor import check_safetensors, shape_of

PREFIX = "vision_model.head."
EPS = 1e-6


class PoolingHead(nn.Module):
    """Tokens behind the last norm [b n d] -> the pooled picture [b d]."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, tokens: Tensor) -> Tensor:
        probe = self.probe.expand(len(tokens), -1, -1)
        seen = self.attention(probe, tokens, tokens, need_weights=False)[0]
        mixed = F.gelu(self.mlp["fc1"](self.layernorm(seen)), approximate="tanh")
        return (seen + self.mlp["fc2"](mixed))[:, 0]


def load_pooling_head(path: Path, width: int, heads: int) -> PoolingHead:
    """The head of a SigLIP's .safetensors, in float32; ValueError names the file where it has none
    of this width.
    """
    check_safetensors(path)
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(PREFIX)]
            shapes = {name.removeprefix(PREFIX): shape_of(file.get_slice(name)) for name in names}
            inner = shapes.get("mlp.fc1.weight", (0, 0))[0]
            with torch.device("meta"):
                head = PoolingHead(width, heads, inner or 1)
            expected = {name: tuple(value.shape) for name, value in head.state_dict().items()}
            if shapes != expected:
                raise ValueError(
                    f"{path.name} holds no pooling head of a SigLIP {width} wide "
                    f"({len(names)} tensors begin with {PREFIX}). Choose the file that the wired "
                    f"CLIP Vision was loaded from: SigLIP so400m, patch 14, 384 pixels."
                )
            weights = {name.removeprefix(PREFIX): file.get_tensor(name).float() for name in names}
    except OSError as error:
        raise unread(path, error) from error
    except SafetensorError as error:
        raise torn(path, error) from error
    head.load_state_dict(weights, assign=True)
    return head.eval().requires_grad_(False)
