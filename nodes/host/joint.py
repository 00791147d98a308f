"""A transformer's attention: one override hears every call, counted from the start of a pass, and
brings it into one shape.

What a reference pass records of a call are the picture's keys and values as the network uses them,
side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from comfy.ldm.modules.attention import SDP_BATCH_LIMIT, attention_pytorch
from torch import Tensor

from ...models.attention.fused import Attend, FusedAttend
from ...models.attention.joint import as_bias, attend_rows
from ...models.attention.parts import References
from ...models.attention.sharing import Sharing
from ...models.network.backbone import ALONE, CROSS
from ...models.network.blocks import BlockId
from ...models.network.call import AttnCall, Pass
from ...models.network.watch import PassEnds, Watcher
from ...models.run import Run
from .beside import added_beside, read_beside
from .hearing import UNPLACED, handing_on
from .model import KEY
from .networks import require_listening
from .networks.shapes import flat, joined, plain
from .page import warn

_FUSED = getattr(attention_pytorch, "__wrapped__", None)  # as the host hands it to an override
# where the host hands native references to the networks that Backbone.references is False for
NATIVE = ("ref_latents", "ref_patches", "ref_pixel_values")


def joint_pass(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: dict[str, Any] | None = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """One pass of the network, x [b c (1) y x]; zeros where it ended early, whose answer is not
    asked for.
    """
    run: Run = transformer_options[KEY]
    _check(run, x, kwargs)
    counted = not run.backbone.named
    passing = run.passing = Pass(run.backbone, tuple(x.shape[-2:]))
    if counted:
        transformer_options = _counting(passing, transformer_options)
    for watcher in run.watchers:
        watcher.begin_pass()
    try:
        with handing_on(transformer_options):
            out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    except PassEnds:
        return torch.zeros_like(x)
    finally:
        run.passing = None
    run.listened = run.listened or passing.reached
    if not run.listened:
        require_listening(executor.class_obj)
    if counted and passing.seen != len(run.backbone.calls):
        _miscounted(run, passing.seen)
    return out


def _counting(passing: Pass, options: dict[str, Any]) -> dict[str, Any]:
    """Options in which a replaced block is known by its own number: its replacement may skip the
    block, or run it.
    """
    replaced = options.get("patches_replace", {}).get("dit")
    if not replaced:
        return options

    def known(f: Callable[..., Any], calls: slice) -> Callable[..., Any]:
        def block(*args: Any, **kwargs: Any) -> Any:
            passing.seen = calls.start
            out = f(*args, **kwargs)
            passing.seen = calls.stop
            return out

        return block

    dit = dict(replaced)
    for (kind, index, *_), f in replaced.items():
        calls = passing.calls_of(kind.removesuffix("_block"), index)
        if calls is not None:
            dit[kind, index] = known(f, calls)
    return options | {"patches_replace": options["patches_replace"] | {"dit": dit}}


def _check(run: Run, x: Tensor, kwargs: Mapping[str, Any]) -> None:
    """ValueError where the picture's tokens would not be where the family has them."""
    if x.ndim == 5 and x.shape[2] != 1:
        raise ValueError(
            f"Kindred: the latent has {x.shape[2]} frames, but pictures are read one by one, of 1 "
            f"frame."
            " Take a latent of one picture."
        )
    native = [kwargs[name] for name in NATIVE if kwargs.get(name) is not None]
    if not run.backbone.references and any(map(len, native)):
        raise ValueError(
            f"Kindred: reference latents are wired, and in {run.backbone.family} they move the "
            f"picture's own tokens,"
            " so a Kindred reference cannot be read beside them. Remove ReferenceLatent."
        )


def _miscounted(run: Run, calls: int) -> None:
    """Say once that what was taken for one block's may have been another's."""
    ways = getattr(run, "ways", None)
    if ways is None or "miscounted" in ways:
        return
    ways.add("miscounted")
    warn(
        f"Kindred: a pass made {calls} attention calls where {run.backbone.family} makes "
        f"{len(run.backbone.calls)}, which are told apart"
        " by their number alone. Another node adds or skips some: what is read may come from other "
        "blocks. Remove that node."
    )


