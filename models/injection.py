"""One engine for both papers (method.md section 4): which rows of an attention call read which reference, and what is recorded.

Knows the host only by the plain values of a call; nodes/host.py translates. A `Run` is all that changes during a sampler run.
Axes: b rows of a call = parts x pictures, n query tokens, m reference tokens, c channels, r reference pictures, y x grid.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from enum import Enum
from typing import Any, Protocol
from uuid import uuid4

import torch
from torch import Tensor, nn

from .attention import Attend, ReferenceTokens, attend_with_references, blend_queries
from .masks import resize_soft, token_map, token_weights
from .reference import BlockId, Grid, Half, ReferencePrompt


class Role(str, Enum):
    """What a part of the batch is to the guider."""
    COND = "cond"
    UNCOND = "uncond"
    OTHER = "other"

    @property
    def half(self) -> Half | None:
        return None if self is Role.OTHER else Half(self.value)


@dataclass(frozen=True)
class BlockSite:
    """A transformer block of the UNet: its module (attn1, attn2), and how many times smaller than the latent its grid is."""
    module: nn.Module
    divisor: int


@dataclass(frozen=True)
class AttnCall:
    """One attention call of the host, translated: extra_options of BasicTransformerBlock.forward (host.md 1.3)."""
    block: BlockId
    grid: Grid
    roles: tuple[Role, ...]  # per equal part of the batch, in the host's order
    areas: tuple[tuple[int, ...] | None, ...]  # per part: (height, width, y, x) in latent cells of a cropped call
    latent: Grid  # size of the whole latent

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [b n c] -> one view per part."""
        return x.chunk(len(self.roles))


@dataclass(frozen=True)
class SelfReferences:
    """What one injection adds to a self-attention call: tokens per role (k v [1 m c]) and who may look at them."""
    by_role: Mapping[Role, ReferenceTokens]
    query_mask: Tensor | None = None  # [parts 1|b n] in 0..1, 1 = may look


class ActiveInjection(Protocol):
    """An injection during one run: everything of it that changes."""
    def begin_step(self, sigma: float) -> None: ...
    def references(self, call: AttnCall, site: BlockSite, q: Tensor) -> SelfReferences | None: ...


