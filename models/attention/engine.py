"""What an attention call reads of the injections that are on, for both papers.

Paper A (arXiv 2403.11284, eq. 1-3): own keys and values are joined by those of a reference, in one
softmax. Paper B (arXiv 2402.03286, eq. 2-3): pictures of one batch are each other's references. An
injection says which tokens each part of the batch reads (References, or Sharing for a story alone);
here they come to the host's attention, docs/method.md section 4.
Axes: b rows of a call = parts x pictures, n query tokens, m key tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..network.blocks import BlockId, block_name
from ..network.call import AttnCall, grid_of
from ..network.sites import BlockSite
from ..network.watch import ActiveInjection
from .fused import Attend
from .parts import References, attend_group, attend_sharing, beside_others, reader, take_parts
from .sharing import Sharing


def references_of(
    call: AttnCall,
    active: Sequence[ActiveInjection],
    sites: Mapping[BlockId, BlockSite],
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> list[References | Sharing]:
    """What the parts of a call read of every active injection, q [b n c], k v [b m c]; empty where
    they read nothing.

    ValueError where nobody can tell whose the rows are, or the block has no keys and values of its
    own.
    """
    concerned = [injection for injection in active if injection.concerns(call)]
    if not concerned:
        return []
    if call.unknown:
        raise ValueError(f"{concerned[0].node}: {call.unknown}")
    site = sites[call.block]
    references: list[References | Sharing] = []
    try:
        for injection in concerned:
            references += injection.references(call, site, q, k, v)
    except AttributeError as error:
        _require_projections(call, site, error)
        raise
    return references if any(_is_read(reference, call) for reference in references) else []


def _is_read(reference: References | Sharing, call: AttnCall) -> bool:
    """Whether any part of the call reads it."""
    if isinstance(reference, Sharing):
        return True
    return any(reference.read_by(call, part) for part in range(len(call.texts)))


def _require_projections(call: AttnCall, site: BlockSite, error: AttributeError) -> None:
    """ValueError where another node's module stands for the block's attention."""
    if site.module is None:
        return
    layer = site.module.attn2 if call.cross else site.module.attn1
    if hasattr(layer, "to_k") and hasattr(layer, "to_v"):
        return
    raise ValueError(
        f"Kindred: another node put {type(layer).__name__} in the place of the attention of block "
        f"{block_name(call.block)}, and it has no keys and values (to_k, to_v) to read. Remove "
        f"that node, or choose "
        "other blocks."
    ) from error


def read(
    call: AttnCall,
    references: Sequence[References | Sharing],
    site: BlockSite,
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
) -> Tensor:
    """The host's attention with all references, q [b n c], k v [b m c] -> [b n c].

    Concatenated references stand in its softmax, added ones beside it; parts that read nothing stay
    the host's own.
    """
    alone = len(references) == 1 and isinstance(references[0], Sharing)
    if alone and call.joint is None:
        return attend_sharing(call, attend, q, k, v, heads, references[0])
    beside = _beside_one_another(references, call, k, v)
    if k.shape[0] != q.shape[0]:
        # HyperTile cuts only the queries into tiles; the host's kernels read the keys so
        k, v = (t.reshape(q.shape[0], -1, t.shape[-1]) for t in (k, v))
    own = share_of_own(call, site, k)
    if own < 1:
        beside = [reference.quieter(own) for reference in beside]
    return _read_by_picture(call, beside, attend, q, k, v, heads)


def _beside_one_another(
    references: Sequence[References | Sharing], call: AttnCall, k: Tensor, v: Tensor
) -> list[References]:
    """The same with a story's sharing as references too, k v [b m c]."""
    beside: list[References] = []
    for reference in references:
        if isinstance(reference, Sharing):
            beside += beside_others(reference, call, k, v)
        else:
            beside.append(reference)
    return beside


def share_of_own(call: AttnCall, site: BlockSite, k: Tensor) -> float:
    """How many of the keys that a picture of this size has here a query still sees of its own, k
    [b m c]: at most 1.

    Tiles, merged tokens and smaller grids leave fewer, beside which a reference would be louder.
    More of them are another node's reference, which ours stands beside as beside one of our own.
    """
    if call.cross or call.joint or not call.network_size:
        return 1.0
    y, x = grid_of(call.network_size, site.divisor)
    return min(k.shape[1] / (y * x), 1.0)


def _read_by_picture(
    call: AttnCall,
    references: Sequence[References],
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
) -> Tensor:
    """Pictures that read the same share a call: no mask, and no tokens that nobody reads."""
    rows = q.shape[0] // len(call.texts)
    bounds = {0, rows}
    for reference in references:
        bounds.update(reference.pictures or ())
    if len(bounds) == 2:
        return _read_alike(call, references, attend, q, k, v, heads)
    by_picture = [t.unflatten(0, (-1, rows)) for t in (q, k, v)]  # [parts pictures n|m c]
    out = []
    for first, last in pairwise(sorted(bounds)):
        own = [t[:, first:last].flatten(0, 1) for t in by_picture]
        theirs = [r.cut(first, last, rows) for r in references if r.covers(first, last)]
        mixed = _read_alike(call.pictures(first, last), theirs, attend, *own, heads)
        out.append(mixed.unflatten(0, (-1, last - first)))
    return torch.cat(out, 1).flatten(0, 1)


def _read_alike(
    call: AttnCall,
    references: Sequence[References],
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
) -> Tensor:
    """Where all pictures of a part read the same: parts that read equally many tokens of the same
    injections share a call.
    """
    groups: dict[tuple[int | None, ...], list[int]] = {}
    for part in range(len(call.texts)):
        groups.setdefault(_lengths(call, references, part), []).append(part)
    out: dict[int, Tensor] = {}
    for lengths, parts in groups.items():
        own = [take_parts(call, t, parts) for t in (q, k, v)]
        used = [r for r, length in zip(references, lengths) if length is not None]
        joined = reader(call, parts, used)
        mixed = attend_group(call, attend, *own, heads, used, parts, joined)
        if len(groups) == 1:
            return mixed
        out.update(zip(parts, mixed.chunk(len(parts))))
    return torch.cat([out[part] for part in range(len(call.texts))])


def _lengths(call: AttnCall, references: Sequence[References], part: int) -> tuple[int | None, ...]:
    """How many tokens of each reference a part reads; None where it reads none of it."""
    tokens = [reference.read_by(call, part) for reference in references]
    return tuple(t.k.shape[1] if t else None for t in tokens)
