"""A transformer's attention: one override hears every call, counted from the start of a pass, and
brings it into one shape.

What a reference pass records of a call are the picture's keys and values as the network uses them,
side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.ldm.modules.attention import SDP_BATCH_LIMIT, attention_pytorch
from torch import Tensor

from ...models.attention.fused import FusedAttend
from ...models.attention.joint import attend_rows
from ...models.network.backbone import ALONE, CROSS
from ...models.network.blocks import BlockId
from ...models.network.call import Pass
from ...models.network.watch import PassEnds
from ...models.run import Run
from .model import KEY
from .networks.shapes import joined, plain
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
        out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    except PassEnds:
        return torch.zeros_like(x)
    finally:
        run.passing = None
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


def _told(options: Mapping[str, Any]) -> BlockId | None:
    """The block that the host says it is in; most families say nothing."""
    kind, index = options.get("block_type"), options.get("block_index")
    return None if kind is None or index is None else (kind, index, 0)


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
        def host(
            q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, **how: Any
        ) -> Tensor:
            if previous is not None:
                return previous(func, q, k, v, heads, mask=mask, **how)
            return func(q, k, v, heads, mask=mask, **how)

        options = kwargs.get("transformer_options") or {}
        run = options.get(KEY)
        if not isinstance(run, Run) or run.passing is None:
            return host(q, k, v, heads, mask, **kwargs)
        block = run.passing.next(_told(options), k.shape[2 if kwargs.get("skip_reshape") else 1])
        if block is None or not (run.watchers or run.active):
            return host(q, k, v, heads, mask, **kwargs)
        own_q, own_k, own_v, restored = joined(q, k, v, heads, kwargs)
        if block[0] == CROSS:
            _show_words(run, (ALONE, *block[1:]), options, own_q, own_k, heads)
            run.end_if_complete()
            return host(q, k, v, heads, mask, **kwargs)
        rest = plain(kwargs)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
        ) -> Tensor:
            return host(q, k, v, heads, mask, **rest)

        queries, keys = (_picture(run, options, tokens) for tokens in (own_q, own_k))
        call = run.joint_call(block, options, keys, None)
        for watcher in run.watchers:
            # else a view: a copy of each block's would take gigabytes
            wanted = block in watcher.blocks
            own = own_k[:, keys], own_v[:, keys]
            watcher.self_tokens(call, torch.cat(own, -1) if wanted else own[0])
        if run.backbone.holds_text(block):
            _show_words(run, block, options, own_q[:, queries], own_k, heads)
        run.end_if_complete()
        run.hear(call)
        found = run.found(call, own_q[:, queries], own_k, own_v)
        if not found:
            return host(q, k, v, heads, mask, **kwargs)
        fused = func is _FUSED and previous is None and q.shape[0] <= SDP_BATCH_LIMIT
        kernel = FusedAttend(attend) if fused else attend

        def read(q: Tensor, mask: Tensor | None) -> Tensor:
            call = run.joint_call(block, options, keys, mask)
            return run.read(call, found, kernel, q, own_k, own_v, heads)

        return restored(attend_rows(attend, own_q, own_k, own_v, heads, queries, read, mask))

    setattr(override, KEY, (previous,))  # a second install replaces ours instead of stacking it
    return override


def _show_words(
    run: Run, block: BlockId, options: Mapping[str, Any], q: Tensor, k: Tensor, heads: int
) -> None:
    """Hand on the picture's queries q [b n c] and, of the keys k [b m c], those of the text."""
    watchers = [watcher for watcher in run.watchers if block in watcher.map_blocks]
    if not watchers:
        return
    y, x = run.passing.grid
    references = _counted(options.get("reference_image_num_tokens"))

    def stands(rows: int) -> slice | None:
        return run.backbone.text(k.shape[1], y * x, rows, references)

    call, text = run.text_call(block, options, k.shape[1], stands)
    for watcher in watchers:
        watcher.cross(call, q, k[:, text], heads)


def _counted(counts: Any) -> int:
    """Tokens of the host's own reference latents: a list of their counts, or none."""
    if not counts:
        return 0
    return sum(counts) if isinstance(counts, (list, tuple)) else int(counts)


def _picture(run: Run, options: Mapping[str, Any], tokens: Tensor) -> slice:
    """Where the picture stands among the tokens [b n c] of a call."""
    y, x = run.passing.grid
    references = _counted(options.get("reference_image_num_tokens"))
    return run.backbone.picture(tokens.shape[1], y * x, references)
