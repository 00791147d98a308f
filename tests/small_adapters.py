"""Public adapters in small: tensors of the published names and of the published shapes' proportions, random."""

from __future__ import annotations

from typing import Any

import torch
from kindred.models.concept.config import Kind
from torch import Tensor

# FLUX.1 has 19 double and 38 single blocks, 3072 channels; tokens of 4096; SigLIP's 1152, 128 tokens
SHAKKER: dict[str, Any] = {
    "kind": Kind.SHAKKER, "seen": 12, "tokens": 5, "width": 10, "channels": 64,
    "blocks": [("double", 0, 0), ("double", 1, 0), *(("single", i, 0) for i in range(4))],
}  # fmt: skip
# CLIP's 768, 4 tokens; the double blocks alone
XLABS: dict[str, Any] = {
    "kind": Kind.XLABS, "seen": 9, "tokens": 4, "width": 10, "channels": 64,
    "blocks": [("double", 0, 0), ("double", 1, 0)],
}  # fmt: skip
# SD3.5 large: 38 blocks of 2432; a resampler 1280 wide, 4 deep, 64 tokens
SD3: dict[str, Any] = {
    "kind": Kind.TIMED, "seen": 12, "tokens": 6, "width": 14, "channels": 192, "hidden": 16, "depth": 2, "waves": 8, "head": 64,
    "blocks": [("double", i, 0) for i in range(3)],
}  # fmt: skip


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def published(layout: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A layout's tensors by the names in its file, and its sizes."""
    sizes = {"shakker": SHAKKER, "xlabs": XLABS, "sd3": SD3}[layout]
    shapes = {"shakker": shakker, "xlabs": xlabs, "sd3": sd3}[layout]()
    tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        draw = drawn(*shape, seed=seed)
        if len(shape) > 1:
            tensors[name] = draw / shape[-1] ** 0.5
        else:
            tensors[name] = 0.2 * draw if name.endswith("bias") else 1 + 0.2 * draw
    return tensors, sizes


def linear(name: str, inside: int, outside: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    bias_too = {f"{name}.bias": (outside,)} if bias else {}
    return {f"{name}.weight": (outside, inside)} | bias_too


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def shakker() -> dict[str, tuple[int, ...]]:
    s, w, d = SHAKKER, SHAKKER["width"], SHAKKER["seen"]
    shapes = linear("image_proj.proj.0", d, 2 * d)
    shapes |= linear("image_proj.proj.2", 2 * d, s["tokens"] * w) | norm("image_proj.norm", w)
    for i in range(len(s["blocks"])):
        for half in "kv":
            shapes |= linear(f"ip_adapter.{i}.to_{half}_ip", w, s["channels"], bias=False)
    return shapes


def xlabs() -> dict[str, tuple[int, ...]]:
    s, w, own = XLABS, XLABS["width"], "ip_adapter_proj_model"
    shapes = linear(f"{own}.proj", s["seen"], s["tokens"] * w) | norm(f"{own}.norm", w)
    for i in range(len(s["blocks"])):
        for half in "kv":
            name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{half}_proj"
            shapes |= linear(name, w, s["channels"])
    return shapes


def sd3() -> dict[str, tuple[int, ...]]:
    s, w, e = SD3, SD3["width"], SD3["hidden"]
    shapes: dict[str, tuple[int, ...]] = {"latents": (1, s["tokens"], e)}
    shapes |= linear("proj_in", s["seen"], e) | linear("proj_out", e, w) | norm("norm_out", w)
    shapes |= linear("time_embedding.linear_1", s["waves"], e) | linear(
        "time_embedding.linear_2", e, e
    )
    for i in range(s["depth"]):
        shapes |= norm(f"layers.{i}.0.norm1", e) | norm(f"layers.{i}.0.norm2", e)
        shapes |= linear(f"layers.{i}.0.to_q", e, e, bias=False)
        shapes |= linear(f"layers.{i}.0.to_kv", e, 2 * e, bias=False)
        shapes |= linear(f"layers.{i}.0.to_out", e, e, bias=False) | norm(f"layers.{i}.1.0", e)
        shapes |= linear(f"layers.{i}.1.1", e, 4 * e, bias=False)
        shapes |= linear(f"layers.{i}.1.3", 4 * e, e, bias=False) | linear(
            f"layers.{i}.2.1", e, 4 * e
        )
    shapes = {f"image_proj.{name}": shape for name, shape in shapes.items()}
    for i in range(len(s["blocks"])):
        name = f"ip_adapter.{i}."
        shapes |= linear(f"{name}norm_ip.linear", e, 2 * w)
        for half in "kv":
            shapes |= linear(f"{name}to_{half}_ip", w, s["channels"], bias=False)
        shapes |= {
            f"{name}{part}.weight": (s["head"],) for part in ("norm_q", "norm_k", "norm_ip_k")
        }
    return shapes
