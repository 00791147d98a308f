"""Concept Encoder Load and Cross-Attn Detail Inject: paper A's concept encoder (arXiv 2403.11284,
section 2.3).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..models import presets
from ..models.attention.parts import Merge
from ..models.attention.weights import CONCEPT_ODDS, WeightMode, dial
from ..models.concept.config import ConceptConfig, Kind, check_layers
from ..models.concept.encoder import KeysValues
from ..models.concept.file import load_concept_encoder
from ..models.concept.inject import NODE as INJECT
from ..models.concept.inject import ActiveConcept, ConceptReading
from ..models.concept.timed import TimedEncoder
from ..models.network.blocks import BlockId, select_blocks
from ..models.network.call import Half, Halves
from . import host, inputs

LOAD = "Concept Encoder Load"
AS_TRAINED, NO_HEAD = "as trained", "none"
LONGEST = 16  # times as long as wide
log = logging.getLogger(__name__)


class ConceptEncoderLoad(io.ComfyNode):
    """A concept encoder from models/concept_encoders (paper A eq. (6); IP-Adapter full-face weights
    too).
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredConceptEncoderLoad",
            display_name=LOAD,
            category="Kindred",
            description="Loads a concept encoder, which turns a photo into extra words for the "
            "model. Put files into models/concept_encoders. IP-Adapter full-face "
            "weights (.safetensors) work too, with their CLIP Vision wired in, and "
            "for FLUX.1 and SD3.5 the IP-Adapters of InstantX and XLabs.",
            search_aliases=[
                "concept encoder",
                "image encoder",
                "ip adapter",
                "ipadapter full face",
                "load encoder",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.concept_files(),
                    tooltip="A .safetensors in models/concept_encoders.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Only for files without their own CLIP Vision, such as "
                    "IP-Adapter full-face (ViT-H).",
                ),
                io.Combo.Input(
                    "pooling_head",
                    options=[NO_HEAD, *host.vision_files()],
                    default=NO_HEAD,
                    optional=True,
                    advanced=True,
                    tooltip="Only for the FLUX.1 IP-Adapter by InstantX: choose the SigLIP "
                    "file that clip_vision was loaded from. Its pooling head is "
                    "read from that file, because Load CLIP Vision leaves it out.",
                ),
            ],
            outputs=[
                host.Encoder.Output(
                    display_name="concept_encoder", tooltip="Wire it into Cross-Attn Detail Inject."
                )
            ],
        )

    @classmethod
    def execute(
        cls, file: str, clip_vision: Any = None, pooling_head: str = NO_HEAD
    ) -> io.NodeOutput:
        try:
            encoder = load_concept_encoder(host.concept_path(file))
        except FileNotFoundError:
            raise
        except ValueError as error:
            raise ValueError(f"{LOAD}: {error}") from error
        except OSError as error:
            raise OSError(
                f"{LOAD}: {error}. Look at that folder and its disk, then queue it again."
            ) from error
        if encoder.tower is None and clip_vision is None:
            raise ValueError(
                f"{LOAD}: {file} holds no CLIP tower; it reads tokens of width "
                f"{encoder.config.tower_width}. "
                f"Wire {host.tower_of(encoder.config)} CLIP Vision into "
                f"clip_vision "
                "(Load CLIP Vision)."
            )
        if encoder.tower is not None and clip_vision is not None:
            log.info(
                "%s: %s has a CLIP tower of its own; the wired CLIP Vision is not used.", LOAD, file
            )
        log.info(
            "%s: %s, for %s, %s, trained with %s",
            LOAD,
            file,
            encoder.config.family,
            encoder.config.merge.value,
            dict(encoder.config.training),
        )
        head = head_of(encoder.config, clip_vision, pooling_head, file)
        vision = clip_vision if encoder.tower is None else None
        return io.NodeOutput(host.ManagedEncoder.of(encoder, file, vision, head))

    @classmethod
    def fingerprint_inputs(
        cls, file: str, clip_vision: Any = None, pooling_head: str = NO_HEAD
    ) -> str:
        """A file trained again under the same name is another encoder."""
        stat = host.concept_path(file).stat()
        return f"{stat.st_mtime_ns} {stat.st_size}"


class ConceptInjection(ConceptReading):
    """Configuration of one Cross-Attn Detail Inject node."""

    watches: ClassVar[bool] = False

    def check(self, model: Any) -> None:
        """Nothing can have become wrong: the tokens do not depend on the model's weights, and its
        layers cannot change.
        """

    def held(self, model: Any, shape: Sequence[int]) -> int:
        """Bytes on the device."""
        return self.bytes_held(host.computes_in(model).itemsize)

    def start_run(self, run: host.SamplerRun) -> ActiveConcept:
        return self.active(*run.device_and_dtype, run.at(self.start, self.end))


