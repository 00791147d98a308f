"""The name of a MODEL that references are bound to, and the one comparison of two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.weight_adapter.bypass import BypassInjectionManager
from torch import Tensor

from ...models.copies import fetched
from ...models.identity import (
    FORMATS,
    ModelKey,
    Parts,
    Sketch,
    cells,
    differences,
    explain,
    held_as,
)
from ...models.network.blocks import block_name
from ...models.reference.bank import BANK_VERSION, ReferenceBank
from .model import (
    attention_sites,
    closure,
    draws_by_unet,
    is_lora,
    network,
    own_modules,
    wrapped_injections,
)

# how much of the weights a key carries: 16 KB, and a change in one of 2048 values is seen
TENSORS, ROWS, COLUMNS = (
    64,
    8,
    4,
)
REMEDY = {
    "kind": "Wire a MODEL of that kind",
    "weights": "Load the checkpoint that it was made with",
    "LoRAs": "Wire a MODEL with the same LoRAs (or merge) at the same strengths",
    "sampling": "Wire a MODEL with the same sampling node",
    "injected modules": "Wire a MODEL with the same modules",
}

# what is read of a tensor -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Piece:
    """A few values of a tensor, where it lies."""

    values: Tensor  # any shape and dtype; without the scale
    dtype: torch.dtype
    scale: Tensor | None = None  # [1]
    stored: str = ""  # a storage that is no numbers to us


def _readable(tensor: Tensor) -> Piece:
    """A tensor of any pack as plain numbers; of quantised ones that the host does not know, the
    bytes stand for themselves.
    """
    held, params = getattr(tensor, "_qdata", None), getattr(tensor, "_params", None)
    if held is None:
        raw = tensor.detach().as_subclass(Tensor)
        # a GGUF tensor's own shape is of bytes
        known = raw.dtype in FORMATS and raw.shape == tensor.shape
        return Piece(
            _spread(raw),
            raw.dtype,
            None,
            "" if known else f"{type(tensor).__name__} of {raw.dtype}".replace("torch.", ""),
        )
    scale = getattr(params, "scale", None)
    if (
        held.dtype in FORMATS
        and held.shape == tensor.shape
        and isinstance(scale, Tensor)
        and scale.numel() == 1
    ):
        return Piece(_spread(held), held.dtype, scale.detach().reshape(1))
    # scaled by blocks or rotated: in what precision, only its kernels know
    numbers = tensor.detach().dequantize()
    return Piece(
        _spread(numbers),
        numbers.dtype,
        None,
        f"{getattr(tensor, '_layout_cls', type(tensor).__name__)}",
    )


def _piece(tensor: Tensor) -> Piece:
    try:
        return _readable(tensor)
    except (
        Exception
    ):  # another pack's tensor may refuse anything, in any way; a key is no reason to end a run
        return Piece(torch.zeros(0), torch.uint8, None, type(tensor).__name__)


def _spread(tensor: Tensor) -> Tensor:
    """ROWS x COLUMNS of the first two axes, evenly spread, at the middle of the others: a view, in
    any memory format.
    """
    if not tensor.ndim or not tensor.numel():
        return tensor.reshape(-1)
    counts = zip(tensor.shape, (ROWS, COLUMNS))
    steps = [
        slice(None, max(1, (n - 1) // (most - 1)) * most, max(1, (n - 1) // (most - 1)))
        for n, most in counts
    ]
    return tensor[(*steps, *(n // 2 for n in tensor.shape[2:]))]


def _fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each as [n] float32 on the CPU; one copy and one wait for every device."""
    values: list[Tensor] = [torch.zeros(0)] * len(tensors)
    for device in {t.device for t in tensors}:
        here = [i for i, t in enumerate(tensors) if t.device == device]
        for i, part in zip(here, fetched([tensors[i] for i in here])):
            values[i] = part
    return values


