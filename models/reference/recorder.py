"""What a pass over a reference leaves: its tokens in every block, and where its pictures look at
the subject's words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..network.blocks import BlockId, Grid, block_name
from ..network.call import AttnCall, Half, Part, Role
from ..network.traced import Places
from ..network.watch import Watcher
from ..subject.masks import resize_soft, token_map, token_weights
from .bank import ReferencePrompt
from .rows import kept_of


class Recorder(Watcher):
    """What a Ref-UNet call leaves: tokens [r n c] per (role, block), word maps [r n] of the mask
    blocks.

    outputs: blocks whose self-attention outputs (cond) are kept too; features_at: the output block
    whose features h are;
    kept: flat positions [l] of the tokens of a grid that are wanted, then [l c]: a transformer's
    whole ones take gigabytes.
    """

    def __init__(
        self,
        blocks: Iterable[BlockId],
        map_blocks: Iterable[BlockId] = (),
        prompt: ReferencePrompt | None = None,
        outputs: Iterable[BlockId] = (),
        features_at: int | BlockId | None = None,
        kept: Mapping[Grid, Tensor] | None = None,
    ) -> None:
        self.kept = kept or {}
        self.blocks, self.map_blocks, self.prompt = frozenset(blocks), frozenset(map_blocks), prompt
        self.output_blocks, self.tap = frozenset(outputs), features_at
        self.outputs: dict[BlockId, Tensor] = {}
        self.features: Tensor | None = None
        self.tokens: dict[tuple[Half, BlockId], Tensor] = {}
        self.maps: dict[BlockId, Tensor] = {}
        self.grids: dict[BlockId, Grid] = {}
        # of the subject's positions among the keys
        self.weights: dict[tuple[int, torch.device, Places], Tensor | None] = {}
        # what this pass has not reached yet
        self._left: set[tuple[str, BlockId | int | None]] = set()

    def begin_pass(self) -> None:
        self._left = {
            *(("tokens", b) for b in self.blocks),
            *(("map", b) for b in self.map_blocks),
            *(("output", b) for b in self.output_blocks),
        }
        if self.tap is not None:
            self._left.add(("features", self.tap))

    @property
    def complete(self) -> bool:
        return not self._left

    def self_tokens(self, call: AttnCall, n: Tensor) -> Tensor:
        self.grids[call.block] = call.grid
        if call.block in self.blocks:
            for role, part in zip(call.roles, call.parts(n)):
                if role.half:
                    self.tokens[role.half, call.block] = self._wanted(call, part)
        self._left.discard(("tokens", call.block))
        return n

    def _wanted(self, call: AttnCall, tokens: Tensor) -> Tensor:
        """Tokens [r n c] of one part, or the wanted ones of them [l c]."""
        if call.grid not in self.kept:
            return tokens
        return kept_of(call.block, call.grid, tokens, self.kept[call.grid])

    def self_output(self, call: AttnCall, out: Tensor) -> Tensor:
        if call.block in self.output_blocks and Role.COND in call.roles:
            self.outputs[call.block] = call.parts(out)[call.roles.index(Role.COND)]
        self._left.discard(("output", call.block))
        return out

    def output_block(self, index: int | BlockId, h: Tensor, parts: Sequence[Part]) -> None:
        roles = [p.role for p in parts]
        if index == self.tap and Role.COND in roles:
            # the next block's patches may write into h
            self.features = h.chunk(len(parts))[roles.index(Role.COND)].clone()
        self._left.discard(("features", index))

    def cross(self, call: AttnCall, q: Tensor, k: Tensor, heads: int) -> None:
        self._left.discard(("map", call.block))
        if call.block not in self.map_blocks or call.unknown:
            return
        for i in (i for i, role in enumerate(call.roles) if role is Role.COND):
            key = k.shape[1], k.device, call.places[i] if call.places else ()
            if key not in self.weights:
                words = [
                    call.word(i, row, k.shape[1], self.prompt.cross.shape[1])
                    for row in self.prompt.subject.positions
                ]
                self.weights[key] = (
                    None if None in words else token_weights(words, k.shape[1], k.device)
                )
            if self.weights[key] is not None:  # else another pack's own keys, not the text
                own, text = call.parts(q)[i], call.parts(k)[i]
                self.maps[call.block] = token_map(
                    own, text, self.weights[key], heads, call.bias_of(i)
                )
                return

    def of(self, half: Half) -> dict[BlockId, Tensor]:
        """Tokens of one half, in the order the UNet ran the blocks; ValueError where some were not
        seen.
        """
        if unseen := sorted(block for block in self.blocks if (half, block) not in self.tokens):
            raise ValueError(
                f"Kindred: the pass over the reference saw nothing of "
                f"{', '.join(map(block_name, unseen))}. Another node "
                "computes the network by itself, in a copy of its own. Remove that node from the "
                "MODEL; if the error stays, "
                "start ComfyUI again, since some packs leave their copy in the checkpoint."
            )
        return {
            block: self.tokens[half, block] for block in self.grids if (half, block) in self.tokens
        }

    def word_map(self) -> Tensor | None:
        """Mean over the mask blocks, at the finest of their grids -> [r y x] fp32."""
        if not self.maps:
            return None
        finest = max(self.grids[b] for b in self.maps)
        return torch.stack(
            [resize_soft(m.unflatten(1, self.grids[b]), finest) for b, m in self.maps.items()]
        ).mean(0)
