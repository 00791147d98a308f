"""A pack that is not ours and does what the popular ones do to a MODEL, each by the host's own doors, and keeps count of it.

Each function takes a MODEL and a list, and gives a MODEL; the list then holds what the stranger saw or did. What it computes by
itself (`own`) can be asked again, so that a test can say whether it stayed its own.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import PatcherInjection, WrappersMP
from kindred.nodes.host import attention_sites
from networks import random_model
from torch import Tensor

BLOCKS = tuple(attention_sites(random_model("tiny").model.diffusion_model))
ODD = frozenset({"middle"})  # stages whose head width the fast kernel does not know


def own(q: Tensor, options: dict[str, Any] | None, heads: int) -> Tensor:
    """Attention over the stranger's four tokens, with the host's options handed on or not."""
    k, v = (
        torch.randn(1, 4, q.shape[-1], generator=torch.Generator().manual_seed(n))
        .expand(len(q), -1, -1)
        .to(q)
        for n in (1, 2)
    )
    return optimized_attention(
        q, k, v, heads, **({} if options is None else {"transformer_options": options})
    )


class Adapter:
    """As IP-Adapter packs do it: one object per block that later applications of the node add to, asked instead of the host."""

    def __init__(self, weights: tuple[float, ...], hands_on: bool) -> None:
        self.weights, self.hands_on = weights, hands_on

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        given = options if self.hands_on else None
        more = {"transformer_options": options} if self.hands_on else {}
        out = optimized_attention(q, k, v, options["n_heads"], **more)
        return out + sum(w * own(q, given, options["n_heads"]) for w in self.weights)


def adapter(
    model: Any, attention: str = "attn1", weight: float = 0.7, hands_on: bool = True
) -> Any:
    m = model.clone()
    known = m.model_options["transformer_options"].get("patches_replace", {}).get(attention, {})
    for block in BLOCKS:
        before = getattr(known.get(block[:2]), "weights", ())
        m.set_model_patch_replace(Adapter((*before, weight), hands_on), attention, *block[:2])
    return m


def patches(model: Any, seen: list) -> Any:
    """Chained patches everywhere; those behind and before an attention attend to tokens of their own, options handed on."""
    m = model.clone()

    def before(
        n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        given, alone = (own(n, o, options["n_heads"]) for o in (options, None))
        seen.append(torch.equal(given, alone))
        return n + 0.1 * given, context, value

    def behind(n: Tensor, options: dict[str, Any]) -> Tensor:
        given, alone = (own(n, o, options["n_heads"]) for o in (options, None))
        seen.append(torch.equal(given, alone))
        return n + 0.1 * given

    m.set_model_attn1_patch(before)
    m.set_model_attn2_patch(before)
    m.set_model_attn1_output_patch(behind)
    m.set_model_attn2_output_patch(behind)
    m.set_model_input_block_patch(lambda h, options: h * 0.99)
    m.set_model_output_block_patch(lambda h, skip, options: (h * 1.01, skip * 0.99))
    m.set_model_middle_block_after_patch(lambda args: {"h": args["h"] * 1.01})
    return m


def wrappers(model: Any, seen: list) -> Any:
    """One wrapper of every kind, and the old slot around the model's function."""
    m = model.clone()

    def of(kind: str) -> Any:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(kind)
            out = executor(*args, **kwargs)
            return out * 1.01 if kind == WrappersMP.DIFFUSION_MODEL else out

        return wrapper

    for kind in (
        WrappersMP.OUTER_SAMPLE,
        WrappersMP.PREPARE_SAMPLING,
        WrappersMP.SAMPLER_SAMPLE,
        WrappersMP.PREDICT_NOISE,
        WrappersMP.CALC_COND_BATCH,
        WrappersMP.APPLY_MODEL,
        WrappersMP.DIFFUSION_MODEL,
    ):
        m.add_wrapper_with_key(kind, "a stranger", of(kind))

    def around(apply: Any, args: dict[str, Any]) -> Tensor:
        seen.append("model_function_wrapper")
        return apply(args["input"], args["timestep"], **args["c"])

    m.set_model_unet_function_wrapper(around)
    return m


def tiles(model: Any, seen: list, overlap: int = 0, stacked: bool = False) -> Any:
    """As tiled diffusion does it: the model asked about the upper and the lower part of the latent, and their mean where they overlap.

    stacked: in one call, the one's rows of cond and uncond behind the other's.
    """
    m = model.clone()

    def around(apply: Any, args: dict[str, Any]) -> Tensor:
        x, t, c = args["input"], args["timestep"], args["c"]
        half = x.shape[2] // 2
        crops = x[:, :, : half + overlap], x[:, :, half - overlap :]
        seen.extend(crop.shape[2:] for crop in crops)
        if stacked:
            twice = {k: torch.cat([v, v]) if isinstance(v, Tensor) else v for k, v in c.items()}
            answers = apply(torch.cat(crops), torch.cat([t, t]), **twice).chunk(2)
        else:
            answers = [apply(crop, t, **c) for crop in crops]
        out, times = torch.zeros_like(x), torch.zeros_like(x)
        for rows, answer in zip(
            (slice(None, half + overlap), slice(half - overlap, None)), answers
        ):
            out[:, :, rows] += answer
            times[:, :, rows] += 1
        return out / times

    m.set_model_unet_function_wrapper(around)
    return m