def _sketch(facts: object, tensors: Sequence[Tensor], layers: int) -> Sketch:
    """facts: what has to be equal to the letter."""
    pieces = [_piece(t) for t in _evenly(tensors)]
    scaled = [piece for piece in pieces if piece.scale is not None]
    numbers = _fetch([piece.values for piece in pieces] + [piece.scale for piece in scaled])
    scales = {id(piece): one.item() for piece, one in zip(scaled, numbers[len(pieces) :])}
    kept = []
    for piece, values in zip(pieces, numbers):
        scale = scales.get(id(piece), 1.0)
        own = piece.dtype if piece.scale is not None else held_as(values, piece.dtype)
        kept.append(cells(values, own, scale))
    stored = next((piece.stored for piece in pieces if piece.stored), "")
    digest = _digest([facts, [piece.stored for piece in pieces]], 16)
    return Sketch(digest, torch.cat(kept, 1) if kept else torch.zeros(2, 0), layers, stored)


def _evenly(many: Sequence[Tensor]) -> list[Tensor]:
    """TENSORS of them, from the first to the last."""
    if not many:
        return []
    wanted = {round(i * (len(many) - 1) / (TENSORS - 1)) for i in range(TENSORS)}
    return [many[i] for i in sorted(wanted)]


def _digest(facts: object, size: int) -> str:
    return hashlib.blake2b(repr(facts).encode(), digest_size=size).hexdigest()


# what is read of a model --------------------------------------------------------------------------


def _weights(model: ModelPatcher) -> dict[str, list[Any]]:
    """Every weight of the network as it was before its patches, loaded or not, and these.

    The host's get_key_patches, but for what the state of a quantised layer holds beside its weight,
    which ends that in an error.
    """
    weights: dict[str, list[Any]] = {}
    for key in model.model_state_dict("diffusion_model."):
        if key in model.hook_backup:
            weight = model.hook_backup[key][0]
        elif key in model.backup:
            weight = model.backup[key].weight
        else:
            try:
                weight = get_key_weight(model.model, key)[0]
            except AttributeError:
                continue
        if isinstance(weight, Tensor):
            weights[key] = [weight, *model.patches.get(key, ())]
    return weights


def _parts(value: object, tensors: list[Tensor]) -> Iterator[object]:
    """What tells one patch from another, but for the values of its tensors, which are collected."""
    if isinstance(value, Tensor):
        tensors.append(value)
        yield tuple(value.shape)
    elif isinstance(value, (list, tuple)):
        yield [part for one in value for part in _parts(one, tensors)]
    elif hasattr(value, "weights"):
        yield type(value).__name__
        yield from _parts(value.weights, tensors)
    elif isinstance(value, (float, int, str)):
        yield value


def _hooks(model: ModelPatcher) -> list[tuple[str, Any]]:
    """The pieces of LoRAs in bypass mode, and their layers. The host keeps them in its injections'
    closures alone.
    """
    held = [
        value for many in model.injections.values() for one in many for value in closure(one.inject)
    ]
    hooks = [
        hook
        for manager in held
        if isinstance(manager, BypassInjectionManager)
        for hook in manager.hooks
    ]
    names = {id(module): name for name, module in model.model.named_modules()} if hooks else {}
    return sorted(
        ((names.get(id(hook.module), ""), hook) for hook in hooks), key=lambda piece: piece[0]
    )


def _patches(weights: dict[str, list[Any]], hooks: Sequence[tuple[str, Any]]) -> Sketch:
    """LoRAs, merges and whatever else is added to weights, and LoRAs in bypass mode."""
    tensors: list[Tensor] = []
    patched: list[object] = [
        (key, list(_parts(patches, tensors)))
        for key, (_, *patches) in sorted(weights.items())
        if patches
    ]
    patched += [
        ("bypass", name, hook.multiplier, list(_parts(hook.adapter, tensors)))
        for name, hook in hooks
    ]
    return _sketch(patched, tensors, len(patched))


