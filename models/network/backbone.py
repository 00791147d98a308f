"""What a diffusion transformer is to the methods: which attention calls it makes, and where the
picture stands in each.

The host's side (nodes/host/networks/) fills this in, one file per kin; nothing here knows the host.
Axes: b rows of a call, n query tokens, m key tokens, h heads, d head width, P the picture's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .blocks import BlockId, Grid
from .rope import Turn
from .unplaced import Unplaced

# the stage of a block whose call holds the picture's tokens and no text: a softmax of their own
ALONE = "self"
CROSS = "cross"  # the stage of a call in which the picture of the block before it reads the text
DOUBLE = "double"  # the stage of a joint block with weights of its own for text and picture
SINGLE = "single"  # the stage of a joint block with the same weights for both


class Stands(str, Enum):
    """Where the picture's tokens stand among those of a joint attention call."""

    FIRST = "first"  # picture, then references, then text
    LAST = "last"  # text, then references, then picture
    BEFORE_REFERENCES = "before references"  # text, then picture, then references


@dataclass(frozen=True)
class Backbone:
    """One transformer of the host."""

    family: str  # the host's name of its kind
    # of one pass, in running order; None: one that holds no whole picture (refiners, text alone)
    calls: tuple[BlockId | None, ...]
    # ("cross", i, 0) is no block of its own: there block ("self", i, 0) reads the text
    patch: int  # latent cells along one side of a token
    # the host tells block_type and block_index, which are ("double", i, 0) or ("single", i, 0);
    # else calls
    named: bool = False
    # are counted, which holds only in a pass whose blocks nobody replaces or skips
    # (transformer_options["patches_replace"]["dit"])
    # one softmax for text and picture; False: a self-attention of the picture alone
    joint: bool = True
    stands: Stands = Stands.BEFORE_REFERENCES
    multiple: int = 1  # the picture's tokens are padded to a multiple of so many
    prefix: int = 0  # tokens of the network's own before the text's
    # the CONDITIONING's rows are the last of the text's part: pads, if any, stand before them
    text_last: bool = False
    turn: Turn | None = None  # None: keys hold no position, or one that no turn undoes
    # of the blocks that hold the picture alone, where their heads are of another width
    turn_alone: Turn | None = None
    unplaced: Unplaced | None = None  # keys are kept without positions; None: as they come
    # where the network hides its attention from the host's override: the module that makes each
    # call, as "blocks.0.attn"; (): the override hears them
    hidden: tuple[str, ...] = ()
    flow: bool = True  # x = (1 - sigma) x0 + sigma eps; False: x = x0 + sigma eps
    noise_scale: float = 1.0  # what eps is multiplied by (HiDream-O1: 8)
    # native reference latents may stand beside; False: they move the picture's keys or add calls
    references: bool = True
    unheard: str = ""  # why nothing can be read in it, in the user's words; "": it can

    def grid(self, latent: Grid) -> Grid:
        """The picture's tokens (y, x) of a latent of so many cells: the host pads odd sizes up."""
        return -(-latent[0] // self.patch), -(-latent[1] // self.patch)

    def text_tokens(self, text: int) -> int:
        """Tokens that a text of so many takes in front of the picture."""
        return -(-text // self.multiple) * self.multiple

    @property
    def blocks(self) -> tuple[BlockId, ...]:
        """The blocks whose attention holds the picture, in running order."""
        return tuple(dict.fromkeys(b for b in self.calls if b and b[0] != CROSS))

    @property
    def reading(self) -> tuple[BlockId, ...]:
        """The blocks in which the picture reads the text, in their own call or in the one behind
        it.
        """
        return tuple(b for b in self.blocks if self.holds_text(b) or (CROSS, *b[1:]) in self.calls)

    @property
    def locating(self) -> tuple[BlockId, ...]:
        """Those of them whose word maps show best where things are.

        The last half of the double blocks, else the middle third (arXiv 2502.04320 reads the last
        double blocks of FLUX).
        """
        reading = self.reading
        if double := [b for b in reading if b[0] == DOUBLE]:
            return tuple(double[len(double) // 2 :])
        third = len(reading) // 3
        return reading[third : max(len(reading) - third, third + 1)]

    def turn_of(self, block: BlockId) -> Turn | None:
        """How positions rotate the keys of a block."""
        return self.turn_alone if self.turn_alone and block[0] == ALONE else self.turn

    def holds_text(self, block: BlockId) -> bool:
        """Whether a block's call is a joint one, text and picture in one softmax."""
        return self.joint and block[0] != ALONE

    def picture(self, tokens: int, count: int, references: int = 0) -> slice:
        """Where the picture's `count` tokens stand among so many of a call, `references` of which
        are of native reference latents.
        """
        if not self.joint:
            return slice(0, count)
        if self.stands is Stands.FIRST:
            return slice(0, count)
        padded = -(-count // self.multiple) * self.multiple
        first = tokens - padded - (references if self.stands is Stands.BEFORE_REFERENCES else 0)
        return slice(first, first + count)

    def text(self, tokens: int, count: int, rows: int, references: int = 0) -> slice | None:
        """Where a CONDITIONING's `rows` stand among the tokens of a call that holds text; count,
        references: as of `picture`.

        None where so many do not fit in: another node made its text longer or shorter.
        """
        first, end = 0, tokens
        if self.joint and self.stands is Stands.FIRST:
            first = count + references
        elif self.joint:
            end = self.picture(tokens, count, references).start
            end -= references if self.stands is Stands.LAST else 0
        first = end - rows if self.text_last else first + self.prefix
        return slice(first, first + rows) if 0 <= first and first + rows <= end else None
