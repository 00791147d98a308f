"""ConsiStory during one sampler run: shared self-attention, query blending, feature injection (arXiv 2402.03286, section 4).

Axes: b pictures of a part, n query tokens, l kept tokens, c channels, r anchors, w words, y x grid. Knows the host only
through AttnCall; what anchors of other runs are made of, only through AnchorSource.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..attention.attend import ReferenceTokens
from ..attention.sharing import Gathers, Sharing
from ..injection import Asker, AttnCall, BlockSite, Part, References, Role, Watcher
from ..network.traced import Places
from ..reference.bank import BlockId, Grid, Half, SubjectTokens, block_name, keys_values
from ..subject.correspondence import adain, correspond, inject, smooth
from ..subject.masks import resize_user_mask, token_map, token_weights
from .anchors import AnchorRecorder
from .plan import (
    SLACK,
    Schedule,
    StorySettings,
    SubjectMaps,
    dropped,
    positions_of,
    shared_groups,
    subject_masks,
)

NODE = "ConsiStory Shared Attention"
log = logging.getLogger(__name__)


class AnchorSource(Protocol):
    """Anchors that are not in the batch: generated earlier, or inverted photos."""

    aligned: bool  # their keys still have to be aligned (appendix E)

    def tokens(
        self, sigma: float, step: int, first: bool
    ) -> Mapping[Half, Mapping[BlockId, Tensor]]:
        """Kept tokens [l c] after dropout; first: of the first stage."""

    def loudness(self, block: BlockId) -> float:
        """How many of the subject's tokens each kept one stands for."""

    def outputs(self, sigma: float) -> Mapping[BlockId, Tensor]:
        """Self-attention outputs [l' c] of the subject's tokens, before injection."""

    def features(self) -> tuple[Tensor, Tensor]:
        """DIFT features [r n c], and the subject's flat positions [l'] among r*n, in host memory."""


@dataclass(frozen=True)
class Layout:
    """Where a model's features are: per block the divisor of its grid, the feature layers, the tap of DIFT."""

    divisors: Mapping[BlockId, int]
    output_blocks: frozenset[
        BlockId
    ]  # self-attentions whose outputs are injected: encoder and decoder at half the maps' divisor
    tap: int  # the output block whose incoming features are DIFT's
    divisor: int  # of both


class QueryRecorder(Watcher):
    """The vanilla pass of eq. (4): normed tokens of the shared layers; to_q has no bias, so blending them blends queries (I43)."""

    def __init__(self, blocks: frozenset[BlockId]) -> None:
        self.blocks, self.tokens = blocks, {}

    def self_tokens(self, call: AttnCall, n: Tensor) -> Tensor:
        if call.block in self.blocks:
            self.tokens[call.block] = n
        return n


