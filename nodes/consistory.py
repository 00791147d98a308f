"""ConsiStory Shared Attention and ConsiStory Anchor Sampler: paper B (arXiv 2402.03286)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..models.attention.attend import STORY_ODDS, dial
from ..models.injection import Asker, BlockSite, Role, grid_of, map_blocks, map_divisor
from ..models.reference.bank import (
    BlockId,
    Half,
    Halves,
    ReferenceBank,
    block_name,
    select_blocks,
    split_row,
)
from ..models.reference.recorder import Recorder
from ..models.story.anchors import NODE as SAMPLER
from ..models.story.anchors import AnchorRecorder, passes_over
from ..models.story.plan import Schedule, StorySettings, dropped
from ..models.story.story import NODE as STORY
from ..models.story.story import AnchorSource, Layout, Story
from ..models.subject.correspondence import smooth
from ..models.subject.masks import resize_user_mask
from . import host

FAST, OFFICIAL = "fast", "official"
log = logging.getLogger(__name__)


@dataclass
class GeneratedAnchors:
    """Anchors of an earlier run, an AnchorSource: exactly the tokens that pictures beside them read then."""

    bank: ReferenceBank
    run: host.SamplerRun
    halves: tuple[Half, ...]
    aligned: ClassVar[bool] = False

    def row(self, sigma: float) -> int:
        row = self.bank.step_of(sigma)
        if row is None:
            known = self.bank.trajectory
            raise ValueError(
                f"{STORY}: this sampler asks for sigma {sigma:.4g} ({len(self.run.sigmas)} steps), which the anchors do not "
                f"have: they were made with {known.schedule} ({len(known.sigmas) - 1} noise levels). Take the sampler, "
                "scheduler and steps of the anchors, or make anchors with these."
            )
        return row

    def tokens(
        self, sigma: float, step: int, first: bool
    ) -> Mapping[Half, Mapping[BlockId, Tensor]]:
        row = self.row(sigma)
        return {
            half: self.bank.tokens(half, row, *self.run.device_and_dtype, first, self.run.rows)
            for half in self.halves
        }

    def loudness(self, block: BlockId) -> float:
        return 1.0

    def outputs(self, sigma: float) -> Mapping[BlockId, Tensor]:
        a = self.bank.anchors
        device, dtype = self.run.device_and_dtype
        stored = a.outputs[self.row(sigma)].to(device, dtype)
        return split_row(
            stored, a.output_layers, {layer.grid: len(a.subject) for layer in a.output_layers}
        )

    def features(self) -> tuple[Tensor, Tensor]:
        return self.bank.anchors.features, self.bank.anchors.subject


@dataclass
class PhotoAnchors:
    """Inverted photos as anchors, an AnchorSource (appendix E): they see nobody; what the bank does not hold is read live."""

    bank: ReferenceBank
    run: host.SamplerRun
    halves: tuple[Half, ...]
    settings: StorySettings
    layout: Layout
    schedule: Schedule
    aligned: ClassVar[bool] = True
    _live: tuple[float, Recorder] | None = None

    def tokens(
        self, sigma: float, step: int, first: bool
    ) -> Mapping[Half, Mapping[BlockId, Tensor]]:
        """Dropout is drawn as for anchors of the batch."""
        found, kept = host.reference_tokens(self.run, self.bank, sigma, frozenset(self.halves)), {}
        for layer in self.bank.layers:
            if layer.grid not in kept:
                drop = torch.cat(
                    [
                        dropped(self.settings.seed, i, step, layer.grid, self.settings.dropout)
                        for i in range(self.bank.pictures)
                    ]
                )
                index = (~drop[self.bank.kept[layer.grid]]).nonzero().squeeze(1)
                kept[layer.grid] = index.to(self.run.device_and_dtype[0])
        grids = {layer.block: layer.grid for layer in self.bank.layers}
        return {
            half: {b: t.index_select(0, kept[grids[b]]) for b, t in found[half].items()}
            for half in self.halves
        }

    def loudness(self, block: BlockId) -> float:
        return self.bank.loudness[self.bank.grids[block]]

    def watched(self, sigma: float) -> Recorder:
        if self._live is None or self._live[0] != sigma:
            recorder = Recorder((), outputs=self.layout.output_blocks, features_at=self.layout.tap)
            host.watch_reference(self.run, self.bank, sigma, frozenset({Half.COND}), recorder)
            self._live = sigma, recorder
        return self._live[1]

    def outputs(self, sigma: float) -> Mapping[BlockId, Tensor]:
        subject = self.subject().to(self.run.device_and_dtype[0])
        return {
            b: x.flatten(0, 1).index_select(0, subject)
            for b, x in self.watched(sigma).outputs.items()
        }

    def features(self) -> tuple[Tensor, Tensor]:
        return smooth(self.watched(self.schedule.features_at).features.float()).flatten(2).movedim(
            1, 2
        ), self.subject()

    def subject(self) -> Tensor:
        whole = tuple(self.bank.trajectory.latents.shape[-2:])
        grid = grid_of(whole, self.layout.divisor)
        masks = (
            self.bank.masks[grid]
            if grid in self.bank.masks
            else resize_user_mask(self.bank.masks[whole].float(), grid)
        )
        return masks.flatten().nonzero().squeeze(1)


@dataclass(frozen=True, eq=False)
class StoryInjection:
    """Configuration of one ConsiStory Shared Attention node."""

    settings: StorySettings  # without its windows, which are of the schedule that will be sampled
    layout: Layout
    moments: tuple[
        float, float, float
    ]  # shares of that schedule: blending's end, injection's start and end
    bank: ReferenceBank | None = None
    masks: Tensor | None = None  # [1|b Y X]
    recorder: AnchorRecorder | None = None
    watches: ClassVar[bool] = True

    def check(self, model: Any) -> None:
        """Called when a sampler starts: a LoRA may have been added behind this node."""
        if self.bank:
            host.require_same_model(STORY, "reference", self.bank.model_key, host.model_key(model))

    def held(self, model: Any, shape: Sequence[int]) -> int:
        """Bytes on the device at most: queries of the plain pass, and the longest keys and values of a layer that shares."""
        s, width, sizes = (
            self.settings,
            host.computes_in(model).itemsize,
            host.token_sizes(model, shape[2:]),
        )
        shared = [sizes[block] for block in s.blocks]
        rows = shape[0] * (1 if s.halves is Halves.COND else 2)
        others = self.bank.pictures if self.bank else min(s.anchors or shape[0], shape[0])
        queries = 2 * shape[0] * sum(n * c for n, c in shared) if s.blend[0] else 0
        return (queries + rows * max(2 * (1 + others) * n * c for n, c in shared)) * width

    def start_run(self, run: host.SamplerRun) -> Story | None:
        if (
            run.steps < 1 or not run.sigmas
        ):  # the model is not asked at all: SplitSigmas at the first or the last step
            return None
        until, *inject = run.at(*self.moments)
        s, k = (
            replace(self.settings, blend_until=until, inject=tuple(inject)),
            self.settings.anchors,
        )
        if run.pictures == 1 and self.bank is None and self.recorder is None:
            log.info(
                "%s: one picture has nobody to share with, so it stays plain. Raise the batch size, or wire a reference.",
                STORY,
            )
            return None
        if self.masks is None and not any(
            p.role is Role.COND and p.subject for p in run.parts.values()
        ):
            raise ValueError(
                f"{STORY}: the positive prompt marks no subject word, and no masks are wired. Encode the prompts with "
                "Subject Prompts and write the subject there, or wire masks of the subject."
            )
        if self.recorder and self.masks is None and run.steps == 1:
            raise ValueError(
                f"{SAMPLER}: one step is sampled, but where the subject is, is known from the step before alone, so there is "
                "nothing to keep of it. Sample 2 steps or more, or wire masks into ConsiStory Shared Attention."
            )
        if self.masks is not None and self.masks.shape[0] not in (1, run.pictures):
            raise ValueError(
                f"{STORY}: {self.masks.shape[0]} masks for {run.pictures} pictures. Wire one mask, or one per picture."
            )
        if k > run.pictures and self.bank is None:
            log.warning(
                "%s: %d anchors were asked for, but the batch has %d pictures: each of them is an anchor.",
                STORY,
                k,
                run.pictures,
            )
        schedule = Schedule(run.sigmas, run.timesteps(), s)
        falls = sorted(set(run.sigmas), reverse=True) == list(
            dict.fromkeys(run.sigmas)
        )  # else its end says why nothing is shared
        if s.injection and schedule.first_injection is None and falls and len(run.sigmas) > 1:
            why = (
                "ends before the pictures can be compared"
                if any(map(schedule.injects, run.sigmas))
                else "has no step between injection_start_percent and injection_end_percent"
            )
            log.warning("%s: this sampler run %s, so no features are injected.", STORY, why)
        if not any(p.role is Role.COND and p.area is None for p in run.parts.values()):
            log.warning(
                "%s: every positive prompt has an area of its own, so no whole picture can share. Add one prompt without an area.",
                STORY,
            )
        story = Story(
            s,
            schedule,
            self.layout,
            run.pictures,
            run.latent,
            run.device_and_dtype[0],
            self.source(run, schedule),
            None if self.masks is None else self.masks.cpu(),
            self.recorder,
        )
        if self.recorder:
            self.recorder.expect(story.anchor_count, run.sigmas, run.asker)
        plain, calls = (
            run.steps,
            schedule.calls(self.masks is not None or self.bank is not None, run.steps),
        )
        log.info(
            "%s: %d pictures in %d calls of the UNet where the plain run has %d (%.2f times; of samplers that ask once a step); up to "
            "%.1f MB beside it.",
            STORY,
            run.pictures,
            calls,
            plain,
            calls / plain,
            self.held(run.guider.model_patcher, (run.pictures, 0, *run.latent)) / 1e6,
        )
        return story

    def source(self, run: host.SamplerRun, schedule: Schedule) -> AnchorSource | None:
        """Who reads the wired reference; ValueError where its anchors do not have what this run will ask for."""
        if self.bank is None:
            return None
        halves = tuple(h for h in self.bank.features if self.settings.halves.source(h))
        if self.bank.anchors is None:
            return PhotoAnchors(self.bank, run, halves, schedule.settings, self.layout, schedule)
        source, anchors = GeneratedAnchors(self.bank, run, halves), self.bank.anchors
        rows = {sigma: source.row(sigma) for sigma in run.sigmas}
        if schedule.first_injection:
            order = str(anchors.settings.get("order"))[:40]
            if anchors.features is None:
                raise ValueError(
                    f"{STORY}: feature_injection is {self.settings.injection}, but the anchors of the reference were made "
                    "with 0. Set it to 0 here, or make the anchors with feature injection."
                )
            if order != (wanted := OFFICIAL if self.settings.official else FAST):
                raise ValueError(
                    f"{STORY}: order is {wanted!r}, but the reference's anchors were made with {order!r}. Choose the same."
                )
            stored = {layer.block for layer in anchors.output_layers}
            if stored and (
                lacking := [block_name(b) for b in sorted(self.layout.output_blocks - stored)]
            ):
                raise ValueError(
                    f"{STORY}: features are to be injected in {', '.join(lacking)}, of which the reference's anchors hold "
                    f"nothing (they do of {', '.join(map(block_name, sorted(stored)))}). Make the anchors again."
                )
            missing = [
                s
                for s in run.sigmas
                if schedule.injects(s)
                and not len(anchors.outputs[rows[s]])
                and len(anchors.subject)
            ]
            if missing:
                held = [s for s, row in rows.items() if len(anchors.outputs[row])]
                where = f" (they do from {max(held):.4g} to {min(held):.4g})" if held else ""
                raise ValueError(
                    f"{STORY}: features are to be injected at {len(missing)} noise levels, from sigma {missing[0]:.4g} on, "
                    f"where the anchors of the reference hold none{where}. Take the injection's start and end percent that "
                    "the anchors were made with."
                )
        return source


def layout_of(unet: Any, sites: Mapping[BlockId, BlockSite]) -> Layout:
    """Features at twice the maps' resolution, or where there is self-attention beside the middle that is nearest to it."""
    wanted = max(map_divisor(sites) // 2, 1)
    outside = [block for block in host.self_attentions(sites) if block[0] != "middle"]
    divisor = min(
        (sites[b].divisor for b in outside),
        key=lambda d: (d > wanted, abs(d - wanted)),
        default=wanted,
    )
    return Layout(
        {b: site.divisor for b, site in sites.items()},
        frozenset(b for b in outside if sites[b].divisor == divisor),
        host.feature_tap(unet, divisor),
        divisor,
    )


class ConsiStory(io.ComfyNode):
    """Shared self-attention with subject masks and dropout, query blending, feature injection (ConsiStory, section 4)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def percent(name: str, default: float, tip: str) -> io.Float.Input:
            return io.Float.Input(
                name, default=default, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=tip
            )

        return io.Schema(
            node_id="KindredConsiStory",
            display_name=STORY,
            category="Kindred",
            description="Makes the pictures of one batch share their subject, without training: each looks at the subject of the others. "
            "Encode the prompts with Subject Prompts, wire its count into the batch size, then sample with any sampler.",
            search_aliases=[
                "consistory",
                "consistent character",
                "story",
                "shared attention",
                "same subject",
                "consistent subject",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that will generate, with its LoRAs."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="How alike the subjects become: 0 leaves the plain pictures, 1 all that sharing and feature "
                    "injection give. Start with 1.",
                ),
                io.Int.Input(
                    "anchors",
                    default=2,
                    min=0,
                    max=64,
                    tooltip="Only the first so many pictures are read by all; they see one another, never the others, so more "
                    "pictures do not change them. 2 are enough, as the paper finds. 0: all pictures read all.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Of the dropout alone; the sampler has its own. Leave it, and vary the sampler's.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How loudly the others' subject speaks at full strength: 0 shares nothing, 1 as if it were the "
                    "picture's own.",
                ),
                io.Float.Input(
                    "dropout",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the others' subject that is hidden at each step, so that poses stay free: 0 alike, 1 "
                    "shares nothing. Start with 0.5; with ControlNet the paper takes 0.7.",
                ),
                io.Float.Input(
                    "query_blend",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="In the first steps, how much of a plain pass's queries is kept: more keeps the layouts different. "
                    "0 saves that pass.",
                ),
                io.Float.Input(
                    "feature_injection",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the matching part of another picture's subject is mixed in, for fine details. Start "
                    "with 0.8; 0 saves the first stage: 55 instead of 88 UNet calls for 50 steps.",
                ),
                io.Float.Input(
                    "query_blend_end",
                    default=0.818,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="query_blend at the last step of its window.",
                ),
                percent(
                    "blend_end_percent",
                    0.12,
                    "When in the sampling the plain pass's queries stop to be used.",
                ),
                percent(
                    "injection_start_percent", 0.1, "When in the sampling feature injection begins."
                ),
                percent(
                    "injection_end_percent", 0.32, "When in the sampling feature injection ends."
                ),
                io.String.Input(
                    "blocks",
                    default="decoder",
                    advanced=True,
                    tooltip="Self-attention blocks that share: decoder, all, encoder, middle, or a list such as output 3-5.",
                ),
                io.String.Input(
                    "mask_blocks",
                    default="auto",
                    advanced=True,
                    tooltip="Blocks whose cross-attention locates the subject. auto: those at a quarter of the latent's size.",
                ),
                io.Combo.Input(
                    "halves",
                    options=[Halves.BOTH.value, Halves.COND.value],
                    default=Halves.COND.value,
                    advanced=True,
                    tooltip="Which halves of CFG share, each with its own: cond only lets guidance amplify what is shared, both "
                    "does not. With anchors 0 take both.",
                ),
                io.Combo.Input(
                    "order",
                    options=[FAST, OFFICIAL],
                    default=FAST,
                    advanced=True,
                    tooltip="fast: the first stage ends where the features are read. official: it runs to its end and takes the "
                    "masks of the last step.",
                ),
                io.Boolean.Input(
                    "align_keys",
                    default=True,
                    advanced=True,
                    tooltip="With inverted photos: give their keys the statistics of the picture that reads them (AdaIN).",
                ),
                host.Reference.Input(
                    "reference",
                    optional=True,
                    tooltip="Read these anchors instead of the first pictures: from ConsiStory Anchor Sampler, Load "
                    "Reference or, for photos, Ref-UNet Feature Capture.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Where the subject will be in each picture, instead of finding it by its "
                    "word. White is the subject.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="Wire it into any sampler, or into ConsiStory Anchor Sampler.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        strength: float = 1.0,
        anchors: int = 2,
        seed: int = 0,
        weight: float = 1.0,
        dropout: float = 0.5,
        query_blend: float = 0.9,
        feature_injection: float = 0.8,
        query_blend_end: float = 0.818,
        blend_end_percent: float = 0.12,
        injection_start_percent: float = 0.1,
        injection_end_percent: float = 0.32,
        blocks: str = "decoder",
        mask_blocks: str = "auto",
        halves: str = Halves.COND.value,
        order: str = FAST,
        align_keys: bool = True,
        reference: ReferenceBank | None = None,
        masks: Tensor | None = None,
    ) -> io.NodeOutput:
        unet = host.require_unet(model, STORY)
        sites = host.attention_sites(unet)
        if any(isinstance(i, StoryInjection) for i in host.injected(model)):
            raise ValueError(
                f"{STORY}: the model already comes from {STORY}. Use one; several subjects are words of Subject Prompts, "
                "separated by commas."
            )
        wanted = frozenset(select_blocks(blocks, host.self_attentions(sites), STORY))
        for name, value in (
            ("dropout", dropout),
            ("query_blend", query_blend),
            ("query_blend_end", query_blend_end),
            ("feature_injection", feature_injection),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{STORY}: {name} is {value}. Give a number from 0 to 1.")
        if not weight >= 0 or anchors < 0:
            raise ValueError(
                f"{STORY}: weight is {weight} and anchors is {anchors}. Give 0 or more."
            )
        weight, feature_injection = (
            weight * dial(strength, STORY, STORY_ODDS),
            feature_injection * strength,
        )
        if reference is not None:
            wanted = cls.require_readable(model, reference, wanted, blocks, Halves(halves))
        layout = layout_of(unet, sites)
        if not layout.output_blocks:  # attention in the middle alone
            feature_injection = 0.0
        settings = StorySettings(
            wanted,
            map_blocks(mask_blocks, sites, STORY),
            anchors,
            seed,
            weight,
            dropout,
            (query_blend, query_blend_end),
            injection=feature_injection,
            halves=Halves(halves),
            official=order == OFFICIAL,
            align_keys=align_keys,
        )
        moments = (blend_end_percent, injection_start_percent, injection_end_percent)
        drawn = None if masks is None else masks.reshape(-1, *masks.shape[-2:])
        nothing = (not weight or dropout == 1) and not (
            feature_injection and injection_start_percent < injection_end_percent
        )
        if nothing or (drawn is not None and not (drawn > 0.5).any()):
            return io.NodeOutput(model.clone())
        return io.NodeOutput(
            host.inject(model, StoryInjection(settings, layout, moments, reference, drawn))
        )

    @staticmethod
    def require_readable(
        model: Any,
        reference: ReferenceBank,
        wanted: frozenset[BlockId],
        blocks: str,
        halves: Halves,
    ) -> frozenset[BlockId]:
        """The wanted blocks, all held by the reference, in the halves that will read them; ValueError names what is missing."""
        host.require_reference(STORY, reference, model)
        missing = [block_name(b) for b in sorted(wanted) if b not in reference.blocks]
        if missing:
            raise ValueError(
                f"{STORY}: blocks is {blocks!r:.200}, but the reference does not hold {', '.join(missing)}; it holds "
                f"{', '.join(map(block_name, reference.blocks))}. Choose the same blocks where the reference is made."
            )
        if halves is Halves.BOTH and Half.UNCOND not in reference.features:
            remedy = (
                f"Make the anchors with halves {Halves.BOTH.value!r} and a CFG above 1"
                if reference.anchors
                else "Wire the negative into Ref-UNet Feature Capture"
            )
            raise ValueError(
                f"{STORY}: halves is {halves.value!r}, but the reference holds only the cond half. {remedy}, or choose "
                f"{Halves.COND.value!r}."
            )
        return wanted


class AnchorSampler(io.ComfyNode):
    """ConsiStory 4.4: the subject made once; its anchors then serve any number of further pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredAnchorSampler",
            display_name=SAMPLER,
            category="Kindred",
            description="Samples like KSampler and keeps the subject: further pictures that get this reference in ConsiStory Shared "
            "Attention look as if they had been made in this batch.",
            search_aliases=[
                "anchor sampler",
                "consistory",
                "reusable subject",
                "character sheet",
                "consistent character",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From ConsiStory Shared Attention; its anchors are what is kept.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise: another seed is another subject.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=10000,
                    tooltip="Start with 50. Further pictures need the same steps.",
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely the prompt is followed. Start with 5, or with 4 for the miniature.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=host.samplers(),
                    default="ddim",
                    tooltip="Start with ddim. Further pictures need the same sampler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=host.schedulers(),
                    default="ddim_uniform",
                    tooltip="Start with ddim_uniform. Further pictures need the same scheduler.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="From Subject Prompts, one line per picture."
                ),
                io.Conditioning.Input(
                    "negative", tooltip="What to avoid, from CLIP Text Encode; it may be empty."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="As many latents as prompts: Empty Latent Image with Subject Prompts' count.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Below 1 starts from the latents given.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["as computed", "float16"],
                    default="as computed",
                    advanced=True,
                    tooltip="How the features are stored. float16 halves memory and file of a model that computes in float32.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The pictures, for VAE Decode."),
                host.Reference.Output(
                    display_name="reference",
                    tooltip="The subject: for ConsiStory Shared Attention, Save Reference, "
                    "Reference Preview.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: host.Conditioning,
        negative: host.Conditioning,
        latent_image: dict[str, Any],
        denoise: float = 1.0,
        precision: str = "as computed",
    ) -> io.NodeOutput:
        story = next((i for i in host.injected(model) if isinstance(i, StoryInjection)), None)
        if story is None or story.bank is not None:
            why = (
                "already reads a reference, so it makes no anchors"
                if story
                else (
                    "does not come from ConsiStory Shared Attention, or its settings share nothing (strength 0; "
                    "weight 0 or dropout 1, with feature_injection 0; black masks)"
                )
            )
            raise ValueError(
                f"{SAMPLER}: the model given {why}. Wire ConsiStory Shared Attention{' without a reference' * bool(story)} "
                "before it."
            )
        if denoise <= 0:
            raise ValueError(
                f"{SAMPLER}: denoise is {denoise}, so no step is sampled and there is nothing to keep of the anchors. Give "
                "more than 0; 1 begins from noise."
            )
        if sampler_name in host.LEAPING:
            raise passes_over(Asker(sampler_name), "levels")
        recorder = AnchorRecorder(torch.float16 if precision == "float16" else None)
        recording = host.inject(model, replace(story, recorder=recorder), instead_of=story)
        out = host.sample(
            recording,
            seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            latent_image,
            denoise,
        )
        if not torch.isfinite(out["samples"]).all():
            bad = (~torch.isfinite(out["samples"])).sum().item()
            raise ValueError(
                f"{SAMPLER}: {bad} of {out['samples'].numel()} values of the pictures are NaN or infinite, so nothing of them "
                "can be kept. Start ComfyUI with --fp32-unet or --force-upcast-attention, or sample with KSampler."
            )
        s = story.settings
        both = {Half.COND: positive, Half.UNCOND: negative}
        prompts = {
            half: host.first_rows(model, prompt, recorder.count) for half, prompt in both.items()
        }
        settings = {
            "anchors": s.anchors,
            "seed": s.seed,
            "weight": s.weight,
            "dropout": s.dropout,
            "query_blend": s.blend[0],
            "feature_injection": s.injection,
            "halves": s.halves.value,
            "order": OFFICIAL if s.official else FAST,
        }
        final = host.to_model_scale(model, out["samples"][: recorder.count])
        bank = recorder.finish(
            final,
            prompts,
            host.model_key(model),
            f"{scheduler}, {sampler_name}, {steps} steps",
            settings,
        )
        log.info("%s: %d anchors, %.1f MB", SAMPLER, recorder.count, bank.bytes / 1e6)
        return io.NodeOutput(out, bank)
