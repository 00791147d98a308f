"""Transformer blocks whose forward is another pack's copy: their attentions are handed what the
host's own forward hands on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as attention
from torch import nn

from .model import KEY


def hands_on(block: nn.Module) -> bool:
    """Whether the block runs the host's own forward, which tells its attentions the options."""
    code = getattr(block.forward, "__code__", None)
    return code is not None and code.co_filename == attention.__file__


def hand_once(layer: nn.Module, options: dict[str, Any]) -> Callable[[], None] | None:
    """Hand `options` to the layer's next call, unless its caller does -> what takes that back;
    None: it takes no options.

    A hook and not a patch: it may come while the network runs, and other packs' functions stay
    where they are.
    """
    try:
        taken = inspect.signature(layer.forward).parameters
    except (TypeError, ValueError):
        return None
    if "transformer_options" not in taken and not any(
        p.kind is p.VAR_KEYWORD for p in taken.values()
    ):
        return None

    place = list(taken).index("transformer_options") if "transformer_options" in taken else None

    def hand(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        handle.remove()
        if KEY in (kwargs.get("transformer_options") or ()) or (
            place is not None and len(args) > place
        ):
            return None
        return args, {**kwargs, "transformer_options": options}

    handle = layer.register_forward_pre_hook(hand, with_kwargs=True)
    return handle.remove