def _named_block(options: Mapping[str, Any]) -> BlockId | None:
    """The block that the host says it is in; most families say nothing."""
    kind, index = options.get("block_type"), options.get("block_index")
    return None if kind is None or index is None else (kind, index, 0)


@dataclass(frozen=True, eq=False)
class _BlockCall:
    """A block's attention in the layout of the methods: q [b n (h d)], k v [b m (h d)]."""

    run: Run
    block: BlockId
    options: Mapping[str, Any]
    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None = None  # the host's, on its keys

    @cached_property
    def translated(self) -> AttnCall:
        """In the words of the methods, without the host's mask; a cross-attention as its block's,
        whose keys are not the picture's.
        """
        block, keys = (ALONE, *self.block[1:]), slice(0)
        if self.block[0] != CROSS:
            block, keys = self.block, self.picture(self.k)
        return self.run.joint_call(block, self.options, keys, None)

    def picture(self, tokens: Tensor) -> slice:
        """Where the picture stands among the tokens [b n c]."""
        count, native = self._counts()
        return self.run.backbone.picture(tokens.shape[1], count, native)

    def show(self) -> None:
        """Hand what passes to the watchers: the picture's keys and values, and where it looks at
        the text.
        """
        if self.block[0] == CROSS:  # it has no block of its own
            return self._show_words((ALONE, *self.block[1:]), slice(0, self.q.shape[1]))
        keys, call = self.picture(self.k), self.translated
        for watcher in self.run.watchers:
            wanted = self.block in watcher.blocks  # else a view: copies of all take gigabytes
            watcher.self_tokens(call, self._kept(keys) if wanted else self.k[:, keys])
        if self.run.backbone.holds_text(self.block):
            self._show_words(self.block, self.picture(self.q))

    def _kept(self, keys: slice) -> Tensor:
        """What a reference is of these keys: they and their values, side by side; unplaced where
        the network's keys are kept so.
        """
        unplaced = self.options.get(UNPLACED)
        k = self.k if unplaced is None else unplaced()
        return torch.cat([k[:, keys], self.v[:, keys]], -1)

    def with_queries(self) -> _BlockCall:
        """The call with the picture's queries as the watchers change them; itself where none
        does.
        """
        watchers = [w for w in self.run.watchers if self.block in w.query_blocks]
        if not watchers:
            return self
        at = self.picture(self.q)
        own = q = self.q[:, at]
        for watcher in watchers:
            q = watcher.queries(self.translated, q)
        return self if q is own else replace(self, q=spliced(self.q, at, q))

    @property
    def answers(self) -> bool:
        """Whether a watcher waits for what this attention answers."""
        return any(self._answers(watcher) for watcher in self.run.watchers)

    def _answers(self, watcher: Watcher) -> bool:
        return self.block in watcher.output_blocks or self.block == watcher.tap

    def answered(self, out: Tensor) -> Tensor:
        """The call's answer [b n (h d)] with the picture's rows as the watchers change them; itself
        where none waits for it.
        """
        if not self.answers:
            return out
        at = self.picture(out)
        call, own = self.translated, out[:, at]
        rows = own
        for watcher in filter(self._answers, self.run.watchers):
            features = rows.movedim(1, 2).unflatten(2, call.grid)  # -> [b c y x]
            watcher.output_block(self.block, features, call.texts)
            rows = watcher.self_output(call, rows)
        self.run.end_if_complete()
        return out if rows is own else spliced(out, at, rows)

    def references(self) -> list[References | Sharing]:
        """What the picture's queries read beside the keys of the call."""
        if self.block[0] == CROSS:
            return []
        self.run.mark_reached(self.translated)
        return self.run.references(self.translated, self.q[:, self.picture(self.q)], self.k, self.v)

    def alters(self) -> bool:
        """Whether a watcher changes what it is computed of."""
        return any(watcher.alters(self.block) for watcher in self.run.watchers)

    def altered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Its queries, keys and values once they changed it."""
        return self.run.altered(self.translated, self.q, self.k, self.v)

    def read(
        self,
        references: Sequence[References | Sharing],
        attend: Attend,
        kernel: Attend,
        mask: Tensor | None,
    ) -> Tensor:
        """[b n (h d)]: the picture's queries read them by `kernel`, all others are `attend`'s
        alone.
        """
        joint = self.translated.joint

        def of_picture(q: Tensor, mask: Tensor | None) -> Tensor:
            call = replace(self.translated, joint=replace(joint, mask=mask))
            return self.run.read(call, references, kernel, q, self.k, self.v, self.heads)

        queries = self.picture(self.q)
        return attend_rows(attend, self.q, self.k, self.v, self.heads, queries, of_picture, mask)

    def _show_words(self, block: BlockId, rows: slice) -> None:
        """The picture's rows of a block's queries, and those of the keys that are the text's."""
        watchers = [watcher for watcher in self.run.watchers if block in watcher.map_blocks]
        if not watchers:
            return
        (count, native), keys, q = self._counts(), self.k.shape[1], self.q[:, rows]

        def stands(rows: int) -> slice | None:
            return self.run.backbone.text(keys, count, rows, native)

        call, text = self.run.text_call(block, self.options, keys, stands, self._bias(rows, q))
        for watcher in watchers:
            watcher.cross(call, q, self.k[:, text], self.heads)

    def _bias(self, rows: slice, q: Tensor) -> Tensor | None:
        """The host's mask on these rows of the queries, q, as something to add [1|b 1|h 1|n m]."""
        mask = self.mask
        if mask is None:
            return None
        theirs = mask if mask.shape[-2] == 1 else mask[..., rows, :]
        return as_bias(theirs, q, self.k.shape[1])

    def _counts(self) -> tuple[int, int]:
        """Tokens of the picture, and of the host's own reference latents, which it counts in a
        list.
        """
        y, x = self.run.passing.grid
        native = self.options.get("reference_image_num_tokens") or 0
        return y * x, native if isinstance(native, int) else sum(native)


