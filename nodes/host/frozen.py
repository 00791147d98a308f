"""The frozen network that a concept encoder is trained through: a UNet's cross-attention reads what
is learned, a transformer reads it beside each block's attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from uuid import uuid4

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.attention.fused import product_attend
from ...models.attention.parts import Merge
from ...models.concept.decoupled import ActiveDecoupled, Decoupled, Place
from ...models.concept.encoder import KeysValues
from ...models.concept.training import Learning, checkpointed
from ...models.network.call import Half, Part, Role
from ...models.run import Run
from .install import install
from .latents import framed, unframed
from .model import Conditioning, attention_sites, draws_by_unet, network, noise_of
from .networks.parts import kinds
from .sites import require_backbone, sites_of

MOST_PROMPTS = 4096  # kept encoded
TRAINING = "Concept Encoder Train"
# networks of the host whose code has no backward pass
ONE_WAY = (
    "comfy.ldm.cosmos.predict2.MiniTrainDIT",
    "comfy.ldm.joyimage.model.JoyImageTransformer3DModel",
)


class Frozen:
    """The Denoiser of models/concept/training.py: the host's model, loaded, with nothing to learn
    but what it reads.

    prompts: CONDITIONING by text. Use outside of inference_mode, with weights that were loaded
    outside of it.
    """

    def __init__(self, model: ModelPatcher, prompts: Mapping[str, Conditioning], node: str) -> None:
        self.patcher = model
        self.load()
        self.model, self.device = model.model.requires_grad_(False), model.load_device
        sampling = model.get_model_object("model_sampling")
        self.sigmas, self.velocity = (
            sampling.sigmas.float().cpu(),
            isinstance(sampling, comfy.model_sampling.V_PREDICTION),
        )
        self.noise = noise_of(model, node)
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

    def learning(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _naming(
        self, run: Run, part: Part, sigma: Tensor, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Options of a call whose rows are all of one part of a run."""
        name = uuid4()
        run.parts[name] = part
        says = {"uuids": [name], "cond_or_uncond": [0], "sigmas": sigma}
        return options["transformer_options"] | says


class FrozenUNet(Frozen):
    """A UNet, whose cross-attention reads what is learned."""

    def __init__(
        self,
        model: ModelPatcher,
        merge: Merge,
        prompts: Mapping[str, Conditioning],
        checkpointing: bool = False,
        node: str = TRAINING,
    ) -> None:
        super().__init__(model, prompts, node)
        unet, self.merge = network(model), merge
        self.sites = attention_sites(unet)
        for block in (
            (*unet.input_blocks, unet.middle_block, *unet.output_blocks) if checkpointing else ()
        ):
            for layer in block or ():  # some have no middle block
                layer.forward = checkpointed(layer.forward)

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
        run = Run(
            sites=self.sites,
            latent=tuple(x.shape[2:]),
            active=[Learning(keys_values, weight, self.merge)],
        )
        part = Part(Role.COND, None, longest, repeats)
        options = self._naming(run, part, sigma, install(self.options, run))
        return self.model.apply_model(x, sigma, transformer_options=options, **conds)


class FrozenTransformer(Frozen):
    """A transformer, beside whose attention is read what is learned: D (10) of docs/method.md."""

    def __init__(self, model: ModelPatcher, prompts: Mapping[str, Conditioning], node: str) -> None:
        self.backbone = require_backbone(model, node)
        one_way = [name for name in kinds(network(model)) if name in ONE_WAY]
        if one_way:
            raise ValueError(
                f"{node}: {self.backbone.family} cannot be trained through: ComfyUI's code for it "
                "has no backward pass. Train on FLUX, Chroma, Qwen-Image or SD3.5."
            )
        super().__init__(model, prompts, node)
        self.sites = sites_of(model, self.backbone)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside the host rotates by what has a way back; and what its blocks write into although
        the backward pass needs it is copied.
        """
        before = comfy.model_management.in_training
        try:
            comfy.model_management.in_training = True
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                yield
        finally:
            comfy.model_management.in_training = before

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        prompts: Sequence[str],
        keys_values: KeysValues,
        weight: float,
    ) -> Tensor:
        """Rows whose texts are of one length share a pass: a longer text is another one."""
        rows = [self._encode(text, framed(self.patcher, x)) for text in prompts]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(tuple((k, row[k].shape) for k in sorted(row)), []).append(i)
        out: dict[int, Tensor] = {}
        for at in groups.values():
            read = {block: (k[at], v[at]) for block, (k, v) in keys_values.items()}
            done = self._pass(x[at], sigma[at], [rows[i] for i in at], read, weight)
            out.update(zip(at, done))
        return torch.stack([out[i] for i in range(len(rows))])

    def _pass(
        self,
        x: Tensor,
        sigma: Tensor,
        rows: Sequence[Mapping[str, Tensor]],
        keys_values: KeysValues,
        weight: float,
    ) -> Tensor:
        conds = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
        text = conds["c_crossattn"].shape[1] if "c_crossattn" in conds else None
        run = Run(
            backbone=self.backbone,
            sites=self.sites,
            latent=tuple(x.shape[2:]),
            active=[decoupled(keys_values, weight)],
        )
        installed = install(self.options, run, places=[Place.ATTENTION])
        options = self._naming(run, Part(Role.COND, None, text), sigma, installed)
        x = framed(self.patcher, x)
        return unframed(self.model.apply_model(x, sigma, transformer_options=options, **conds))


def decoupled(keys_values: KeysValues, weight: float) -> ActiveDecoupled:
    """The concept tokens of one training step, which every row reads."""
    blocks = {block: Decoupled(k, v) for block, (k, v) in keys_values.items()}
    return ActiveDecoupled(
        lambda sigma: {}, (math.inf, 0.0), weight, now={Half.COND: blocks}, node=TRAINING
    )


def frozen(
    model: ModelPatcher,
    merge: Merge,
    prompts: Mapping[str, Conditioning],
    checkpointing: bool,
    node: str,
) -> Frozen:
    """The network that a concept encoder is trained for; ValueError for one that cannot be trained
    through.
    """
    if draws_by_unet(model):
        return FrozenUNet(model, merge, prompts, checkpointing, node)
    if checkpointing:
        raise ValueError(
            f"{node}: gradient checkpointing works on UNets only. Switch it off; freeze the "
            "tower or take smaller pictures where memory is short."
        )
    return FrozenTransformer(model, prompts, node)


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
    apart = kwargs.get("skip_reshape") or v.ndim == 4  # SD3's v has its heads apart
    return (
        func(q, k, v, heads, mask=mask, **kwargs) if apart else product_attend(q, k, v, heads, mask)
    )
