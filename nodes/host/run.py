"""A sampler run: the host's attention calls, its conds and its guider, translated for models/injection.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import comfy.model_patcher
import comfy.model_sampling
import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import SDP_BATCH_LIMIT, attention_pytorch, optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

import nodes

from ...models.attention.attend import FusedAttend
from ...models.injection import ActiveInjection, Asker, AttnCall, PassEnds, Run
from ...models.reference.bank import BlockId, Half, ReferenceBank, RowReader, block_name
from ...models.story.story import QueryRecorder, Story
from .foreign import hands_on, told_once
from .foresight import Foreseen, foresee
from .joint import joint_override, joint_pass
from .model import KEY, Conditioning, log, network
from .page import warn
from .sites import require_backbone, sites_of
from .stages import Stages, answering, begin_keyframes

_FUSED = getattr(attention_pytorch, "__wrapped__", None)  # as the host hands it to an override


class Injection(Protocol):
    """A frozen node configuration; watches: it needs more of the UNet than its attention calls."""

    watches: bool

    def check(self, model: ModelPatcher) -> None: ...
    def held(
        self, model: ModelPatcher, shape: Sequence[int]
    ) -> int: ...  # bytes on the device; shape [b c y x] of the latents
    def start_run(self, run: SamplerRun) -> ActiveInjection | None: ...


@dataclass
class SamplerRun(Run):
    """A run under one of the host's guiders."""

    injections: tuple[Injection, ...] = ()
    stages: Stages | None = None  # of a story that needs two
    guider: Any = None
    model_options: dict[str, Any] = field(default_factory=dict)
    step_tokens: dict[
        tuple[int, float, frozenset[Half]], Mapping[Half, Mapping[BlockId, Tensor]]
    ] = field(default_factory=dict)
    ways: set[str] = field(default_factory=set)  # cached, live: each is logged once
    pictures: int = 0  # in the sampled batch
    sigmas: tuple[float, ...] = ()  # of this sampler run, descending, without the last 0
    steps: int = 0
    story: Story | None = None
    rows: RowReader | None = None  # of the banks that this run reads
    foreseen: Foreseen | None = None
    asker: Asker = Asker()

    def say_unread(self) -> None:
        """Warn, once the run is over, of each injection that should have been read and was in no block at no step."""
        for node in dict.fromkeys(a.node for a in self.active if id(a) in self.wanted - self.heard):
            warn(
                f"{node}: nothing of it was read in any block at any step, so it is not in these pictures. Another node computes the "
                "network's attention by itself, in a copy of its own. Remove that node from the MODEL; if the warning stays, start "
                "ComfyUI again, since some packs leave their copy in the checkpoint."
            )

    def begin(
        self, guider: Any, model_options: dict[str, Any], shape: Sequence[int], sigmas: Tensor
    ) -> None:
        """Called once the host has loaded the model and processed its conds; shape [b c y x] of the sampled latents."""
        self.guider, self.model_options, self.latent = guider, model_options, tuple(shape[-2:])
        self.handed, self.part = None, ""
        self.pictures, self.sigmas = (
            shape[0],
            tuple(s for s in sigmas.float().tolist() if 0 < s < math.inf),
        )  # float32
        self.steps = len(sigmas) - 1
        unet = network(guider.model_patcher)
        self.sites = sites_of(guider.model_patcher, self.backbone)
        self.compiled = (
            self.compiled
            or unet is not guider.model_patcher.get_model_object("diffusion_model")
            or any(hasattr(module, "_orig_mod") for module in unet.modules())
        )
        self.read_conds(guider.conds)
        self.wanted, self.heard = set(), set()
        self.rows = RowReader(self.device_and_dtype[0], pins=not args.disable_pinned_memory)
        self.active = [
            active
            for injection in self.injections
            if (active := injection.start_run(self)) is not None
        ]
        stories = [active for active in self.active if isinstance(active, Story)]
        self.watchers = [w for w in self.watchers if w is not self.story] + stories
        self.story = next(iter(stories), None)
        self.stages = Stages(self.story) if self.story else None

    def blocks_read(self, bank: ReferenceBank) -> frozenset[BlockId]:
        """Of a bank, by all injections of this run."""
        return frozenset().union(
            *(i.blocks for i in self.injections if getattr(i, "bank", None) is bank)
        ) & frozenset(bank.blocks)

    def timesteps(self) -> tuple[float, ...]:
        """The model's own timestep, 0 to 999, at each of the run's sigmas."""
        sampling, sigmas = self.guider.inner_model.model_sampling, torch.tensor(self.sigmas)
        if isinstance(
            sampling, comfy.model_sampling.ModelSamplingContinuousEDM
        ):  # its own timesteps are log sigma / 4
            low, high = (math.log(float(s)) for s in (sampling.sigma_min, sampling.sigma_max))
            return tuple(((sigmas.log() - low) / (high - low) * 999).tolist())
        return tuple(sampling.timestep(sigmas).float().tolist())

    def at(self, *percents: float) -> tuple[float, ...]:
        """Shares of the schedule (0 = all noise) as the sigmas of this run's own: another node may have changed it behind ours."""
        return tuple(
            float(self.guider.inner_model.model_sampling.percent_to_sigma(p)) for p in percents
        )

    @property
    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where and in what the UNet computes."""
        return self.guider.model_patcher.load_device, self.guider.inner_model.get_dtype_inference()

    def close(self) -> None:
        super().close()
        self.guider, self.model_options, self.step_tokens = None, {}, {}
        self.story = self.stages = self.rows = self.foreseen = None


@torch.compiler.disable
def _attn1_patch(
    n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    run: Run | None = options.get(KEY)
    if isinstance(run, Run):
        _say_unheard(run, n)
        run.current = run.call(options)
        for watcher in run.watchers:
            n = watcher.self_tokens(run.current, n)
        run.before = n, context
        run.end_if_complete()
    return n, context, value


@torch.compiler.disable
def _attn1_output_patch(out: Tensor, options: dict[str, Any]) -> Tensor:
    run: Run | None = options.get(KEY)
    if isinstance(run, Run) and run.current is not None:
        for watcher in run.watchers:
            out = watcher.self_output(run.current, out)
        run.end_if_complete()
    return out


@torch.compiler.disable
def _output_block_patch(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    run: Run | None = options.get(KEY)
    if isinstance(run, Run):
        for watcher in run.watchers:
            watcher.output_block(options["block"][1], h, run.parts_of(options))
        run.end_if_complete()
    return h, skip


@torch.compiler.disable
def _attn2_patch(
    n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    run: Run | None = options.get(KEY)
    if isinstance(run, Run):
        _say_unheard(run, n)
        run.current, run.before = run.call(options, context.shape[1]), (n, context)
    return n, context, value


@torch.compiler.disable
def _last_patch(
    n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Behind the others' patches, which may attend to something of their own: the next attention is the block's."""
    run: Run | None = options.get(KEY)
    if isinstance(run, Run) and run.current is not None and run.before is not None:
        run.current = run.settled(run.current, n, context)
        run.pending, run.asked = run.current, tuple(n.shape)
        _hand_on(run, run.current, options)
    return n, context, value


