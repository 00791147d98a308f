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

from ...models.attention.attend import product_attend
from ...models.concept.encoder import KeysValues
from ...models.concept.training import Learning, checkpointed
from ...models.injection import Merge, Part, Role, Run
from .model import Conditioning, attention_sites, computes_in, network
from .run import install

MOST_PROMPTS = 4096  # kept encoded
SIDES = {
    "SDXL": 1024,
    "SD20": 768,
    "KindredMiniature": 128,
}  # pixels of a side a family was trained at; else 512
Interrupted = (
    comfy.model_management.InterruptProcessingException
)  # a BaseException: the user pressed cancel


@contextmanager
def training(model: ModelPatcher, dtype: torch.dtype, node: str) -> Iterator[ModelPatcher]:
    """Inside: gradients flow, the host knows, and here is the MODEL again, its weights read anew and its LoRAs on them.

    Weights loaded under inference_mode take no part in a backward pass. The copy and all random draws end with the block.
    """
    if model.cached_patcher_init is None or model.injections:
        why = "was made by a node that cannot read its weights again"
        if model.injections:
            theirs = ", ".join(sorted(map(str, model.injections)))
            why = f"carries what is added while it runs ({theirs:.80}: a LoRA in bypass mode, or another pack's modules)"
        raise ValueError(
            f"{node}: the model given {why}, so it cannot be trained through. Wire Load Checkpoint or Load Diffusion Model, "
            "with Load LoRA if you like, into it."
        )
    before = comfy.model_management.in_training
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        copy = model.clone(disable_dynamic=True, force_deepcopy=True)
        copy.parent, copy.clone_base_uuid = (
            None,
            uuid4(),
        )  # nobody's clone: what is done to it is done to it alone
        if computes_in(copy) != dtype:
            copy.set_model_compute_dtype(dtype)
        try:
            comfy.model_management.in_training = True
            yield copy
        finally:
            comfy.model_management.in_training = before
            comfy.model_management.unload_model_and_clones(copy)


def progress(total: int) -> Callable[[int, Any], None]:
    """A bar to be told (steps done, PIL picture or None); raises Interrupted when the user wants it to end."""
    bar = comfy.utils.ProgressBar(total)

    def tell(done: int, picture: Any = None) -> None:
        bar.update_absolute(done, total, picture and ("JPEG", picture, max(picture.size)))
        comfy.model_management.throw_exception_if_processing_interrupted()

    return tell


class FrozenUNet:
    """The Denoiser of models/concept/training.py: the host's model, loaded, with nothing to learn but what it is given to read.

    prompts: CONDITIONING by text. Use outside of inference_mode, with weights that were loaded outside of it.
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
        """What the model reads of one prompt at the size of x: c_crossattn [1 w c], y [1 c] for SDXL."""
        if text not in self.encoded:
            kept = [
                (
                    cross.clone(),
                    {k: v.clone() if isinstance(v, Tensor) else v for k, v in extras.items()},
                )
                for cross, extras in self.prompts[text]
            ]
            (cond,) = comfy.samplers.encode_model_conds(
                self.model.extra_conds,
                comfy.sampler_helpers.convert_cond(kept),
                x[:1],
                self.device,
                "positive",
                latent_image=x[:1],
            )  # inpainting models ask for its size
            found = {k: getattr(c, "cond", None) for k, c in cond["model_conds"].items()}
            if len(self.encoded) >= MOST_PROMPTS:
                del self.encoded[next(iter(self.encoded))]
            self.encoded[text] = {
                k: c.detach().to(self.device) for k, c in found.items() if isinstance(c, Tensor)
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
        given = {
            k: torch.cat(
                [
                    row[k].repeat(1, n, 1) if k == "c_crossattn" else row[k]
                    for row, n in zip(rows, repeats)
                ]
            )
            for k in rows[0]
        }
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
        return self.model.apply_model(x, sigma, transformer_options=options, **given)


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
