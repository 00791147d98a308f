"""The one door to the host: its model, its sampler run and its attention, translated once into Kindred's types.

A node's configuration is a frozen `Injection` on a clone of the MODEL. When a sampler starts, one wrapper turns the
injections it finds into a `Run`; the run lives in the sampler's own copy of the options and dies with it.
"""
from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..models.attention import product_attend
from ..models.concept import ConceptEncoder, KeysValues
from ..models.injection import ActiveInjection, BlockSite, Merge, Part, Recorder, Role, Run
from ..models.reference import BlockId, Half, ReferenceBank, ReferencePrompt
from ..models.training import Learning, checkpointed

KEY = "kindred"  # our name in transformer_options and in the host's wrapper lists
SUBJECT, TEXT = "kindred_subject", "kindred_text"  # what Subject Prompts leaves inside CONDITIONING
SPECIAL = ("area", "mask", "control", "hooks", "gligen", "start_percent", "end_percent")
Inversion, Reference = io.Custom("KINDRED_INVERSION"), io.Custom("KINDRED_REFERENCE")
Encoder = io.Custom("KINDRED_CONCEPT_ENCODER")
log = logging.getLogger(__name__)
Conditioning = list[tuple[Tensor, dict[str, Any]]]


class Injection(Protocol):
    """A frozen node configuration."""
    def check(self, model: ModelPatcher) -> None: ...
    def start_run(self, run: SamplerRun) -> ActiveInjection: ...


