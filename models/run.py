"""All that changes during one sampler run.

Knows the host only by the plain values of a call; nodes/host/ translates.
Axes: b rows of a call = parts x pictures, n query tokens, t tokens of the text, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .attention.engine import read, references_of
from .attention.fused import Attend
from .attention.parts import References
from .attention.sharing import Sharing
from .network.backbone import Backbone
from .network.blocks import BlockId, Grid, block_name
from .network.call import Asker, AttnCall, Joint, Part, Pass, Turn, is_resized
from .network.sites import BlockSite
from .network.traced import Traced, trace
from .network.watch import ActiveInjection, PassEnds, Watcher


@dataclass(frozen=True)
class Said:
    """What the host says of a call of the model, and of the attention in it that is asked.

    names: of the call's parts, in the order of its rows; rows, size: of the latents that the model
    was called with; block, grid: of the attention.
    """

    names: tuple[Any, ...] = ()
    rows: int = 0
    size: Grid | None = None
    block: BlockId | None = None
    grid: Grid = (0, 0)


def _as_it_is(said: Said) -> Said:
    return said


@dataclass
class Run:
    """Everything of ours that changes during one sampler run; a plain object, since the host copies
    dicts and lists.
    """

    watchers: list[Watcher] = field(default_factory=list)
    # nobody wants the UNet's answer: a pass ends with what the last watcher waits for
    ends_early: bool = False
    sites: dict[BlockId, BlockSite] = field(default_factory=dict)
    parts: dict[Any, Part] = field(default_factory=dict)  # by the names that calls give them
    # what the host hands to a call -> what it says
    translate: Callable[[Any], Said] = _as_it_is
    latent: Grid = (0, 0)
    handed: Grid | None = None  # size of what the sampler asks about now; None: the latent's
    part: str = ""  # as of AttnCall
    pictures: int = 0  # in the sampled batch; 0: not known
    active: list[ActiveInjection] = field(default_factory=list)
    turn: Turn | None = None  # the attention that a UNet is at
    traced: dict[tuple[Any, ...], Traced | None] = field(default_factory=dict)
    compiled: bool = False  # torch.compile stands somewhere in the network
    backbone: Backbone | None = None  # of a transformer; None: a UNet
    passing: Pass | None = None  # the pass that a transformer is in
    listened: bool = False  # an attention of a transformer's own was heard in some pass
    drop: Callable[[], None] | None = None  # takes away what was left on a module for its next call
    wanted: set[int] = field(default_factory=set)  # ids of active ones that should have been read
    reached: set[int] = field(default_factory=set)  # of those that an attention call asked
    # what was said of this run, each once; None: nothing is said of it
    ways: set[str] | None = None

    def asks(self, size: Grid, who: Asker) -> None:
        """The sampler is about to ask for a picture of this size."""
        self.handed, (y, x), (height, width) = size, size, self.latent
        self.part = (
            ""
            if is_resized(self.latent, size)
            else f"{who} asks the model about {y}x{x} of a latent of {height}x{width}"
        )

    def expect(self, parts: Mapping[Any, Part]) -> None:
        """Parts that calls will name."""
        self.parts.update(parts)

    def parts_of(self, options: Any) -> list[Part]:
        """The parts of a call in their order. Tiled diffusion stacks several tiles of all of them,
        one tile behind the other.
        """
        return self._parts(self.translate(options))

    def _parts(self, said: Said) -> list[Part]:
        # called past the sampler: nobody we know
        parts = [self.parts.get(name, Part()) for name in said.names or (None,)]
        whole = len(parts) * self.pictures
        several = whole and said.rows > whole and not said.rows % whole
        return parts * (said.rows // whole) if several else parts

    def call(self, options: Any, text: int | None = None) -> AttnCall:
        """A UNet's call; text: tokens of a cross-attention's context, None in self-attention."""
        said = self.translate(options)
        parts = self._parts(said)
        repeats = () if text is None else tuple(_repeats(part, text) for part in parts)
        return AttnCall(
            said.block,
            said.grid,
            tuple(parts),
            self.handed or self.latent,
            text is not None,
            repeats if any(map(_several, repeats)) else (),
            said.size,
            part=self.part,
        )

    def joint_call(
        self, block: BlockId, options: Any, picture: slice, mask: Tensor | None
    ) -> AttnCall:
        """A call of a transformer; picture: of its keys. ValueError where a text stands there
        several times.
        """
        parts = self.parts_of(options)
        if self.backbone.joint and any(_several(part.repeats) for part in parts):
            raise ValueError(
                f"Kindred: lines of unequal length were made equal by repeating the shorter ones, "
                f"but {self.backbone.family} reads text "
                "and picture in one attention, where a repeated text is louder. Bring the lines of "
                "Subject Prompts to one length, "
                "or sample them apart."
            )
        return AttnCall(
            block,
            self.passing.grid,
            tuple(parts),
            self.handed or self.latent,
            network_size=self.passing.latent,
            part=self.part,
            joint=Joint(picture, mask),
        )

    def text_call(
        self,
        block: BlockId,
        options: Any,
        keys: int,
        stands: Callable[[int], slice | None],
        bias: Tensor | None = None,
    ) -> tuple[AttnCall, slice]:
        """Where the picture of a transformer's block reads the text, translated, and which of its
        keys are the text's.

        keys: all of the call's; stands: where so many rows of a CONDITIONING are among them, as
        Backbone.text says; bias: the host's mask on all keys, [1|b 1|h 1|n m].
        """
        call = self.joint_call(block, options, slice(0), None)
        rows = [p.rows for p in call.texts] if self.backbone.joint else [keys for _ in call.texts]
        where = [None if r is None else stands(r) for r in rows]
        seen = [at for at in where if at is not None]
        text = slice(
            min((at.start for at in seen), default=0), max((at.stop for at in seen), default=0)
        )
        places = tuple(None if at is None else _places(at, text) for at in where)
        joint = Joint(slice(0), None if bias is None else bias[..., text])
        return replace(call, cross=True, places=places, joint=joint), text

    def settle(self, n: Tensor, context: Tensor) -> AttnCall | None:
        """Behind all patches the block's attention comes next: its call, n [b n c], context
        [b t c]; None where no patch of ours heard of it.
        """
        turn = self.turn
        if turn is None or turn.before is None:
            return None
        turn.call = self._settled(turn.call, turn.before, n, context)
        turn.before, turn.shape, turn.due = None, tuple(n.shape), True
        return turn.call

    @property
    def due(self) -> AttnCall | None:
        """The call whose attention function comes next."""
        return self.turn.call if self.turn and self.turn.due else None

    def take(self) -> AttnCall | None:
        """The same; one attention is the block's, what others attend to until the next is
        theirs.
        """
        call = self.due
        if call is not None:
            self.turn.due = False
        return call

    def _settled(
        self, call: AttnCall, before: tuple[Tensor, Tensor], n: Tensor, context: Tensor
    ) -> AttnCall:
        """Its rows and keys as they are now, or why that cannot be told.

        Tiles of HyperTile are other rows of the same tokens; in self-attention the keys are no
        text.
        """
        (was, text), cross = before, call.cross
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
            traced = trace(len(call.texts), was, n, *((text, context, once) if cross else ()))
            self.traced[known if traced else (known, call.block)] = traced
        if (traced := self.traced.get(known)) is not None:
            return call.after(traced)
        return replace(
            call,
            unknown=f"another node's {'cross' if cross else 'self'}-attention patch gives block "
            f"{block_name(call.block)} "
            f"{n.shape[0]} rows where the model was given {was.shape[0]} ({len(call.texts)} "
            f"prompts of "
            f"{was.shape[0] // len(call.texts)} pictures), and whose they are cannot be told "
            f"(regional prompts, attention "
            "couple). Remove that node.",
        )

    def end_if_complete(self) -> None:
        """PassEnds where the rest of this pass is for nobody."""
        if self.ends_early and all(watcher.complete for watcher in self.watchers):
            self.take()
            raise PassEnds

    def drop_hook(self) -> None:
        """Take away what a layer's next call would have been handed."""
        if self.drop:
            self.drop()
        self.drop = None

    def mark_reached(self, call: AttnCall) -> None:
        """The block's own attention came to where we are asked."""
        self.reached.update(id(active) for active in self.active if active.concerns(call))

    def close(self) -> None:
        """Let go of everything, so that whoever still holds the run's options holds no tensors."""
        self.active, self.watchers, self.sites, self.parts, self.traced = [], [], {}, {}, {}
        self.turn = self.passing = None
        self.drop_hook()

    def references(
        self, call: AttnCall, q: Tensor, k: Tensor, v: Tensor
    ) -> list[References | Sharing]:
        """What the parts of a call read of every active injection; empty where they read
        nothing.
        """
        return references_of(call, self.active, self.sites, q, k, v)

    def alters(self, call: AttnCall) -> bool:
        """Whether a watcher changes what the call is computed of."""
        return not call.cross and any(watcher.alters(call.block) for watcher in self.watchers)

    def altered(
        self, call: AttnCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same once they changed it, q [b n c], k v [b m c]."""
        for watcher in self.watchers:
            if watcher.alters(call.block):
                q, k, v = watcher.altered(call, q, k, v)
        return q, k, v

    def attend(
        self, call: AttnCall, attend: Attend, q: Tensor, k: Tensor, v: Tensor, heads: int
    ) -> Tensor:
        """The host's attention with every active reference, q [b n c], k v [b m c] -> [b n c]."""
        self.mark_reached(call)
        if self.alters(call):
            q, k, v = self.altered(call, q, k, v)
        references = self.references(call, q, k, v)
        if not references:
            return attend(q, k, v, heads)
        return self.read(call, references, attend, q, k, v, heads)

    def read(
        self,
        call: AttnCall,
        references: Sequence[References | Sharing],
        attend: Attend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
    ) -> Tensor:
        """The same with what was found for the call."""
        return read(call, references, self.sites[call.block], attend, q, k, v, heads)


def _repeats(part: Part, text: int) -> tuple[int, ...]:
    """How many times each row's text stands among `text` tokens of the context."""
    again = max(text // (part.text or text), 1)
    return tuple(once * again for once in part.repeats)


def _several(repeats: Sequence[int]) -> bool:
    return any(count != 1 for count in repeats)


def _places(own: slice, text: slice) -> tuple[int, ...]:
    """The places of the keys of `text` in a text that stands at `own`; -1 for those of others."""
    return tuple(
        key - own.start if own.start <= key < own.stop else -1
        for key in range(text.start, text.stop)
    )