def fast_kernel(model: Any, seen: list) -> Any:
    """As Sage Attention nodes do it: no masks, no odd head widths; those go to the host's function."""
    m = model.clone()
    previous = m.model_options["transformer_options"].get("optimized_attention_override")

    def override(
        func: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        stage = kwargs["transformer_options"]["block"][0]
        fit = mask is None and stage not in ODD
        seen.append("fast" if fit else "host")
        out = (
            func(q, k, v, heads, mask=mask, **kwargs)
            if previous is None
            else previous(func, q, k, v, heads, mask=mask, **kwargs)
        )
        return out.bfloat16().to(q) if fit else out  # its precision is less

    m.model_options["transformer_options"]["optimized_attention_override"] = override
    return m


def strict_kernel(model: Any, seen: list) -> Any:
    """One that refuses a mask in its own words."""
    m = model.clone()

    def override(func: Any, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if mask is not None:
            raise RuntimeError("this kernel knows no masks")
        return func(*args, **kwargs)

    m.model_options["transformer_options"]["optimized_attention_override"] = override
    return m


def block_forward(model: Any, seen: list) -> Any:
    """A transformer block's forward as an object patch around the host's."""
    m = model.clone()
    name = "diffusion_model.middle_block.1.transformer_blocks.0.forward"
    forward = m.get_model_object(name)

    def patched(x: Tensor, **kwargs: Any) -> Tensor:
        seen.append("forward")
        return forward(x, **kwargs) * 1.05

    m.add_object_patch(name, patched)
    return m


class Layered(torch.nn.Module):
    """As layered diffusion does it: an attention that keeps no to_q, to_k and to_v, and asks the host's kernel without its options."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.asked = [inner]  # in a list: not a submodule

    def forward(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        context = x if context is None else context
        inner = self.asked[0]
        q, k, v = (
            inner.to_q(x),
            inner.to_k(context),
            inner.to_v(context if value is None else value),
        )
        return inner.to_out(optimized_attention(q, k, v, inner.heads)) * 1.05


def layered(model: Any, attention: str = "attn1") -> Any:
    m = model.clone()
    name = f"diffusion_model.middle_block.1.transformer_blocks.0.{attention}"
    m.add_object_patch(name, Layered(m.get_model_object(name)))
    return m


def in_silence(model: Any) -> Any:
    """A block's self-attention computed past the host's function, its layers where they were."""
    m = model.clone()
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1"
    inner = m.get_model_object(name)

    def forward(
        x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            inner.to_q(x),
            inner.to_k(context),
            inner.to_v(context if value is None else value),
        )
        return inner.to_out(optimized_attention(q, k, v, inner.heads))

    m.add_object_patch(name + ".forward", forward)
    return m


def guidance(model: Any, seen: list) -> Any:
    """As automatic CFG packs do it: functions before, in the place of, and behind the guidance; both halves at CFG 1 too."""
    m = model.clone()

    def before(args: dict[str, Any]) -> list[Tensor]:
        seen.append(len(args["conds_out"]))
        return args["conds_out"]

    def instead(args: dict[str, Any]) -> Tensor:
        return args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"] * 0.9

    m.set_model_sampler_pre_cfg_function(before)
    m.set_model_sampler_cfg_function(instead, disable_cfg1_optimization=True)
    m.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 1.01)
    return m


# modules of its own beside the UNet's -------------------------------------------------------------------------------------------


class Motion(torch.nn.Module):
    """As motion packs do it: every place of a picture attends to the same place of the others; how many there are, a wrapper says."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.frames or len(x) % self.frames:
            raise RuntimeError(
                f"{len(x)} rows are no whole number of videos of {self.frames} frames"
            )
        y, (b, c, h, w) = x, x.shape
        tokens = y.view(b // self.frames, self.frames, c, h * w).permute(0, 3, 1, 2).flatten(0, 1)
        mixed = optimized_attention(tokens, tokens, tokens, 4).view(
            b // self.frames, h * w, self.frames, c
        )
        return x + 0.3 * mixed.permute(0, 2, 3, 1).reshape(x.shape)


def motion(model: Any, seen: list, key: str = "motion", wrapped_by: str | None = None) -> Any:
    """Modules put into blocks by an injection, and wrappers that set them up for a run, under the injection's key or their own."""
    m, made = model.clone(), [Motion(), Motion()]
    places = ("input_blocks", 1), ("output_blocks", 2)

    def blocks(patcher: Any) -> list[Any]:
        return [getattr(patcher.model.diffusion_model, stage)[index] for stage, index in places]

    def put(patcher: Any) -> None:
        seen.append("put")
        for block, module in zip(blocks(patcher), made):
            block.append(module)

    def take(patcher: Any) -> None:
        seen.append("taken")
        for block in blocks(patcher):
            del block[-1]

    def run(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for module in made:
            module.frames = len(noise)
        try:
            return executor(noise, *args, **kwargs)
        finally:
            for module in made:
                module.frames = None

    m.set_injections(key, [PatcherInjection(inject=put, eject=take)])
    m.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, wrapped_by or key, run)
    return m


def fixture(model: Any, gain: float = 0.2) -> Any:
    """A module that needs nobody: injected, and no wrapper beside it."""
    m = model.clone()
    name, scale = "middle_block", torch.nn.Identity()
    scale.register_forward_hook(lambda module, args, out: out * (1 + gain))

    def put(patcher: Any) -> None:
        getattr(patcher.model.diffusion_model, name).append(scale)

    def take(patcher: Any) -> None:
        del getattr(patcher.model.diffusion_model, name)[-1]

    put.__module__ = take.__module__ = "another_pack.nodes"
    m.set_injections("a fixture", [PatcherInjection(inject=put, eject=take)])
    return m
