"""Reference passes: the Ref-UNet inside the host's own sampling, captured, replayed or live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...models.copies import sent
from ...models.network.blocks import BlockId
from ...models.network.call import Half
from ...models.network.watch import Watcher
from ...models.noise.inversion import Loop
from ...models.probe.prober import Prober
from ...models.reference.bank import ReferenceBank, ReferencePrompt
from ...models.reference.recorder import Recorder
from ...models.run import Run
from .calls import named_parts
from .hearing import patched_attentions
from .install import install
from .latents import framed, unframed
from .model import (
    KEY,
    SAMPLER,
    SPECIAL,
    SUBJECT,
    TEXT,
    Conditioning,
    draws_by_unet,
    ejected,
    log,
    network,
    wrapped_injections,
)
from .networks import recognise
from .page import note
from .run import SamplerRun


def read_prompt(
    model: ModelPatcher, conditioning: Conditioning, name: str, node: str, pictures: int
) -> ReferencePrompt:
    """The one plain prompt of a reference pass over r pictures; ValueError where several, masked or
    timed prompts are wired.
    """
    special = sorted(
        {k for _, extras in conditioning for k in SPECIAL if extras.get(k) is not None}
    )
    if len(conditioning) != 1 or special:
        raise ValueError(
            f"{node}: {name} must be one plain prompt such as 'a photo of a cat', but "
            f"{len(conditioning)} prompts were "
            f"given{' with ' + ', '.join(special) if special else ''}. Wire Subject Prompts "
            f"straight into it."
        )
    ((cross, extras),) = conditioning
    if cross.shape[0] not in (1, pictures):
        raise ValueError(
            f"{node}: {name} holds {cross.shape[0]} prompts for {pictures} reference "
            f"picture{'s' * (pictures > 1)}. "
            "Write one line in Subject Prompts, or one line per picture."
        )
    return ReferencePrompt(
        str(extras.get(TEXT, "")), cross, _plain(model, extras), extras.get(SUBJECT)
    )


def first_rows(model: ModelPatcher, conditioning: Conditioning, rows: int) -> ReferencePrompt:
    """What the first pictures of a batch were asked for; of several prompts the first, without what
    is not a prompt.
    """
    cross, extras = conditioning[0]
    plain = {k: v[:rows] if isinstance(v, Tensor) else v for k, v in _plain(model, extras).items()}
    return ReferencePrompt(
        "\n".join(str(extras.get(TEXT, "")).splitlines()[:rows]),
        cross[:rows],
        plain,
        extras.get(SUBJECT),
    )


def _plain(model: ModelPatcher, extras: Mapping[str, Any]) -> dict[str, Tensor | int | float | str]:
    """What a prompt says beside its words, as far as a file can hold it and this model reads it.

    Without a text projection in the checkpoint (SD1.5) the host's pooled text is whatever lay in
    memory; such a model reads none.
    """
    unread = (
        ("pooled_output",) if getattr(network(model), "num_classes", "not a UNet") is None else ()
    )
    return {
        k: v
        for k, v in extras.items()
        if k not in unread and isinstance(v, (Tensor, int, float, str)) and not isinstance(v, bool)
    }


def _conditioning(prompt: ReferencePrompt) -> Conditioning:
    return [(prompt.cross, dict(prompt.extras))]


def _bare(model_options: dict[str, Any], run: Run | None, watched: bool = False) -> dict[str, Any]:
    """Options of a reference pass: LoRA and patches of the weights stay; wrappers that skip or
    split calls are not for it.

    Nor are the modules that other packs' wrappers set up (`wrapped_injections`). run: None for a
    pass of which nothing is read.
    """
    kept = {
        k: v
        for k, v in model_options.get("transformer_options", {}).items()
        if k not in ("wrappers", "callbacks", KEY, SAMPLER)
    }
    options = {"transformer_options": kept}
    return options if run is None else install(options, run, watched)


class _ReferenceGuider(comfy.samplers.CFGGuider):
    """Evaluates cond (and uncond, where its features are wanted) in one call and returns cond:
    guidance 1.
    """

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        conds = [self.conds["positive"], self.conds.get("negative")]
        return comfy.samplers.calc_cond_batch(
            self.inner_model, conds, x, timestep, model_options or {}
        )[0]


class _ReferenceSampler(comfy.samplers.Sampler):
    """Hands a loop of models/noise/inversion.py the host's model as denoise(x, sigma), and keeps
    what the loop returns.

    recorder: what it saw last stands for the answer of a pass that ends before there is one.
    """

    def __init__(
        self, loop: Loop, run: SamplerRun | None, total: int, recorder: Recorder | None = None
    ) -> None:
        self.loop, self.run, self.total, self.recorder, self.result, self.checked = (
            loop,
            run,
            total,
            recorder,
            None,
            False,
        )

    def sample(
        self,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self.run is not None:
            self.run.begin(guider, extra_args["model_options"], unframed(noise).shape, sigmas)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            denoised = unframed(
                guider(
                    framed(guider.model_patcher, x),
                    sent(sigma, x.device, x.dtype).expand(x.shape[0]),
                    model_options=extra_args["model_options"],
                    seed=None,
                )
            )
            if not self.checked:
                self._require_finite(denoised, sigma)
            return denoised

        def progress(step: int, denoised: Tensor, x: Tensor) -> None:
            callback(min(step, self.total - 1), denoised, x, self.total)

        self.result = self.loop(denoise, noise.device, progress)
        return noise

    def _require_finite(self, denoised: Tensor, sigma: Tensor) -> None:
        """Once: of a pass that ends early, what was seen last."""
        seen = denoised
        if self.run and self.run.calls.ends_early:
            seen = next(reversed(self.recorder.tokens.values()), denoised)
        if not torch.isfinite(seen).all():
            raise ValueError(
                f"Kindred: at noise level {float(sigma.flatten()[0]):.4g} the model gave NaN or "
                f"infinite values for the photo. "
                "Start ComfyUI with --fp32-unet or --force-upcast-attention, or use another "
                "VAE."
            )
        self.checked = True


@dataclass(frozen=True)
class _Probing:
    """A prober as what a run begins with: it lends and changes by itself."""

    prober: Prober

    def start_run(self, run: SamplerRun) -> Prober:
        return self.prober


def reference_pass(
    model: ModelPatcher,
    shape: Sequence[int],
    sigmas: Tensor,
    positive: ReferencePrompt,
    negative: ReferencePrompt | None,
    loop: Loop,
    recorder: Recorder | None = None,
    total: int | None = None,
    ends_early: bool = False,
    prober: Prober | None = None,
) -> Any:
    """Run `loop` inside the host's sampling (loading, casts, progress, interrupts) at guidance 1;
    returns the loop's result.

    shape: [r c y x] of the reference latents; sigmas: descending [t+1], for nodes that look at the
    schedule; total: UNet calls for the progress bar, where they are not one per step; ends_early:
    the loop wants no answers, only what `recorder` sees; prober: what changes its passes.
    """
    bare, run = _stripped(model), None
    watchers: list[Watcher] = [w for w in (recorder, prober) if w is not None]
    if watchers or draws_by_unet(model):  # of any other network nothing is asked but its answer
        probing = () if prober is None else (_Probing(prober),)
        run = SamplerRun(Run(watchers, ends_early, backbone=recognise(model)), probing)
    calls = run and run.calls
    guider = _guider(bare, calls, positive, negative)
    total = total or len(sigmas) - 1
    sampler = _ReferenceSampler(loop, run, total, recorder)
    empty = framed(bare, torch.zeros(list(shape)))
    shown = latent_preview.prepare_callback(bare, total)
    try:
        with patched_attentions(bare, calls and calls.backbone):
            guider.sample(empty, empty, sampler, sigmas, callback=shown, seed=0)
    finally:
        if run is not None:
            run.close()
    return sampler.result


def _stripped(model: ModelPatcher) -> ModelPatcher:
    """A clone without what other packs wrap around the model, and what goes with it."""
    bare = model.clone()
    for key in wrapped_injections(model):
        bare.remove_injections(key)
        bare.remove_additional_models(key)
    bare.wrappers = {}
    bare.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)
    # the clone's flag tells of the model that is loaded, which the host ejects first
    bare.is_injected = False
    return bare


def _guider(
    bare: ModelPatcher,
    calls: Run | None,
    positive: ReferencePrompt,
    negative: ReferencePrompt | None,
) -> _ReferenceGuider:
    guider = _ReferenceGuider(bare)
    guider.model_options = _bare(bare.model_options, calls)
    conds = {"positive": _conditioning(positive)}
    guider.inner_set_conds(conds | ({"negative": _conditioning(negative)} if negative else {}))
    return guider


def reference_tokens(
    run: SamplerRun, bank: ReferenceBank, sigma: float, halves: frozenset[Half]
) -> Mapping[Half, Mapping[BlockId, Tensor]]:
    """The kept tokens [l c] of every block of the bank at this sigma: from the bank where it holds
    it (cached), else live.

    Live is a Ref-UNet call on the interpolated trajectory at that very sigma. Remembered for the
    step, so that chained nodes and repeated evaluations at one sigma share it.
    """
    key = (id(bank), sigma, halves)
    if key not in run.step_tokens:
        step = bank.step_of(sigma)
        why = (
            "as a transformer's is: one row more in each step"
            if bank.live
            else f"since it holds no sigma {sigma:.4g} (it was made with "
            f"{bank.trajectory.schedule})"
        )
        way = f"live, {why}" if step is None else "cached"
        if way.split(",")[0] not in run.calls.ways:
            run.calls.ways.add(way.split(",")[0])
            (log.info if step is not None else note)(f"Kindred: the reference is read {way}.")
        run.step_tokens = {
            key: _live_tokens(run, bank, sigma, halves)
            if step is None
            else {
                half: bank.tokens(half, step, *run.device_and_dtype, reader=run.rows)
                for half in halves
            }
        } | {k: v for k, v in run.step_tokens.items() if k[1] == sigma}
    return run.step_tokens[key]


def _live_tokens(
    run: SamplerRun, bank: ReferenceBank, sigma: float, halves: frozenset[Half]
) -> dict[Half, dict[BlockId, Tensor]]:
    if lacking := {*bank.grids.values()} - bank.masks.keys():
        raise ValueError(
            f"Kindred: this sampler asks for noise level {sigma:.4g}, which the reference does not "
            f"hold (it was made with {bank.trajectory.schedule}), and reading it there needs masks "
            f"of {len(lacking)} more grids than its {len(bank.masks)}. Take the sampler, scheduler "
            "and steps of the reference, or make it again with a mask wired."
        )
    kept = run.kept_of(bank)
    if bank.live:  # it runs as deep as the last block that is read
        recorder = Recorder(run.blocks_read(bank), kept=kept)
        watch_reference(run, bank, sigma, halves, recorder)
        return {half: recorder.of(half) for half in halves}
    recorder = Recorder(bank.blocks)
    watch_reference(run, bank, sigma, halves, recorder)
    return {half: bank.keep(recorder.of(half), kept) for half in halves}


def watch_reference(
    run: SamplerRun, bank: ReferenceBank, sigma: float, halves: frozenset[Half], recorder: Recorder
) -> None:
    """One Ref-UNet call on the trajectory at this very sigma, seen by `recorder`."""
    model, device = run.guider.inner_model, run.guider.model_patcher.load_device
    x = framed(run.guider.model_patcher, sent(bank.latent_at(sigma), device))
    wanted = {"positive": Half.COND, "negative": Half.UNCOND}
    conds = {
        kind: comfy.sampler_helpers.convert_cond(_conditioning(bank.prompts[half]))
        for kind, half in wanted.items()
        if half in halves
    }
    conds = comfy.samplers.process_conds(
        model, x, conds, device, latent_image=x, denoise_mask=None, seed=0
    )
    inner = Run(
        watchers=[recorder],
        ends_early=True,
        latent=tuple(x.shape[-2:]),
        sites=run.calls.sites,
        compiled=run.calls.compiled,
        backbone=run.backbone,
    )
    inner.expect(named_parts(conds))
    try:
        patcher = run.guider.model_patcher
        with (
            ejected(patcher, wrapped_injections(patcher)),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):  # others' patches may draw numbers, as token merging does
            comfy.samplers.calc_cond_batch(
                model,
                [conds.get("positive"), conds.get("negative")],
                x,
                x.new_full((x.shape[0],), sigma),
                _bare(run.model_options, inner, watched=True),
            )
    finally:
        inner.close()
