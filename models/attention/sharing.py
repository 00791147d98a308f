"""Pictures of one batch that read one another's tokens: one gather of keys and one of values,
whoever reads whom.

Axes: b pictures, n tokens of a picture, l tokens read beside them, c channels; P parts of a call
that share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..copies import sent
from ..network.blocks import Grid
from .fused import Attend
from .references import ReferenceTokens
from .weights import log_of

Pictures = tuple[int, int]  # the first, and the one behind the last


@dataclass(frozen=True, eq=False)
class Gather:
    """Where every picture's keys stand among P*b*n, neighbours that read the same beside one
    another.

    index: all groups' positions, of a group those of P parts of its pictures of n + l tokens; rows:
    the P*b rows of the queries in the same order, None where it is theirs; biases: per group
    [1 1 1 n+l], or None.
    """

    groups: tuple[Pictures, ...]
    index: Tensor
    rows: Tensor | None
    lengths: tuple[int, ...]  # n + l of every group
    biases: tuple[Tensor | None, ...]


@dataclass
class Gathers:
    """Makes them on the device, once per step, grid and number of parts."""

    pictures: int
    weight: float
    device: torch.device
    _cache: dict[tuple[Grid, int, torch.dtype], Gather] = field(default_factory=dict)
    _own: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # of the whole run

    def begin_step(self) -> None:
        self._cache.clear()

    def of(
        self,
        grid: Grid,
        parts: int,
        groups: Sequence[Pictures],
        reads: Mapping[Pictures, Tensor],
        dtype: torch.dtype,
    ) -> Gather:
        """reads: per group of pictures the positions [l] among b*n that each of them reads, on the
        device; none: its own alone.
        """
        key = grid, parts, dtype
        if key not in self._cache:
            b, n = self.pictures, grid[0] * grid[1]
            if (b * parts, n) not in self._own:
                self._own[b * parts, n] = torch.arange(b * parts * n, device=self.device).view(
                    b * parts, n
                )
            own, pieces, rows = self._own[b * parts, n], [], []
            for first, last in groups:
                for part in range(parts):
                    read = reads.get((first, last))
                    read = read + part * b * n if read is not None and part else read
                    for row in range(part * b + first, part * b + last):
                        pieces += [own[row]] if read is None else [own[row], read]
                        rows.append(row)
            lengths = [n + (len(reads[who]) if who in reads else 0) for who in groups]
            self._cache[key] = Gather(
                tuple(groups),
                torch.cat(pieces),
                self._order(rows),
                tuple(lengths),
                tuple(self._bias(n, length, dtype) for length in lengths),
            )
        return self._cache[key]

    def _order(self, rows: list[int]) -> Tensor | None:
        if rows == sorted(rows):
            return None
        key = len(rows), 0
        if key not in self._own:
            self._own[key] = sent(torch.tensor(rows), self.device)
        return self._own[key]

    def _bias(self, n: int, length: int, dtype: torch.dtype) -> Tensor | None:
        """log W beside zeros, where W is not 1."""
        if self.weight == 1 or length == n:
            return None
        return F.pad(
            torch.full((1, 1, 1, length - n), log_of(self.weight), dtype=dtype, device=self.device),
            (n, 0),
        )


@dataclass(frozen=True, eq=False)
class Sharing:
    """What a story says of an attention call: these of its parts share, each among its own
    pictures.
    """

    parts: tuple[int, ...]
    gather: Gather
    weight: float
    dims_text: bool = False  # as of ReferenceTokens

    def attend(self, attend: Attend, own: Sequence[Tensor], heads: int) -> list[list[Tensor]]:
        """own: q k v [P*b n c] of the parts that share -> per part, per group, the outputs [. n c]
        of its pictures.
        """
        g, parts, c = self.gather, len(self.parts), own[0].shape[-1]
        q = (own[0] if g.rows is None else own[0].index_select(0, g.rows)).split(
            [parts * (last - first) for first, last in g.groups]
        )
        sizes = [len(queries) * length for queries, length in zip(q, g.lengths)]
        k, v = (t.flatten(0, 1).index_select(0, g.index).split(sizes) for t in own[1:])
        out = []
        for queries, keys, values, length, bias in zip(q, k, v, g.lengths, g.biases):
            out.append(
                attend(
                    queries, keys.view(-1, length, c), values.view(-1, length, c), heads, mask=bias
                ).chunk(parts)
            )
        return [[pieces[part] for pieces in out] for part in range(parts)]

    def tokens(self, k: Tensor, v: Tensor) -> list[tuple[Pictures, ReferenceTokens]]:
        """The same for whoever joins them with other references: k v [b n c] of one part -> what
        each group reads beside its own.
        """
        n, at, read = k.shape[1], 0, []
        for (first, last), length in zip(self.gather.groups, self.gather.lengths):
            index = self.gather.index[at + n : at + length]  # the first part's first picture
            at += len(self.parts) * (last - first) * length
            if length > n:
                kv = (t.flatten(0, 1).index_select(0, index)[None] for t in (k, v))
                read.append(((first, last), self._tokens(*kv)))
        return read

    def _tokens(self, k: Tensor, v: Tensor) -> ReferenceTokens:
        return ReferenceTokens(k, v, self.weight, dims_text=self.dims_text)