@dataclass
class SamplerRun(Run):
    """A run under one of the host's guiders."""
    injections: tuple[Injection, ...] = ()
    guider: Any = None
    model_options: dict[str, Any] = field(default_factory=dict)
    step_tokens: dict[tuple[int, float, frozenset[Half]], Mapping[Half, Mapping[BlockId, Tensor]]] = field(default_factory=dict)
    ways: set[str] = field(default_factory=set)  # cached, live: each is logged once

    def begin(self, guider: Any, model_options: dict[str, Any], shape: Sequence[int]) -> None:
        """Called once the host has loaded the model and processed its conds; shape [b c y x] of the sampled latents."""
        self.guider, self.model_options, self.latent = guider, model_options, tuple(shape[2:])
        self.sites = attention_sites(guider.inner_model.diffusion_model)
        self.read_conds(guider.conds)
        self.active = [injection.start_run(self) for injection in self.injections]

    @property
    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where and in what the UNet computes."""
        return self.guider.model_patcher.load_device, self.guider.inner_model.get_dtype_inference()

    def close(self) -> None:
        super().close()
        self.guider, self.model_options, self.step_tokens = None, {}, {}


# ---------------------------------------------------------------------------------------------------------- the model
def require_unet(model: ModelPatcher, node: str) -> BaseModel:
    """The BaseModel behind a MODEL of the SD1.x/2.x/SDXL kind; ValueError names what was given otherwise."""
    base = model.model
    sampling = model.get_model_object("model_sampling")
    if not isinstance(base.diffusion_model, UNetModel) or not isinstance(sampling, comfy.model_sampling.EPS):
        raise ValueError(f"{node}: needs a UNet that predicts noise or v (SD1.5, SD2.x, SDXL), but the model given is "
                         f"{type(base.model_config).__name__} ({type(base.diffusion_model).__name__}, "
                         f"{'flow' if isinstance(sampling, comfy.model_sampling.CONST) else type(sampling).__name__}). "
                         "Load an SD1.5, SD2.x or SDXL checkpoint.")
    return base


def attention_sites(unet: UNetModel) -> dict[BlockId, BlockSite]:
    """Every transformer block in the order the UNet runs them."""
    sites: dict[BlockId, BlockSite] = {}
    divisor = 1
    stages = (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks))
    for stage, blocks in stages:
        for index, layers in enumerate(blocks):
            depth = 0
            for layer in layers:
                if isinstance(layer, SpatialTransformer):
                    for block in layer.transformer_blocks:
                        sites[stage, index, depth] = BlockSite(block, divisor)
                        depth += 1
                elif isinstance(layer, Downsample):
                    divisor *= 2
                elif isinstance(layer, Upsample):
                    divisor //= 2
    return sites


def model_key(model: ModelPatcher) -> str:
    """A name for the weights and their LoRAs that is the same on every machine: "SD15 1a2b3c4d5e6f"."""
    def tensors(value: object) -> Iterable[object]:
        if isinstance(value, Tensor):
            yield tuple(value.shape)
            yield value.detach().flatten()[:4].float().tolist()
        elif isinstance(value, (list, tuple)):
            for v in value:
                yield from tensors(v)
        elif hasattr(value, "weights"):
            yield from tensors(value.weights)
        elif isinstance(value, (float, int, str)):
            yield value
    digest = hashlib.blake2b(digest_size=6)
    for key, (original, *patches) in model.get_key_patches("diffusion_model.").items():
        if patches or key.endswith(("attn1.to_k.weight", "attn2.to_v.weight")):
            digest.update(repr((key, list(tensors(original[0])), [list(tensors(p)) for p in patches])).encode())
    sampling = model.get_model_object("model_sampling")  # eps, v, zsnr: the same weights read otherwise
    digest.update(repr(([c.__name__ for c in type(sampling).__mro__], float(sampling.sigma_max), sorted(model.injections))).encode())
    return f"{type(model.model.model_config).__name__} {digest.hexdigest()}"


def schedule(model: ModelPatcher, scheduler: str, steps: int) -> Tensor:
    """The sigmas a KSampler with this scheduler and step count runs, descending, as [t+1] on the CPU."""
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps).cpu()


SCHEDULERS = list(comfy.samplers.SCHEDULER_NAMES)


def chosen_sigmas(model: Any, steps: int, scheduler: str, sigmas: Tensor | None, node: str) -> tuple[Tensor, str]:
    """Descending sigmas [t+1] ending in 0 and their name; wired SIGMAS win. ValueError for a schedule that cannot be inverted."""
    name = f"{scheduler}, {steps} steps" if sigmas is None else f"custom, {len(sigmas) - 1} steps"
    sigmas = (schedule(model, scheduler, steps) if sigmas is None else sigmas).float().cpu()
    if len(sigmas) < 2 or not torch.isfinite(sigmas).all() or (sigmas.diff() >= 0).any() or sigmas[-1] != 0:
        raise ValueError(f"{node}: sigmas ({name}) must fall from step to step and end in 0, but "
                         f"{[round(s, 4) for s in sigmas.tolist()[:6]]}... "
                         f"({len(sigmas)} values, last {sigmas[-1].item() if len(sigmas) else 'none'}) were given. "
                         "Take another scheduler or fewer steps; wired SIGMAS must be those the sampler gets, not flipped ones.")
    return sigmas, name


def latent_in(model: ModelPatcher, samples: Tensor, node: str) -> Tensor:
    """A LATENT's samples in model scale, checked: channels, finiteness, and not the empty latent."""
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(f"{node}: the latent is {list(samples.shape)}, but this model's latents have {channels} channels "
                         "[b c y x]. Encode the photo with this checkpoint's VAE (VAE Encode).")
    if not torch.isfinite(samples).all():
        bad = (~torch.isfinite(samples)).sum().item()
        raise ValueError(f"{node}: {bad} of {samples.numel()} latent values are NaN or infinite. A VAE in fp16 does this to "
                         "some pictures: start ComfyUI with --fp32-vae or use another VAE.")
    if not samples.any():
        raise ValueError(f"{node}: the latent is empty (all zeros). Connect the encoded photo of the subject, not Empty Latent Image.")
    return model.model.process_latent_in(samples.float().cpu())  # --fp16-intermediates and --gpu-only give others


def offer_example(picture: Path) -> None:
    """Lay the shipped workflows' example photo into the host's temp folder, which the host itself empties at start and exit."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(picture, folder / "kindred_reference.png")


def latent_out(model: ModelPatcher, samples: Tensor) -> Tensor:
    """Latents in model scale -> a LATENT's samples."""
    return model.model.process_latent_out(samples)


def percent_to_sigma(model: ModelPatcher, percent: float) -> float:
    """Share of the model's own schedule (0 = all noise) as a sigma."""
    return float(model.get_model_object("model_sampling").percent_to_sigma(percent))


