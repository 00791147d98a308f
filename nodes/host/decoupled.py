"""Decoupled concepts on a MODEL whose network is a transformer: where they are read, and what is
there before a run begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.concept.adapters import normed
from ...models.concept.config import ConceptConfig, Kind
from ...models.concept.decoupled import (
    NODE,
    ActiveDecoupled,
    Beside,
    Decoupled,
    Place,
    TokensAt,
)
from ...models.concept.encoder import KeysValues
from ...models.concept.timed import Norms, TimedEncoder
from ...models.copies import sent
from ...models.network.backbone import DOUBLE
from ...models.network.blocks import BlockId
from ...models.network.call import Half, Halves
from ...models.subject.target import TargetMask
from .model import computes_in, cross_layers, network
from .networks.widths import width_of
from .run import SamplerRun
from .sites import require_backbone

TIMES = 1000  # of a timed adapter's clock from sigma 0 to 1


def concept_layers(
    model: ModelPatcher, node: str
) -> tuple[str, tuple[tuple[BlockId, int], ...], int | None]:
    """The model's family, where it can read a concept with the channels there, and the width of a
    UNet's text; None for a transformer. ValueError in words for a network that cannot be read.
    """
    backbone = require_backbone(model, node)
    if backbone is None:
        return cross_layers(model, node)
    width = width_of(network(model))
    if not width:
        raise ValueError(
            f"{node}: {backbone.family} cannot read concept encoders: its attention gives the "
            "picture's queries only together with their positions. Load a model that "
            "docs/networks.md lists for them, such as FLUX, SD3.5 or Qwen-Image."
        )
    return backbone.family, tuple((block, width) for block in backbone.reading), None


def place_of(config: ConceptConfig) -> Place:
    """Where what is read with an encoder's keys and values is added."""
    own = config.adapter
    return Place.STREAM if own and own.kind is Kind.XLABS else Place.ATTENTION


@dataclass(frozen=True)
class DecoupledReading:
    """How one concept is read beside a transformer's blocks."""

    weight: float
    start: float  # shares of the sampled schedule between which the concept is read
    end: float
    halves: Halves
    place: Place = Place.ATTENTION
    target_mask: Tensor | None = None  # [1|b y x] at its own size


@dataclass(frozen=True)
class DecoupledInjection:
    """Configuration of one Cross-Attn Detail Inject node on a transformer.

    keys_values: (k, v) [1 m c] per half and block, where the encoder made them; of a timed adapter
    what it sees of the pictures, per half, [b n d], and its encoder.
    """

    how: DecoupledReading
    config: ConceptConfig
    blocks: tuple[BlockId, ...]
    keys_values: Mapping[Half, KeysValues]
    seen: Mapping[Half, Tensor]
    timed: TimedEncoder | None = None
    watches: ClassVar[bool] = False

    @property
    def place(self) -> Place:
        return self.how.place

    @property
    def halves(self) -> Halves:
        return self.how.halves

    def check(self, model: ModelPatcher) -> None:
        """Nothing can have become wrong: a MODEL's network has the blocks that it had."""

    def held(self, model: ModelPatcher, shape: Sequence[int]) -> int:
        """Bytes on the device: keys and values of every block, or the timed adapter itself."""
        width = computes_in(model).itemsize
        if self.timed is not None:
            return width * sum(p.numel() for p in self.timed.parameters())
        layers = (kv for blocks in self.keys_values.values() for kv in blocks.values())
        return width * sum(k.numel() + v.numel() for k, v in layers)

    def start_run(self, run: SamplerRun) -> ActiveDecoupled:
        """Keys and values come to the device, once per run; of a timed adapter at each step."""
        how = self.how
        target = None if how.target_mask is None else TargetMask(how.target_mask, NODE)
        window = run.at(how.start, how.end)
        at = self._held(run) if self.timed is None else self._timed(run)
        return ActiveDecoupled(at, window, how.weight, how.halves, how.place, target)

    def _held(self, run: SamplerRun) -> TokensAt:
        device, dtype = run.device_and_dtype
        own = normed(self.config)
        held: dict[Half, Mapping[BlockId, Beside]] = {
            half: {
                block: Decoupled(*(sent(x, device, dtype) for x in (k, v)), own)
                for block, (k, v) in layers.items()
            }
            for half, layers in self.keys_values.items()
        }
        return lambda sigma: held

    def _timed(self, run: SamplerRun) -> TokensAt:
        device, dtype = run.device_and_dtype
        encoder = deepcopy(self.timed).to(device, dtype)
        norms = own_norms(network(run.guider.model_patcher))
        last: dict[float, Mapping[Half, Mapping[BlockId, Beside]]] = {}

        def at(sigma: float) -> Mapping[Half, Mapping[BlockId, Beside]]:
            if sigma not in last:
                last.clear()
                last[sigma] = {
                    half: self._blocks(encoder.at(seen.to(device, dtype), sigma * TIMES, norms))
                    for half, seen in self.seen.items()
                }
            return last[sigma]

        return at

    def _blocks(self, blocks: Mapping[BlockId, Beside]) -> Mapping[BlockId, Beside]:
        return {block: blocks[block] for block in self.blocks}


def own_norms(net: Any) -> dict[BlockId, Norms]:
    """The weights of SD3.5's norms on the picture's queries and keys, where it has some."""
    norms = {}
    for index, block in enumerate(net.joint_blocks):
        attention = block.x_block.attn
        q, k = (getattr(norm, "weight", None) for norm in (attention.ln_q, attention.ln_k))
        if q is not None and k is not None:
            norms[DOUBLE, index, 0] = Norms(q.detach(), k.detach())
    return norms
