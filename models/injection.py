"""One engine for both papers (method.md section 4): which rows of an attention call read which reference, and what is recorded.

Knows the host only by the plain values of a call; nodes/host/ translates. A `Run` is all that changes during a sampler run.
Axes: b rows of a call = parts x pictures, n query tokens, m reference tokens, c channels, r reference pictures, y x grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from typing import Any, Protocol
from uuid import uuid4

import torch
from torch import Tensor, nn

from .attention.attend import Attend
from .attention.parts import Merge as Merge
from .attention.parts import (
    References,
    attend_group,
    attend_sharing,
    beside_others,
    reader,
    take_parts,
)
from .attention.parts import gather_parts as gather_parts
from .attention.sharing import Sharing
from .network.backbone import Backbone, turned
from .network.call import Joint, Pass
from .network.traced import Places, Traced, trace
from .reference.bank import (
    BlockId,
    Grid,
    Half,
    SubjectTokens,
    block_name,
    keys_values,
    select_blocks,
)
from .subject.masks import resize_user_mask

SUBJECT = "kindred_subject"  # what Subject Prompts leaves inside CONDITIONING: where the subject's words stand
REPEATS = "kindred_repeats"  # and how many times each row's text stands in it


MASK_DIVISOR = 4  # method.md 2.2: word maps are read where the grid is a quarter of the latent (16x16 at 512 px)


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
    """A block with attention: its module, and how many times smaller than the latent its grid is.

    module: of a UNet (attn1, attn2); None in a transformer, whose keys and values are taken as they come.
    """

    module: nn.Module | None
    divisor: int
    self_attention: bool = (
        True  # False: its attn1 reads the text too, as in the first level of SDXS 0.9
    )
    backbone: Backbone | None = None

    def keys_values(
        self, tokens: Tensor, texts: tuple[int | None, int | None] = (None, None)
    ) -> tuple[Tensor, Tensor]:
        """Kept tokens [b l c] -> k, v [b l (h d)]; texts: how long it was beside the reference, and is here, for keys that it moves."""
        if self.backbone is None:
            return keys_values(self.module.attn1, tokens)
        k, v = tokens.chunk(2, -1)
        there, here = (None if t is None else self.backbone.text_tokens(t) for t in texts)
        if self.backbone.turn is not None and None not in (there, here) and there != here:
            k = turned(k, self.backbone.turn, here - there)
        return k, v


def map_blocks(wanted: str, sites: Mapping[BlockId, BlockSite], node: str) -> tuple[BlockId, ...]:
    """The blocks whose cross-attention locates the subject; auto: every block at a quarter of the latent, or the coarsest there is.

    Of a transformer, blocks in which the picture reads the text; auto: those that its backbone knows to locate best.
    """
    if (backbone := next((site.backbone for site in sites.values()), None)) is not None:
        if wanted.strip().lower() == "auto":
            return backbone.locating
        return select_blocks(wanted, backbone.reading, node)
    if wanted.strip().lower() != "auto":
        return select_blocks(wanted, tuple(sites), node)
    divisor = map_divisor(sites)
    return tuple(block for block, site in sites.items() if site.divisor == divisor)


def map_divisor(sites: Mapping[BlockId, BlockSite]) -> int:
    return min(MASK_DIVISOR, max(site.divisor for site in sites.values()))


def grid_of(latent: Grid, divisor: int) -> Grid:
    """Token grid of a block: every stride-2 convolution rounds up."""
    return -(-latent[0] // divisor), -(-latent[1] // divisor)


@dataclass(frozen=True)
class Asker:
    """Who asks the model, for sentences: the sampler, and the other nodes that stand between it and us."""

    sampler: str = ""
    between: tuple[str, ...] = ()

    def __str__(self) -> str:
        others = (
            f", or a node between it and the model ({', '.join(self.between)}),"
            if self.between
            else ""
        )
        return f"the sampler {self.sampler}{others}"

    def choose(self, sampler: str) -> str:
        return f"Choose a sampler that {sampler}{', or remove that node' if self.between else ''}."


def is_resized(whole: Grid, size: Grid) -> bool:
    """Whether a picture of one size is another of it with the same sides' ratio, each side rounded to a cell; else it is a part."""
    low, high = zip(*(((s - 1) / w, (s + 1) / w) for w, s in zip(whole, size)))
    return max(low) <= min(high)


