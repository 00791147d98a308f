"""A run in the host's options: first and last in every chain of patches that matters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ...models.concept.decoupled import Place
from ...models.run import Run
from .attention import (
    Beside,
    attn1_output_patch,
    attn1_patch,
    attn2_patch,
    last_patch,
    output_block_patch,
    unet_override,
    until_complete,
)
from .beside import install_beside
from .calls import said_in
from .joint import joint_override, joint_pass
from .model import KEY


def install(
    model_options: dict[str, Any], run: Run, watched: bool = False, places: Iterable[Place] = ()
) -> dict[str, Any]:
    """A copy of the options with the run in it; first and last in every chain that matters, so the
    order of nodes does not.

    watched: also hand outputs of self-attentions and of blocks to the run's watchers; places: where
    a transformer's run adds what is read beside its attention.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer = options.setdefault("transformer_options", {})
    transformer[KEY], run.translate = run, said_in
    run.compiled = run.compiled or COMPILE_KEY in transformer.get("wrappers", {}).get(
        WrappersMP.APPLY_MODEL, {}
    )
    previous = transformer.get("optimized_attention_override")
    previous = getattr(previous, KEY, (previous,))[0]
    if run.backbone is not None:
        # six families have no other
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, f"{KEY}_pass", joint_pass, transformer)
        transformer["optimized_attention_override"] = joint_override(previous)
        for place in places:
            install_beside(transformer, run, place)
        return options
    if run.ends_early:
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, until_complete, transformer)
    patches = transformer.setdefault("patches", {})
    ours = {"attn1_patch": attn1_patch, "attn2_patch": attn2_patch}
    if watched:
        ours |= {
            "attn1_output_patch": attn1_output_patch,
            "output_block_patch": output_block_patch,
        }
    for name, patch in ours.items():
        theirs = [p for p in patches.get(name, ()) if p is not patch and p is not last_patch]
        last = [last_patch] if name in ("attn1_patch", "attn2_patch") else []
        patches[name] = [patch, *theirs, *last]  # first: it sees norm(x) as it is
    for name in ("attn1", "attn2"):
        replaced = transformer.get("patches_replace", {}).get(name, {})
        replaced.update(
            {block: f if isinstance(f, Beside) else Beside(f) for block, f in replaced.items()}
        )
    transformer["optimized_attention_override"] = unet_override(previous)
    return options


def compiled(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether torch.compile stands between the model and its UNet: the host's node as a wrapper,
    others' as the module itself.
    """
    return COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}) or hasattr(
        model.diffusion_model, "_orig_mod"
    )
