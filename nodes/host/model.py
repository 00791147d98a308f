"""The host's model: what it is, its attention layers, its schedule and its latents."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import comfy.model_sampling
import comfy.samplers
import comfy.utils
import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter.bypass import BypassInjectionManager
from comfy_api.v0_0_2 import io
from torch import Tensor

from ...models.network.blocks import BlockId
from ...models.network.call import grid_of
from ...models.network.sites import BlockSite
from ...models.noise.path import DIFFUSION, Diffusion, Flow
from ...models.reference.bank import ReferenceBank

# of a flow: what its samplers begin with is 1, and some of the host's levels end a hair below it
FULL_NOISE = 0.999
KEY = "kindred"  # our name in transformer_options and in the host's wrapper lists
SAMPLER = "kindred_sampler"  # and of a sampler's own run, beside what its calls read
# what Subject Prompts leaves inside CONDITIONING: the text, where the subject's words stand in it,
# and how many times each row's text stands there
TEXT, SUBJECT, REPEATS = "kindred_text", "kindred_subject", "kindred_repeats"
SPECIAL = ("area", "mask", "control", "hooks", "gligen", "start_percent", "end_percent")
Inversion, Reference = io.Custom("KINDRED_INVERSION"), io.Custom("KINDRED_REFERENCE")
Encoder = io.Custom("KINDRED_CONCEPT_ENCODER")
log = logging.getLogger(__name__)
Conditioning = list[tuple[Tensor, dict[str, Any]]]


def network(model: ModelPatcher) -> torch.nn.Module:
    """What this MODEL computes with, whatever another one left in its place; the UNet itself where
    torch.compile stands around it.
    """
    unet = model.get_model_object("diffusion_model")
    return getattr(unet, "_orig_mod", unet)


def other_work(model: ModelPatcher, unet: UNetModel, sampling: object) -> str | None:
    """What one of the host's UNets does instead of making pictures from text; None where it does
    just that.
    """
    kinds = {kind.__name__ for kind in type(model.model).__mro__}
    image_to_image = getattr(comfy.model_sampling, "IMG_TO_IMG", ())
    if unet.use_temporal_resblocks or "SVD_img2vid" in kinds:  # SV3D too
        return "for videos"
    if "Stable_Zero123" in kinds:
        return "for other views of a picture"
    if "SD_X4Upscaler" in kinds:
        return "for upscaling"
    if hasattr(unet, "heatmap_head"):  # SDPose
        return "for poses"
    if "Lotus" in kinds or isinstance(sampling, image_to_image):
        return "from picture to picture in one step"
    return None if attention_sites(unet) else "without attention"


def require_unet(model: ModelPatcher, node: str) -> UNetModel:
    """The UNet behind a MODEL of the SD1.x/2.x/SDXL kind; ValueError names what was given
    otherwise.
    """
    unet, sampling = network(model), model.get_model_object("model_sampling")
    if not isinstance(unet, UNetModel) or not isinstance(sampling, comfy.model_sampling.EPS):
        why = (
            "flow" if isinstance(sampling, comfy.model_sampling.CONST) else type(sampling).__name__
        )
    else:
        why = other_work(model, unet, sampling)
    if why:
        remedy = (
            "Remove the node that puts a network of its own in the UNet's place."
            if "diffusion_model" in model.object_patches
            else "Load an SD1.5, SD2.x or SDXL checkpoint."
        )
        raise ValueError(
            f"{node}: needs a UNet that predicts noise or v (SD1.5, SD2.x, SDXL), but the model "
            f"given is "
            f"{type(model.model.model_config).__name__} ({type(unet).__name__}, {why}). {remedy}"
        )
    return unet


def noise_of(model: ModelPatcher, node: str) -> Diffusion | Flow:
    """How this model mixes a picture with noise; ValueError where in a way of its own."""
    sampling, kinds = model.get_model_object("model_sampling"), comfy.model_sampling
    if isinstance(sampling, kinds.CONST) and not isinstance(
        sampling, getattr(kinds, "IMG_TO_IMG_FLOW", ())
    ):
        return Flow(getattr(sampling, "noise_scale", 1.0))
    # Cosmos Predict2's is a flow whose x the host holds as x_0 + sigma noise, up to sigma 80
    diffusions = (kinds.EPS, getattr(kinds, "COSMOS_RFLOW", ()))
    if isinstance(sampling, diffusions) and not isinstance(
        sampling, getattr(kinds, "IMG_TO_IMG", ())
    ):
        return DIFFUSION
    raise ValueError(
        f"{node}: needs a model that denoises a picture (noise, v or flow prediction), but the "
        f"model given is "
        f"{type(model.model.model_config).__name__} ({model.model.model_type.name.lower()}). Load "
        f"a checkpoint that draws "
        "pictures from text."
    )


def draws_by_unet(model: ModelPatcher) -> bool:
    return isinstance(network(model), UNetModel)


def _resizes(layer: torch.nn.Module, way: type[torch.nn.Module]) -> bool:
    """Whether a layer is a Downsample or an Upsample, or a residual block with one inside
    (resblock_updown).
    """
    return isinstance(layer, way) or isinstance(getattr(layer, "h_upd", None), way)


def attention_sites(unet: UNetModel) -> dict[BlockId, BlockSite]:
    """Every transformer block in the order the UNet runs them."""
    sites: dict[BlockId, BlockSite] = {}
    divisor = 1
    middle = () if unet.middle_block is None else (unet.middle_block,)  # KOALA and SDXS have none
    for stage, blocks in (
        ("input", unet.input_blocks),
        ("middle", middle),
        ("output", unet.output_blocks),
    ):
        for index, layers in enumerate(blocks):
            depth = 0
            for layer in layers:
                if isinstance(layer, SpatialTransformer):
                    for block in layer.transformer_blocks:
                        sites[stage, index, depth] = BlockSite(
                            block, divisor, not getattr(block, "disable_self_attn", False)
                        )
                        depth += 1
                elif _resizes(layer, Downsample):
                    divisor *= 2
                elif _resizes(layer, Upsample):
                    divisor //= 2
    return sites


def self_attentions(sites: Mapping[BlockId, BlockSite]) -> tuple[BlockId, ...]:
    """The blocks whose attn1 attends to the picture's own tokens."""
    return tuple(block for block, site in sites.items() if site.self_attention)


