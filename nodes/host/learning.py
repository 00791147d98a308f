"""Training inside the host: a copy that gradients pass through, progress, and what is learned
from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.concept.config import Preprocessing
from ...models.concept.draws import Examples
from ...models.concept.pictures import centre_square
from ...models.network.blocks import BlockId
from .latents import latent_in
from .model import (
    Conditioning,
    attention_sites,
    computes_in,
    draws_by_unet,
    require_unet,
)

# pixels of a side a family was trained at; else 512
SIDES = {
    "SDXL": 1024,
    "SD20": 768,
    "KindredMiniature": 128,
}
# a BaseException: the user pressed cancel
Interrupted = comfy.model_management.InterruptProcessingException


@contextmanager
def training(model: ModelPatcher, dtype: torch.dtype, node: str) -> Iterator[ModelPatcher]:
    """Inside: gradients flow, the host knows, and here is the MODEL again, its weights read anew
    and its LoRAs on them.

    Weights loaded under inference_mode take no part in a backward pass. The copy and all random
    draws end with the block.
    """
    if model.cached_patcher_init is None or model.injections:
        why = "was made by a node that cannot read its weights again"
        if model.injections:
            theirs = ", ".join(sorted(map(str, model.injections)))
            why = (
                f"carries what is added while it runs ({theirs:.80}: a LoRA in bypass mode, or "
                f"another "
                "pack's modules)"
            )
        raise ValueError(
            f"{node}: the model given {why}, so it cannot be trained through. Wire Load Checkpoint "
            f"or Load Diffusion Model, "
            "with Load LoRA if you like, into it."
        )
    before = comfy.model_management.in_training
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        copy = model.clone(disable_dynamic=True, force_deepcopy=True)
        # nobody's clone: what is done to it is done to it alone
        copy.parent, copy.clone_base_uuid = (
            None,
            uuid4(),
        )
        if computes_in(copy) != dtype:
            copy.set_model_compute_dtype(dtype)
        try:
            comfy.model_management.in_training = True
            yield copy
        finally:
            comfy.model_management.in_training = before
            comfy.model_management.unload_model_and_clones(copy)


def progress(total: int) -> Callable[[int, Any], None]:
    """A bar to be told (steps done, PIL picture or None); raises Interrupted when the user wants it
    to end.
    """
    bar = comfy.utils.ProgressBar(total)

    def tell(done: int, picture: Any = None) -> None:
        bar.update_absolute(done, total, picture and ("JPEG", picture, max(picture.size)))
        comfy.model_management.throw_exception_if_processing_interrupted()

    return tell


def examples_of(
    model: ModelPatcher,
    vae: Any,
    images: Sequence[Tensor],
    captions: Sequence[str],
    small: int,
    size: int,
    one_subject: bool,
    node: str,
    tell: Callable[[int], None],
) -> Examples:
    """IMAGEs, each [b Y X c], as the tower (`small` pixels) and the UNet (latents of `size` pixels)
    see them.

    one_subject: each of the batches shows one; tell: is told how many pictures were seen.
    """
    pixels, latents, subjects = [], [], []
    for_tower, for_unet = (
        Preprocessing(side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) for side in (small, size)
    )
    with torch.inference_mode():
        for number, batch in enumerate(images):
            for image in batch:
                tell(len(subjects))
                # a strip would be enlarged beyond all memory
                image = centre_square(image)[None].cpu()
                pixels.append(for_tower(image)[0].mul(255).round().byte().movedim(0, -1))
                encoded = vae.encode(for_unet(image).movedim(1, -1))
                latents.append(latent_in(model, encoded, node)[0])
                subjects.append(number if one_subject else len(subjects))
    # copies, made outside of inference_mode
    return Examples(torch.stack(latents), torch.stack(pixels), captions, subjects)


def text_layers(model: ModelPatcher, node: str) -> dict[BlockId, tuple[Tensor, Tensor]]:
    """(to_k, to_v) of every cross-attention layer, in float32 on the CPU; none of a transformer."""
    if not draws_by_unet(model):
        return {}
    sites = attention_sites(require_unet(model, node))
    return {
        b: (s.module.attn2.to_k.weight.float().cpu(), s.module.attn2.to_v.weight.float().cpu())
        for b, s in sites.items()
    }


def encoded(
    clip: Any, captions: Sequence[str], width: int | None, node: str
) -> dict[str, Conditioning]:
    """CONDITIONING by text, of no text too; ValueError for the CLIP of another model, where the
    width of its text is known.
    """
    prompts = {
        text: clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in {*captions, ""}
    }
    wide = prompts[""][0][0].shape[-1]
    if width is not None and wide != width:
        raise ValueError(
            f"{node}: the CLIP given writes text of width {wide}, but the model reads width "
            f"{width}. Wire the CLIP of the same checkpoint."
        )
    return prompts
