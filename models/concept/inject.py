"""A photo read as part of the prompt: paper A eq. (6)-(9) in every cross-attention
(arXiv 2403.11284, section 2.3).

Axes: b rows of a call, m tokens of a photo, n query tokens, c channels, y x the mask's own size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.parts import Merge, References
from ..attention.references import ReferenceTokens
from ..attention.weights import WeightMode
from ..copies import sent
from ..network.blocks import BlockId
from ..network.call import AttnCall, Half, Halves, Role
from ..network.sites import BlockSite
from ..subject.target import TargetMask
from .encoder import KeysValues

NODE = "Cross-Attn Detail Inject"


@dataclass(frozen=True)
class ConceptReading:
    """How one concept is read; its keys and values are there before a run begins."""

    # (k, v) [1 m c] per block, where the encoder made them; uncond: of the empty image
    keys_values: Mapping[Half, KeysValues]
    pictures: int
    weight: float
    mode: WeightMode
    merge: Merge
    start: float  # shares of the sampled schedule between which the concept is read
    end: float
    halves: Halves
    target_mask: Tensor | None = None  # [1|b y x] at its own size

    def bytes_held(self, width: int) -> int:
        """On the device, for the whole run: keys and values of every layer; width: of a number."""
        return width * sum(k.numel() + v.numel() for _, k, v in self._layers())

    def active(
        self, device: torch.device, dtype: torch.dtype, window: tuple[float, ...]
    ) -> ActiveConcept:
        """Eq. (6), once per run: the keys and values come to the device, in the dtype of the run;
        window: sigmas from, until.
        """
        tokens = {key: self._tokens(key[0], k, v, device, dtype) for key, k, v in self._layers()}
        target = None if self.target_mask is None else TargetMask(self.target_mask, NODE)
        return ActiveConcept(self, tokens, target, window)

    def _layers(self) -> Iterator[tuple[tuple[Half, BlockId], Tensor, Tensor]]:
        for half, layers in self.keys_values.items():
            for block, (k, v) in layers.items():
                yield (half, block), k, v

    def _tokens(
        self, half: Half, k: Tensor, v: Tensor, device: torch.device, dtype: torch.dtype
    ) -> ReferenceTokens:
        k, v = (sent(x, device, dtype) for x in (k, v))
        log_mask = None
        if self.pictures > 1 and half is Half.COND:  # R equal pictures are one (I9)
            log_mask = torch.full((k.shape[1],), -math.log(self.pictures), device=device)
        return ReferenceTokens(k, v, self.weight, self.mode, log_mask)


@dataclass
class ActiveConcept:
    """A ConceptReading during one run."""

    config: ConceptReading
    tokens: Mapping[tuple[Half, BlockId], ReferenceTokens]
    target: TargetMask | None
    window: tuple[float, ...]  # sigmas: from, until
    inside: bool = False
    node: ClassVar[str] = NODE

    @property
    def wants(self) -> bool:
        return self.inside

    def concerns(self, call: AttnCall) -> bool:
        return call.cross and self.inside and (Half.COND, call.block) in self.tokens

    def begin_step(self, sigma: float) -> None:
        self.inside = self.window[1] <= sigma <= self.window[0]

    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> list[References]:
        if not self.concerns(call):
            return []
        by_role = {
            role: self.tokens[half, call.block]
            for role in dict.fromkeys(call.roles)
            if role is not Role.OTHER and (half := self.config.halves.source(role.half))
        }
        mask = self.target(call, q) if self.target else None
        return [References(by_role, mask, self.config.merge)]