def plain_colours(image: Tensor) -> Tensor:
    """IMAGE [b y x 1|3|4] -> [b y x 1|3], alpha laid over white; ValueError for what is no picture.

    Of a strip the middle is kept: towers enlarge the whole picture before they cut its centre.
    """
    if (
        image.ndim != 4
        or image.shape[-1] not in (1, 3, 4)
        or not image.numel()
        or not torch.isfinite(image).all()
    ):
        raise ValueError(
            f"{INJECT}: the image is {list(image.shape)}"
            f"{'' if torch.isfinite(image).all() else ' and holds NaN or infinite values'}. Wire "
            f"Load Image into it."
        )
    most = LONGEST * min(image.shape[1:3])
    top, left = (max(n - most, 0) // 2 for n in image.shape[1:3])
    image = image[:, top : top + most, left : left + most]
    return image if image.shape[-1] < 4 else image[..., :3] * image[..., 3:] + (1 - image[..., 3:])


class CrossAttnDetailInject(io.ComfyNode):
    """Paper A eq. (7)-(9): the concept's keys and values beside the text's, weighted inside the
    softmax.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredCrossAttnDetailInject",
            display_name=INJECT,
            category="Kindred",
            description="Lets the picture being made read a photo as if it were part of the "
            "prompt. Chain it with Masked Self-Attn Inject, "
            "or use several for several subjects.",
            search_aliases=[
                "concept injection",
                "image prompt",
                "ip adapter",
                "ipadapter apply",
                "cross attention",
                "personalize",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model the encoder was trained for, with any LoRA."
                ),
                host.Encoder.Input(
                    "concept_encoder", tooltip="From Concept Encoder Load or Concept Encoder Train."
                ),
                io.Image.Input(
                    "image", tooltip="A photo of the subject. Several photos describe it together."
                ),
                inputs.strength(
                    "How much of the photo's subject comes through: 0 = the plain "
                    "picture, 1 = as trained, above 1 still more. Start with 1 and turn it "
                    "down if the prompt is ignored.",
                    presets.CONCEPT.most,
                ),
                inputs.weight(
                    "How much the photo counts at strength 1: 1 = as trained; higher "
                    "copies more until the prompt is ignored. W_C in the paper.",
                ),
                inputs.weight_mode(
                    "How the strength acts with merge = concat. logit bias: moves "
                    "attention to or from the photo. post softmax: scales what is "
                    "read. key scale: scales the keys. output blend: mixes the "
                    "results with and without the photo.",
                ),
                io.Combo.Input(
                    "merge",
                    options=[AS_TRAINED, *(m.value for m in Merge)],
                    default=AS_TRAINED,
                    advanced=True,
                    tooltip="concat: prompt and photo share one attention (the paper). add: "
                    "the photo gets its own, added on top (IP-Adapter). as "
                    "trained: as the encoder's file says.",
                ),
                inputs.blocks(
                    "Where the photo is read: all, encoder, middle, decoder, or a list "
                    "such as output 3-5, middle 0.",
                ),
                inputs.percent(
                    "start_percent",
                    presets.CONCEPT.window[0],
                    "When in the sampling the photo starts being read. At 0.2 the "
                    "first 20 % of sampling use the prompt only.",
                ),
                inputs.percent(
                    "end_percent",
                    presets.CONCEPT.window[1],
                    "When in the sampling it stops being read.",
                ),
                inputs.halves(
                    Halves.BOTH,
                    "Which halves of CFG read the photo. both: the prompt reads it, the "
                    "negative an empty picture, as in IP-Adapter. cond only: the "
                    "prompt alone; guidance then amplifies it. shared: prompt and "
                    "negative read it.",
                ),
                inputs.target_mask(
                    "White = the part of the new picture that reads the photo.",
                ),
                inputs.preset(
                    presets.CONCEPT,
                    "Ready settings that replace start_percent and end_percent; strength scales "
                    "them. custom: no preset. identity: as trained. gentle: half the strength. "
                    "strong: twice, at most 2; if Masked Self-Attn Inject is wired too, set its "
                    "preset to beside an encoder.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Wire it into any sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        concept_encoder: host.ManagedEncoder,
        image: Tensor,
        strength: float = 1.0,
        weight: float = 1.0,
        weight_mode: str = WeightMode.LOGIT_BIAS.value,
        merge: str = AS_TRAINED,
        blocks: str = "all",
        start_percent: float = presets.CONCEPT.window[0],
        end_percent: float = presets.CONCEPT.window[1],
        halves: str = Halves.BOTH.value,
        target_mask: Tensor | None = None,
        preset: str = presets.CUSTOM,
    ) -> io.NodeOutput:
        config = concept_encoder.encoder.config
        wanted = readable_layers(model, config, blocks)
        how = merge_of(config, merge)
        mode, chosen = WeightMode(weight_mode), Halves(halves)
        window = start_percent, end_percent
        strength, window = presets.CONCEPT.chosen(preset, strength, window)
        weight = full_weight(weight, strength, how, mode)
        image = plain_colours(image)
        mask = None if target_mask is None else target_mask.reshape(-1, *target_mask.shape[-2:])
        nowhere = mask is not None and not (mask > 0.5).any()
        if weight == 0 or window[0] >= window[1] or nowhere:
            return io.NodeOutput(model.clone())
        if config.decoupled:
            how_read = (weight, *window, chosen, host.place_of(config), mask)
            reading = host.DecoupledReading(*how_read)
            return io.NodeOutput(
                host.inject(model, decoupled(concept_encoder, image, wanted, reading))
            )
        tokens = keys_values(concept_encoder, image, chosen, wanted)
        injection = ConceptInjection(tokens, len(image), weight, mode, how, *window, chosen, mask)
        return io.NodeOutput(host.inject(model, injection))


def head_of(config: ConceptConfig, clip_vision: Any, pooling_head: str, file: str) -> Any:
    """SigLIP's pooling head where an adapter reads through it; ValueError where the wired CLIP
    Vision does not fit, or the head is not named.
    """
    if config.adapter is None:
        return None
    host.require_sight(config, clip_vision, file, LOAD)
    if config.adapter.kind is not Kind.SHAKKER:
        return None
    if pooling_head == NO_HEAD:
        raise ValueError(
            f"{LOAD}: {file} reads SigLIP's pooled picture, but Load CLIP Vision leaves SigLIP's "
            "pooling head out. Choose in pooling_head the file that clip_vision was loaded from."
        )
    try:
        return host.pooling_head(pooling_head, clip_vision)
    except ValueError as error:
        raise ValueError(f"{LOAD}: {error}") from error


def merge_of(config: ConceptConfig, merge: str) -> Merge:
    """How the photo is read; ValueError for one softmax on a transformer, where text and picture
    share it and the photo would dim the prompt.
    """
    how = config.merge if merge == AS_TRAINED else Merge(merge)
    if config.decoupled and how is not Merge.ADD:
        raise ValueError(
            f"{INJECT}: merge is {how.value}, but in {config.family} text and picture share one "
            f"softmax and the photo is read beside it. Set merge to {Merge.ADD.value}."
        )
    return how


def decoupled(
    managed: host.ManagedEncoder,
    image: Tensor,
    blocks: tuple[BlockId, ...],
    reading: host.DecoupledReading,
) -> host.DecoupledInjection:
    """What a transformer's blocks read of the pictures [b y x 3], once they are seen."""
    config, encoder = managed.encoder.config, managed.encoder
    if not isinstance(encoder, TimedEncoder):
        tokens = keys_values(managed, image, reading.halves, blocks)
        return host.DecoupledInjection(reading, config, blocks, tokens, {})
    seen = {Half.COND: managed.look(image)}
    if reading.halves is Halves.BOTH:
        seen[Half.UNCOND] = managed.look(image, empty=True)
    return host.DecoupledInjection(reading, config, blocks, {}, seen, encoder)


def readable_layers(model: Any, config: ConceptConfig, blocks: str) -> tuple[BlockId, ...]:
    """The cross-attentions, or a transformer's blocks, that `blocks` names; ValueError where the
    encoder is for another model.
    """
    family, layers, width = host.concept_layers(model, INJECT)
    check_layers(config, family, layers, width, INJECT)
    own = dict(config.layers)
    return select_blocks(blocks, [block for block, _ in layers if block in own], INJECT)


def full_weight(weight: float, strength: float, merge: Merge, mode: WeightMode) -> float:
    """W_C at this strength; ValueError for one that is none."""
    if not 0 <= weight < math.inf:
        raise ValueError(
            f"{INJECT}: full strength (weight) is {weight}. Give 0 (the plain picture) or more; 1 "
            f"is as trained."
        )
    one_softmax = merge is Merge.CONCAT and mode is WeightMode.LOGIT_BIAS
    odds = CONCEPT_ODDS if one_softmax else 0.0
    return weight * dial(strength, INJECT, odds, presets.CONCEPT.most)


def keys_values(
    encoder: host.ManagedEncoder, image: Tensor, halves: Halves, blocks: Sequence[BlockId]
) -> dict[Half, KeysValues]:
    """(k, v) [1 m c] of the pictures [b y x 3] together, per half and block."""
    by_half = {Half.COND: encoder.encode(image)}
    if halves is Halves.BOTH:
        by_half[Half.UNCOND] = encoder.encode(image, empty=True)
    return {
        half: {block: _as_one(*layers[block]) for block in blocks}
        for half, layers in by_half.items()
    }


def _as_one(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k.flatten(0, 1)[None], v.flatten(0, 1)[None]
