"""Networks that hide their attention: they hand the host's options on to no attention call, so no
`optimized_attention_override` is asked.

While a run lasts, its MODEL carries a patch on the forward of each of their attentions
(`add_object_patch`): the host's own code, whose calls of attention hand on the options of the pass.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...models.network.backbone import Backbone
from ...models.network.blocks import BlockId
from .model import KEY

ATTENTION = "optimized_attention"  # the name by which the host's networks call it
UNPLACED = (
    f"{KEY}_unplaced"  # gives a call's keys [b m (h d)] as they are before they have positions
)
Forward = Callable[..., Any]
# of the pass that is running, and within an attention of the call
_options: ContextVar[Mapping[str, Any] | None] = ContextVar("options", default=None)


@contextmanager
def handing_on(options: Mapping[str, Any]) -> Iterator[None]:
    """Inside: the options that patched forwards hand on."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


@contextmanager
def patched_attentions(model: ModelPatcher, backbone: Backbone | None) -> Iterator[None]:
    """Inside: whatever runs this MODEL hears its hidden attentions; the host patches them as it
    loads the network.

    Forwards that other packs put there are run, and stay. Afterwards the network is as it was.
    """
    if backbone is None or not backbone.hidden:
        yield
        return
    theirs = model.object_patches
    model.object_patches = dict(theirs)
    try:
        for place, block in zip(backbone.hidden, backbone.calls):
            model.add_object_patch(_name(place), _patch(model, place, block, backbone))
        yield
    finally:
        model.object_patches = theirs
        for place in backbone.hidden:
            _restore(model, _name(place))


def deaf(model: ModelPatcher, places: tuple[str, ...]) -> str:
    """The first of these attentions whose forward another pack put there, without a call of the
    host's attention that could be heard; "": there is none.
    """
    return next((p for p in places if _rebound(_object_at(model, _name(p))) is None), "")


def _name(place: str) -> str:
    """Of an attention's forward, as the host's patches call it."""
    return f"diffusion_model.{place}.forward"


def _object_at(model: ModelPatcher, name: str) -> Any:
    """What this MODEL has at a place, whatever a run or another MODEL left there."""
    thing, path = model.model, ""
    for part in name.split("."):
        path = f"{path}.{part}".lstrip(".")
        if path in model.object_patches:
            thing = model.object_patches[path]
        elif path in model.object_patches_backup:
            thing = model.object_patches_backup[path]
        else:
            thing = getattr(thing, part)
    return getattr(thing, KEY, thing)  # behind a patch of ours


def _patch(model: ModelPatcher, place: str, block: BlockId, backbone: Backbone) -> Forward:
    """The forward of an attention which says whose call it is, to be put in its place."""
    forward, unplaced = _object_at(model, _name(place)), backbone.unplaced
    attention = _object_at(model, _name(place).removesuffix(".forward"))
    rebound = _rebound(forward)

    @torch.compiler.disable
    def patched(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        options = _options.get()
        if options is None:
            return forward(x, *args, **kwargs)
        named = {**options, "block_type": block[0], "block_index": block[1]}
        if unplaced is not None:
            named[UNPLACED] = partial(unplaced.keys, attention, x)
        with handing_on(named):
            return rebound(x, *args, **kwargs)

    setattr(patched, KEY, forward)
    return patched


def _rebound(forward: Forward) -> Forward | None:
    """The same code, in which the name of the host's attention means one that hands on the options;
    None where it does not use that name.
    """
    function = getattr(forward, "__func__", forward)
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    if code is None or ATTENTION not in names or not _asks_by_name(code):
        return None

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        return names[ATTENTION](*args, **{**kwargs, "transformer_options": _options.get()})

    own = {**names, ATTENTION: attention}
    same = FunctionType(code, own, code.co_name, function.__defaults__, function.__closure__)
    same.__kwdefaults__ = function.__kwdefaults__
    owner = getattr(forward, "__self__", None)
    return same if owner is None else MethodType(same, owner)


def _asks_by_name(code: CodeType) -> bool:
    """Whether it calls the host's attention by its module's name for it; not by one that it imports
    itself, or as another module's.
    """
    return any(
        step.opname == "LOAD_GLOBAL" and step.argval == ATTENTION
        for step in dis.get_instructions(code)
    )


def _restore(model: ModelPatcher, name: str) -> None:
    """What stood there before the run, if the host did not put it back itself (it does where it
    unloads a network).
    """
    attention = comfy.utils.get_attr(model.model, name.removesuffix(".forward"))
    patch = vars(attention).get("forward")
    if not hasattr(patch, KEY):
        return
    del attention.forward
    before = model.object_patches.get(name, getattr(patch, KEY))
    if name not in model.object_patches:
        model.object_patches_backup.pop(name, None)
    if attention.forward != before:  # not the class's own
        attention.forward = before