# ---------------------------------------------------------------------------------------------------------- the run
@torch.compiler.disable
def _attn1_patch(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    run: Run | None = options.get(KEY)
    if isinstance(run, Run):
        run.pending = run.call(options)
        if run.recorder:
            run.recorder.self_tokens(run.pending, n)
    return n, context, value


@torch.compiler.disable
def _attn2_patch(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    run: Run | None = options.get(KEY)
    if isinstance(run, Run):
        run.pending = run.call(options, context.shape[1])
    return n, context, value


def _override(previous: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """optimized_attention_override that asks its predecessor (sage, flash, another pack) with the longer keys."""
    @torch.compiler.disable
    def override(func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
                 **kwargs: Any) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
            if previous is not None:
                return previous(func, q, k, v, heads, mask=mask, **kwargs)
            return func(q, k, v, heads, mask=mask, **kwargs)
        run = (kwargs.get("transformer_options") or {}).get(KEY)
        call = run.pending if isinstance(run, Run) else None
        if call is None or mask is not None or kwargs.get("skip_reshape"):
            return attend(q, k, v, heads, mask)
        if call.cross and run.recorder:
            run.recorder.cross(call, q, k, heads)
        return run.attend(call, attend, q, k, v, heads)
    setattr(override, KEY, (previous,))  # a second install replaces ours instead of stacking it
    return override


class _Beside:
    """A neighbour's replacement f of a block's cross-attention, with ours beside it: f + (ours - plain), which is ours where f is plain.

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
        out = self.f(q, k, v, options)
        if run.recorder:
            run.recorder.cross(call, q, k, heads)

        def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
            return optimized_attention(q, k, v, heads, mask=mask, attn_precision=options["attn_precision"], transformer_options=options)
        return out + (run.attend(call, attend, q, k, v, heads) - attend(q, k, v, heads)) if run.found(call, q) else out


def install(model_options: dict[str, Any], run: Run) -> dict[str, Any]:
    """A copy of the options with the run in it; last in every chain that matters, so the order of nodes does not."""
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer = options.setdefault("transformer_options", {})
    transformer[KEY] = run
    patches = transformer.setdefault("patches", {})
    for name, patch in (("attn1_patch", _attn1_patch), ("attn2_patch", _attn2_patch)):
        patches[name] = [patch, *(p for p in patches.get(name, ()) if p is not patch)]  # first: it sees norm(x) as it is
    replaced = transformer.get("patches_replace", {}).get("attn2", {})
    replaced.update({block: f if isinstance(f, _Beside) else _Beside(f) for block, f in replaced.items()})
    previous = transformer.get("optimized_attention_override")
    transformer["optimized_attention_override"] = _override(getattr(previous, KEY, (previous,))[0])
    return options


def _outer_sample(executor: Any, noise: Tensor, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    guider = executor.class_obj
    original = guider.model_options
    injections = original["transformer_options"].get(KEY, ())
    if "multigpu_clones" in original:
        raise ValueError("Kindred: MultiGPU Work Units split the rows that share a subject over several devices. Remove that node.")
    for injection in injections:
        injection.check(guider.model_patcher)
    run = SamplerRun(injections=injections)
    guider.model_options = install(original, run)
    try:
        return executor(noise, latent, *args, **kwargs)
    finally:
        run.close()
        guider.model_options = original


def _sampler_sample(executor: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor,
                    *args: Any, **kwargs: Any) -> Tensor:
    extra_args["model_options"]["transformer_options"][KEY].begin(guider, extra_args["model_options"], noise.shape)
    return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def _predict_noise(executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None) -> Tensor:
    sigma = float(timestep.flatten()[0])
    for injection in model_options["transformer_options"][KEY].active:
        injection.begin_step(sigma)
    return executor(x, timestep, model_options, seed)


def inject(model: ModelPatcher, injection: Injection) -> ModelPatcher:
    """A clone of the MODEL with one more injection; the input MODEL is never changed."""
    clone = model.clone()
    transformer = clone.model_options.setdefault("transformer_options", {})
    transformer[KEY] = (*transformer.get(KEY, ()), injection)
    wrappers = ((WrappersMP.OUTER_SAMPLE, _outer_sample), (WrappersMP.SAMPLER_SAMPLE, _sampler_sample),
                (WrappersMP.PREDICT_NOISE, _predict_noise))
    for kind, wrapper in wrappers:
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


# ------------------------------------------------------------------------------------------------------- the Ref-UNet
def read_prompt(conditioning: Conditioning, name: str, node: str, pictures: int) -> ReferencePrompt:
    """The one plain prompt of a reference pass over r pictures; ValueError where several, masked or timed prompts are wired."""
    special = sorted({k for _, extras in conditioning for k in SPECIAL if extras.get(k) is not None})
    if len(conditioning) != 1 or special:
        raise ValueError(f"{node}: {name} must be one plain prompt such as 'a photo of a cat', but {len(conditioning)} prompts were "
                         f"given{' with ' + ', '.join(special) if special else ''}. Wire Subject Prompts straight into it.")
    (cross, extras), = conditioning
    if cross.shape[0] not in (1, pictures):
        raise ValueError(f"{node}: {name} holds {cross.shape[0]} prompts for {pictures} reference picture{'s' * (pictures > 1)}. "
                         "Write one line in Subject Prompts, or one line per picture.")
    plain = {k: v for k, v in extras.items() if isinstance(v, (Tensor, int, float, str)) and not isinstance(v, bool)}
    return ReferencePrompt(str(extras.get(TEXT, "")), cross, plain, extras.get(SUBJECT))


def _conditioning(prompt: ReferencePrompt) -> Conditioning:
    return [(prompt.cross, dict(prompt.extras))]


def _bare(model_options: dict[str, Any], run: Run) -> dict[str, Any]:
    """Options of a reference pass: LoRA and patches of the weights stay; wrappers that skip or split calls are not for it."""
    kept = {k: v for k, v in model_options.get("transformer_options", {}).items() if k not in ("wrappers", "callbacks", KEY)}
    return install({"transformer_options": kept}, run)


class _ReferenceGuider(comfy.samplers.CFGGuider):
    """Evaluates cond (and uncond, where its features are wanted) in one call and returns cond: guidance 1."""
    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None) -> Tensor:
        conds = [self.conds["positive"], self.conds.get("negative")]
        return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options or {})[0]


Loop = Callable[[Callable[[Tensor, Tensor], Tensor], torch.device, Callable[[int, Tensor, Tensor], None]], Any]


class _ReferenceSampler(comfy.samplers.Sampler):
    """Hands a loop of models/inversion.py the host's model as denoise(x, sigma), and keeps what the loop returns."""
    def __init__(self, loop: Loop, run: SamplerRun, total: int) -> None:
        self.loop, self.run, self.total, self.result, self.checked = loop, run, total, None, False

    def sample(self, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor,
               *args: Any, **kwargs: Any) -> Tensor:
        self.run.begin(guider, extra_args["model_options"], noise.shape)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            denoised = guider(x, sigma.to(x).expand(x.shape[0]), model_options=extra_args["model_options"], seed=None)
            if not self.checked and not torch.isfinite(denoised).all():
                raise ValueError(f"Kindred: at sigma {float(sigma.flatten()[0]):.4g} the model gave NaN or infinite values for the photo. "
                                 "Start ComfyUI with --fp32-unet or --force-upcast-attention, or use another VAE.")
            self.checked = True
            return denoised

        def progress(step: int, denoised: Tensor, x: Tensor) -> None:
            callback(min(step, self.total - 1), denoised, x, self.total)
        self.result = self.loop(denoise, noise.device, progress)
        return noise


def reference_pass(model: ModelPatcher, shape: Sequence[int], sigmas: Tensor, positive: ReferencePrompt, negative: ReferencePrompt | None,
                   loop: Loop, recorder: Recorder | None = None, total: int | None = None) -> Any:
    """Run `loop` inside the host's sampling (loading, casts, progress, interrupts) at guidance 1; returns the loop's result.

    shape: [r c y x] of the reference latents; sigmas: descending [t+1], for nodes that look at the schedule; total: UNet
    calls for the progress bar, where they are not one per step.
    """
    bare = model.clone()
    bare.wrappers = {}
    run = SamplerRun(recorder=recorder)
    guider = _ReferenceGuider(bare)
    guider.model_options = _bare(bare.model_options, run)
    guider.inner_set_conds({"positive": _conditioning(positive)} | ({"negative": _conditioning(negative)} if negative else {}))
    total = total or len(sigmas) - 1
    sampler = _ReferenceSampler(loop, run, total)
    empty = torch.zeros(list(shape))
    try:
        guider.sample(empty, empty, sampler, sigmas, callback=latent_preview.prepare_callback(bare, total), seed=0)
    finally:
        run.close()
    return sampler.result


def reference_tokens(run: SamplerRun, bank: ReferenceBank, sigma: float,
                     halves: frozenset[Half]) -> Mapping[Half, Mapping[BlockId, Tensor]]:
    """The kept tokens [l c] of every block of the bank at this sigma: from the bank where it holds it (cached), else live.

    Live is a Ref-UNet call on the interpolated trajectory at that very sigma. Remembered for the step, so that chained nodes
    and repeated evaluations at one sigma share it.
    """
    key = (id(bank), sigma, halves)
    if key not in run.step_tokens:
        step = bank.step_of(sigma)
        way = f"live, since it holds no sigma {sigma:.4g} (it was made with {bank.trajectory.schedule})" if step is None else "cached"
        if way.split(",")[0] not in run.ways:
            run.ways.add(way.split(",")[0])
            log.info("Kindred: the reference is read %s.", way)
        run.step_tokens = {key: _live_tokens(run, bank, sigma, halves) if step is None else
                           {half: bank.tokens(half, step, *run.device_and_dtype) for half in halves}} | {
                           k: v for k, v in run.step_tokens.items() if k[1] == sigma}
    return run.step_tokens[key]


def _live_tokens(run: SamplerRun, bank: ReferenceBank, sigma: float, halves: frozenset[Half]) -> dict[Half, dict[BlockId, Tensor]]:
    model, device = run.guider.inner_model, run.guider.model_patcher.load_device
    x = bank.latent_at(sigma).to(device)
    wanted = {"positive": Half.COND, "negative": Half.UNCOND}
    conds = {kind: comfy.sampler_helpers.convert_cond(_conditioning(bank.prompts[half])) for kind, half in wanted.items() if half in halves}
    conds = comfy.samplers.process_conds(model, x, conds, device, latent_image=x, denoise_mask=None, seed=0)
    recorder = Recorder(bank.blocks)
    inner = Run(recorder=recorder, latent=tuple(x.shape[2:]))
    inner.read_conds(conds)
    comfy.samplers.calc_cond_batch(model, [conds.get("positive"), conds.get("negative")], x, x.new_full((x.shape[0],), sigma),
                                   _bare(run.model_options, inner))
    inner.close()
    return {half: bank.keep(recorder.of(half)) for half in halves}


# ------------------------------------------------------------------------------------------------------ concept encoders
CONCEPTS = "concept_encoders"  # their folder beside checkpoints and loras


def register_folders(shipped: Path) -> None:
    """models/concept_encoders, and the pack's own for the miniature's. Pickles are listed too, so that the node can say why not."""
    paths, endings = folder_paths.folder_names_and_paths.setdefault(CONCEPTS, ([], set()))
    endings.update((".safetensors", ".sft", ".bin", ".pt", ".ckpt"))
    for folder in (Path(folder_paths.models_dir) / CONCEPTS, shipped):
        folder_paths.add_model_folder_path(CONCEPTS, str(folder))


def concept_files() -> list[str]:
    return folder_paths.get_filename_list(CONCEPTS)


def concept_path(name: str) -> Path:
    """The file behind a name of the list; FileNotFoundError in the host's words where it is gone."""
    return Path(folder_paths.get_full_path_or_raise(CONCEPTS, name))


def concept_folder() -> Path:  # where a new one is saved
    return Path(folder_paths.get_folder_paths(CONCEPTS)[0])


def cross_layers(model: ModelPatcher, node: str) -> tuple[str, tuple[tuple[BlockId, int], ...], int]:
    """The model's family, its cross-attention layers with their channels, and the width of the text they read."""
    base = require_unet(model, node)
    sites = attention_sites(base.diffusion_model)
    width = next(iter(sites.values())).module.attn2.to_k.in_features
    return type(base.model_config).__name__, tuple((b, s.module.attn2.to_k.out_features) for b, s in sites.items()), width


@dataclass(frozen=True, eq=False)
class ManagedEncoder:
    """A concept encoder under the host's memory management; `vision` (CLIP_VISION) gives the tokens where it holds no tower."""
    encoder: ConceptEncoder
    patcher: ModelPatcher
    name: str
    vision: Any = None

    @staticmethod
    def of(encoder: ConceptEncoder, name: str, vision: Any = None) -> ManagedEncoder:
        device = comfy.model_management.get_torch_device()
        half = comfy.model_management.should_use_fp16(device)
        encoder = encoder.to(torch.float16 if half else torch.float32).eval().requires_grad_(False)
        return ManagedEncoder(encoder, comfy.model_patcher.ModelPatcher(encoder, device, comfy.model_management.unet_offload_device()),
                              name, vision)

    @staticmethod
    def tower_of(vision: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A CLIP_VISION's configuration and weights in transformers' names, to train from; ValueError for towers of other kinds."""
        if vision.model_type != "clip_vision_model":
            raise ValueError(f"Kindred: a concept encoder is made from a CLIP vision model, but the one given is {vision.model_type}. "
                             "Take CLIP ViT-L or ViT-H.")
        config = {k: v for k, v in vision.config.items() if isinstance(v, (int, float, str)) and k not in ("model_type", "torch_dtype")}
        return config, {k: v.detach().float().cpu().clone() for k, v in vision.get_sd().items()}

    def see(self, image: Tensor | None) -> Tensor:
        """The wired CLIP Vision's penultimate tokens [1 m d] of a picture [Y X c]; None: of zero pixels, which no picture has."""
        if image is not None:
            return self.vision.encode_image(image[None])["penultimate_hidden_states"]
        comfy.model_management.load_models_gpu([self.vision.patcher])
        size, device = self.vision.image_size, self.vision.load_device
        return self.vision.model(pixel_values=torch.zeros(1, 3, size, size, device=device), intermediate_output=-2)[1]

    def encode(self, images: Tensor, empty: bool = False) -> KeysValues:
        """Images [b Y X c] in 0..1 -> (k, v) [b m c] of every layer, in host memory; empty: of zero pixels instead, b = 1."""
        if self.vision is None:
            given = [self.encoder.config.preprocessing(image[None].cpu()) * (not empty) for image in images[:1 if empty else None]]
        else:
            given = [self.see(None)] if empty else [self.see(image) for image in images]
            if given[0].shape[-1] != (wanted := self.encoder.config.tower_width):
                raise ValueError(f"{self.name}: the CLIP Vision given has tokens of width {given[0].shape[-1]}, but this concept encoder "
                                 f"reads width {wanted}: {'ViT-H' if wanted == 1280 else 'ViT-L' if wanted == 1024 else 'another one'}. "
                                 "Connect that CLIP Vision to Concept Encoder Load.")
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)  # plain layers cannot be loaded in part
        given = [x.to(next(self.encoder.parameters())) for x in given]  # --novram leaves them on the CPU
        made = [self.encoder(x) if self.vision is None else self.encoder.keys_values(self.encoder.features(x)) for x in given]
        return {block: tuple(torch.cat([m[block][i] for m in made]).cpu() for i in (0, 1)) for block in made[0]}


# ---------------------------------------------------------------------------------------------------------- training
MOST_PROMPTS = 4096  # kept encoded
SIDES = {"SDXL": 1024, "SD20": 768, "KindredMiniature": 128}  # pixels of a side a family was trained at; else 512
Interrupted = comfy.model_management.InterruptProcessingException  # a BaseException: the user pressed cancel


@contextmanager
def training(model: ModelPatcher, dtype: torch.dtype, node: str) -> Iterator[ModelPatcher]:
    """Inside: gradients flow, the host knows, and here is the MODEL again, its weights read anew and its LoRAs on them.

    Weights loaded under inference_mode take no part in a backward pass. The copy and all random draws end with the block.
    """
    if model.cached_patcher_init is None or model.injections:
        why = "carries a LoRA in bypass mode" if model.injections else "was made by a node that cannot read its weights again"
        raise ValueError(f"{node}: the model given {why}, so it cannot be trained through. Wire Load Checkpoint or Load Diffusion Model, "
                         "with Load LoRA if you like, into it.")
    before = comfy.model_management.in_training
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        copy = model.clone(disable_dynamic=True, force_deepcopy=True)
        copy.parent, copy.clone_base_uuid = None, uuid4()  # nobody's clone: what is done to it is done to it alone
        if copy.model.get_dtype_inference() != dtype:
            copy.set_model_compute_dtype(dtype)
        try:
            comfy.model_management.in_training = True
            yield copy
        finally:
            comfy.model_management.in_training = before
            comfy.model_management.unload_model_and_clones(copy)


def progress(total: int) -> Callable[[int, Any], None]:
    """A bar to be told (steps done, PIL picture or None); raises Interrupted when the user wants it to end."""
    bar = comfy.utils.ProgressBar(total)

    def tell(done: int, picture: Any = None) -> None:
        bar.update_absolute(done, total, picture and ("JPEG", picture, max(picture.size)))
        comfy.model_management.throw_exception_if_processing_interrupted()
    return tell


class FrozenUNet:
    """The Denoiser of models/training.py: the host's model, loaded, with nothing to learn but what it is given to read.

    prompts: CONDITIONING by text. Use outside of inference_mode, with weights that were loaded outside of it.
    """

    def __init__(self, model: ModelPatcher, merge: Merge, prompts: Mapping[str, Conditioning], checkpointing: bool = False) -> None:
        self.patcher = model
        self.load()
        self.model, self.merge, self.device = model.model.requires_grad_(False), merge, model.load_device
        sampling = model.get_model_object("model_sampling")
        self.sigmas, self.velocity = sampling.sigmas.float().cpu(), isinstance(sampling, comfy.model_sampling.V_PREDICTION)
        self.sites = attention_sites(self.model.diffusion_model)
        self.options = comfy.model_patcher.create_model_options_clone(model.model_options)
        kernel = _products if self.device.type == "cpu" else lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)
        self.options.setdefault("transformer_options", {}).setdefault("optimized_attention_override", kernel)  # sage cannot go back
        self.prompts, self.encoded = prompts, {}
        unet = self.model.diffusion_model
        for block in (*unet.input_blocks, unet.middle_block, *unet.output_blocks) if checkpointing else ():
            for layer in block:
                layer.forward = checkpointed(layer.forward)

    def load(self) -> None:
        """Onto the device, whole; again after anything else was there."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)

    def _encode(self, text: str, x: Tensor) -> dict[str, Tensor]:
        """What the model reads of one prompt at the size of x: c_crossattn [1 w c], y [1 c] for SDXL."""
        if text not in self.encoded:
            kept = [(cross.clone(), {k: v.clone() if isinstance(v, Tensor) else v for k, v in extras.items()})
                    for cross, extras in self.prompts[text]]
            cond, = comfy.samplers.encode_model_conds(self.model.extra_conds, comfy.sampler_helpers.convert_cond(kept), x[:1],
                                                      self.device, "positive")
            found = {k: getattr(c, "cond", None) for k, c in cond["model_conds"].items()}
            if len(self.encoded) >= MOST_PROMPTS:
                del self.encoded[next(iter(self.encoded))]
            self.encoded[text] = {k: c.detach().to(self.device) for k, c in found.items() if isinstance(c, Tensor)}
        return self.encoded[text]

    def __call__(self, x: Tensor, sigma: Tensor, prompts: Sequence[str], keys_values: KeysValues, weight: float) -> Tensor:
        rows = [self._encode(text, x) for text in prompts]
        longest = math.lcm(*(row["c_crossattn"].shape[1] for row in rows))
        repeats = tuple(longest // row["c_crossattn"].shape[1] for row in rows)
        given = {k: torch.cat([row[k].repeat(1, n, 1) if k == "c_crossattn" else row[k] for row, n in zip(rows, repeats)]) for k in rows[0]}
        run, part = Run(sites=self.sites, latent=tuple(x.shape[2:]), active=[Learning(keys_values, weight, self.merge)]), uuid4()
        run.parts[part] = Part(Role.COND, None, longest, repeats)
        options = install(self.options, run)["transformer_options"] | {"uuids": [part], "cond_or_uncond": [0], "sigmas": sigma}
        return self.model.apply_model(x, sigma, transformer_options=options, **given)


def _products(func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
              **kwargs: Any) -> Tensor:  # on a CPU 1.8 times faster in the backward pass than the fused kernel
    return func(q, k, v, heads, mask=mask, **kwargs) if kwargs.get("skip_reshape") else product_attend(q, k, v, heads, mask)