def _hand_on(run: Run, call: AttnCall, options: dict[str, Any]) -> None:
    """Where another pack's copy of the block's forward asks the next attention, it tells it nothing: then we do."""
    run.drop_hook()
    site = run.sites.get(call.block)
    if site is not None and not run.compiled and not hands_on(site.module):
        run.drop = told_once(
            site.module.attn2 if call.cross else site.module.attn1,
            {**options, "optimized_attention_override": _override(None)},
        )  # not its neighbours' kernels: it asked none


def _say_unheard(run: Run, x: Tensor) -> None:
    """Say once where something should have been read, but another node computed the attention past the host's function."""
    call, run.pending = run.pending, None
    if call is None or call.unknown or not isinstance(run, SamplerRun) or "unheard" in run.ways:
        return
    tokens = x.new_empty(run.asked)
    if run.found(call, tokens, tokens, tokens):
        run.ways.add("unheard")
        log.info(
            "Kindred: another node computes the %s-attention of block %s by itself, at least in some passes, so nothing of ours is "
            "read there then. PAG does so in its own pass, and there it is right; else remove that node, or put it on a model of its "
            "own.",
            "cross" if call.cross else "self",
            block_name(call.block),
        )


def _override(previous: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """optimized_attention_override that asks its predecessor (sage, flash, another pack) with the longer keys."""

    @torch.compiler.disable
    def override(
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        def attend(
            q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
        ) -> Tensor:
            if previous is not None:
                return previous(func, q, k, v, heads, mask=mask, **kwargs)
            return func(q, k, v, heads, mask=mask, **kwargs)

        run = (kwargs.get("transformer_options") or {}).get(KEY)
        call = run.pending if isinstance(run, Run) else None
        if call is None or mask is not None or kwargs.get("skip_reshape"):
            return attend(q, k, v, heads, mask)
        run.pending = (
            None  # one attention is the block's; what others attend to until the next is theirs
        )
        for watcher in run.watchers if call.cross else ():
            watcher.cross(call, q, k, heads)
        run.end_if_complete()
        fused = (
            func is _FUSED
            and previous is None
            and not kwargs.get("skip_output_reshape")
            and q.shape[0] <= SDP_BATCH_LIMIT
        )
        return run.attend(call, FusedAttend(attend) if fused else attend, q, k, v, heads)

    setattr(override, KEY, (previous,))  # a second install replaces ours instead of stacking it
    return override


class _Beside:
    """A neighbour's replacement f of a block's attention, with ours beside it: f + (ours - plain), which is ours where f is plain.

    What f computes by itself stays its own, whether it hands its options on (the override would hear it) or not.
    """

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f = f

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        run: Run | None = options.get(KEY)
        if not isinstance(run, Run) or run.pending is None:
            return self.f(q, k, v, options)
        call, run.pending, heads = run.pending, None, options["n_heads"]
        run.hear(call)
        out = self.f(q, k, v, options)
        for watcher in run.watchers if call.cross else ():
            watcher.cross(call, q, k, heads)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
        ) -> Tensor:
            return optimized_attention(
                q,
                k,
                v,
                heads,
                mask=mask,
                attn_precision=options["attn_precision"],
                transformer_options=options,
            )

        return (
            out + (run.attend(call, attend, q, k, v, heads) - attend(q, k, v, heads))
            if run.found(call, q, k, v)
            else out
        )


def _until_complete(
    executor: Any,
    x: Tensor,
    timesteps: Tensor | None = None,
    context: Tensor | None = None,
    y: Tensor | None = None,
    control: dict[str, Any] | None = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """A pass of the UNet that answers zeros where it ended early; its answer is not asked for."""
    for watcher in transformer_options[KEY].watchers:
        watcher.begin_pass()
    try:
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
    except PassEnds:
        return x.new_zeros(x.shape[0], executor.class_obj.out_channels, *x.shape[2:])


def install(model_options: dict[str, Any], run: Run, watched: bool = False) -> dict[str, Any]:
    """A copy of the options with the run in it; first and last in every chain that matters, so the order of nodes does not.

    watched: also hand outputs of self-attentions and of blocks to the run's watchers.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer = options.setdefault("transformer_options", {})
    transformer[KEY] = run
    run.compiled = run.compiled or COMPILE_KEY in transformer.get("wrappers", {}).get(
        WrappersMP.APPLY_MODEL, {}
    )
    previous = transformer.get("optimized_attention_override")
    previous = getattr(previous, KEY, (previous,))[0]
    if run.backbone is not None:
        add_wrapper_with_key(
            WrappersMP.APPLY_MODEL, f"{KEY}_pass", joint_pass, transformer
        )  # six families have no other
        transformer["optimized_attention_override"] = joint_override(previous)
        return options
    if run.ends_early:
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _until_complete, transformer)
    patches = transformer.setdefault("patches", {})
    ours = {"attn1_patch": _attn1_patch, "attn2_patch": _attn2_patch}
    if watched:
        ours |= {
            "attn1_output_patch": _attn1_output_patch,
            "output_block_patch": _output_block_patch,
        }
    for name, patch in ours.items():
        theirs = [p for p in patches.get(name, ()) if p is not patch and p is not _last_patch]
        last = [_last_patch] if name in ("attn1_patch", "attn2_patch") else []
        patches[name] = [patch, *theirs, *last]  # first: it sees norm(x) as it is
    for name in ("attn1", "attn2"):
        replaced = transformer.get("patches_replace", {}).get(name, {})
        replaced.update(
            {block: f if isinstance(f, _Beside) else _Beside(f) for block, f in replaced.items()}
        )
    transformer["optimized_attention_override"] = _override(previous)
    return options


def _outer_sample(
    executor: Any, noise: Tensor, latent: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    guider = executor.class_obj
    original = guider.model_options
    injections = original["transformer_options"].get(KEY, ())
    if "multigpu_clones" in original:
        raise ValueError(
            "Kindred: MultiGPU Work Units split the rows that share a subject over several devices. Remove that node."
        )
    backbone = require_backbone(guider.model_patcher, "Kindred")
    for injection in injections:
        injection.check(guider.model_patcher)
    run = SamplerRun(injections=injections, backbone=backbone)
    guider.model_options = install(
        original, run, watched=any(injection.watches for injection in injections)
    )
    try:
        out = executor(noise, latent, *args, **kwargs)
        run.say_unread()
        return out
    finally:
        run.close()
        guider.model_options = original


def _prepare_sampling(
    executor: Any, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Any:
    """Tell the host what the run will hold beside the UNet's own, in the one unit it knows: more pictures, of two rows each.

    Else its free memory shrinks under it, and it splits cond and uncond by surprise.
    """
    run = (kwargs.get("model_options") or {}).get("transformer_options", {}).get(KEY)
    if isinstance(run, SamplerRun) and len(noise_shape) in (4, 5):
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
    run: SamplerRun = extra_args["model_options"]["transformer_options"][KEY]

    def whole(options: dict[str, Any]) -> Tensor:
        run.asker = asker(executor.class_obj, extra_args["model_options"])
        run.begin(guider, extra_args["model_options"], noise.shape, sigmas)
        sample = run.stages.sample if run.stages else _in_one_stage
        plain = (
            options is not extra_args and len(run.sigmas) >= run.steps
        )  # else some steps are at 0, or at no number
        run.foreseen = (
            foresee(executor.class_obj, run.sigmas, run.story, run.model_options) if plain else None
        )
        return sample(executor, guider, sigmas, options, callback, noise, *args, **kwargs)

    out = whole(dict(extra_args))
    if run.foreseen is None or run.foreseen.right:
        return out
    log.info(
        "Kindred: the model was asked for other noise levels than the sampler's, so the picture is made again with those."
    )
    begin_keyframes(guider)
    return whole(extra_args)


def asker(sampler: Any, model_options: Mapping[str, Any]) -> Asker:
    """A sampler as KSampler lists it, where it is a function as the host's are; else by its class."""
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
    run: SamplerRun = model_options["transformer_options"][KEY]
    sigma = run.foreseen.next(timestep) if run.foreseen else None
    if sigma is None:
        sigma = float(timestep.flatten()[0])
    if run.stages:
        told = [
            len(o.get("sampler_post_cfg_function", ())) for o in (model_options, run.model_options)
        ]
        if (
            told[0] == told[1] and (known := run.stages.replayed(sigma, x)) is not None
        ):  # CFG++ samplers listen to each call
            return known
    size = tuple(x.shape[-2:])
    run.asks(size, run.asker)
    if run.story:
        run.story.require_size(size, sigma, run.asker)
    for injection in run.active:
        injection.begin_step(sigma)
        if injection.wants:
            run.wanted.add(id(injection))
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
    run = options.get(KEY)
    if _compiled(executor.class_obj, options):
        kwargs[KEY] = (
            "run"  # the compiler keeps no guard on the options: a call that looks like a plain one runs what was compiled for it
        )
    story = run.story if isinstance(run, SamplerRun) else None
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


def _behind_vanilla(
    run: SamplerRun,
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
        kept = control and {
            k: list(v) if isinstance(v, list) else v for k, v in control.items()
        }  # the UNet empties the lists
        executor(x, t, c_concat, c_crossattn, kept, options, **kwargs)
        run.active, run.watchers, story.vanilla = active, watchers, plain.tokens
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    finally:
        run.active, run.watchers, story.vanilla = active, watchers, {}


def _compiled(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether torch.compile stands between the model and its UNet: the host's node as a wrapper, others' as the module itself."""
    return COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}) or hasattr(
        model.diffusion_model, "_orig_mod"
    )


def injected(model: ModelPatcher) -> tuple[Injection, ...]:
    """The injections on a MODEL, in the order of their nodes."""
    return model.model_options.get("transformer_options", {}).get(KEY, ())


def inject(
    model: ModelPatcher, injection: Injection, instead_of: Injection | None = None
) -> ModelPatcher:
    """A clone of the MODEL with one more injection, or with one exchanged; the input MODEL is never changed."""
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
