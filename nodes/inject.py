"""Masked Self-Attn Inject: paper A's reference in the pictures being made (arXiv 2403.11284,
section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..models import presets
from ..models.attention.joint import TextShare
from ..models.attention.weights import SELF_ODDS, WeightMode, dial
from ..models.network.blocks import BlockId, block_name
from ..models.network.call import Half, Halves
from ..models.network.rope import Positions
from ..models.network.sites import BlockSite
from ..models.reference.bank import ReferenceBank
from ..models.reference.inject import NODE, ActiveMaskedSelf, MaskedSelf
from . import host, inputs


class MaskedSelfInjection(MaskedSelf):
    """Configuration of one Masked Self-Attn Inject node."""

    watches: ClassVar[bool] = False

    def check(self, model: Any) -> None:
        """Called when a sampler starts: a LoRA may have been added behind this node."""
        host.require_same_model(NODE, "reference", self.bank.model_key, host.model_key(model))
        if self.positions is not Positions.OWN:
            host.require_plain_positions(model, NODE, f"positions is {self.positions.value}")

    def held(self, model: Any, shape: Sequence[int]) -> int:
        """Bytes on the device."""
        width = host.computes_in(model).itemsize
        return self.bytes_held(shape[0], host.token_sizes(model, shape[-2:], self.bank), width)

    def start_run(self, run: host.SamplerRun) -> ActiveMaskedSelf:
        def tokens_at(sigma: float) -> Mapping[Half, Mapping[BlockId, Tensor]]:
            return host.reference_tokens(run, self.bank, sigma, self.sources)

        window = run.at(self.start, self.end)
        run.foretell_halves(self.halves)
        run.foretell(self.bank, [s for s in run.sigmas if window[1] <= s <= window[0]])
        return self.active(tokens_at, window)


class MaskedSelfAttnInject(io.ComfyNode):
    """Paper A eq. (1)-(3): reference keys and values beside the picture's own, weighted inside the
    softmax.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredMaskedSelfAttnInject",
            display_name=NODE,
            category="Kindred",
            description="Keeps the subject of a reference in every new picture: the pictures look "
            "at the reference while they are made. Works with any sampler. For several "
            "references, chain several of these nodes.",
            search_aliases=[
                "attention injection",
                "reference only",
                "personalize",
                "subject reference",
                "self attention",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model the reference was read with."),
                host.Reference.Input("reference", tooltip="From Ref-UNet Feature Capture."),
                inputs.strength(
                    "How much of the reference's subject comes through: 0 = the "
                    "plain picture, 1 = all of it. Start with 1 and turn it down if "
                    "the picture copies too much.",
                ),
                inputs.weight(
                    "How much the reference counts at strength 1: 1 = as much as the "
                    "picture's own features; higher copies more until shapes break. "
                    "W_S in the paper.",
                ),
                inputs.weight_mode(
                    "How the strength acts. logit bias: moves attention to or from "
                    "the reference. post softmax: scales what is read. key scale: "
                    "scales the keys. output blend: mixes the results with and "
                    "without the reference.",
                ),
                inputs.blocks(
                    "Which captured blocks to use: all, encoder, middle, decoder, "
                    "masactrl, measured (by Block Probe), or a list such as output "
                    "3-5, middle 0. In transformers encoder and decoder are the first and the "
                    "second half, "
                    "and double, single or a list such as double 3-5, single 0 name their own.",
                ),
                inputs.percent(
                    "start_percent",
                    presets.SELF.window[0],
                    "When in the sampling the reference starts being read.",
                ),
                inputs.percent(
                    "end_percent",
                    presets.SELF.window[1],
                    "When in the sampling it stops being read.",
                ),
                inputs.halves(
                    Halves.COND,
                    "Which halves of CFG read the reference. cond only: the prompt "
                    "alone; guidance then amplifies the subject (stronger). both: "
                    "prompt and negative; wire a negative into the capture. shared: "
                    "both, with the prompt's features.",
                ),
                inputs.target_mask(
                    "White = the part of the new picture that may look at the reference.",
                ),
                inputs.text_share(
                    "In transformers (Flux, Qwen-Image, SD3.5 ...) the prompt and "
                    "the picture share one attention. kept: the prompt counts as "
                    "much as without the reference. plain: the reference weakens "
                    "it. No effect on SD1.5, SD2.x and SDXL.",
                ),
                io.Combo.Input(
                    "positions",
                    options=[p.value for p in Positions],
                    default=Positions.OWN.value,
                    optional=True,
                    advanced=True,
                    tooltip="Where the reference stands for the new picture (Flux, "
                    "Qwen-Image, Z-Image ...). own: where the subject was in the "
                    "photo. centred: the photo's middle on the picture's. aside: "
                    "right of the picture. apart: one step along the time axis, or "
                    "aside if there is none. none: positions are ignored, only "
                    "contents are compared. SD1.5, SD2.x, SDXL, SD3.5 and AuraFlow "
                    "have own only.",
                ),
                inputs.preset(
                    presets.SELF,
                    "Ready settings that replace start_percent and end_percent; strength scales "
                    "them down. custom: no preset. identity: all of the likeness. beside an "
                    "encoder: for use with Cross-Attn Detail Inject; starts later, so more "
                    "subjects come out whole. gentle: half the strength.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Wire it into any sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        reference: ReferenceBank,
        strength: float = 1.0,
        weight: float = 1.0,
        weight_mode: str = WeightMode.LOGIT_BIAS.value,
        blocks: str = "all",
        start_percent: float = presets.SELF.window[0],
        end_percent: float = presets.SELF.window[1],
        halves: str = Halves.COND.value,
        target_mask: Tensor | None = None,
        text_share: str = TextShare.KEPT.value,
        positions: str = Positions.OWN.value,
        preset: str = presets.CUSTOM,
    ) -> io.NodeOutput:
        sites = host.require_sites(model, NODE)
        stands = Positions(positions)
        require_positions(stands, sites)
        host.require_reference(NODE, reference, model)
        wanted = readable_blocks(host.chosen_blocks(model, blocks, sites, NODE), blocks, reference)
        mode = WeightMode(weight_mode)
        window = start_percent, end_percent
        strength, window = presets.SELF.chosen(preset, strength, window)
        weight = weight_at(strength, weight, mode)
        mask = None if target_mask is None else target_mask.reshape(-1, *target_mask.shape[-2:])
        injection = MaskedSelfInjection(
            reference,
            weight,
            mode,
            wanted,
            *window,
            Halves(halves),
            mask,
            TextShare(text_share),
            stands,
        )
        require_halves(injection)
        return io.NodeOutput(read_by(model, injection))

    @classmethod
    def fingerprint_inputs(cls, blocks: str = "all", **others: Any) -> str:
        """A new measurement means other blocks by the same word."""
        return host.measurements_stamp(blocks)


def weight_at(strength: float, weight: float, mode: WeightMode) -> float:
    """The weight of a strength; ValueError where either is out of its range."""
    if not weight >= 0:
        raise ValueError(
            f"{NODE}: full strength (weight) is {weight}. Give 0 (the plain picture) or more; 1 is "
            f"the plain concatenation."
        )
    return weight * dial(strength, NODE, SELF_ODDS if mode is WeightMode.LOGIT_BIAS else 0.0)


def require_positions(positions: Positions, sites: Mapping[BlockId, BlockSite]) -> None:
    """ValueError for places that the keys of this network know nothing of."""
    if positions is Positions.OWN:
        return
    backbone = next((site.backbone for site in sites.values() if site.backbone), None)
    if backbone is None or backbone.turn is None:
        name = backbone.family if backbone else "a UNet (SD1.5, SD2.x, SDXL)"
        raise ValueError(
            f"{NODE}: positions is {positions.value}, but this model is {name}, whose attention "
            "keys hold no positions that Kindred can change. Choose own."
        )


def read_by(model: Any, injection: MaskedSelfInjection) -> Any:
    """The MODEL that reads a reference, or a plain one; said where that cannot be meant."""
    why = idle(injection)
    if why and injection.weight:
        host.warn(f"{NODE}: {why}")
    if why or injection.weight == 0:
        return model.clone()
    return host.inject(model, injection)


def idle(injection: MaskedSelf) -> str:
    """Why the pictures stay plain whatever is sampled, though a weight asks for more; "" where
    they do not.
    """
    if injection.start >= injection.end:
        return (
            f"start_percent is {injection.start} and end_percent is {injection.end}, so the "
            "reference is never read. Give an end above the start."
        )
    mask = injection.target_mask
    if mask is not None and not (mask > 0.5).any():
        return (
            "the target mask is black, so no part of the picture reads the reference. Make "
            "the part that may read it white, or take the mask away."
        )
    return ""


def readable_blocks(
    wanted: Sequence[BlockId], blocks: str, reference: ReferenceBank
) -> frozenset[BlockId]:
    """The wanted blocks that the reference holds; ValueError where it lacks one that was asked for
    by name.
    """
    missing = [block_name(b) for b in wanted if b not in reference.blocks]
    if missing and blocks.strip().lower() != "all":
        raise ValueError(
            f"{NODE}: {', '.join(missing)} not captured; the reference holds "
            f"{', '.join(map(block_name, reference.blocks))}. "
            "Choose the same blocks in Ref-UNet Feature Capture."
        )
    return frozenset(wanted) & frozenset(reference.blocks)


def require_halves(injection: MaskedSelf) -> None:
    """ValueError where a half is to be read that the reference does not hold."""
    features = injection.bank.features
    if not injection.sources <= features.keys():
        raise ValueError(
            f"{NODE}: halves is {injection.halves.value!r}, but the reference holds only the "
            f"{', '.join(h.value for h in features)} half. "
            "Wire the negative prompt into Ref-UNet Feature Capture, or choose cond only or shared."
        )
