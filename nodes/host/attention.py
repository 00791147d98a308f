"""A UNet's attention: what the host's patches, its override and other packs' replacements hand to
the run, call by call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.modules.attention import SDP_BATCH_LIMIT, attention_pytorch, optimized_attention
from torch import Tensor

from ...models.attention.fused import FusedAttend
from ...models.network.blocks import block_name
from ...models.network.call import AttnCall, Turn
from ...models.network.watch import PassEnds
from ...models.run import Run
from .foreign import hand_once, hands_on
from .model import KEY, log

_FUSED = getattr(attention_pytorch, "__wrapped__", None)  # as the host hands it to an override


@torch.compiler.disable
def attn1_patch(
    n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    run: Run | None = options.get(KEY)
    if isinstance(run, Run):
        _say_unheard(run, n)
        call = run.call(options)
        for watcher in run.watchers:
            n = watcher.self_tokens(call, n)
        run.turn = Turn(call, (n, context))
        run.end_if_complete()
    return n, context, value


@torch.compiler.disable
def attn1_output_patch(out: Tensor, options: dict[str, Any]) -> Tensor:
    run: Run | None = options.get(KEY)
    if isinstance(run, Run) and run.turn is not None:
        for watcher in run.watchers:
            out = watcher.self_output(run.turn.call, out)
        run.end_if_complete()
    return out


@torch.compiler.disable
def output_block_patch(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    run: Run | None = options.get(KEY)
    if isinstance(run, Run):
        for watcher in run.watchers:
            watcher.output_block(options["block"][1], h, run.parts_of(options))
        run.end_if_complete()
    return h, skip


@torch.compiler.disable
def attn2_patch(
    n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    run: Run | None = options.get(KEY)
    if isinstance(run, Run):
        _say_unheard(run, n)
        run.turn = Turn(run.call(options, context.shape[1]), (n, context))
    return n, context, value


@torch.compiler.disable
def last_patch(
    n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Behind the others' patches, which may attend to something of their own: the next attention is
    the block's.
    """
    run: Run | None = options.get(KEY)
    call = run.settle(n, context) if isinstance(run, Run) else None
    if call is not None:
        _hand_on(run, call, options)
    return n, context, value


def _hand_on(run: Run, call: AttnCall, options: dict[str, Any]) -> None:
    """Where another pack's copy of the block's forward asks the next attention, it tells it
    nothing: then we do.
    """
    run.drop_hook()
    site = run.sites.get(call.block)
    if site is not None and not run.compiled and not hands_on(site.module):
        run.drop = hand_once(
            site.module.attn2 if call.cross else site.module.attn1,
            {**options, "optimized_attention_override": unet_override(None)},
        )  # not its neighbours' kernels: it asked none


def _say_unheard(run: Run, x: Tensor) -> None:
    """Say once where something should have been read, but another node computed the attention past
    the host's function.
    """
    call = run.take()
    if call is None or call.unknown or run.ways is None or "unheard" in run.ways:
        return
    tokens = x.new_empty(run.turn.shape)
    if run.references(call, tokens, tokens, tokens):
        run.ways.add("unheard")
        log.info(
            "Kindred: another node computes the %s-attention of block %s by itself, at least in "
            "some passes, so Kindred has no effect "
            "there. PAG does so in its own pass, which is fine. Otherwise remove that "
            "node, or use it on a separate "
            "MODEL.",
            "cross" if call.cross else "self",
            block_name(call.block),
        )


def unet_override(previous: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """optimized_attention_override that asks its predecessor (sage, flash, another pack) with the
    longer keys.
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
        def attend(
            q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
        ) -> Tensor:
            if previous is not None:
                return previous(func, q, k, v, heads, mask=mask, **kwargs)
            return func(q, k, v, heads, mask=mask, **kwargs)

        run = (kwargs.get("transformer_options") or {}).get(KEY)
        ours = isinstance(run, Run) and mask is None and not kwargs.get("skip_reshape")
        call = run.take() if ours else None
        if call is None:
            return attend(q, k, v, heads, mask)
        for watcher in run.watchers if call.cross else ():
            watcher.cross(call, q, k, heads)
        run.end_if_complete()
        fused = (
            func is _FUSED
            and previous is None
            and not kwargs.get("skip_output_reshape")
            and q.shape[0] <= SDP_BATCH_LIMIT
        )
        return run.attend(call, FusedAttend(attend) if fused else attend, q, k, v, heads)

    setattr(override, KEY, (previous,))  # a second install replaces ours instead of stacking it
    return override


class Beside:
    """A neighbour's replacement f of a block's attention, with ours beside it: f + (ours - plain),
    which is ours where f is plain.

    What f computes by itself stays its own, whether it hands its options on (the override would
    hear it) or not.
    """

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f = f

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        run: Run | None = options.get(KEY)
        call = run.take() if isinstance(run, Run) else None
        if call is None:
            return self.f(q, k, v, options)
        heads = options["n_heads"]
        run.mark_reached(call)
        out = self.f(q, k, v, options)
        for watcher in run.watchers if call.cross else ():
            watcher.cross(call, q, k, heads)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
        ) -> Tensor:
            return optimized_attention(
                q,
                k,
                v,
                heads,
                mask=mask,
                attn_precision=options["attn_precision"],
                transformer_options=options,
            )

        return (
            out + (run.attend(call, attend, q, k, v, heads) - attend(q, k, v, heads))
            if run.alters(call) or run.references(call, q, k, v)
            else out
        )


def until_complete(
    executor: Any,
    x: Tensor,
    timesteps: Tensor | None = None,
    context: Tensor | None = None,
    y: Tensor | None = None,
    control: dict[str, Any] | None = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """A pass of the UNet that answers zeros where it ended early; its answer is not asked for."""
    for watcher in transformer_options[KEY].watchers:
        watcher.begin_pass()
    try:
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
    except PassEnds:
        return x.new_zeros(x.shape[0], executor.class_obj.out_channels, *x.shape[2:])
