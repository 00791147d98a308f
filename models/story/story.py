"""ConsiStory during one sampler run: shared self-attention, query blending, feature injection
(arXiv 2402.03286, section 4).

Axes: b pictures of a part, n query tokens, l kept tokens, c channels, r anchors, w words, y x grid.
Knows the host only through AttnCall; what anchors of other runs are made of, only through
AnchorSource.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.parts import References
from ..attention.references import ReferenceTokens
from ..attention.sharing import Gathers, Sharing
from ..copies import sent
from ..network.blocks import BlockId, Grid
from ..network.call import Asker, AttnCall, Part, Role
from ..network.sites import BlockSite
from ..network.watch import Watcher
from ..subject.correspondence import adain, inject
from ..subject.maps import positions_of
from .anchors import AnchorRecorder
from .followed import FollowedWords
from .matching import Comparison, candidates_in_batch, match, say_unmatched
from .plan import NODE, SLACK, Schedule, StorySettings, shared_groups
from .refusals import require_own_keys, require_whole
from .sources import AnchorSource, Layout
from .step import Step

log = logging.getLogger(__name__)


@dataclass
class Story(Watcher):
    """All that changes. `begin_step` and the calls between come in any order of halves, any number
    of times.
    """

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
    comparison: Comparison = field(default_factory=Comparison)
    vanilla: dict[BlockId, Tensor] = field(default_factory=dict)  # of the pass before this one
    _seen: bool = False  # the model ran its attention in this step
    _said: set[str] = field(default_factory=set)  # warnings that come once in a run
    _highest: float = 0.0  # noise level so far
    _fell: bool = False  # below an earlier one: there the subject may be known
    _calls: int = 0  # of the model

    def __post_init__(self) -> None:
        self.stage = int(self.schedule.first_injection is not None)
        self.words = FollowedWords(self.pictures)
        self._gathers = Gathers(self.pictures, self.settings.weight, self.device)
        self.step = self._new_step(None)

    # steps ----------------------------------------------------------------------------------------

    def begin_step(self, sigma: float) -> None:
        self.sigma, self._seen = sigma, False
        self._fell, self._highest = self._fell or sigma < self._highest, max(sigma, self._highest)
        self._gathers.begin_step()
        self.words.begin(sigma)
        if self.recorder:
            self.recorder.begin(self.stage, sigma)
        self.step = self._new_step(self._mean_maps(sigma))
        # inside a call of the UNet no other may run, so what anchors say is asked here
        if self.anchors and self.wants:
            self.step.tokens()
        if self.anchors and self.stage == 2 and self.schedule.injects(sigma):
            self.step.outputs()

    def require_size(self, size: Grid, sigma: float, who: Asker) -> None:
        """Positions, masks and features are those of the latent's size: ValueError where the
        sampler asks for another and they matter.
        """
        compares = self.stage == 1 and sigma <= self.schedule.features_at * (1 + SLACK)
        injects = self.stage == 2 and self.schedule.injects(sigma)
        if size != self.latent and (
            self.user_masks is None or self.recorder or self.wants or compares or injects
        ):
            raise ValueError(
                f"{NODE}: {who} asks the model for pictures of {size[0]}x{size[1]} where the "
                f"latent is "
                f"{self.latent[0]}x{self.latent[1]}. Pictures that share a subject must keep their "
                f"size in all steps. " + who.choose("keeps the size, such as euler or ddim")
            )

    def begin_call(self) -> None:
        """The model is about to be asked: of the passes of its UNet in one call the last counts, of
        several calls the first.

        Other nodes ask again after the call (PAG, SAG), and run a reference of their own before it,
        inside (Reference ControlNets).
        """
        self._calls += 1

    def end_step(self) -> None:
        """Say once where the model answered without its attention: then nothing was shared,
        whatever the settings.

        ValueError where another node left no cross-attention in which the subject's word could be
        followed.
        """
        self.words.require_followed(self.sigma)
        if not self._seen and "missed" not in self._said:
            self._said.add("missed")
            log.warning(
                "%s: at sigma %.4g the model answered without running its attention, so nothing "
                "was shared there. A node that "
                "skips calls (EasyCache, LazyCache) does this, one that computes the network in a "
                "copy of its own, or a model "
                "compiled before this node: remove the former, put the latter behind this node.",
                NODE,
                self.sigma,
            )

    @property
    def first_stage_ends(self) -> bool:
        """After the call at this noise level: what the second stage needs is there."""
        return (
            self.stage == 1 and not self.settings.official and self.comparison.features is not None
        )

    def begin_second_stage(self) -> None:
        """Match the pictures (eq. 8, 9), choose what is injected (eq. 5, the gate of appendix B),
        and forget what comes anew.
        """
        read_at = self.comparison.sigma
        last = -1.0 if self.settings.official or read_at is None else read_at
        self.step = self._new_step(self._mean_maps(last, inclusive=True))
        self._match()
        self.words.maps.forget(self.settings.inject[0] * (1 + SLACK))
        self.stage, self.comparison.features = 2, None

    def _match(self) -> None:
        features, masks = self.comparison.features, self.step.masks(self._grid(self.layout.divisor))
        if masks is None or features is None:
            say_unmatched(features is not None, self.words.followed)
            return
        k = self.anchor_count
        if self.recorder:
            self.recorder.matched(features[:k], torch.cat(positions_of(masks, range(k))))
        if self.anchors:
            stored, subject = self.anchors.features()
            sources, each = sent(stored.to(features.dtype), self.device), [masks]
            candidates = [[subject] * self.pictures]
        else:
            sources = features[:k]
            words = self.step.words(self._grid(self.layout.divisor)) if self.gates else None
            each = [masks] if words is None else list(words.unbind(1))
            candidates = [candidates_in_batch(m, self.settings.anchors, k) for m in each]
        targets, rows = match(features, each, sources, candidates, self.layout.transformer)
        if self.anchors:  # flat positions among r*n -> rows of the stored outputs
            rows = torch.searchsorted(subject, rows)
        self.comparison.targets = sent(targets, self.device)
        self.comparison.sources = sent(rows, self.device)

    def finish(self) -> None:
        """Tell the recorder where the anchors' subjects were in the end, and the words' maps on the
        way; say if nothing was shared.
        """
        if not (self._fell or self.anchors) and self.user_masks is None:
            log.warning(
                "%s: no step of this run follows a noisier one, so nothing was shared: the subject "
                "is located only from "
                "the step before. Sample 2 steps or more, from much noise to little, or wire "
                "masks.",
                NODE,
            )
        if not self.recorder:
            return
        self.step = self._new_step(self._mean_maps(-1.0, inclusive=True))
        grids = {self.latent, *(layer.grid for layer in self.recorder.layers.values())}
        self.recorder.masks = {
            g: m[: self.anchor_count].clone()
            for g in grids
            if (m := self.step.masks(g)) is not None
        }
        seen = sorted(self.recorder.latents)
        if self.step.soft is not None and {*seen} <= {*self.words.maps.sigmas}:
            self.recorder.maps = (
                torch.stack([self.words.maps.at(s)[: self.anchor_count].sum(1) for s in seen])
                .float()
                .cpu()
            )

    # what a step knows ----------------------------------------------------------------------------

    @property
    def anchor_count(self) -> int:
        """Pictures of the batch that others read."""
        return self.step.anchor_count

    def _new_step(self, soft: Tensor | None) -> Step:
        return Step(
            self.settings,
            self.schedule,
            self.pictures,
            self.device,
            self.user_masks,
            self.anchors,
            self._said,
            self.stage,
            self.sigma,
            soft,
        )

    def _mean_maps(self, sigma: float, inclusive: bool = False) -> Tensor | None:
        """The running mean of the words' maps above a noise level; None where the user
        wired masks.
        """
        return None if self.user_masks is not None else self.words.maps.mean(sigma, inclusive)

    def _grid(self, divisor: int) -> Grid:
        return -(-self.latent[0] // divisor), -(-self.latent[1] // divisor)

    def _require_whole(self, call: AttnCall, x: Tensor) -> None:
        grid = self._grid(self.layout.divisors[call.block])
        require_whole(call, x, self.pictures, grid)

    @property
    def shares(self) -> bool:
        """Whether anyone reads anything at this step; else it is the host's own."""
        if not self.settings.weight or self.settings.dropout == 1:
            return False
        if self.anchors:
            return any(len(t) for tokens in self.step.tokens().values() for t in tokens.values())
        grids = {self._grid(self.layout.divisors[b]) for b in self.settings.blocks}
        return any(self.step.shared(grid) for grid in grids)

    # what a transformer's calls are watched for, as Watcher has it
    @property
    def blocks(self) -> frozenset[BlockId]:
        return self.settings.blocks if self.recorder else frozenset()

    @property
    def map_blocks(self) -> frozenset[BlockId]:
        return frozenset() if self.user_masks is not None else frozenset(self.settings.map_blocks)

    @property
    def query_blocks(self) -> frozenset[BlockId]:
        return frozenset(self.vanilla)

    @property
    def output_blocks(self) -> frozenset[BlockId]:
        injects = self.stage == 2 and self.schedule.injects(self.sigma)
        return self.layout.output_blocks if injects else frozenset()

    @property
    def tap(self) -> int | BlockId | None:
        compares = self.stage == 1 and self.sigma <= self.schedule.features_at * (1 + SLACK)
        return self.layout.tap if compares else None

    # the network's calls --------------------------------------------------------------------------

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
            named = part.role is Role.COND and part.subject and (part.text or part.rows)
            if not named or id(part) in done:
                continue
            grid = self._grid(self.layout.divisors[call.block])
            call_number = self._calls or None
            if self.words.follow(call, i, q, k, heads, grid, self.sigma, call_number):
                done.add(id(part))

    def self_tokens(self, call: AttnCall, n: Tensor) -> Tensor:
        self._seen = True
        if call.block not in self.settings.blocks:
            return n
        parts = self.sharing_parts(call.texts)
        if self.recorder and parts:
            kept, index = self.step.all_kept(call.grid)
            for half in {
                call.texts[i].role.half: None for i in parts
            }:  # the first part of each half
                part = call.parts(n)[next(i for i in parts if call.texts[i].role.half is half)]
                self._require_whole(call, part)
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
        return n if call.joint else self._blended(call, n)

    def queries(self, call: AttnCall, q: Tensor) -> Tensor:
        """Positions turn queries, and a turn of a blend is the blend of the turns."""
        self._require_whole(call, call.parts(q)[0])
        return self._blended(call, q)

    def _blended(self, call: AttnCall, n: Tensor) -> Tensor:
        """Eq. (4): normed tokens or queries [b n c], of the parts that share blended with those of
        the vanilla pass.
        """
        vanilla = self.vanilla.get(call.block)
        if vanilla is None:
            return n
        parts = self.sharing_parts(call.texts)
        nu = self.schedule.blend(self.sigma)
        if len(parts) == len(call.texts):
            return torch.lerp(n, vanilla, nu)
        pairs = zip(call.parts(n), call.parts(vanilla))
        return torch.cat(
            [torch.lerp(a, b, nu) if i in parts else a for i, (a, b) in enumerate(pairs)]
        )

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
        self._require_whole(call, call.parts(q)[0])
        grid = self._grid(self.layout.divisors[call.block])
        own = call.parts(call.of_picture(k))[0]
        require_own_keys(call, call.parts(q)[0], own, self.pictures, grid)
        if self.anchors:
            return self._references_to_anchors(call, site, k, parts)
        if self.gates and (gated := self.step.gated(call.grid)):
            lists = (one.references(call, k, v, parts, s) for one in gated)
            return list(chain.from_iterable(lists))
        if not (reads := dict(self.step.shared(call.grid))):
            return []
        groups = [who for who, _ in shared_groups(self.pictures, s.anchors)]
        return [
            Sharing(
                tuple(parts),
                self._gathers.of(call.grid, len(parts), groups, reads, q.dtype),
                s.weight,
                s.dims_text,
            )
        ]

    @property
    def gates(self) -> bool:
        """Whether each of several subjects is read by its own like alone: of a transformer; anchors
        that are kept tell no subjects apart.
        """
        return self.layout.transformer and self.recorder is None and self.anchors is None

    def _references_to_anchors(
        self, call: AttnCall, site: BlockSite, k: Tensor, parts: Sequence[int]
    ) -> list[References]:
        tokens_of, projected = {}, {}
        for i in parts:
            half = self.settings.halves.source(call.texts[i].role.half)
            tokens = self.step.tokens()[half][call.block]
            if not len(tokens):
                return []
            if half not in projected:
                texts = (self.anchors.text(half), call.texts[i].text) if call.joint else ()
                projected[half] = site.keys_values(tokens.to(k)[None], texts or (None, None))
            keys, values = projected[half]
            # a transformer's keys are normed, and hold positions
            if self.anchors.aligned and self.settings.align_keys and not call.joint:
                # the photo's keys with the statistics of this picture's subject (appendix E)
                where = self.step.subject(call.grid)
                keys = keys if where is None else adain(keys, call.parts(k)[i], where=where)
                values = values.expand(len(keys), -1, -1)
            weight = self.settings.weight * self.anchors.loudness(call.block)
            dims = self.settings.dims_text
            tokens_of[i] = ReferenceTokens(keys, values, weight, dims_text=dims)
        return [References({}, by_part=tokens_of)]

    def self_output(self, call: AttnCall, out: Tensor) -> Tensor:
        """Eq. (6): outputs after to_out, cond half, from a snapshot of all pictures, so that their
        order does not matter (Q1).
        """
        if (
            call.block not in self.layout.output_blocks
            or self.stage != 2
            or not self.schedule.injects(self.sigma)
        ):
            return out
        targets, sources = self.comparison.targets, self.comparison.sources
        parts = [i for i in self.sharing_parts(call.texts) if call.texts[i].role is Role.COND]
        mixed = list(call.parts(out)) if parts else []
        for i in parts:
            x = mixed[i]
            self._require_whole(call, x)
            if (
                self.recorder and targets is not None and i == parts[0]
            ):  # None: the pictures could not be compared
                self.recorder.output(self.sigma, call.block, call.grid, x, self._calls or None)
            if targets is not None and len(targets):
                snapshot = (
                    self.step.outputs()[call.block].to(x) if self.anchors else x.flatten(0, 1)
                )
                mixed[i] = inject(x, snapshot, sources, targets, self.settings.injection)
        return torch.cat(mixed) if parts and targets is not None and len(targets) else out

    def output_block(self, index: int | BlockId, h: Tensor, parts: Sequence[Part]) -> None:
        if (
            index != self.layout.tap
            or self.stage != 1
            or self.sigma > self.schedule.features_at * (1 + SLACK)
        ):
            return
        cond = [i for i in self.sharing_parts(parts) if parts[i].role is Role.COND]
        if cond:
            self.comparison.read(h.chunk(len(parts))[cond[0]], self.sigma, self._calls)