def feature_tap(unet: UNetModel, divisor: int) -> int:
    """The first output block whose incoming features have this divisor: DIFT's up block 0 of SDXL,
    1 of SD1.x and 2.x.
    """
    here = 2 ** sum(_resizes(layer, Downsample) for layers in unet.input_blocks for layer in layers)
    for index, layers in enumerate(unet.output_blocks):
        if here == divisor:
            return index
        here //= 2 ** sum(_resizes(layer, Upsample) for layer in layers)
    raise ValueError(
        f"Kindred: this UNet has no output block at a {divisor}th of the latent's size. Load an "
        f"SD1.5, SD2.x or SDXL "
        "checkpoint."
    )


@contextmanager
def own_modules(model: ModelPatcher) -> Iterator[None]:
    """The model's modules as they were loaded: those that another MODEL's object patches put there
    stay from its run until the next.
    """
    placed = {
        name: comfy.utils.set_attr(model.model, name, original)
        for name, original in model.object_patches_backup.items()
        if isinstance(original, torch.nn.Module)
    }
    try:
        yield
    finally:
        for name, other in reversed(placed.items()):
            comfy.utils.set_attr(model.model, name, other)


def closure(function: object) -> Iterator[object]:
    """What a function holds of where it was written; another pack's may have been given up before
    all of it was there.
    """
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents


def is_lora(injection: Any) -> bool:
    """Whether one of the host's injections is a LoRA in bypass mode: weights, and no module of
    another pack.
    """
    return any(isinstance(one, BypassInjectionManager) for one in closure(injection.inject))


def _pack(function: object) -> str:
    """The top package that a function comes from: a pack, or the host's own; "" where it does not
    say.
    """
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return str(getattr(function, "__module__", None) or "").split(".")[0]


def wrapped_injections(model: ModelPatcher) -> list[str]:
    """Keys of the injections that belong to a wrapper: of the same key, or of the same pack. A pass
    without wrappers goes without them.

    LoRAs in bypass mode are weights and belong to nobody.
    """
    held = (model.wrappers, model.model_options.get("transformer_options", {}).get("wrappers", {}))
    wrappers = [
        (key, f)
        for kinds in held
        for by_key in kinds.values()
        for key, many in by_key.items()
        if key != KEY
        for f in many
    ]
    keys, packs = (
        {key for key, _ in wrappers},
        {_pack(f) for _, f in wrappers} - {"", "comfy", "comfy_extras", "comfy_api", "nodes"},
    )
    return [
        key
        for key, many in model.injections.items()
        if not any(map(is_lora, many))
        and (key in keys or any(_pack(one.inject) in packs for one in many))
    ]


@contextmanager
def ejected(model: ModelPatcher, keys: Collection[str]) -> Iterator[None]:
    """Inside: the network of a running model without what it was given under these keys; afterwards
    it is back.

    By the patcher's own methods, which tell others' callbacks; while the rest alone is in, those
    under these keys are not told of it.
    """
    if not (keys and model.is_injected):
        yield
        return
    with model.use_ejected():
        injections, callbacks = model.injections, model.callbacks
        model.injections = {key: many for key, many in injections.items() if key not in keys}
        model.callbacks = {
            kind: {key: many for key, many in by_key.items() if key not in keys}
            for kind, by_key in callbacks.items()
        }
        try:
            model.inject_model()
            yield
        finally:
            model.eject_model()
            model.injections, model.callbacks = injections, callbacks


