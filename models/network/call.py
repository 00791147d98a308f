"""One pass of a network and one attention call in it, translated: whose its rows are, and where the
picture stands.

Axes: b rows of a call = parts x pictures, n query tokens, c channels, y x grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from torch import Tensor

from ..subject.words import SubjectTokens
from .backbone import ALONE, CROSS, Backbone
from .blocks import BlockId, Grid
from .traced import Places, Traced


class Half(str, Enum):
    """Which half of classifier-free guidance a row belongs to."""

    COND = "cond"
    UNCOND = "uncond"


class Halves(str, Enum):
    """Which halves of the generation read the reference, and which of its features they read
    (method.md 2.2, CFG).
    """

    COND = "cond only"  # guidance amplifies the reference
    BOTH = "both"  # each half reads the features of its own half
    SHARED = "shared"  # both halves read the features of the cond half

    def source(self, half: Half) -> Half | None:
        """The captured half that a generating row of `half` reads, or None when it reads none."""
        if self is Halves.BOTH:
            return half
        return Half.COND if self is Halves.SHARED or half is Half.COND else None


class Role(str, Enum):
    """What a part of the batch is to the guider."""

    COND = "cond"
    UNCOND = "uncond"
    OTHER = "other"

    @property
    def half(self) -> Half | None:
        return None if self is Role.OTHER else Half(self.value)


@dataclass(frozen=True)
class Part:
    """What is known of one processed cond: its role, its area, and its text's tokens before the
    host repeats them.
    """

    role: Role = Role.OTHER
    area: tuple[int, ...] | None = None  # (height, width, y, x) in latent cells, of a crop
    text: int | None = None
    repeats: tuple[int, ...] = (1,)  # per row: how many times Subject Prompts already repeats it
    subject: SubjectTokens | None = None
    rows: int | None = None  # of its CONDITIONING; a transformer may pad them


@dataclass(frozen=True)
class Asker:
    """Who asks the model, for sentences: the sampler, and the other nodes that stand between it and
    us.
    """

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
    """Whether a picture of one size is another of it with the same sides' ratio, each side rounded
    to a cell; else it is a part.
    """
    low, high = zip(*(((s - 1) / w, (s + 1) / w) for w, s in zip(whole, size)))
    return max(low) <= min(high)


def grid_of(latent: Grid, divisor: int) -> Grid:
    """Token grid of a block: every stride-2 convolution rounds up."""
    return -(-latent[0] // divisor), -(-latent[1] // divisor)


@dataclass(frozen=True)
class Joint:
    """What a call of a joint softmax holds beside the picture's tokens."""

    picture: slice  # of its keys
    mask: Tensor | None = None  # the host's own, on its keys

    def pictures(self, parts: int, first: int, last: int) -> Joint:
        """The same with the mask of only the pictures first <= i < last of every part."""
        mask = self.mask
        if mask is None or mask.ndim == 2 or mask.shape[0] == 1:  # one for all
            return self
        return replace(self, mask=mask.unflatten(0, (parts, -1))[:, first:last].flatten(0, 1))


@dataclass
class Pass:
    """A pass of the network: its attention calls are counted, since most families tell none of
    them.
    """

    backbone: Backbone
    latent: Grid  # cells of what the network was given
    seen: int = 0  # calls, where the family is counted
    # blocks whose own call came, where they are named
    done: set[BlockId] = field(default_factory=set)
    # queries [b n (h d)] of the attention that comes next, before positions are put on
    unplaced: Tensor | None = None
    # what is added to the picture's tokens [b n c] once the block is done
    behind: list[Tensor] = field(default_factory=list)

    def next(self, named: BlockId | None, keys: int) -> BlockId | None:
        """The block of the next call, None where it holds no whole picture.

        named: what the host says of it, if anything; keys: how many it has. A named block's own
        call is its first with keys for the whole picture. Where blocks are counted, a call with
        fewer where a block's is due is another node's, and not counted; a block that reads the text
        alone may have fewer.
        """
        whole = keys >= self.grid[0] * self.grid[1]
        if self.backbone.named:
            if named is None or named in self.done or named not in self.backbone.calls:
                return None
            if named[0] != CROSS and not whole:
                return None
            self.done.add(named)
            return named
        calls = self.backbone.calls
        block = calls[self.seen] if self.seen < len(calls) else None
        if block is not None and block[0] != CROSS and not whole:
            return None
        self.seen += 1
        return block

    def calls_of(self, stage: str, index: int) -> slice | None:
        """Which calls of a counted pass are those of one block; None where the family has no such
        block.
        """
        calls = self.backbone.calls
        if (stage, index, 0) not in calls:
            return None
        first = calls.index((stage, index, 0))
        last = first + 1
        while last < len(calls) and calls[last] in ((ALONE, index, 0), (CROSS, index, 0)):
            last += 1
        return slice(first, last)

    @property
    def reached(self) -> bool:
        """Whether any attention of the network's own came by."""
        return bool(self.done or self.seen)

    @property
    def grid(self) -> Grid:
        """Tokens (y, x) of the picture."""
        return self.backbone.grid(self.latent)