def _sampling(model: ModelPatcher) -> str:
    """What the network predicts and at which noise: the host's classes, and not those that a node
    puts together of them.
    """
    sampling = model.get_model_object("model_sampling")
    classes = [
        c
        for c in type(sampling).__mro__
        if c not in torch.nn.Module.__mro__ and "<locals>" not in c.__qualname__
    ]
    scale = getattr(sampling, "sigma_data", 1.0)
    return (
        f"{' '.join(c.__name__ for c in classes)} up to sigma {float(sampling.sigma_max):.4g}"
        + (f", data {float(scale):.4g}" if scale != 1 else "")
    )


def model_key(model: ModelPatcher) -> ModelKey:
    """A name for the weights and their LoRAs that is the same on every machine, "SD15
    1a2b3c4d5e6f", and what it is compared by.

    It is the same whether the model is loaded, partly loaded or not at all.
    """
    with own_modules(model):
        weights, hooks = _weights(model), _hooks(model)
    modules = {*model.injections} - {*wrapped_injections(model)}
    matrices = {
        key: w for key, (w, *_) in weights.items() if key.endswith(".weight") and len(w.shape) > 1
    }
    own = _sketch(
        [(key, tuple(w.shape)) for key, w in matrices.items()], [*matrices.values()], len(matrices)
    )
    others = tuple(sorted(key for key in modules if not any(map(is_lora, model.injections[key]))))
    parts = Parts(own, _patches(weights, hooks), _sampling(model), others)
    return ModelKey(f"{family(model)} {_exact(model, weights, hooks, sorted(modules))}", parts)


def family(model: ModelPatcher) -> str:
    """The host's name of its kind; behind a slash that of its latents, where they are not its
    kind's (Playground 2.5 is an SDXL).
    """
    kind, latents = type(model.model.model_config), type(model.get_model_object("latent_format"))
    return kind.__name__ + (f"/{latents.__name__}" if latents is not kind.latent_format else "")


# the name as the first references have it: to the letter, or they are refused ---------------------


def _marks(value: object, dtype: torch.dtype | None = None) -> Iterable[object]:
    """What tells one patch of the weights from another, cheaply; dtype: what its tensors will be
    cast to.
    """
    if isinstance(value, Tensor):
        yield tuple(value.shape)
        yield _first(value).to(dtype or value.dtype).float().tolist()
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _marks(v, dtype)
    elif hasattr(value, "weights"):
        yield from _marks(value.weights, dtype)
    elif isinstance(value, (float, int, str)):
        yield value


def _first(value: Tensor) -> Tensor:
    """Four values; of what no operation may be done with, those that a key carries anyway."""
    if type(value) in (Tensor, torch.nn.Parameter):
        return value.detach().flatten()[:4]
    with suppress(Exception):
        return torch.tensor(value.detach().flatten()[:4].float().tolist())
    return _piece(value).values.flatten()[:4].float()