def computes_in(model: ModelPatcher) -> torch.dtype:
    """The dtype of the UNet's hidden states: of this MODEL, as the shared network holds what the
    one before left there.
    """
    cast = model.get_model_object("manual_cast_dtype")
    return network(model).dtype if cast is None else cast


def pins_memory() -> bool:
    """Whether the host lets copies go through pinned memory."""
    return not args.disable_pinned_memory


def token_sizes(
    model: ModelPatcher, latent: Sequence[int], bank: ReferenceBank | None = None
) -> dict[BlockId, tuple[int, int]]:
    """Tokens of one picture and their channels in every self-attention layer; latent: its size (y,
    x) in cells.

    Of a transformer only the layers of the bank, whose keys and values tell the width.
    """
    unet = network(model)
    if not isinstance(unet, UNetModel):
        layers = bank.layers if bank else ()
        cells = bank.trajectory.latents.shape[-2] if bank else 0
        return {
            layer.block: (
                math.prod(grid_of(tuple(latent), max(cells // layer.grid[0], 1))),
                layer.channels // 2,
            )
            for layer in layers
        }
    return {
        block: (
            math.prod(grid_of(tuple(latent), site.divisor)),
            getattr(getattr(site.module.attn1, "to_k", None), "out_features", 0),
        )
        for block, site in attention_sites(unet).items()
    }  # 0: another node's layer, refused where it is read


def schedule(model: ModelPatcher, scheduler: str, steps: int) -> Tensor:
    """The sigmas a KSampler with this scheduler and step count runs, descending, as [t+1] on the
    CPU.
    """
    if scheduler not in schedulers():
        raise ValueError(
            f"Kindred: this ComfyUI has no scheduler {scheduler!r:.60}. Choose one of "
            f"{', '.join(map(str, schedulers()))}."
        )
    # packs change how it computes them
    return comfy.samplers.KSampler(model, steps, torch.device("cpu"), "euler", scheduler).sigmas


def schedulers() -> list[str]:
    """The host's own list, as its KSampler reads it: packs that load after us add to it, or put
    another one in its place.
    """
    return comfy.samplers.KSampler.SCHEDULERS


def samplers() -> list[str]:
    """The same of samplers."""
    return comfy.samplers.KSampler.SAMPLERS


def chosen_sigmas(
    model: Any, steps: int, scheduler: str, sigmas: Tensor | None, node: str
) -> tuple[Tensor, str]:
    """Descending sigmas [t+1] ending in 0 and their name; wired SIGMAS win. ValueError for a
    schedule that cannot be inverted.
    """
    wired = sigmas is not None
    name = (
        f"{scheduler}, {steps} steps"
        if sigmas is None
        else f"custom, {max(sigmas.numel() - 1, 0)} steps"
    )
    levels = (schedule(model, scheduler, steps) if sigmas is None else sigmas).float().cpu()
    sigmas = levels.flatten()
    if (
        levels.ndim != 1
        or len(sigmas) < 2
        or not torch.isfinite(sigmas).all()
        or (sigmas.diff() >= 0).any()
        or sigmas[-1] != 0
    ):
        raise ValueError(
            f"{node}: sigmas ({name}) must fall from step to step and end in 0, but "
            f"{[round(s, 4) for s in sigmas.tolist()[:6]]}... "
            f"({len(sigmas)} values, last {sigmas[-1].item() if len(sigmas) else 'none'}) were "
            f"given. "
            "Take another scheduler or fewer steps; wired SIGMAS must be those the sampler gets, "
            "not flipped ones."
        )
    if not wired:
        _say_of_late_start(model, float(sigmas[0]), name, node)
    return sigmas, name


def _say_of_late_start(model: ModelPatcher, first: float, name: str, node: str) -> None:
    """A warning where a flow's schedule leaves out the noise that its samplers begin with."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST) or first >= FULL_NOISE:
        return
    log.warning(
        "%s: with %s this model's noise levels begin at %.3f, but pictures begin at 1: the first "
        "steps of the sampler are not among them. Take simple, or the scheduler of the sampler.",
        node,
        name,
        first,
    )


def cross_layers(
    model: ModelPatcher, node: str
) -> tuple[str, tuple[tuple[BlockId, int], ...], int]:
    """The model's family, its cross-attention layers with their channels, and the width of the text
    they read.
    """
    with own_modules(model):
        to_k = {
            block: site.module.attn2.to_k
            for block, site in attention_sites(require_unet(model, node)).items()
        }
    width = next(iter(to_k.values())).in_features
    return (
        type(model.model.model_config).__name__,
        tuple((block, layer.out_features) for block, layer in to_k.items()),
        width,
    )
