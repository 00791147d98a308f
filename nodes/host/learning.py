"""Training inside the host: a copy that gradients pass through, progress, and the frozen UNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.attention.fused import product_attend
from ...models.attention.parts import Merge
from ...models.concept.config import Preprocessing
from ...models.concept.draws import Examples
from ...models.concept.encoder import KeysValues
from ...models.concept.pictures import centre_square
from ...models.concept.training import Learning, checkpointed
from ...models.network.blocks import BlockId
from ...models.network.call import Part, Role
from ...models.run import Run
from .install import install
from .latents import latent_in
from .model import Conditioning, attention_sites, computes_in, network, require_unet

MOST_PROMPTS = 4096  # kept encoded
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


class FrozenUNet:
    """The Denoiser of models/concept/training.py: the host's model, loaded, with nothing to learn
    but what it is given to read.

    prompts: CONDITIONING by text. Use outside of inference_mode, with weights that were loaded
    outside of it.
    """

    def __init__(
        self,
        model: ModelPatcher,
        merge: Merge,
        prompts: Mapping[str, Conditioning],
        checkpointing: bool = False,
    ) -> None:
        self.patcher = model
        self.load()
        self.model, self.merge, self.device = (
            model.model.requires_grad_(False),
            merge,
            model.load_device,
        )
        sampling = model.get_model_object("model_sampling")
        self.sigmas, self.velocity = (
            sampling.sigmas.float().cpu(),
            isinstance(sampling, comfy.model_sampling.V_PREDICTION),
        )
        self.sites = attention_sites(network(model))
        self.options = comfy.model_patcher.create_model_options_clone(model.model_options)
        kernel = (
            _products
            if self.device.type == "cpu"
            else lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)
        )
        self.options.setdefault("transformer_options", {}).setdefault(
            "optimized_attention_override", kernel
        )  # sage cannot go back
        self.prompts, self.encoded = prompts, {}
        unet = network(model)
        for block in (
            (*unet.input_blocks, unet.middle_block, *unet.output_blocks) if checkpointing else ()
        ):
            for layer in block or ():  # some have no middle block
                layer.forward = checkpointed(layer.forward)

    def load(self) -> None:
        """Onto the device, whole; again after anything else was there."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)

    def _encode(self, text: str, x: Tensor) -> dict[str, Tensor]:
        """What the model reads of one prompt at the size of x: c_crossattn [1 w c], y [1 c] for
        SDXL.
        """
        if text not in self.encoded:
            kept = [(cross.clone(), _copied(extras)) for cross, extras in self.prompts[text]]
            (cond,) = comfy.samplers.encode_model_conds(
                self.model.extra_conds,
                comfy.sampler_helpers.convert_cond(kept),
                x[:1],
                self.device,
                "positive",
                latent_image=x[:1],
            )  # inpainting models ask for its size
            read = {k: getattr(c, "cond", None) for k, c in cond["model_conds"].items()}
            if len(self.encoded) >= MOST_PROMPTS:
                del self.encoded[next(iter(self.encoded))]
            self.encoded[text] = {
                k: c.detach().to(self.device) for k, c in read.items() if isinstance(c, Tensor)
            }
        return self.encoded[text]

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        prompts: Sequence[str],
        keys_values: KeysValues,
        weight: float,
    ) -> Tensor:
        rows = [self._encode(text, x) for text in prompts]
        longest = math.lcm(*(row["c_crossattn"].shape[1] for row in rows))
        repeats = tuple(longest // row["c_crossattn"].shape[1] for row in rows)
        rows = [
            row | {"c_crossattn": row["c_crossattn"].repeat(1, n, 1)}
            for row, n in zip(rows, repeats)
        ]
        conds = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        run, part = (
            Run(
                sites=self.sites,
                latent=tuple(x.shape[2:]),
                active=[Learning(keys_values, weight, self.merge)],
            ),
            uuid4(),
        )
        run.parts[part] = Part(Role.COND, None, longest, repeats)
        options = install(self.options, run)["transformer_options"] | {
            "uuids": [part],
            "cond_or_uncond": [0],
            "sigmas": sigma,
        }
        return self.model.apply_model(x, sigma, transformer_options=options, **conds)


def _copied(extras: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in extras.items()}


def _products(
    func: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:  # on a CPU 1.8 times faster in the backward pass than the fused kernel
    return (
        func(q, k, v, heads, mask=mask, **kwargs)
        if kwargs.get("skip_reshape")
        else product_attend(q, k, v, heads, mask)
    )


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
    """(to_k, to_v) of every cross-attention layer, in float32 on the CPU."""
    sites = attention_sites(require_unet(model, node))
    return {
        b: (s.module.attn2.to_k.weight.float().cpu(), s.module.attn2.to_v.weight.float().cpu())
        for b, s in sites.items()
    }


def encoded(clip: Any, captions: Sequence[str], width: int, node: str) -> dict[str, Conditioning]:
    """CONDITIONING by text, of no text too; ValueError for the CLIP of another model."""
    prompts = {
        text: clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in {*captions, ""}
    }
    wide = prompts[""][0][0].shape[-1]
    if wide != width:
        raise ValueError(
            f"{node}: the CLIP given writes text of width {wide}, but the model reads width "
            f"{width}. Wire the CLIP of the same checkpoint."
        )
    return prompts