def joint_override(previous: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """optimized_attention_override of a transformer; previous: another pack's, which computes what
    we ask for.
    """

    @torch.compiler.disable
    def override(
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        host = func if previous is None else partial(previous, func)
        options = kwargs.get("transformer_options") or {}
        block = _block_of(options, k.shape[2 if kwargs.get("skip_reshape") else 1])
        if block is None:
            return host(q, k, v, heads, mask=mask, **kwargs)
        run: Run = options[KEY]
        *tokens, restored = joined(q, k, v, heads, kwargs)
        shown = _BlockCall(run, block, options, *tokens, heads, mask)
        shown.show()
        run.end_if_complete()
        call = shown.with_queries()
        references, concepts = call.references(), read_beside(run, block)
        attend = _in_layout(host, plain(kwargs))
        if call.alters():
            return restored(attend(*call.altered(), heads, mask=mask))
        if not (references or concepts or call.answers) and call is shown:
            return host(q, k, v, heads, mask=mask, **kwargs)
        if references:
            fused = func is _FUSED and previous is None
            out = call.read(references, attend, _kernel(attend, fused, q), mask)
        elif call is shown:
            out = flat(host(q, k, v, heads, mask=mask, **kwargs), kwargs)
        else:
            out = attend(call.q, call.k, call.v, heads, mask=mask)
        return restored(added_beside(call, call.answered(out), concepts, attend))

    setattr(override, KEY, (previous,))  # a second install replaces ours instead of stacking it
    return override


def _kernel(attend: Attend, fused: bool, q: Tensor) -> Attend:
    """What references are read by; fused: the host's attention is torch's own."""
    return FusedAttend(attend) if fused and q.shape[0] <= SDP_BATCH_LIMIT else attend


def spliced(whole: Tensor, at: slice, rows: Tensor) -> Tensor:
    """Tokens [b n c] with those of a slice exchanged."""
    return torch.cat([whole[:, : at.start], rows, whole[:, at.stop :]], 1)


def _block_of(options: Mapping[str, Any], keys: int) -> BlockId | None:
    """The block whose attention is asked, with so many keys; None where it is none of ours."""
    run = options.get(KEY)
    if not isinstance(run, Run) or run.passing is None:
        return None
    block = run.passing.next(_named_block(options), keys)
    return block if run.watchers or run.active else None


def _in_layout(host: Callable[..., Tensor], rest: Mapping[str, Any]) -> Attend:
    """The host's attention of tokens [b n (h d)]."""

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        return host(q, k, v, heads, mask=mask, **rest)

    return attend