@dataclass
class Story(Watcher):
    """All that changes. `begin_step` and the calls between come in any order of halves, any number of times."""

    settings: StorySettings
    schedule: Schedule
    layout: Layout
    pictures: int
    latent: Grid
    device: torch.device
    anchors: AnchorSource | None = None  # else the first pictures of the batch
    user_masks: Tensor | None = None  # [1|b Y X] in 0..1, host memory
    recorder: AnchorRecorder | None = None
    node: ClassVar[str] = NODE
    stage: int = 0  # 1, 2; 0 where one stage is enough
    sigma: float = 0.0
    maps: SubjectMaps = field(default_factory=SubjectMaps)
    vanilla: dict[BlockId, Tensor] = field(default_factory=dict)  # of the pass before this one
    tapped: float | None = None  # the noise level that DIFT's features come from
    features: Tensor | None = None  # [b n c]
    targets: Tensor | None = None  # [k] flat positions among b*n that are injected
    sources: Tensor | None = None  # [k] rows that they are injected from
    _soft: Tensor | None = (
        None  # the running mean of the words' maps [b w y x] in host memory; None: nothing is known yet
    )
    _masks: dict[Grid, Tensor | None] = field(default_factory=dict)
    _shared: dict[Grid, list[tuple[tuple[int, int], Tensor]]] = field(default_factory=dict)
    _kept: dict[Grid, list[Tensor]] = field(default_factory=dict)
    _all_kept: dict[Grid, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _seen: bool = False  # the model ran its attention in this step
    _missed: bool = False
    _subject: dict[Grid, Tensor | None] = field(
        default_factory=dict
    )  # the masks [b n] on the device
    _read: Mapping[Half, Mapping[BlockId, Tensor]] | None = None
    _outputs: Mapping[BlockId, Tensor] | None = None
    _weights: dict[tuple[SubjectTokens, int, int, Places], Tensor | None] = field(
        default_factory=dict
    )
    _told: bool = False
    _highest: float = 0.0  # noise level so far
    _fell: bool = False  # below an earlier one: there the subject may be known
    _calls: int = 0  # of the model
    _features_of: int | None = None  # the call that DIFT's features come from
    _no_word: str = ""  # why the subject's word could not be followed in this step
    _words_heard: bool = False  # a cross-attention with the word in it was heard in this run

    def __post_init__(self) -> None:
        self.stage = int(self.schedule.first_injection is not None)
        self._gathers = Gathers(self.pictures, self.settings.weight, self.device)

    # steps -----------------------------------------------------------------------------------------------------------

    def begin_step(self, sigma: float) -> None:
        self.sigma, self._read, self._outputs = sigma, None, None
        self._seen, self._no_word = False, ""
        self._fell, self._highest = self._fell or sigma < self._highest, max(sigma, self._highest)
        for held in (self._masks, self._shared, self._kept, self._all_kept, self._subject):
            held.clear()
        self._gathers.begin_step()
        self.maps.begin(sigma)
        if self.recorder:
            self.recorder.begin(self.stage, sigma)
        self._soft = (
            None if self.user_masks is not None else self.maps.mean(sigma)
        )  # the one wait for the device in a step
        if (
            self.anchors and self.settings.weight and self.settings.dropout < 1
        ):  # here: inside a call of the UNet no other may run
            self.read()
        if self.anchors and self.stage == 2 and self.schedule.injects(sigma):
            self.outputs()

    def require_size(self, size: Grid, sigma: float, who: Asker) -> None:
        """Positions, masks and features are those of the latent's size: ValueError where the sampler asks for another and they matter."""
        compares = self.stage == 1 and sigma <= self.schedule.features_at * (1 + SLACK)
        injects = self.stage == 2 and self.schedule.injects(sigma)
        if size != self.latent and (
            self.user_masks is None or self.recorder or self.wants or compares or injects
        ):
            raise ValueError(
                f"{NODE}: {who} asks the model for pictures of {size[0]}x{size[1]} where the latent is "
                f"{self.latent[0]}x{self.latent[1]}. Pictures that share a subject must keep their size in all steps. "
                + who.choose("keeps the size, such as euler or ddim")
            )

    def begin_call(self) -> None:
        """The model is about to be asked: of the passes of its UNet in one call the last counts, of several calls the first.

        Other nodes ask again after the call (PAG, SAG), and run a reference of their own before it, inside (Reference ControlNets).
        """
        self._calls += 1

    def end_step(self) -> None:
        """Say once where the model answered without its attention: then nothing was shared, whatever the settings.

        ValueError where another node left no cross-attention in which the subject's word could be followed.
        """
        if self._no_word and self.sigma not in self.maps.sigmas:
            raise ValueError(f"{NODE}: {self._no_word}")
        if not self._seen and not self._missed:
            self._missed = True
            log.warning(
                "%s: at sigma %.4g the model answered without running its attention, so nothing was shared there. A node that "
                "skips calls (EasyCache, LazyCache) does this, one that computes the network in a copy of its own, or a model "
                "compiled before this node: remove the former, put the latter behind this node.",
                NODE,
                self.sigma,
            )

    @property
    def first_stage_ends(self) -> bool:
        """After the call at this noise level: what the second stage needs is there."""
        return self.stage == 1 and not self.settings.official and self.features is not None

    def begin_second_stage(self) -> None:
        """Match the pictures (eq. 8, 9), choose what is injected (eq. 5, the gate of appendix B), and forget what comes anew."""
        last = -1.0 if self.settings.official or self.tapped is None else self.tapped
        self._masks.clear()
        self._soft = None if self.user_masks is not None else self.maps.mean(last, inclusive=True)
        self._match()
        self.maps.forget(self.settings.inject[0] * (1 + SLACK))
        self.stage, self.features = 2, None

    def _match(self) -> None:
        grid = self._grid(self.layout.divisor)
        masks = self.masks(grid)
        if masks is None or self.features is None:
            if self.features is not None and not self._words_heard:
                log.warning(
                    "%s: the subject's word could not be followed, so no features are injected: another node computes the "
                    "network's cross-attention by itself. Remove that node, or wire masks of the subject.",
                    NODE,
                )
            else:
                log.warning(
                    "%s: the pictures could not be compared, so no features are injected: this sampler run ends before, or a node "
                    "that skips calls (EasyCache, LazyCache) skipped the one in which they are.",
                    NODE,
                )
            return
        k = self.anchor_count
        if self.recorder:
            self.recorder.matched(self.features[:k], torch.cat(positions_of(masks, range(k))))
        if self.anchors:
            sources, subject = self.anchors.features()
            sources, kept = sources.to(self.features), [subject] * self.pictures
        else:
            sources, per_picture = self.features[:k], positions_of(masks, range(k))
            kept = [
                torch.cat([per_picture[j] for j in read])
                if read
                else torch.zeros(0, dtype=torch.long)
                for (first, last), read in shared_groups(self.pictures, self.settings.anchors)
                for _ in range(first, last)
            ]
        found = correspond(
            self.features,
            masks.flatten(1).to(self.device),
            sources,
            [i.to(self.device) for i in kept],
        )
        targets = found.keep.flatten().cpu().nonzero().squeeze(1)  # once for the whole run
        rows = found.source.flatten().cpu()[targets]
        if self.anchors:  # flat positions among r*n -> rows of the stored outputs
            rows = torch.searchsorted(subject, rows)
        self.targets, self.sources = targets.to(self.device), rows.to(self.device)
        log.info(
            "%s: %d of %d subject tokens found their like", NODE, len(targets), int(masks.sum())
        )

    def finish(self) -> None:
        """Tell the recorder where the anchors' subjects were in the end, and the words' maps on the way; say if nothing was shared."""
        if not (self._fell or self.anchors) and self.user_masks is None:
            log.warning(
                "%s: no step of this run comes behind a noisier one, so nothing was shared: where the subject is, is known from "
                "the step before alone. Sample 2 steps or more, from much noise to little, or wire masks.",
                NODE,
            )
        if not self.recorder:
            return
        self._masks.clear()
        self._soft = None if self.user_masks is not None else self.maps.mean(-1.0, inclusive=True)
        grids = {self.latent, *(layer.grid for layer in self.recorder.layers.values())}
        self.recorder.masks = {
            g: m[: self.anchor_count].clone() for g in grids if (m := self.masks(g)) is not None
        }
        seen = sorted(self.recorder.latents)
        if self._soft is not None and {*seen} <= {*self.maps.sigmas}:
            self.recorder.maps = (
                torch.stack([self.maps.at(s)[: self.anchor_count].sum(1) for s in seen])
                .float()
                .cpu()
            )

    # masks -----------------------------------------------------------------------------------------------------------

    @property
    def anchor_count(self) -> int:
        """Pictures of the batch that others read."""
        return 0 if self.anchors else min(self.settings.anchors or self.pictures, self.pictures)

    def _grid(self, divisor: int) -> Grid:
        return -(-self.latent[0] // divisor), -(-self.latent[1] // divisor)

    def masks(self, grid: Grid) -> Tensor | None:
        """Where the subjects are at this step: bool [b y x] in host memory; None before anything is known."""
        if grid not in self._masks:
            if self.user_masks is not None:
                found = resize_user_mask(self.user_masks, grid).expand(self.pictures, -1, -1)
            else:
                found = (
                    None
                    if self._soft is None
                    else subject_masks(self._soft, grid, self.settings.threshold)
                )
                if found is not None and not found.any() and not self._told:
                    self._told = True
                    log.warning(
                        "%s: the subject's word lights up nowhere, so nothing is shared at this step. Describe the subject more "
                        "plainly, or wire masks.",
                        NODE,
                    )
            self._masks[grid] = found
        return self._masks[grid]

    def kept(self, grid: Grid) -> list[Tensor]:
        """Per anchor of the batch, the flat positions [l] among b*n that others see at this step: its mask after dropout."""
        if grid not in self._kept:
            masks, s = self.masks(grid), self.settings
            if masks is None:
                self._kept[grid] = [torch.zeros(0, dtype=torch.long)] * self.anchor_count
            else:
                step = self.schedule.step(self.sigma)
                masks = torch.stack(
                    [
                        masks[i] & ~dropped(s.seed, i, step, grid, s.dropout).view(grid)
                        for i in range(self.anchor_count)
                    ]
                )
                self._kept[grid] = positions_of(masks, range(self.anchor_count))
        return self._kept[grid]

    def shared(self, grid: Grid) -> list[tuple[tuple[int, int], Tensor]]:
        """Per group of pictures the flat positions it reads, on the device; groups that read nothing are left out."""
        if grid not in self._shared:
            kept = self.kept(grid)
            groups = shared_groups(self.pictures, self.settings.anchors)
            reads = [(who, torch.cat([kept[j] for j in read])) for who, read in groups if read]
            self._shared[grid] = [
                (who, index.to(self.device, non_blocking=True))
                for who, index in reads
                if len(index)
            ]
        return self._shared[grid]

    def read(self) -> Mapping[Half, Mapping[BlockId, Tensor]]:
        """This step's tokens of anchors that are not in the batch."""
        if self._read is None:
            self._read = self.anchors.tokens(
                self.sigma, self.schedule.step(self.sigma), self.stage == 1
            )
        return self._read

    def outputs(self) -> Mapping[BlockId, Tensor]:
        """This step's self-attention outputs of anchors that are not in the batch."""
        if self._outputs is None:
            self._outputs = self.anchors.outputs(self.sigma)
        return self._outputs

    @property
    def shares(self) -> bool:
        """Whether anyone reads anything at this step; else it is the host's own."""
        if not self.settings.weight or self.settings.dropout == 1:
            return False
        if self.anchors:
            return any(len(t) for tokens in self.read().values() for t in tokens.values())
        grids = {self._grid(self.layout.divisors[b]) for b in self.settings.blocks}
        return any(self.shared(grid) for grid in grids)

    # the UNet's calls ------------------------------------------------------------------------------------------------

    def sharing_parts(self, parts: Sequence[Part]) -> list[int]:
        """Parts of a call that share: whole pictures of the halves chosen."""
        return [
            i
            for i, p in enumerate(parts)
            if p.role is not Role.OTHER
            and p.area is None
            and self.settings.halves.source(p.role.half)
        ]

    def wants_vanilla(self, parts: Sequence[Part]) -> bool:
        """Whether a pass without sharing has to come first, eq. (4)."""
        return bool(self.schedule.blend(self.sigma) and self.sharing_parts(parts) and self.shares)

    def cross(self, call: AttnCall, q: Tensor, k: Tensor, heads: int) -> None:
        if call.block not in self.settings.map_blocks or self.user_masks is not None:
            return
        done: set[int] = set()
        for i in self.sharing_parts(call.texts):
            part = call.texts[i]
            if (
                part.role is not Role.COND
                or part.subject is None
                or not part.text
                or id(part) in done
            ):
                continue
            if call.unknown:
                self._no_word = f"{call.unknown[:-1]}, or wire masks of the subject."
                continue
            key = part.subject, part.text, k.shape[1], call.places[i] if call.places else ()
            if key not in self._weights:
                words = [
                    [call.word(i, row, k.shape[1], part.text) for row in word]
                    for word in part.subject.of_words(self.pictures)
                ]
                self._weights[key] = (
                    None
                    if any(None in rows for rows in words)
                    else torch.stack(
                        [token_weights(rows, k.shape[1], k.device) for rows in words], -1
                    )
                )
            if self._weights[key] is None:
                self._no_word = (
                    f"another node's cross-attention patch leaves {k.shape[1]} keys of other contents in block "
                    f"{block_name(call.block)} where the text has {part.text} tokens, so the subject's word cannot be "
                    "followed there (NegPip, regional prompts). Wire masks of the subject, or remove that node."
                )
                continue
            q_part = call.parts(q)[i]
            self.require_whole(call, q_part)
            maps = token_map(q_part, call.parts(k)[i], self._weights[key], heads)  # [b n w]
            self.maps.add(
                self.sigma,
                call.block,
                id(part),
                maps.movedim(-1, 1).unflatten(2, call.grid),
                self._calls or None,
            )
            self._words_heard = True
            done.add(id(part))

    def require_whole(self, call: AttnCall, x: Tensor) -> None:
        """Every part must hold every picture, whole, or positions would mean other things: ValueError."""
        if call.unknown:
            raise ValueError(f"{NODE}: {call.unknown}")
        if x.shape[0] != self.pictures:
            raise ValueError(
                f"{NODE}: the model was given {x.shape[0]} pictures at once, but the batch has {self.pictures}. Pictures that "
                "share a subject must be sampled together: remove the node that splits them (context windows, HyperTile)."
            )
        rows, columns = self._grid(self.layout.divisors[call.block])
        if call.cut:
            raise ValueError(
                f"{NODE}: the model was given {call.given[0]}x{call.given[1]} of a latent of {call.cut[0]}x{call.cut[1]}. "
                "Pictures that share a subject must be sampled whole: remove the node that cuts them (tiled diffusion)."
            )
        if x.shape[1] > rows * columns and call.grid == (rows, columns):
            raise ValueError(
                f"{NODE}: in block {block_name(call.block)} each picture has {x.shape[1]} keys where its own {rows}x{columns} "
                f"tokens make {rows * columns}: another node lengthened them (StyleAligned shares every picture with all). "
                "Remove that node; this one shares the subject alone."
            )
        if x.shape[1] != rows * columns or call.grid != (rows, columns):
            raise ValueError(
                f"{NODE}: block {block_name(call.block)} has {x.shape[1]} tokens ({call.grid[0]}x{call.grid[1]}) where the "
                f"latent's size makes {rows}x{columns}. A node that changes the grid (Deep Shrink), merges or tiles tokens is "
                "on the model: remove it."
            )

    def require_own_keys(self, call: AttnCall, q: Tensor, k: Tensor) -> None:
        """A picture's keys must be its own tokens alone, q [b n c], k [b m c]: ValueError."""
        if k.shape[1] < q.shape[1]:
            raise ValueError(
                f"{NODE}: another node shortened the keys of self-attention: block {block_name(call.block)} has {k.shape[1]} "
                f"keys for {q.shape[1]} tokens ({call.grid[0]}x{call.grid[1]}), and which of them are left cannot be told. "
                "Remove that node."
            )
        self.require_whole(call, k)

    def self_tokens(self, call: AttnCall, n: Tensor) -> Tensor:
        self._seen = True
        if call.block not in self.settings.blocks:
            return n
        parts = self.sharing_parts(call.texts)
        if self.recorder and parts:
            kept, index = self._recorded(call.grid)
            for half in {call.roles[i].half: None for i in parts}:  # the first part of each half
                part = call.parts(n)[next(i for i in parts if call.roles[i].half is half)]
                self.require_whole(call, part)
                self.recorder.tokens(
                    self.stage,
                    self.sigma,
                    call.block,
                    call.grid,
                    half,
                    part.flatten(0, 1).index_select(0, index),
                    kept,
                    self._calls or None,
                )
        vanilla = self.vanilla.get(call.block)
        if vanilla is None:
            return n
        nu = self.schedule.blend(self.sigma)
        if len(parts) == len(call.roles):
            return torch.lerp(n, vanilla, nu)
        pairs = zip(call.parts(n), call.parts(vanilla))
        return torch.cat(
            [torch.lerp(a, b, nu) if i in parts else a for i, (a, b) in enumerate(pairs)]
        )

    def _recorded(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Flat positions [l] of what all anchors of the batch show at this step, in host memory and on the device."""
        if grid not in self._all_kept:
            kept = torch.cat(self.kept(grid))
            self._all_kept[grid] = kept, kept.to(self.device, non_blocking=True)
        return self._all_kept[grid]

    @property
    def wants(self) -> bool:
        return self.settings.weight > 0 and self.settings.dropout < 1

    def concerns(self, call: AttnCall) -> bool:
        return self.wants and not call.cross and call.block in self.settings.blocks

    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> list[References | Sharing]:
        """Eq. (2), (3): gathered tokens beside a picture's own, never a mask over b*n keys."""
        s = self.settings
        parts = self.sharing_parts(call.texts) if self.concerns(call) else ()
        if not parts:
            return []
        self.require_whole(call, call.parts(q)[0])
        self.require_own_keys(call, call.parts(q)[0], call.parts(k)[0])
        if self.anchors:
            return self._references_to_anchors(call, site, k, parts)
        reads = dict(self.shared(call.grid))
        if not reads:
            return []
        groups = [who for who, _ in shared_groups(self.pictures, s.anchors)]
        return [
            Sharing(
                tuple(parts),
                self._gathers.of(call.grid, len(parts), groups, reads, q.dtype),
                s.weight,
            )
        ]

    def _references_to_anchors(
        self, call: AttnCall, site: BlockSite, k: Tensor, parts: Sequence[int]
    ) -> list[References]:
        made, projected = {}, {}
        for i in parts:
            half = self.settings.halves.source(call.roles[i].half)
            tokens = self.read()[half][call.block]
            if not len(tokens):
                return []
            if half not in projected:
                projected[half] = keys_values(site.module.attn1, tokens.to(k)[None])
            keys, values = projected[half]
            if self.anchors.aligned and self.settings.align_keys:
                keys = self._aligned(keys, call.parts(k)[i], call.grid)
                values = values.expand(len(keys), -1, -1)
            made[i] = ReferenceTokens(
                keys, values, self.settings.weight * self.anchors.loudness(call.block)
            )
        return [References({}, by_part=made)]

    def _aligned(self, keys: Tensor, own: Tensor, grid: Grid) -> Tensor:
        """Keys [1 l c] of the photo's subject with the statistics of this picture's subject, own [b n c] -> [1|b l c] (appendix E)."""
        if grid not in self._subject:
            masks = self.masks(grid)
            self._subject[grid] = (
                None if masks is None else masks.flatten(1).to(self.device, non_blocking=True)
            )
        where = self._subject[grid]
        return keys if where is None else adain(keys, own, where=where)

    def self_output(self, call: AttnCall, out: Tensor) -> Tensor:
        """Eq. (6): outputs after to_out, cond half, from a snapshot of all pictures, so that their order does not matter (Q1)."""
        if (
            call.block not in self.layout.output_blocks
            or self.stage != 2
            or not self.schedule.injects(self.sigma)
        ):
            return out
        parts = [i for i in self.sharing_parts(call.texts) if call.roles[i] is Role.COND]
        mixed = list(call.parts(out)) if parts else []
        for i in parts:
            x = mixed[i]
            self.require_whole(call, x)
            if (
                self.recorder and self.targets is not None and i == parts[0]
            ):  # None: the pictures could not be compared
                self.recorder.output(self.sigma, call.block, call.grid, x, self._calls or None)
            if self.targets is not None and len(self.targets):
                snapshot = self.outputs()[call.block].to(x) if self.anchors else x.flatten(0, 1)
                mixed[i] = inject(x, snapshot, self.sources, self.targets, self.settings.injection)
        return torch.cat(mixed) if parts and self.targets is not None and len(self.targets) else out

    def output_block(self, index: int, h: Tensor, parts: Sequence[Part]) -> None:
        if (
            index != self.layout.tap
            or self.stage != 1
            or self.sigma > self.schedule.features_at * (1 + SLACK)
        ):
            return
        for i in self.sharing_parts(parts):
            if parts[i].role is Role.COND and (
                self.features is None or self._features_of == self._calls
            ):
                self.tapped, self._features_of = self.sigma, self._calls or None
                self.features = smooth(h.chunk(len(parts))[i].float()).flatten(2).movedim(1, 2)
                return