def _exact(
    model: ModelPatcher,
    weights: dict[str, list[Any]],
    hooks: Sequence[tuple[str, Any]],
    modules: list[str],
) -> str:
    """Of the weights as they are stored: another one in another precision."""
    digest = hashlib.blake2b(digest_size=6)
    named = [key for key in weights if key.endswith(("attn1.to_k.weight", "attn2.to_v.weight"))]
    if not named:  # a transformer, whose layers have other names
        matrices = [key for key in weights if key.endswith(".weight")]
        named = matrices[:: max(len(matrices) // 8, 1)]
    looked = {key: many for key, many in weights.items() if many[1:] or key in named}
    first = _fetch([_first(weight) for weight, *_ in looked.values()])
    for (key, (weight, *patches)), values in zip(looked.items(), first):
        digest.update(
            repr(
                (key, [tuple(weight.shape), values.tolist()], [list(_marks(p)) for p in patches])
            ).encode()
        )
    # eps, v, zsnr: the same weights read otherwise
    sampling = model.get_model_object("model_sampling")
    digest.update(
        repr(
            ([c.__name__ for c in type(sampling).__mro__], float(sampling.sigma_max), modules)
        ).encode()
    )
    cast = {dtype: dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    # a piece is cast to its layer's precision where it first runs, in place; it is told as it will
    # be then
    if hooks:
        beside = [
            (name, hook.multiplier, [*_marks(hook.adapter, cast.get(hook.module.weight.dtype))])
            for name, hook in hooks
        ]
        digest.update(repr(beside).encode())
    return digest.hexdigest()


# comparing ----------------------------------------------------------------------------------------


def require_same_model(node: str, what: str, made_with: str, current: str) -> None:
    """Features of one set of weights mean nothing to another. ValueError says what differs:
    weights, LoRAs, sampling or modules.
    """
    differ = differences(made_with, current)
    if differ == ():
        return
    begin = f"{node}: the {what} was made with model {made_with}, but the model given is {current}"
    if differ is None:
        raise ValueError(
            f"{begin}. An older Kindred made it, which kept no more than this name: it counts "
            f"weights, LoRAs, sampling and "
            f"the precision (fp16, bf16, fp8). Wire the same MODEL in the same precision, or make "
            f"the {what} again."
        )
    difference = (
        ""
        if differ == ("kind",)
        else f": {explain(made_with, current, differ)} differ{'s' * (differ[-1] == 'sampling')}"
    )
    raise ValueError(
        f"{begin}{difference}. {REMEDY[differ[0]]}, or make the {what} again with this one."
    )


def require_reference(node: str, bank: ReferenceBank, model: ModelPatcher) -> None:
    """A REFERENCE that this pack and this model can read; ValueError names both versions or both
    models.
    """
    if bank.version != BANK_VERSION:
        raise ValueError(
            f"{node}: the reference is of version {bank.version}, but this Kindred reads version "
            f"{BANK_VERSION}. "
            "Make it again, or use the Kindred that made it."
        )
    require_same_model(node, "reference", bank.model_key, model_key(model))
    require_layers(node, bank, model)


def require_layers(node: str, bank: ReferenceBank, model: ModelPatcher) -> None:
    """A file may name any model; ValueError where the reference's layers, text or latents are not
    this one's.
    """
    if not draws_by_unet(model):
        return require_channels(node, bank, model)
    sites = attention_sites(network(model))
    own = {
        block: (site.module.attn1.to_k, site.module.attn2.to_k)
        for block, site in sites.items()
        if hasattr(site.module.attn1, "to_k") and hasattr(site.module.attn2, "to_k")
    }  # else another node's, refused where it is read
    for layer in bank.layers:
        to_k = own[layer.block][0] if layer.block in own else None
        # hidden states; keys and values
        widths = (to_k.in_features, 2 * to_k.out_features) if to_k is not None else ("none",)
        if layer.channels not in widths and (layer.block in own or layer.block not in sites):
            raise ValueError(
                f"{node}: the reference has {layer.channels} channels in "
                f"{block_name(layer.block)}, but the model given has "
                f"{' or '.join(map(str, widths))}, though both are called {bank.model_key}. Make "
                f"the reference again."
            )
    wanted = (
        model.get_model_object("latent_format").latent_channels,
        next((k.in_features for _, k in own.values()), None),
    )
    held = {
        (bank.trajectory.latents.shape[2], prompt.cross.shape[-1])
        for prompt in bank.prompts.values()
    }
    if own and held != {wanted}:
        raise ValueError(
            f"{node}: the reference has (latent channels, text width) {sorted(held)}, but the "
            f"model given has {wanted}, "
            f"though both are called {bank.model_key}. Make the reference again."
        )


def require_channels(node: str, bank: ReferenceBank, model: ModelPatcher) -> None:
    """The same of a transformer, whose layers are known by what they are heard to do: latents have
    channels to compare.
    """
    wanted = model.get_model_object("latent_format").latent_channels
    channels = bank.trajectory.latents.shape[2]
    if channels != wanted:
        raise ValueError(
            f"{node}: the reference has latents of {channels} channels, but the model given has "
            f"{wanted}, though both are called"
            f" {bank.model_key}. Make the reference again."
        )
