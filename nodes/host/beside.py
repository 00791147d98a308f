"""Decoupled concepts in a transformer's pass: queries without their positions, and where what they
read is added.

Queries come from the host's `attn1_patch`, which is asked before positions are put on, in the
families that have it; from the call itself where keys hold no position (SD3, AuraFlow) or the
picture reads the text by a cross-attention of its own; elsewhere the backbone's turn takes the
position off again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...models.attention.fused import Attend
from ...models.concept.decoupled import ActiveDecoupled, Place
from ...models.network.backbone import ALONE, CROSS, DOUBLE
from ...models.network.blocks import BlockId
from ...models.network.call import AttnCall, Role
from ...models.run import Run
from .model import KEY

PATCH = "attn1_patch"


class HeardCall(Protocol):
    """A block's attention call as nodes/host/joint.py has it: q [b n (h d)], k v [b m (h d)]."""

    run: Run
    block: BlockId
    options: Mapping[str, Any]
    q: Tensor
    k: Tensor
    v: Tensor
    heads: int

    @property
    def translated(self) -> AttnCall: ...

    def picture(self, tokens: Tensor) -> slice: ...


def read_beside(run: Run, block: BlockId) -> list[ActiveDecoupled]:
    """The concepts that the picture reads in this call; in a cross-attention those of the block
    that it belongs to.
    """
    if block[0] == CROSS:
        block = (ALONE, *block[1:])
    elif not run.backbone.joint:
        return []
    return [a for a in run.active if isinstance(a, ActiveDecoupled) and a.reads(block)]


def added_beside(
    call: HeardCall, out: Tensor, concepts: Sequence[ActiveDecoupled], attend: Attend
) -> Tensor:
    """A call's answer [b n (h d)] with what its picture reads of the concepts; what belongs into
    the stream is kept until its block is done.
    """
    if not concepts:
        return out
    queries = slice(None) if call.block[0] == CROSS else call.picture(call.q)
    q = unplaced(call, queries)
    own = tuple(call.translated.of_picture(t) for t in (call.k, call.v))
    for concept in concepts:
        call.run.reached.add(id(concept))
        answer = concept.added(call.translated, q, own, call.heads, attend)
        if answer is None:
            continue
        if concept.place is Place.STREAM:
            call.run.passing.behind.append(answer)
        else:
            out = _with(out, queries, answer)
    return out


def _with(tokens: Tensor, where: slice, more: Tensor) -> Tensor:
    """The tokens [b n c] with `more` added to some of them; the others keep every bit."""
    start, stop, _ = where.indices(tokens.shape[1])
    return torch.cat((tokens[:, :start], tokens[:, start:stop] + more, tokens[:, stop:]), 1)


def unplaced(call: HeardCall, queries: slice) -> Tensor:
    """The picture's queries of a call as they are before their positions are put on,
    [b n (h d)].
    """
    backbone, passing = call.run.backbone, call.run.passing
    kept, passing.unplaced = passing.unplaced, None
    if kept is not None and kept.shape == call.q.shape:
        return kept[:, queries]
    q, turn = call.q[:, queries], backbone.turn_of(call.block)
    if turn is None or call.block[0] == CROSS:
        return q
    texts = (part.text for part in call.translated.texts if part.role is not Role.OTHER)
    text = backbone.text_tokens(next(texts, None) or 0)
    return turn.out_of_place(passing.grid, text, q.device)(q)


@torch.compiler.disable
def attn1_patch(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> dict[str, Any]:
    """The host's hook before positions are put on, q [b h n d]: it keeps the queries, and changes
    nothing.
    """
    run = (more.get("extra_options") or {}).get(KEY)
    if isinstance(run, Run) and run.passing is not None:
        run.passing.unplaced = q.transpose(1, 2).flatten(2)
    return {}


def install_beside(transformer: dict[str, Any], run: Run, place: Place) -> None:
    """Our hooks in a run's own copy of the options; last, so that other packs' changes are seen."""
    if run.backbone.joint:  # of the others some ask it for something else
        patches = transformer["patches"] = dict(transformer.get("patches", {}))
        theirs = [p for p in patches.get(PATCH, ()) if p is not attn1_patch]
        patches[PATCH] = [*theirs, attn1_patch]
    if place is Place.STREAM:
        replaced = transformer["patches_replace"] = dict(transformer.get("patches_replace", {}))
        dit = replaced["dit"] = dict(replaced.get("dit", {}))
        for stage, index, _ in run.backbone.blocks:
            if stage == DOUBLE:
                name = (f"{DOUBLE}_block", index)
                dit[name] = _then_added(run, dit.get(name))


def _then_added(run: Run, previous: Callable[..., Any] | None) -> Callable[..., Any]:
    """A double block, replaced by another pack or not, behind which a concept is added to the
    picture's tokens.
    """

    def replaced(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        done = extra["original_block"](args) if previous is None else previous(args, extra)
        if run.passing is None:
            return done
        answers, run.passing.behind = run.passing.behind, []
        for tokens in answers:  # the host's own references stand behind the picture
            done = {**done, "img": _with(done["img"], slice(0, tokens.shape[1]), tokens)}
        return done

    return replaced
