"""ConsiStory Anchor Sampler: a subject made once and kept for further pictures (arXiv 2402.03286,
4.4).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..models.network.call import Asker, Half
from ..models.network.sites import require_placed_keys
from ..models.reference.bank import ReferenceBank
from ..models.story.anchors import NODE as SAMPLER
from ..models.story.anchors import AnchorRecorder, passes_over
from ..models.story.inject import FAST, OFFICIAL
from ..models.story.plan import StorySettings
from . import host, inputs

log = logging.getLogger(__name__)


class AnchorSampler(io.ComfyNode):
    """ConsiStory 4.4: the subject made once; its anchors then serve any number of further
    pictures.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredAnchorSampler",
            display_name=SAMPLER,
            category="Kindred",
            description="Samples like KSampler and keeps the subject: further pictures that get "
            "this reference in ConsiStory Shared "
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
                    tooltip="From ConsiStory Shared Attention; the subject of its anchors is kept.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Noise seed. Another seed gives another subject.",
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
                    tooltip="How closely the prompt is followed. Start with 5, or with 4 for the "
                    "miniature.",
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
                    tooltip="As many latents as prompts: Empty Latent Image with Subject Prompts' "
                    "count.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Below 1 starts from the wired latents instead of from pure noise.",
                ),
                inputs.precision(
                    "How the features are stored. float16 halves memory and file if "
                    "the model computes in float32.",
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
        story = story_of(model)
        require_placed_keys(host.require_sites(model, SAMPLER), SAMPLER)
        require_sampled(denoise, sampler_name)
        recorder = AnchorRecorder(inputs.stored_in(precision), pins=host.pins_memory())
        recording = host.inject(model, replace(story, recorder=recorder), instead_of=story)
        order = seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise
        out = host.sample(recording, *order)
        require_finite(out["samples"])
        schedule = f"{scheduler}, {sampler_name}, {steps} steps"
        conditionings = {Half.COND: positive, Half.UNCOND: negative}
        bank = anchors_of(model, story, recorder, out["samples"], conditionings, schedule)
        log.info("%s: %d anchors, %.1f MB", SAMPLER, recorder.count, bank.bytes / 1e6)
        return io.NodeOutput(out, bank)


def anchors_of(
    model: Any,
    story: host.StoryInjection,
    recorder: AnchorRecorder,
    samples: Tensor,
    conditionings: Mapping[Half, host.Conditioning],
    schedule: str,
) -> ReferenceBank:
    """What was recorded of the first pictures of finished latents [b c y x], as a reference."""
    count = recorder.count
    prompts = {half: host.first_rows(model, c, count) for half, c in conditionings.items()}
    final = host.to_model_scale(model, samples[:count])
    facts = host.model_key(model), schedule, written(story.settings), host.noise_of(model, SAMPLER)
    return recorder.finish(final, prompts, *facts)


def story_of(model: Any) -> host.StoryInjection:
    """The story that the model carries; ValueError where it carries none that makes anchors."""
    story = next((i for i in host.injected(model) if isinstance(i, host.StoryInjection)), None)
    if story is None or story.bank is not None:
        why = (
            "already reads a reference, so it makes no anchors"
            if story
            else (
                "does not come from ConsiStory Shared Attention, or its settings share nothing "
                "(strength 0; "
                "full strength 0 or dropout 1, with feature_injection 0; black masks)"
            )
        )
        raise ValueError(
            f"{SAMPLER}: the model given {why}. Wire ConsiStory Shared "
            f"Attention{' without a reference' * bool(story)} "
            "before it."
        )
    return story


def require_sampled(denoise: float, sampler: str) -> None:
    """ValueError where no step is sampled, or a sampler skips levels of its schedule."""
    if denoise <= 0:
        raise ValueError(
            f"{SAMPLER}: denoise is {denoise}, so no step is sampled and there is nothing to keep "
            f"of the anchors. Give "
            "more than 0; 1 begins from noise."
        )
    if sampler in host.LEAPING:
        raise passes_over(Asker(sampler), "levels")


def require_finite(samples: Tensor) -> None:
    """ValueError for pictures that nothing can be kept of."""
    if not torch.isfinite(samples).all():
        bad = (~torch.isfinite(samples)).sum().item()
        raise ValueError(
            f"{SAMPLER}: {bad} of {samples.numel()} values of the pictures are NaN or infinite, so "
            f"nothing of them "
            "can be kept. Start ComfyUI with --fp32-unet or --force-upcast-attention, or sample "
            "with KSampler."
        )


def written(settings: StorySettings) -> dict[str, float | int | str]:
    """What anchors were made with, as their file tells it."""
    return {
        "anchors": settings.anchors,
        "seed": settings.seed,
        "weight": settings.weight,
        "dropout": settings.dropout,
        "query_blend": settings.blend[0],
        "feature_injection": settings.injection,
        "halves": settings.halves.value,
        "order": OFFICIAL if settings.official else FAST,
    }
