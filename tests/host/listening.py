"""A pass of a host's network as its attention calls are heard: what they hold, in the layout of the methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from kindred.models.network.backbone import Backbone
from kindred.nodes.host import hearing
from kindred.nodes.host.networks import recognise
from kindred.nodes.host.networks.shapes import joined, plain
from tiny_networks import READ, denoised, latent, prompt, tiny
from torch import Tensor

# the picture alone first
REFINING = ("Lumina2", "ZImage", "ZImagePixel", "Omnigen2", "Boogu")


@dataclass(frozen=True)
class Heard:
    """One attention call of a pass: tokens [b n (h d)], [b m (h d)], and what the host calls its block."""

    q: Tensor
    k: Tensor
    v: Tensor
    block: tuple[str, int] | None
    references: int
    unplaced: Tensor | None  # keys before they have positions, where they are kept so


def listening(heard: list[Heard]) -> Callable[..., Tensor]:
    """An override that changes nothing and passes every call through the layout of the methods."""

    def attend(
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        **kw: Any,
    ) -> Tensor:
        options = kw["transformer_options"]
        rows, keys, values, restored = joined(q, k, v, heads, kw)
        block = (
            (options.get("block_type"), options["block_index"])
            if "block_index" in options
            else None
        )
        references = sum(options.get("reference_image_num_tokens", ()))
        before = options[hearing.UNPLACED]() if hearing.UNPLACED in options else None
        heard.append(Heard(rows, keys.clone(), values.clone(), block, references, before))
        return restored(func(rows, keys, values, heads, mask=mask, **plain(kw)))

    return attend


def handing(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """APPLY_MODEL: what a hidden attention hands on are the options of this pass."""
    options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "sigmas" in a)
    with hearing.handing_on(options):
        return executor(x, *args, **kwargs)


def listen(
    name: str, noisy: Tensor | None = None, positive: list | None = None, model: Any = None
) -> tuple[list[Heard], Tensor]:
    """Every call of one pass over a picture, and the pass's answer; model: instead of the shared one."""
    calls: list[Heard] = []
    model = (model or tiny(name)).clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = listening(calls)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "handing", handing)
    noisy = latent(name) if noisy is None else noisy
    with hearing.patched_attentions(model, recognise(model)):
        return calls, denoised(model, noisy, prompt(name) if positive is None else positive)


@cache
def plain_pass(name: str) -> tuple[list[Heard], Tensor]:
    return listen(name)


def backbone(name: str) -> Backbone:
    found = recognise(tiny(name))
    assert found is not None and not found.unheard
    return found


def first_site(found: Backbone) -> int:
    """The number of the first call that holds the picture."""
    return next(n for n, block in enumerate(found.calls) if block)


def changed(before: Tensor, after: Tensor) -> list[int]:
    """The tokens in which two calls differ."""
    return ((before - after).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist()


def count(name: str) -> int:
    return math.prod(READ[name].grid)


def even_picture(name: str, frames: int = 1) -> Tensor:
    """A picture of one colour, so that its tokens differ by their positions alone; no token is a pad."""
    family = READ[name]
    y, x = family.grid if name not in REFINING else (8, 8)
    shape = family.shape(y * family.patch, x * family.patch)
    channels = torch.linspace(-1, 1, family.channels)
    flat = channels.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    if frames == 1:
        return flat[None]
    return flat.reshape(1, family.channels, 1, *flat.shape[-2:]).repeat(1, 1, frames, 1, 1)


def keys_of(found: Backbone, call: Heard, grid: tuple[int, int]) -> Tensor:
    return call.k[:, found.picture(call.k.shape[1], math.prod(grid), call.references)]