@dataclass
class Turn:
    """A UNet's attention, from the first patch of the host's that hears of it to the function that
    computes it.
    """

    call: AttnCall
    # tokens [b n c] and context [b t c] as the host gave them; None: all patches are done
    before: tuple[Tensor, Tensor] | None
    shape: tuple[int, ...] = ()  # [b n c] of its queries' tokens behind all patches
    due: bool = False  # the block's attention function comes next


@dataclass(frozen=True)
class AttnCall:
    """One attention call of the host, translated: extra_options of
    BasicTransformerBlock.forward.
    """

    block: BlockId
    grid: Grid
    texts: tuple[Part, ...]  # what is known of each equal part of the batch, in the host's order
    latent: Grid  # size of what the sampler asks about: of the whole latent, unless it resizes
    cross: bool = False  # cross-attention, whose keys are the text
    # per part, per row (cycled): how many times its text stands in the keys; () is once
    repeats: tuple[tuple[int, ...], ...] = ()
    network_size: Grid | None = (
        None  # size of what the UNet was given, in latent cells; None: not known
    )
    # per part: where in its text each key stands, None: it is not there; (): as the host gave it
    places: tuple[Places | None, ...] = ()
    unknown: str = ""  # why nobody can tell whose the rows are
    joint: Joint | None = None  # a transformer's call: text and picture in one softmax
    part: str = ""  # who asks about a part of the picture, and of which size

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of each part."""
        return tuple(part.role for part in self.texts)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [b n c] -> one view per part."""
        return x.chunk(len(self.texts))

    def bias_of(self, part: int) -> Tensor | None:
        """What the host adds to the logits of one part's keys, [1|b 1|h 1|n m]; None: nothing."""
        mask = self.joint and self.joint.mask
        return mask if mask is None or mask.shape[0] == 1 else self.parts(mask)[part]

    def of_picture(self, keys: Tensor) -> Tensor:
        """Of all keys [b m c] those of the picture [b n c]; beside a text they are some of them."""
        return keys if self.joint is None else keys[:, self.joint.picture]

    @property
    def cut(self) -> Grid | None:
        """The size that a part should have had, where another node cut the latent before the UNet;
        None where none did.
        """
        y, x = self.latent  # an area may reach over the edge, where the host ends it
        sizes = (
            (min(p.area[0], y - p.area[2]), min(p.area[1], x - p.area[3])) if p.area else (y, x)
            for p in self.texts
            if p.role is not Role.OTHER
        )
        return next(
            (size for size in sizes if self.network_size and size != self.network_size), None
        )

    def word(self, part: int, positions: Sequence[int], keys: int, text: int) -> list[int] | None:
        """Which of a part's keys are the words at these positions of its text of so many tokens;
        None: its text is not there.
        """
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
            texts=tuple(self.texts[p] for p in traced.parts),
            places=traced.places if self.cross else (),
            repeats=tuple(repeats) if any(r != 1 for row in repeats for r in row) else (),
        )

    def pictures(self, first: int, last: int) -> AttnCall:
        """The same call with only the pictures first <= i < last of every part."""
        picked = tuple(
            tuple(rows[i % len(rows)] for i in range(first, last)) for rows in self.repeats
        )
        joint = self.joint and self.joint.pictures(len(self.texts), first, last)
        return replace(self, repeats=picked, joint=joint)