class Recorder:
    """What a Ref-UNet call leaves: tokens [r n c] per (role, block), word maps [r n] of the mask blocks."""

    def __init__(self, blocks: Iterable[BlockId], map_blocks: Iterable[BlockId] = (), prompt: ReferencePrompt | None = None) -> None:
        self.blocks, self.map_blocks, self.prompt = frozenset(blocks), frozenset(map_blocks), prompt
        self.tokens: dict[tuple[Half, BlockId], Tensor] = {}
        self.maps: dict[BlockId, Tensor] = {}
        self.grids: dict[BlockId, Grid] = {}
        self.weights: dict[tuple[int, torch.device], Tensor] = {}  # of the subject's positions, by text length

    def self_tokens(self, call: AttnCall, n: Tensor) -> None:
        self.grids[call.block] = call.grid
        if call.block in self.blocks:
            for role, part in zip(call.roles, call.parts(n)):
                if role.half:
                    self.tokens[role.half, call.block] = part

    def cross(self, call: AttnCall, q: Tensor, k: Tensor, heads: int) -> None:
        if call.block in self.map_blocks and Role.COND in call.roles:
            i, w = call.roles.index(Role.COND), self.prompt.cross.shape[1]
            repeats = range(0, k.shape[1] // w * w, w)  # the host repeats the shorter of two prompts (method.md 2.3)
            if not repeats:  # another pack's own keys, not the text
                return
            if (k.shape[1], k.device) not in self.weights:
                positions = [[p + r for r in repeats for p in row] for row in self.prompt.subject.positions]
                self.weights[k.shape[1], k.device] = token_weights(positions, k.shape[1], k.device)
            self.maps[call.block] = token_map(call.parts(q)[i], call.parts(k)[i], self.weights[k.shape[1], k.device], heads)

    def of(self, half: Half) -> dict[BlockId, Tensor]:
        """Tokens of one half, in the order the UNet ran the blocks."""
        return {block: self.tokens[half, block] for block in self.grids if (half, block) in self.tokens}

    def word_map(self) -> Tensor | None:
        """Mean over the mask blocks, at the finest of their grids -> [r y x] fp32."""
        if not self.maps:
            return None
        finest = max(self.grids[b] for b in self.maps)
        return torch.stack([resize_soft(m.unflatten(1, self.grids[b]), finest) for b, m in self.maps.items()]).mean(0)


@dataclass
class Run:
    """Everything of ours that changes during one sampler run; a plain object, since the host copies dicts and lists."""
    recorder: Recorder | None = None
    sites: dict[BlockId, BlockSite] = field(default_factory=dict)
    parts: dict[Any, tuple[Role, tuple[int, ...] | None]] = field(default_factory=dict)  # uuid -> role and area
    latent: Grid = (0, 0)
    active: list[ActiveInjection] = field(default_factory=list)
    pending: AttnCall | None = None  # the call whose attention function comes next, and which attention it is
    pending_self: bool = False

    def read_conds(self, conds: Mapping[str, list[dict[str, Any]]]) -> None:
        """Give every processed cond its own uuid (the host shares one between area twins) and remember its role."""
        for kind, entries in conds.items():
            role = Role.UNCOND if "negative" in kind else Role.COND
            for entry in entries:
                entry["uuid"] = uuid4()
                self.parts[entry["uuid"]] = (role, tuple(entry["area"]) if entry.get("area") else None)

    def call(self, options: Mapping[str, Any]) -> AttnCall:
        known = [self.parts.get(u, (Role.OTHER, None)) for u in options.get("uuids") or (None,)]  # called past the sampler: nobody we know
        return AttnCall((*options["block"], options["block_index"]), tuple(options["activations_shape"][2:]),
                        tuple(role for role, _ in known), tuple(area for _, area in known), self.latent)

    def close(self) -> None:
        """Let go of everything, so that whoever still holds the run's options holds no tensors."""
        self.active, self.sites, self.parts = [], {}, {}
        self.recorder = self.pending = None

    def attend(self, call: AttnCall, attend: Attend, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        """Self-attention with every active reference in one softmax; parts that read nothing stay the host's own."""
        found = [r for i in self.active if (r := i.references(call, self.sites[call.block], q)) is not None]
        if not any(role in r.by_role for r in found for role in call.roles):
            return attend(q, k, v, heads)
        if k.shape[0] != q.shape[0]:  # HyperTile cuts only the queries into tiles; the host's kernels read the keys so
            k, v = (t.reshape(q.shape[0], -1, t.shape[-1]) for t in (k, v))
        rows = q.shape[0] // len(call.roles)
        groups: dict[tuple[bool, ...], list[int]] = {}  # parts that read the same injections share a call
        for part, role in enumerate(call.roles):
            groups.setdefault(tuple(role in r.by_role for r in found), []).append(part)
        out: dict[int, Tensor] = {}
        for reads, parts in groups.items():
            own = [take_parts(call, t, parts) for t in (q, k, v)]
            given = [(gather_parts(r, [call.roles[p] for p in parts], rows), r.query_mask) for r, yes in zip(found, reads) if yes]
            free = [tokens for tokens, mask in given if mask is None]
            masked = [(tokens, torch.cat([mask[p].expand(rows, -1) for p in parts])) for tokens, mask in given if mask is not None]
            mixed = attend_with_references(attend, *own, free, heads)
            for size in range(1, len(masked) + 1):  # where target masks overlap, a query reads all of their references
                for chosen in combinations(masked, size):
                    region = torch.stack([mask for _, mask in chosen]).prod(0)
                    mixed = blend_queries(mixed, attend_with_references(attend, *own, [*free, *(t for t, _ in chosen)], heads), region)
            if len(groups) == 1:
                return mixed
            out.update(zip(parts, mixed.chunk(len(parts))))
        return torch.cat([out[p] for p in range(len(call.roles))])


def take_parts(call: AttnCall, x: Tensor, parts: Sequence[int]) -> Tensor:
    """The rows of the listed parts; x itself where they are all of it, a view where it is one."""
    if len(parts) == len(call.roles):
        return x
    views = call.parts(x)
    return views[parts[0]] if len(parts) == 1 else torch.cat([views[p] for p in parts])


def gather_parts(references: SelfReferences, roles: Sequence[Role], rows: int) -> ReferenceTokens:
    """The tokens each row of the listed parts reads; one shared copy where all parts read the same."""
    tokens = [references.by_role[role] for role in roles]
    first = tokens[0]
    if all(t is first for t in tokens):
        return first
    return ReferenceTokens(torch.cat([t.k.expand(rows, -1, -1) for t in tokens]),
                           torch.cat([t.v.expand(rows, -1, -1) for t in tokens]), first.weight, first.mode, first.log_mask)
