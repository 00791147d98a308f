"""A reference read by the pictures being made: paper A eq. (1)-(3) in every self-attention
(arXiv 2403.11284, section 2.2).

Axes: b rows of a call, l kept tokens, n query tokens, c channels, y x the mask's own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.joint import TextShare
from ..attention.parts import References
from ..attention.references import ReferenceTokens
from ..attention.weights import WeightMode
from ..network.blocks import BlockId, Grid
from ..network.call import AttnCall, Half, Halves, Role
from ..network.rope import Positions
from ..network.sites import BlockSite
from ..network.unplaced import Unplaced
from ..subject.target import TargetMask
from .bank import ReferenceBank
from .placing import Place, Placing

NODE = "Masked Self-Attn Inject"
# sigma -> the kept tokens [l c] of every block, per half
TokensAt = Callable[[float], Mapping[Half, Mapping[BlockId, Tensor]]]


@dataclass(frozen=True)
class MaskedSelf:
    """How one reference is read."""

    bank: ReferenceBank
    weight: float
    mode: WeightMode
    blocks: frozenset[BlockId]
    start: float  # shares of the sampled schedule between which the reference is read
    end: float
    halves: Halves
    target_mask: Tensor | None = None  # [1|b y x] at the mask's own size
    text: TextShare = TextShare.KEPT
    positions: Positions = Positions.OWN

    @property
    def sources(self) -> frozenset[Half]:
        return frozenset(s for half in Half if (s := self.halves.source(half)))

    def bytes_held(
        self, pictures: int, sizes: Mapping[BlockId, tuple[int, int]], width: int
    ) -> int:
        """On the device: this step's row and the next one, and the longest keys and values of a
        layer.

        sizes: tokens of a picture and their channels, per block; width: bytes of a number.
        """
        kept = {layer: self.bank.most_kept[layer.grid] for layer in self.bank.layers}
        row = sum(kept[layer] * layer.channels for layer in self.bank.layers)
        readers = pictures * (1 if self.halves is Halves.COND else 2)
        longest = max(
            2 * (sizes[layer.block][0] + kept[layer]) * sizes[layer.block][1]
            for layer in self.bank.layers
        )
        return (2 * len(self.sources) * row + readers * longest) * width

    def active(self, tokens_at: TokensAt, window: tuple[float, ...]) -> ActiveMaskedSelf:
        """The same during a run; window: sigmas from, until."""
        target = None if self.target_mask is None else TargetMask(self.target_mask, NODE)
        placing = Placing(self.positions, self.bank.pictures)
        return ActiveMaskedSelf(self, tokens_at, window, placing, target=target)


@dataclass
class ActiveMaskedSelf:
    """A MaskedSelf during one run: the current step's tokens, and target masks per grid."""

    config: MaskedSelf
    tokens_at: TokensAt
    window: tuple[float, ...]  # sigmas: from, until
    placing: Placing
    sigma: float = 0.0  # of the step
    tokens: Mapping[Half, Mapping[BlockId, Tensor]] | None = None
    target: TargetMask | None = None
    # what puts positions on keys that are kept without, by grid and length of the text
    codes: dict[tuple[Grid, int], Tensor] = field(default_factory=dict)
    node: ClassVar[str] = NODE

    @property
    def wants(self) -> bool:
        return self.tokens is not None

    def concerns(self, call: AttnCall) -> bool:
        return not call.cross and self.tokens is not None and call.block in self.config.blocks

    def begin_step(self, sigma: float) -> None:
        self.sigma, inside = sigma, self.window[1] <= sigma <= self.window[0]
        self.tokens = self.tokens_at(sigma) if inside else None

    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> list[References]:
        """Keys and values of the reference, projected once per call and not once per row."""
        if not self.concerns(call):
            return []
        source = {
            role: s
            for role in dict.fromkeys(call.roles)
            if role is not Role.OTHER and (s := self.config.halves.source(role.half))
        }
        halves = list(dict.fromkeys(source.values()))
        if not halves or not len(self.tokens[halves[0]][call.block]):
            return []
        k, v = self._keys_values(call, site, halves, q)
        weight, log_mask = self._weight(call.block, k)
        more = {
            "dims_text": self.config.text is TextShare.PLAIN,
            "query_turn": self._queries(call, site, q),
        }
        reference_tokens = partial(
            ReferenceTokens, weight=weight, mode=self.config.mode, log_mask=log_mask, **more
        )
        of_half = {
            half: reference_tokens(k[i : i + 1], v[i : i + 1]) for i, half in enumerate(halves)
        }
        return [
            References(
                {role: of_half[half] for role, half in source.items()},
                self.target(call, q) if self.target else None,
                by_row=reference_tokens(k, v) if halves == list(source.values()) else None,
            )
        ]

    def _keys_values(
        self, call: AttnCall, site: BlockSite, halves: Sequence[Half], q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """k, v [halves l c] of the block, in the queries' dtype and on their device."""
        tokens = [self.tokens[half][call.block][None].to(q) for half in halves]
        if site.backbone is None:
            return site.keys_values(tokens[0] if len(tokens) == 1 else torch.cat(tokens))
        k, v = zip(*(self._placed(call, site, *pair) for pair in zip(halves, tokens)))
        return torch.cat(k), torch.cat(v)

    def _placed(
        self, call: AttnCall, site: BlockSite, half: Half, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A transformer's tokens of one half [1 l c] -> k, v where they are to stand."""
        bank, there = self.config.bank, self.config.bank.prompts[half].cross.shape[1]
        if self.config.positions is Positions.OWN:
            here = _text_of(call)
            code = self._code(call.block, site.backbone.unplaced, here or 0, tokens.device)
            return site.keys_values(tokens, (there, here), code)
        k, v = site.keys_values(tokens)
        grid = bank.grids[call.block]
        place = self._place(call, site, there)
        turn = site.backbone.turn_of(call.block)
        return self.placing.keys(k, turn, place, bank.kept_at(grid, self.sigma)), v

    def _code(
        self, block: BlockId, unplaced: Unplaced | None, text: int, device: torch.device
    ) -> Tensor | None:
        """The code of the kept keys' places beside a text of so many tokens [l d/2 2 2], made once
        in a run; None where keys are kept in their places.
        """
        if unplaced is None:
            return None
        grid = self.config.bank.grids[block]
        if (grid, text) not in self.codes:
            cells = self.config.bank.cells[grid].to(device)
            self.codes[grid, text] = unplaced.places(text, cells)
        return self.codes[grid, text]

    def _place(self, call: AttnCall, site: BlockSite, there: int) -> Place:
        """Of the reference beside this call's picture; there: tokens of the text beside it."""
        turn, grid = site.backbone.turn_of(call.block), self.config.bank.grids[call.block]
        here = _text_of(call)
        texts = tuple(map(site.backbone.text_tokens, (there, there if here is None else here)))
        return Place.of(turn, grid, call.grid, texts)

    def _queries(
        self, call: AttnCall, site: BlockSite, q: Tensor
    ) -> Callable[[Tensor], Tensor] | None:
        """What takes the queries' positions off where the reference has none."""
        if self.config.positions is not Positions.NONE:
            return None
        place = self._place(call, site, 0)
        return site.backbone.turn_of(call.block).out_of_place(call.grid, place.here, q.device)

    def _weight(self, block: BlockId, k: Tensor) -> tuple[float, Tensor | None]:
        """The weight and what is added to the logits [l], where each kept token stands for several
        of the subject's.
        """
        c = self.config
        louder = c.bank.loudness[c.bank.grids[block]]
        if c.mode is WeightMode.LOGIT_BIAS or louder == 1:
            return c.weight * louder, None
        return c.weight, k.new_full((k.shape[1],), math.log(louder), dtype=torch.float32)


def _text_of(call: AttnCall) -> int | None:
    """How many rows the text has that the call's parts read; None where that is not known."""
    return next((part.text for part in call.texts if part.role is not Role.OTHER), None)
