"""Wrappers of the host's sampling on a MODEL: where a run begins, is asked and ends, and where a
step's noise level is told.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

import nodes

from ...models.network.call import Asker
from ...models.run import Run
from ...models.story.sources import QueryRecorder
from ...models.story.story import Story
from .decoupled import DecoupledInjection
from .foresight import foresee
from .guiders import begun, require_one_model, say_elsewhere
from .hearing import patched_attentions
from .install import compiled, install
from .model import KEY, SAMPLER, Conditioning, log
from .run import Injection, SamplerRun
from .sites import require_backbone
from .stages import answering, begin_keyframes


def _outer_sample(
    executor: Any, noise: Tensor, latent: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    guider = executor.class_obj
    original = guider.model_options
    injections = original["transformer_options"].get(KEY, ())
    if "multigpu_clones" in original:
        raise ValueError(
            "Kindred: MultiGPU Work Units split the rows that share a subject over several "
            "devices. Remove that node."
        )
    backbone = require_backbone(guider.model_patcher, "Kindred")
    require_one_model(guider, injections)
    for injection in injections:
        injection.check(guider.model_patcher)
    run = SamplerRun(Run(backbone=backbone), injections)
    guider.model_options = install(
        original,
        run.calls,
        watched=any(injection.watches for injection in injections),
        places={i.place for i in injections if isinstance(i, DecoupledInjection)},
    )
    guider.model_options["transformer_options"][SAMPLER] = run
    try:
        with begun(), patched_attentions(guider.model_patcher, backbone):
            out = executor(noise, latent, *args, **kwargs)
        run.say_unread()
        return out
    finally:
        run.close()
        guider.model_options = original


def _prepare_sampling(
    executor: Any, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Any:
    """Tell the host what the run will hold beside the UNet's own, in the one unit it knows: more
    pictures, of two rows each.

    Else its free memory shrinks under it, and it splits cond and uncond by surprise.
    """
    run = (kwargs.get("model_options") or {}).get("transformer_options", {}).get(SAMPLER)
    if run is not None and len(noise_shape) in (4, 5):
        more = sum(injection.held(model, noise_shape) for injection in run.injections)
        picture = model.model.memory_required([2, *noise_shape[1:]])
        noise_shape = [noise_shape[0] + math.ceil(more / picture), *noise_shape[1:]]
    return executor(model, noise_shape, *args, **kwargs)


def _sampler_sample(
    executor: Any,
    guider: Any,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Any,
    noise: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    run: SamplerRun = extra_args["model_options"]["transformer_options"][SAMPLER]

    def whole(options: dict[str, Any]) -> Tensor:
        run.asker = asker(executor.class_obj, extra_args["model_options"])
        run.begin(guider, extra_args["model_options"], noise.shape, sigmas)
        sample = run.stages.sample if run.stages else _in_one_stage
        # else some steps are at 0, or at no number
        plain = options is not extra_args and len(run.sigmas) >= run.steps
        run.foreseen = (
            foresee(executor.class_obj, run.sigmas, run.story, run.model_options) if plain else None
        )
        return sample(executor, guider, sigmas, options, callback, noise, *args, **kwargs)

    out = whole(dict(extra_args))
    if run.foreseen is None or run.foreseen.right:
        return out
    log.info(
        "Kindred: the model was asked for other noise levels than the sampler's, so the picture is "
        "made again with those."
    )
    begin_keyframes(guider)
    return whole(extra_args)


def asker(sampler: Any, model_options: Mapping[str, Any]) -> Asker:
    """A sampler as KSampler lists it, where it is a function as the host's are; else by its
    class.
    """
    function = getattr(getattr(sampler, "sampler_function", None), "__name__", None)
    name = (
        function.removeprefix("sample_").removesuffix("_function")
        if function
        else type(sampler).__name__
    )
    return Asker(name, tuple(str(key or "unnamed") for key in answering(model_options)))


def _in_one_stage(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    return executor(*args, **kwargs)


def _predict_noise(
    executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None
) -> Tensor:
    run: SamplerRun = model_options["transformer_options"][SAMPLER]
    sigma, equal = run.foreseen.next(timestep) if run.foreseen else None, None
    if sigma is None and run.stages:
        sigma, equal = run.stages.level_of(x, timestep)
    elif sigma is None:
        sigma = float(timestep.flatten()[0])
    if run.stages:
        listeners = [
            len(o.get("sampler_post_cfg_function", ())) for o in (model_options, run.model_options)
        ]
        if (
            listeners[0] == listeners[1]
            and (known := run.stages.replayed(sigma, x, equal)) is not None
        ):  # CFG++ samplers listen to each call
            return known
    size = tuple(x.shape[-2:])
    run.calls.asks(size, run.asker)
    if run.story:
        run.story.require_size(size, sigma, run.asker)
    for injection in run.calls.active:
        injection.begin_step(sigma)
        if injection.wants:
            run.calls.wanted.add(id(injection))
    denoised = executor(x, timestep, model_options, seed)
    if run.stages:
        run.stages.answered(sigma, x, denoised)
    return denoised


def _apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: dict[str, Any] | None = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """One call of the model; of ConsiStory eq. (4) two passes, where the story asks for it."""
    options = transformer_options or {}
    run, sampler = options.get(KEY), options.get(SAMPLER)
    if compiled(executor.class_obj, options) and _takes_more(executor.class_obj.diffusion_model):
        # the compiler keeps no guard on the options: a call that looks like a plain one runs what
        # was compiled for it
        kwargs[KEY] = "run"
    story = sampler and sampler.story
    if story is not None:
        story.begin_call()
    try:
        if story is not None and story.wants_vanilla(run.parts_of(options)):
            return _behind_vanilla(
                run, story, executor, x, t, c_concat, c_crossattn, control, options, **kwargs
            )
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    finally:
        if isinstance(run, Run):
            run.drop_hook()


def _takes_more(network: torch.nn.Module) -> bool:
    """Whether a network's forward takes arguments that it does not know; HiDream-I1's does not."""
    forward = getattr(network, "_orig_mod", network).forward
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def _behind_vanilla(
    run: Run,
    story: Story,
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None,
    c_crossattn: Tensor | None,
    control: dict[str, Any] | None,
    options: dict[str, Any],
    **kwargs: Any,
) -> Tensor:
    """ConsiStory eq. (4): a pass without sharing comes first, on the same input."""
    plain, active, watchers = QueryRecorder(story.settings.blocks), run.active, run.watchers
    try:
        run.active, run.watchers = [a for a in active if a is not story], [plain]
        # the UNet empties the lists
        kept = control and {k: list(v) if isinstance(v, list) else v for k, v in control.items()}
        executor(x, t, c_concat, c_crossattn, kept, options, **kwargs)
        run.active, run.watchers, story.vanilla = active, watchers, plain.tokens
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    finally:
        run.active, run.watchers, story.vanilla = active, watchers, {}


def injected(model: ModelPatcher) -> tuple[Injection, ...]:
    """The injections on a MODEL, in the order of their nodes."""
    return model.model_options.get("transformer_options", {}).get(KEY, ())


def inject(
    model: ModelPatcher, injection: Injection, instead_of: Injection | None = None
) -> ModelPatcher:
    """A clone of the MODEL with one more injection, or with one exchanged; the input MODEL is never
    changed.
    """
    clone = model.clone()
    transformer = clone.model_options.setdefault("transformer_options", {})
    known = transformer.get(KEY, ())
    transformer[KEY] = (
        tuple(injection if i is instead_of else i for i in known)
        if instead_of
        else (*known, injection)
    )
    wrappers = (
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
        (WrappersMP.SAMPLER_SAMPLE, _sampler_sample),
        (WrappersMP.PREDICT_NOISE, _predict_noise),
        (WrappersMP.APPLY_MODEL, _apply_model),
    )
    for kind, wrapper in wrappers:
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    clone.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)
    clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, say_elsewhere)
    return clone


def sample(
    model: ModelPatcher,
    seed: int,
    steps: int,
    cfg: float,
    sampler: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent: dict[str, Any],
    denoise: float,
) -> dict[str, Any]:
    """The host's KSampler: LATENT in, LATENT out."""
    return nodes.common_ksampler(
        model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise
    )[0]
