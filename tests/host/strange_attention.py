"""Packs that are not ours and reach into an attention's rows, keys and forward, as popular ones do, each by the host's own doors.

Regional prompts, NegPip, copies of a block's forward, references of their own, fewer or more keys. Each takes a MODEL and gives one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.patcher_extension import WrappersMP
from torch import Tensor

Patch = tuple[Tensor, Tensor, Tensor]


# rows and keys of cross-attention ---------------------------------------------------------------------------------------------


def couple(
    model: Any,
    regions: Sequence[Tensor | None],
    both: bool = False,
    alternate: bool = False,
    strength: float = 1.0,
) -> Any:
    """Attention couple: the cond rows once more for the prompt of each region [1 w c], and the mean of what they read.

    Nothing is the picture's own prompt once more.
    both: the uncond rows too; alternate: a picture's copies beside one another; strength: of the prompt itself.
    """
    m, count = model.clone(), 1 + len(regions)

    def repeated(x: Tensor) -> Tensor:
        return x.repeat_interleave(count, 0) if alternate else x.repeat(count, 1, 1)

    def before(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> Patch:
        kinds = options["cond_or_uncond"]
        rows = n.shape[0] // len(kinds)
        w = math.lcm(context.shape[1], *(r.shape[1] for r in regions if r is not None))
        qs, ks = [], []
        for kind, q, k in zip(kinds, n.chunk(len(kinds)), context.chunk(len(kinds))):
            k = k.repeat(1, w // k.shape[1], 1)
            if kind == 1 and not both:
                qs, ks = [*qs, q], [*ks, k]
                continue
            each = [
                k * strength,
                *(k if r is None else r.to(k).repeat(rows, w // r.shape[1], 1) for r in regions),
            ]
            qs.append(repeated(q))
            ks.append(torch.stack(each, 1).flatten(0, 1) if alternate else torch.cat(each))
        return torch.cat(qs), torch.cat(ks), torch.cat(ks)

    def behind(out: Tensor, options: dict[str, Any]) -> Tensor:
        kinds, found, at = options["cond_or_uncond"], [], 0
        rows = out.shape[0] // sum(1 if kind == 1 and not both else count for kind in kinds)
        for kind in kinds:
            copies = 1 if kind == 1 and not both else count
            mine = out[at : at + copies * rows]
            found.append(
                mine.unflatten(0, (rows, copies)).mean(1)
                if alternate
                else mine.unflatten(0, (copies, rows)).mean(0)
            )
            at += copies * rows
        return torch.cat(found)

    m.set_model_attn2_patch(before)
    m.set_model_attn2_output_patch(behind)
    return m


def halved_keys(model: Any) -> Any:
    """NegPip: the text's rows are keys and values in turn."""
    m = model.clone()
    m.set_model_attn2_patch(
        lambda n, context, value, options: (n, context[:, 0::2], value[:, 1::2])
    )
    return m


def more_keys(model: Any, tokens: Tensor) -> Any:
    """An adapter that puts its tokens [1 m c] behind the text's."""
    m = model.clone()

    def before(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> Patch:
        beside = tokens.to(context).expand(len(context), -1, -1)
        return n, torch.cat((context, beside), 1), torch.cat((value, beside), 1)

    m.set_model_attn2_patch(before)
    return m


# keys of self-attention -------------------------------------------------------------------------------------------------------


def style_aligned(model: Any) -> Any:
    """The tokens of a part's first picture beside everybody's own."""
    m = model.clone()

    def before(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> Patch:
        def shared(x: Tensor) -> Tensor:
            first = [part[:1].expand_as(part) for part in x.chunk(len(options["cond_or_uncond"]))]
            return torch.cat((x, torch.cat(first)), 1)

        return n, shared(context), shared(value)

    m.set_model_attn1_patch(before)
    return m


def fewer_keys(model: Any, every: int = 2) -> Any:
    """Of a block's own tokens only some are left as keys, as where others are merged into them."""
    m = model.clone()
    m.set_model_attn1_patch(
        lambda n, context, value, options: (n, context[:, ::every], value[:, ::every])
    )
    return m


# a copy of a block's forward --------------------------------------------------------------------------------------------------


def _half(
    attention: Callable[..., Tensor],
    name: str,
    n: Tensor,
    keys: Tensor | None,
    patches: dict[str, Any],
    options: dict[str, Any],
) -> Tensor:
    """One attention and its patches; what it answers, before the residual."""
    value = keys if f"{name}_patch" in patches else None
    for patch in patches.get(f"{name}_patch", ()):
        n, keys, value = patch(n, keys, value, options)
    n = attention(n, context=keys, value=value)
    for patch in patches.get(f"{name}_output_patch", ()):
        n = patch(n, options)
    return n


def copied(
    self: BasicTransformerBlock,
    x: Tensor,
    context: Tensor | None = None,
    transformer_options: Any = None,
) -> Tensor:
    """A block as a pack wrote it once: patches are asked, attentions are told nothing."""
    options = {
        k: v for k, v in transformer_options.items() if k not in ("patches", "patches_replace")
    }
    options |= {
        "n_heads": self.n_heads,
        "dim_head": self.d_head,
        "attn_precision": self.attn_precision,
    }
    patches = transformer_options.get("patches", {})
    n = self.norm1(x)
    x = _half(self.attn1, "attn1", n, n if "attn1_patch" in patches else None, patches, options) + x
    x = _half(self.attn2, "attn2", self.norm2(x), context, patches, options) + x
    return self.ff(self.norm3(x)) + x


def alone(
    self: BasicTransformerBlock,
    x: Tensor,
    context: Tensor | None = None,
    transformer_options: Any = None,
) -> Tensor:
    """One that asks nobody."""
    x = self.attn1(self.norm1(x)) + x
    x = self.attn2(self.norm2(x), context=context) + x
    return self.ff(self.norm3(x)) + x


def deaf(
    self: BasicTransformerBlock,
    x: Tensor,
    context: Tensor | None = None,
    transformer_options: Any = None,
) -> Tensor:
    """One that asks the patches and then computes past the layers' own calls."""
    hearing = copied.__get__(Silent(self))
    return hearing(x, context, transformer_options)


class Silent:
    """A block whose attentions are called by their forward alone, so that no hook hears it."""

    def __init__(self, block: BasicTransformerBlock) -> None:
        self.block, self.attn1, self.attn2 = block, block.attn1.forward, block.attn2.forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


@contextmanager
def left_in_the_class(forward: Callable[..., Tensor], model: Any) -> Iterator[None]:
    """As packs do it that exchange the class's forward and never put it back: until the test is over.

    model: one whose blocks run it then; the host leaves forwards on them by themselves where one was an object patch before.
    """
    own = [
        vars(block)
        for block in model.model.diffusion_model.modules()
        if "forward" in vars(block) and isinstance(block, BasicTransformerBlock)
    ]
    left = [(held, held.pop("forward")) for held in own]
    kept, BasicTransformerBlock.forward = BasicTransformerBlock.forward, forward
    try:
        yield
    finally:
        BasicTransformerBlock.forward = kept
        for held, own_forward in left:
            held["forward"] = own_forward


# a reference of its own -------------------------------------------------------------------------------------------------------


def own_reference(model: Any, seed: int = 8) -> Any:
    """A pass over a picture of the pack's own first, inside the same call of the model."""
    m = model.clone()

    def twice(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        executor(
            torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x),
            *args,
            **kwargs,
        )
        return executor(x, *args, **kwargs)

    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "a stranger", twice)
    return m
