"""ConsiStory Shared Attention: the pictures of a batch share their subject (arXiv 2402.03286)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..models.attention.joint import TextShare
from ..models.attention.weights import STORY_ODDS, dial
from ..models.network.blocks import BlockId, block_name
from ..models.network.call import Half, Halves
from ..models.network.sites import BlockSite, map_blocks, require_placed_keys
from ..models.reference.bank import ReferenceBank
from ..models.story.inject import FAST, OFFICIAL
from ..models.story.plan import NODE as STORY
from ..models.story.plan import StorySettings
from . import host, inputs

SHARES = ("dropout", "query_blend", "query_blend_end", "feature_injection")  # are from 0 to 1


class ConsiStory(io.ComfyNode):
    """Shared self-attention with subject masks and dropout, query blending, feature injection
    (ConsiStory, section 4).
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredConsiStory",
            display_name=STORY,
            category="Kindred",
            description="Makes the pictures of one batch share their subject, without training: "
            "each looks at the subject of the others. "
            "Encode the prompts with Subject Prompts, wire its count into the batch size, then "
            "sample with any sampler.",
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
                inputs.strength(
                    "How alike the subjects become: 0 = the plain pictures, 1 = all "
                    "that sharing and feature injection give. Start with 1.",
                ),
                io.Int.Input(
                    "anchors",
                    default=2,
                    min=0,
                    max=64,
                    tooltip="How many of the first pictures define the subject. 2 is "
                    "enough, as the paper finds, and more pictures do not change "
                    "them; 0 = all.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Only varies the dropout. Change the sampler's seed instead.",
                ),
                inputs.weight(
                    "How much the other pictures' subject counts at strength 1: 0 = not "
                    "at all, 1 = as much as the picture's own.",
                ),
                io.Float.Input(
                    "dropout",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Hides this share of the other pictures' subject at each step, "
                    "so that poses stay free: 0 = most alike, 1 = nothing shared. "
                    "Start with 0.5; with ControlNet the paper takes 0.7.",
                ),
                io.Float.Input(
                    "query_blend",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="How much of each picture's plain layout is kept in the first "
                    "steps; more keeps the layouts different. 0 is faster: it "
                    "skips the extra model calls.",
                ),
                io.Float.Input(
                    "feature_injection",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Mixes in this much of the matching parts of another picture's "
                    "subject, for fine details. Start with 0.8; 0 saves time: 55 "
                    "instead of 88 model calls for 50 steps.",
                ),
                io.Float.Input(
                    "query_blend_end",
                    default=0.818,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="The value that query_blend reaches at its last step.",
                ),
                inputs.percent(
                    "blend_end_percent",
                    0.12,
                    "When in the sampling query_blend stops being used.",
                ),
                inputs.percent(
                    "injection_start_percent", 0.1, "When in the sampling feature injection begins."
                ),
                inputs.percent(
                    "injection_end_percent", 0.32, "When in the sampling feature injection ends."
                ),
                inputs.blocks(
                    "Self-attention blocks that share: decoder, all, encoder, "
                    "middle, or a list such as output 3-5. In transformers decoder "
                    "is the second half, and a list names their blocks, such as "
                    "single 10-20.",
                    default="decoder",
                ),
                io.String.Input(
                    "mask_blocks",
                    default="auto",
                    advanced=True,
                    tooltip="Blocks whose cross-attention locates the subject. auto: those at a "
                    "quarter of the latent's size; in transformers those that locate best.",
                ),
                io.Combo.Input(
                    "halves",
                    options=[Halves.BOTH.value, Halves.COND.value],
                    default=Halves.COND.value,
                    advanced=True,
                    tooltip="Where sharing acts. cond only: on the prompt alone, which "
                    "guidance amplifies. both: on prompt and negative; better with "
                    "anchors 0.",
                ),
                io.Combo.Input(
                    "order",
                    options=[FAST, OFFICIAL],
                    default=FAST,
                    advanced=True,
                    tooltip="When the first stage of feature injection ends. fast: once "
                    "its features are read. official: after all steps, as in the "
                    "authors' code, with the last step's masks.",
                ),
                io.Boolean.Input(
                    "align_keys",
                    default=True,
                    advanced=True,
                    tooltip="Photos only: adapts the photo's features to the new picture "
                    "(AdaIN), so that its colours and contrast fit in. No effect on "
                    "transformers.",
                ),
                host.Reference.Input(
                    "reference",
                    optional=True,
                    tooltip="A subject to use instead of the first pictures: from "
                    "ConsiStory Anchor Sampler or Load Reference, or, of photos, "
                    "from Ref-UNet Feature Capture.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White = where the subject will be in each picture. Replaces "
                    "finding it by its word.",
                ),
                inputs.text_share(
                    "In transformers (Flux, Qwen-Image, SD3.5 ...) the prompt and "
                    "the pictures share one attention. kept: the prompt counts as "
                    "much as without the other pictures. plain: they weaken it. No "
                    "effect on SD1.5, SD2.x and SDXL.",
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
        text_share: str = TextShare.KEPT.value,
    ) -> io.NodeOutput:
        sites = host.require_sites(model, STORY)
        require_first(model)
        require_shares(dropout, query_blend, query_blend_end, feature_injection)
        require_counts(weight, anchors)
        choices = choices_of(halves, order, align_keys, text_share)
        wanted = shared_blocks(model, sites, blocks, reference, choices["halves"])
        maps, layout = map_blocks(mask_blocks, sites, STORY), host.layout_of(model, sites)
        numbers = anchors, seed, weight * dial(strength, STORY, STORY_ODDS), dropout
        injected = feature_injection * strength * bool(layout.output_blocks)  # none: middle alone
        blend = query_blend, query_blend_end
        settings = StorySettings(wanted, maps, *numbers, blend, injection=injected, **choices)
        moments = blend_end_percent, injection_start_percent, injection_end_percent
        drawn = None if masks is None else masks.reshape(-1, *masks.shape[-2:])
        if shares_nothing(settings, moments, drawn):
            return io.NodeOutput(model.clone())
        story = host.StoryInjection(settings, layout, moments, reference, drawn)
        return io.NodeOutput(host.inject(model, story))

    @classmethod
    def fingerprint_inputs(cls, blocks: str = "decoder", **others: Any) -> str:
        """A new measurement means other blocks by the same word."""
        return host.measurements_stamp(blocks)