@dataclass(frozen=True)
class AttnCall:
    """One attention call of the host, translated: extra_options of BasicTransformerBlock.forward."""

    block: BlockId
    grid: Grid
    roles: tuple[Role, ...]  # per equal part of the batch, in the host's order
    areas: tuple[
        tuple[int, ...] | None, ...
    ]  # per part: (height, width, y, x) in latent cells of a cropped call
    latent: Grid  # size of what the sampler asks about: of the whole latent, unless it resizes
    cross: bool = False  # cross-attention, whose keys are the text
    repeats: tuple[
        tuple[int, ...], ...
    ] = ()  # per part, per row (cycled): how many times its text stands in the keys; () is once
    texts: tuple[Part, ...] = ()  # per part: what is known of its text
    given: Grid | None = None  # size of what the UNet was given, in latent cells; None: not known
    places: tuple[
        Places | None, ...
    ] = ()  # per part: where in its text each key stands, None: it is not there; (): as the host gave it
    unknown: str = ""  # why nobody can tell whose the rows are
    joint: Joint | None = None  # a transformer's call: text and picture in one softmax
    part: str = ""  # who asks about a part of the picture, and of which size

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [b n c] -> one view per part."""
        return x.chunk(len(self.roles))

    @property
    def cut(self) -> Grid | None:
        """The size that a part should have had, where another node cut the latent before the UNet; None where none did."""
        y, x = self.latent  # an area may reach over the edge, where the host ends it
        sizes = (
            (min(a[0], y - a[2]), min(a[1], x - a[3])) if a else (y, x)
            for role, a in zip(self.roles, self.areas)
            if role is not Role.OTHER
        )
        return next((size for size in sizes if self.given and size != self.given), None)

    def word(self, part: int, positions: Sequence[int], keys: int, text: int) -> list[int] | None:
        """Which of a part's keys are the words at these positions of its text of so many tokens; None: its text is not there."""
        if not self.places:  # the host repeats the shorter of two prompts (method.md 2.3)
            return (
                [p + start for start in range(0, keys // text * text, text) for p in positions]
                if keys >= text
                else None
            )
        places = self.places[part]
        if places is None:
            return None
        if self.joint:  # a transformer reads no text twice, and may make other rows of it (Anima)
            return [places.index(p) for p in positions] if {*positions} <= {*places} else None
        return [i for i, place in enumerate(places) if place >= 0 and place % text in positions]

    def after(self, traced: Traced) -> AttnCall:
        """The same call once other nodes' patches copied its parts or changed its keys."""
        once = [self.texts[p].repeats for p in traced.parts]
        repeats = [
            tuple(r * n for n in (own if place is not None else (1,)) for r in times)
            if times is not None
            else self.repeats[p]
            if self.repeats
            else (1,)
            for p, place, times, own in zip(traced.parts, traced.places, traced.repeats, once)
        ]
        return replace(
            self,
            roles=tuple(self.roles[p] for p in traced.parts),
            areas=tuple(self.areas[p] for p in traced.parts),
            texts=tuple(self.texts[p] for p in traced.parts),
            places=traced.places if self.cross else (),
            repeats=tuple(repeats) if any(r != 1 for row in repeats for r in row) else (),
        )

    def pictures(self, first: int, last: int) -> AttnCall:
        """The same call with only the pictures first <= i < last of every part."""
        picked = tuple(
            tuple(rows[i % len(rows)] for i in range(first, last)) for rows in self.repeats
        )
        return replace(self, repeats=picked)


@dataclass
class TargetMask:
    """Where in the new picture an injection may act: mask [1|b y x] at its own size, white is where; kept per grid."""

    mask: Tensor
    node: str  # whose errors these are
    _at: dict[tuple[Grid, Grid, tuple[Any, ...]], Tensor] = field(default_factory=dict)

    def __call__(self, call: AttnCall, q: Tensor) -> Tensor:
        """-> [parts 1|b n] at the call's grid; the call of an area prompt is cropped, and the mask with it; where the sampler resizes
        the picture, the mask is resized to what it asks about. ValueError on tiles and parts.
        """
        if call.grid[0] * call.grid[1] != q.shape[1]:
            raise ValueError(
                f"{self.node}: a target mask needs whole pictures, but a node before the sampler cut them into tiles "
                f"({q.shape[1]} tokens for a grid of {call.grid[0]}x{call.grid[1]}: HyperTile does this). "
                "Remove that node or the target mask."
            )
        if whole := call.cut:
            raise ValueError(
                f"{self.node}: a target mask needs whole pictures, but a node before the sampler cut them into tiles "
                f"({call.given[0]}x{call.given[1]} of a latent of {whole[0]}x{whole[1]}: tiled diffusion does this). "
                "Remove that node or the target mask."
            )
        if call.part:
            raise ValueError(
                f"{self.node}: a target mask needs whole pictures, but {call.part}. Choose another sampler, or remove the "
                "target mask."
            )
        rows = q.shape[0] // len(call.roles)
        if self.mask.shape[0] not in (1, rows):
            raise ValueError(
                f"{self.node}: {self.mask.shape[0]} target masks for {rows} pictures. Wire one mask, or one per picture."
            )
        key = (call.latent, call.grid, call.areas)
        if key not in self._at:
            whole = resize_user_mask(self.mask, call.latent).float()
            crops = [
                whole if a is None else whole[:, a[2] : a[2] + a[0], a[3] : a[3] + a[1]]
                for a in call.areas
            ]
            self._at[key] = torch.stack(
                [resize_user_mask(crop, call.grid).flatten(1) for crop in crops]
            ).to(q)
        return self._at[key]


class ActiveInjection(Protocol):
    """An injection during one run: everything of it that changes. node: whose; wants: it should be read at this step."""

    node: str
    wants: bool

    def begin_step(self, sigma: float) -> None: ...
    def concerns(self, call: AttnCall) -> bool: ...  # an attention that it is read in
    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> Iterable[References | Sharing]: ...


class Watcher:
    """Sees what passes through the UNet, and may change what it is handed where it returns it."""

    complete = False  # this pass has nothing more to show
    map_blocks: frozenset[BlockId] = frozenset()  # whose cross-attention it waits for

    def begin_pass(self) -> None:
        """The UNet begins a pass that ends once all its watchers are complete."""

    def self_tokens(self, call: AttnCall, n: Tensor) -> Tensor:
        """Normed tokens [b n c] before a self-attention's to_q (its keys and values keep what they were) -> what to_q reads."""
        return n

    def cross(self, call: AttnCall, q: Tensor, k: Tensor, heads: int) -> None:
        """Queries [b n (h d)] and text keys [b m (h d)] of a cross-attention."""

    def self_output(self, call: AttnCall, out: Tensor) -> Tensor:
        """Outputs [b n c] of a self-attention after to_out, before the residual -> what is added."""
        return out

    def output_block(self, index: int, h: Tensor, parts: Sequence[Part]) -> None:
        """Features h [b c y x] that output block `index` is about to join with its skip."""


@dataclass(frozen=True)
class Part:
    """What is known of one processed cond: its role, its area, and its text's tokens before the host repeats them."""

    role: Role = Role.OTHER
    area: tuple[int, ...] | None = None
    text: int | None = None
    repeats: tuple[int, ...] = (1,)  # per row: how many times Subject Prompts already repeats it
    subject: SubjectTokens | None = None
    rows: int | None = None  # of its CONDITIONING; a transformer may pad them


class PassEnds(Exception):
    """Leaves the UNet where its watchers have seen all they wait for."""


@dataclass
class Run:
    """Everything of ours that changes during one sampler run; a plain object, since the host copies dicts and lists."""

    watchers: list[Watcher] = field(default_factory=list)
    ends_early: bool = (
        False  # nobody wants the UNet's answer: a pass ends with what the last watcher waits for
    )
    sites: dict[BlockId, BlockSite] = field(default_factory=dict)
    parts: dict[Any, Part] = field(default_factory=dict)  # by the cond's uuid
    latent: Grid = (0, 0)
    handed: Grid | None = None  # size of what the sampler asks about now; None: the latent's
    part: str = ""  # as of AttnCall
    pictures: int = 0  # in the sampled batch; 0: not known
    active: list[ActiveInjection] = field(default_factory=list)
    current: AttnCall | None = None  # the call that the UNet is in
    pending: AttnCall | None = None  # the same, while its attention function comes next
    asked: tuple[int, ...] = ()  # the shape of its queries' tokens [b n c]
    before: tuple[Tensor, Tensor] | None = (
        None  # tokens [b n c] and context [b t c] as the host gave them
    )
    traced: dict[tuple[Any, ...], Traced | None] = field(default_factory=dict)
    compiled: bool = False  # torch.compile stands somewhere in the network
    backbone: Backbone | None = None  # of a transformer; None: a UNet
    passing: Pass | None = None  # the pass that a transformer is in
    drop: Callable[[], None] | None = None  # takes away what was left on a module for its next call
    wanted: set[int] = field(default_factory=set)  # ids of active ones that should have been read
    heard: set[int] = field(default_factory=set)  # of those that an attention asked

    def asks(self, size: Grid, who: Asker) -> None:
        """The sampler is about to ask for a picture of this size."""
        self.handed, (y, x), (height, width) = size, size, self.latent
        self.part = (
            ""
            if is_resized(self.latent, size)
            else f"{who} asks the model about {y}x{x} of a latent of {height}x{width}"
        )

    def read_conds(self, conds: Mapping[str, list[dict[str, Any]]]) -> None:
        """Give every processed cond its own uuid (the host shares one between area twins) and remember its role."""
        for kind, entries in conds.items():
            role = Role.UNCOND if "negative" in kind else Role.COND
            for entry in entries:
                entry["uuid"] = uuid4()
                text = getattr(entry.get("model_conds", {}).get("c_crossattn"), "cond", None)
                self.parts[entry["uuid"]] = Part(
                    role,
                    tuple(entry["area"]) if entry.get("area") else None,
                    None if text is None else text.shape[1],
                    entry.get(REPEATS, (1,)),
                    entry.get(SUBJECT),
                    None if (rows := entry.get("cross_attn")) is None else rows.shape[1],
                )

    def parts_of(self, options: Mapping[str, Any]) -> list[Part]:
        """The parts of a call in their order. Tiled diffusion stacks several tiles of all of them, one tile behind the other."""
        parts = [
            self.parts.get(u, Part()) for u in options.get("uuids") or (None,)
        ]  # called past the sampler: nobody we know
        rows, whole = options.get("original_shape", (0,))[0], len(parts) * self.pictures
        return parts * (rows // whole) if whole and rows > whole and not rows % whole else parts

    def call(self, options: Mapping[str, Any], text: int | None = None) -> AttnCall:
        """Translate extra_options; text: tokens of the context of a cross-attention, None in self-attention."""
        parts = self.parts_of(options)
        repeats = (
            ()
            if text is None
            else tuple(
                tuple(r * max(text // (p.text or text), 1) for r in p.repeats) for p in parts
            )
        )
        return AttnCall(
            (*options["block"], options["block_index"]),
            tuple(options["activations_shape"][2:]),
            tuple(p.role for p in parts),
            tuple(p.area for p in parts),
            self.handed or self.latent,
            text is not None,
            repeats if any(r != 1 for part in repeats for r in part) else (),
            tuple(parts),
            tuple(options["original_shape"][2:]) if "original_shape" in options else None,
            part=self.part,
        )

    def joint_call(
        self, block: BlockId, options: Mapping[str, Any], picture: slice, mask: Tensor | None
    ) -> AttnCall:
        """A call of a transformer, translated; picture: of its keys."""
        parts = self.parts_of(options)
        return AttnCall(
            block,
            self.passing.grid,
            tuple(p.role for p in parts),
            tuple(p.area for p in parts),
            self.handed or self.latent,
            texts=tuple(parts),
            given=self.passing.latent,
            part=self.part,
            joint=Joint(picture, mask),
        )

    def text_call(
        self,
        block: BlockId,
        options: Mapping[str, Any],
        keys: int,
        stands: Callable[[int], slice | None],
    ) -> tuple[AttnCall, slice]:
        """Where the picture of a transformer's block reads the text, translated, and which of its keys are the text's.

        keys: all of the call's; stands: where so many rows of a CONDITIONING are among them, as Backbone.text says.
        """
        call = self.joint_call(block, options, slice(0), None)
        rows = [p.rows for p in call.texts] if self.backbone.joint else [keys for _ in call.texts]
        where = [None if r is None else stands(r) for r in rows]
        seen = [at for at in where if at is not None]
        text = slice(
            min((at.start for at in seen), default=0), max((at.stop for at in seen), default=0)
        )
        places = tuple(
            None
            if at is None
            else tuple(
                i if 0 <= (i := key - at.start) < at.stop - at.start else -1
                for key in range(text.start, text.stop)
            )
            for at in where
        )
        return replace(call, cross=True, places=places), text

    def settled(self, call: AttnCall, n: Tensor, context: Tensor) -> AttnCall:
        """The call behind all patches: its rows and keys as they are now, or why that cannot be told.

        Tiles of HyperTile are other rows of the same tokens; in self-attention the keys are no text.
        """
        (was, text), self.before = self.before, None
        cross = call.cross
        if n.shape[0] == was.shape[0] and (not cross or context.shape[1] == text.shape[1]):
            return call
        if not cross and n.shape[0] * n.shape[1] == was.shape[0] * was.shape[1]:
            return call
        shapes = (
            was.shape[0],
            n.shape[0],
            *((text.shape[1], context.shape[1], context.shape[0]) if cross else ()),
        )
        known = cross, *shapes, *map(id, call.texts)
        if self.traced.get(known) is None and (known, call.block) not in self.traced:
            once = [p.text or text.shape[1] for p in call.texts]
            found = trace(len(call.roles), was, n, *((text, context, once) if cross else ()))
            self.traced[known if found else (known, call.block)] = found
        if (found := self.traced.get(known)) is not None:
            return call.after(found)
        return replace(
            call,
            unknown=f"another node's {'cross' if cross else 'self'}-attention patch gives block {block_name(call.block)} "
            f"{n.shape[0]} rows where the model was given {was.shape[0]} ({len(call.roles)} prompts of "
            f"{was.shape[0] // len(call.roles)} pictures), and whose they are cannot be told (regional prompts, attention "
            "couple). Remove that node.",
        )

    def end_if_complete(self) -> None:
        """PassEnds where the rest of this pass is for nobody."""
        if self.ends_early and all(watcher.complete for watcher in self.watchers):
            self.pending = None
            raise PassEnds

    def drop_hook(self) -> None:
        """Take away what a layer's next call would have been handed."""
        if self.drop:
            self.drop()
        self.drop = None

    def hear(self, call: AttnCall) -> None:
        """The block's own attention came to where we are asked."""
        self.heard.update(id(active) for active in self.active if active.concerns(call))

    def close(self) -> None:
        """Let go of everything, so that whoever still holds the run's options holds no tensors."""
        self.active, self.watchers, self.sites, self.parts, self.traced = [], [], {}, {}, {}
        self.current = self.pending = self.before = self.passing = None
        self.drop_hook()

    def found(self, call: AttnCall, q: Tensor, k: Tensor, v: Tensor) -> list[References | Sharing]:
        """What the parts of a call read of every active injection; empty where they read nothing."""
        concerned = [i for i in self.active if i.concerns(call)]
        if not concerned:
            return []
        if call.unknown:
            raise ValueError(f"{concerned[0].node}: {call.unknown}")
        site = self.sites[call.block]
        try:
            found = [r for i in concerned for r in i.references(call, site, q, k, v)]
        except AttributeError as error:
            layer = site.module.attn2 if call.cross else site.module.attn1
            if hasattr(layer, "to_k") and hasattr(layer, "to_v"):
                raise
            raise ValueError(
                f"Kindred: another node put {type(layer).__name__} in the place of the attention of block "
                f"{block_name(call.block)}, and it has no keys and values (to_k, to_v) to read. Remove that node, or choose "
                "other blocks."
            ) from error
        return (
            found
            if any(
                isinstance(r, Sharing) or r.read_by(call, p)
                for r in found
                for p in range(len(call.roles))
            )
            else []
        )

    def attend(
        self, call: AttnCall, attend: Attend, q: Tensor, k: Tensor, v: Tensor, heads: int
    ) -> Tensor:
        """The host's attention with every active reference: concatenated ones in its softmax, added ones beside it.

        Parts that read nothing stay the host's own.
        """
        self.hear(call)
        found = self.found(call, q, k, v)
        return self.read(call, found, attend, q, k, v, heads) if found else attend(q, k, v, heads)

    def read(
        self,
        call: AttnCall,
        found: Sequence[References | Sharing],
        attend: Attend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
    ) -> Tensor:
        """The same of what was found for the call."""
        if len(found) == 1 and isinstance(found[0], Sharing):
            return attend_sharing(call, attend, q, k, v, heads, found[0])
        found = [
            r
            for f in found
            for r in (beside_others(f, call, k, v) if isinstance(f, Sharing) else [f])
        ]
        if (
            k.shape[0] != q.shape[0]
        ):  # HyperTile cuts only the queries into tiles; the host's kernels read the keys so
            k, v = (t.reshape(q.shape[0], -1, t.shape[-1]) for t in (k, v))
        if (seen := self.share_of_own(call, k)) < 1:
            found = [r.quieter(seen) for r in found]
        rows = q.shape[0] // len(call.roles)
        bounds = sorted({0, rows}.union(*(r.pictures for r in found if r.pictures)))
        if len(bounds) == 2:
            return self.attend_alike(call, attend, q, k, v, heads, found)
        by_picture = [t.unflatten(0, (-1, rows)) for t in (q, k, v)]
        out = []
        for first, last in pairwise(
            bounds
        ):  # pictures that read the same share a call: no mask, and no tokens that nobody reads
            own = [t[:, first:last].flatten(0, 1) for t in by_picture]
            reads = [r.cut(first, last, rows) for r in found if r.covers(first, last)]
            out.append(
                self.attend_alike(call.pictures(first, last), attend, *own, heads, reads).unflatten(
                    0, (-1, last - first)
                )
            )
        return torch.cat(out, 1).flatten(0, 1)

    def share_of_own(self, call: AttnCall, k: Tensor) -> float:
        """How many of the keys that a picture of this size has here a query still sees of its own, k [b n c]: at most 1.

        Tiles, merged tokens and smaller grids leave fewer, beside which a reference would be louder. More of them are another
        node's reference, which ours stands beside as beside one of our own.
        """
        if call.cross or call.joint or not call.given:
            return 1.0
        whole = grid_of(call.given, self.sites[call.block].divisor)
        return min(k.shape[1] / (whole[0] * whole[1]), 1.0)

    def attend_alike(
        self,
        call: AttnCall,
        attend: Attend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        found: Sequence[References],
    ) -> Tensor:
        """`attend` where all pictures of a part read the same references."""
        groups: dict[
            tuple[int | None, ...], list[int]
        ] = {}  # parts that read equally many tokens of the same injections share a call
        for part in range(len(call.roles)):
            groups.setdefault(
                tuple(t.k.shape[1] if (t := r.read_by(call, part)) else None for r in found), []
            ).append(part)
        out: dict[int, Tensor] = {}
        for reads, parts in groups.items():
            own = [take_parts(call, t, parts) for t in (q, k, v)]
            heard = [r for r, m in zip(found, reads) if m is not None]
            mixed = attend_group(
                call, attend, *own, heads, heard, parts, reader(call, parts, heard)
            )
            if len(groups) == 1:
                return mixed
            out.update(zip(parts, mixed.chunk(len(parts))))
        return torch.cat([out[p] for p in range(len(call.roles))])