def require_first(model: Any) -> None:
    """ValueError where the model carries a story already."""
    if any(isinstance(i, host.StoryInjection) for i in host.injected(model)):
        raise ValueError(
            f"{STORY}: the model already comes from {STORY}. Use one; several subjects are words "
            f"of Subject Prompts, "
            "separated by commas."
        )


def choices_of(halves: str, order: str, align_keys: bool, text_share: str) -> dict[str, Any]:
    """Fields of StorySettings that are chosen from a list."""
    return {
        "halves": Halves(halves),
        "official": order == OFFICIAL,
        "align_keys": align_keys,
        "dims_text": TextShare(text_share) is TextShare.PLAIN,
    }


def shared_blocks(
    model: Any,
    sites: Mapping[BlockId, BlockSite],
    blocks: str,
    reference: ReferenceBank | None,
    halves: Halves,
) -> frozenset[BlockId]:
    """The blocks that share; ValueError where a reference cannot be read in them."""
    wanted = frozenset(host.chosen_blocks(model, blocks, sites, STORY))
    if reference is None:
        return wanted
    require_placed_keys(sites, STORY)
    return readable_blocks(model, reference, wanted, blocks, halves)


def require_shares(*shares: float) -> None:
    """ValueError for one that is not from 0 to 1, by the name of its input in SHARES."""
    for name, value in zip(SHARES, shares, strict=True):
        if not 0 <= value <= 1:
            raise ValueError(f"{STORY}: {name} is {value}. Give a number from 0 to 1.")


def require_counts(weight: float, anchors: int) -> None:
    """ValueError for one below 0."""
    if not weight >= 0 or anchors < 0:
        raise ValueError(
            f"{STORY}: full strength (weight) is {weight} and anchors is {anchors}. Give 0 or more."
        )


def shares_nothing(
    settings: StorySettings, moments: tuple[float, float, float], masks: Tensor | None
) -> bool:
    """Whether the pictures stay plain whatever is sampled; masks [1|b Y X]."""
    _, begin, end = moments
    shares = settings.weight and settings.dropout != 1
    injects = settings.injection and begin < end
    empty = masks is not None and not (masks > 0.5).any()
    return empty or not (shares or injects)


def readable_blocks(
    model: Any,
    reference: ReferenceBank,
    wanted: frozenset[BlockId],
    blocks: str,
    halves: Halves,
) -> frozenset[BlockId]:
    """The wanted blocks, all held by the reference, in the halves that will read them; ValueError
    names what is missing.
    """
    host.require_reference(STORY, reference, model)
    missing = [block_name(b) for b in sorted(wanted) if b not in reference.blocks]
    if missing:
        raise ValueError(
            f"{STORY}: blocks is {blocks!r:.200}, but the reference does not hold "
            f"{', '.join(missing)}; it holds "
            f"{', '.join(map(block_name, reference.blocks))}. Choose the same blocks where the "
            f"reference is made."
        )
    if halves is Halves.BOTH and Half.UNCOND not in reference.features:
        remedy = (
            f"Make the anchors with halves {Halves.BOTH.value!r} and a CFG above 1"
            if reference.anchors
            else "Wire the negative into Ref-UNet Feature Capture"
        )
        raise ValueError(
            f"{STORY}: halves is {halves.value!r}, but the reference holds only the cond half. "
            f"{remedy}, or choose "
            f"{Halves.COND.value!r}."
        )
    return wanted
