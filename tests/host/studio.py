"""The nodes of the pack and the host's samplers as functions over a tiny random model: what the host's laws are said in.

Everything runs under inference_mode, as in the host. Sizes are latent cells (y, x). What is the same in many tests (a
photo's bank, a plain picture) is made once and shared, as the host's own cache would share it.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from kindred.models.concept.encoder import ConceptConfig, ConceptEncoder, Preprocessing
from kindred.models.injection import Merge
from kindred.models.noise.inversion import InversionTrajectory
from kindred.models.reference.bank import ReferenceBank, SubjectTokens
from kindred.nodes.concept import CrossAttnDetailInject
from kindred.nodes.consistory import AnchorSampler, ConsiStory
from kindred.nodes.host import ManagedEncoder, cross_layers
from kindred.nodes.inversion import DDIMInvert
from kindred.nodes.reference import MaskedSelfAttnInject, RefUNetCapture
from networks import random_model, random_prompt
from torch import Tensor

import nodes

STEPS, SIZE, SCHEDULER = 3, (8, 8), "ddim_uniform"
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "image_size": 24,
    "patch_size": 8,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "num_channels": 3,
    "projection_dim": 16,
}
CAT = SubjectTokens(("cat",), ((5,),))
comfy.utils.set_progress_bar_enabled(False)


def photo(size: tuple[int, int] = SIZE, pictures: int = 1, seed: int = 3) -> dict[str, Tensor]:
    """A LATENT as VAE Encode would give it."""
    return {
        "samples": torch.randn(pictures, 4, *size, generator=torch.Generator().manual_seed(seed))
    }


def prompt(
    seed: int = 5, family: str = "tiny", tokens: int = 77, subject: SubjectTokens | None = None
) -> list:
    return random_prompt(family, seed, tokens, subject)


def coarse(family: str = "tiny", tokens: int = 77) -> list:
    """The coarse description of the photo, with its subject."""
    return random_prompt(family, 1, tokens, CAT)


def negative(family: str = "tiny", tokens: int = 77) -> list:
    return random_prompt(family, 2, tokens)


@torch.inference_mode()
def invert(
    model: Any,
    latent: dict | None = None,
    positive: list | None = None,
    steps: int = STEPS,
    scheduler: str = SCHEDULER,
    **more: Any,
) -> tuple[InversionTrajectory, dict, str]:
    """DDIM Invert -> trajectory, noise, what it reports."""
    out = DDIMInvert.execute(
        model, latent or photo(), positive or coarse(), steps, scheduler, **more
    )
    return *out.result, out.ui.as_dict()["text"][0]


@torch.inference_mode()
def capture(
    model: Any,
    latent: dict | None = None,
    positive: list | None = None,
    steps: int = STEPS,
    scheduler: str = SCHEDULER,
    **more: Any,
) -> tuple[ReferenceBank, Tensor]:
    """Ref-UNet Feature Capture, from a latent unless an inversion is given -> bank, mask."""
    if "inversion" not in more or latent is not None:
        more["latent"] = latent or photo()
    return RefUNetCapture.execute(model, positive or coarse(), steps, scheduler, **more).result


@torch.inference_mode()
def inject(model: Any, bank: ReferenceBank, weight: float = 1.0, **more: Any) -> Any:
    """Masked Self-Attn Inject -> MODEL."""
    return MaskedSelfAttnInject.execute(model, bank, weight=weight, **more).result[0]


@torch.inference_mode()
def sample(
    model: Any,
    seed: int = 1,
    steps: int = STEPS,
    cfg: float = 4.0,
    sampler: str = "euler",
    scheduler: str = SCHEDULER,
    positive: list | None = None,
    uncond: list | None = None,
    size: tuple[int, int] = SIZE,
    batch: int = 1,
    latent: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """KSampler (and, with its words, KSamplerAdvanced) -> latent samples [b c y x]."""
    start = torch.zeros(batch, 4, *size) if latent is None else latent
    return nodes.common_ksampler(
        model,
        seed,
        steps,
        cfg,
        sampler,
        scheduler,
        positive or prompt(),
        uncond or negative(),
        {"samples": start},
        **more,
    )[0]["samples"]


@cache
def bank_of(
    family: str = "tiny",
    steps: int = STEPS,
    size: tuple[int, int] = SIZE,
    pictures: int = 1,
    seed: int = 3,
    both: bool = True,
) -> ReferenceBank:
    """A shared bank of a photo; both: with the negative half."""
    more = {"negative": negative(family)} if both else {}
    return capture(
        random_model(family), photo(size, pictures, seed), coarse(family), steps, **more
    )[0]


@cache
def plain(**how: Any) -> Tensor:
    """A shared plain picture of the tiny model."""
    return sample(random_model("tiny"), **how)


def differs(a: Tensor, b: Tensor) -> float:
    """Greatest difference, relative to the spread of b."""
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return ((a - b).abs().max() / b.std()).item()


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The rows of every UNet call made inside."""
    rows: list[int] = []
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, args: rows.append(args[0].shape[0])
    )
    try:
        yield rows
    finally:
        hook.remove()


def fingerprint(value: Any) -> Any:
    """What must not change: contents of tensors and containers, identity of everything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape), hashlib.blake2b(
            value.detach().contiguous().view(-1).numpy().tobytes()
        ).hexdigest()
    if isinstance(value, dict):
        return {k: fingerprint(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [fingerprint(v) for v in value]
    return value if isinstance(value, (str, int, float, type(None))) else id(value)


def of_model(model: Any) -> Any:
    """A MODEL as its owner sees it: options, wrappers, callbacks, patches and weights."""
    return fingerprint(
        [
            model.model_options,
            model.wrappers,
            model.callbacks,
            model.patches,
            model.object_patches,
            model.attachments,
            dict(model.model.state_dict()),
        ]
    )


def without_patcher() -> set[int]:
    """Networks that the host still counts as loaded though their MODEL is gone: a leak, unless a test before keeps them."""
    gc.collect()
    return {
        id(m.real_model()) for m in comfy.model_management.current_loaded_models if m.model is None
    }


def of_bank(bank: ReferenceBank) -> Any:
    return fingerprint(
        [
            bank.features,
            bank.masks,
            bank.maps,
            bank.trajectory.latents,
            bank.trajectory.sigmas,
            {half: [p.cross, dict(p.extras)] for half, p in bank.prompts.items()},
        ]
    )


# concepts ------------------------------------------------------------------------------------------------------------------


def subject(
    pictures: int = 1, seed: int = 7, size: tuple[int, int] = (48, 40), channels: int = 3
) -> Tensor:
    """An IMAGE as Load Image gives it, [b y x c]."""
    return torch.rand(pictures, *size, channels, generator=torch.Generator().manual_seed(seed))


def fresh_encoder(
    family: str = "tiny",
    seed: int = 0,
    merge: str = "concat",
    tower: bool = True,
    model: Any = None,
) -> ConceptEncoder:
    """A random concept encoder for a family: a tower of 2 layers over 3 x 3 patches, keys and values as loud as the text's."""
    told = cross_layers(model or random_model(family), "a test")
    config = ConceptConfig(
        *told,
        tower_width=TOWER["hidden_size"],
        tower=TOWER if tower else None,
        preprocessing=Preprocessing(TOWER["image_size"]),
        merge=Merge(merge),
    )
    made, generator = ConceptEncoder(config), torch.Generator().manual_seed(seed)
    for name, p in made.named_parameters():
        p.data = (
            torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5
            if p.ndim > 1
            else torch.full(p.shape, float(name.endswith("weight")))
        )
    return made


def encoder_of(family: str = "tiny", seed: int = 0, merge: str = "concat") -> ManagedEncoder:
    """A shared concept encoder as Concept Encoder Load gives it."""
    return kept_encoder(family, seed, merge)


@cache
def kept_encoder(*told: Any) -> ManagedEncoder:
    return ManagedEncoder.of(fresh_encoder(*told), f"{told[0]}.safetensors")


@torch.inference_mode()
def concept(
    model: Any,
    weight: float = 1.0,
    image: Tensor | None = None,
    encoder: ManagedEncoder | None = None,
    family: str = "tiny",
    **more: Any,
) -> Any:
    """Cross-Attn Detail Inject -> MODEL."""
    everywhere = {
        "start_percent": 0.0,
        "halves": "cond only",
    }  # laws are about all steps, and about one half unless they say both
    return CrossAttnDetailInject.execute(
        model,
        encoder or encoder_of(family),
        subject() if image is None else image,
        weight=weight,
        **everywhere | more,
    ).result[0]


def of_encoder(encoder: ManagedEncoder) -> Any:
    return fingerprint(
        [dict(encoder.encoder.state_dict()), encoder.name, encoder.patcher.model_options]
    )


# stories -------------------------------------------------------------------------------------------------------------------

MOMENTS = 5  # steps at 0.2, 0.4, 0.6, 0.8 and 1 of the schedule; DIFT's is the fourth
WINDOWS = {
    "blend_end_percent": 0.5,
    "injection_start_percent": 0.3,
    "injection_end_percent": 0.7,
}  # blend steps 1 and 2, inject 2 and 3


@torch.inference_mode()
def story(model: Any, **inputs: Any) -> Any:
    """ConsiStory Shared Attention of 2 anchors, its windows wide enough for MOMENTS steps -> MODEL."""
    return ConsiStory.execute(model, **{"anchors": 2, "halves": "both"} | WINDOWS | inputs).result[
        0
    ]


def prompts_of(
    pictures: int | Sequence[int],
    family: str = "tiny",
    tokens: int = 77,
    by_word: Sequence[int] = (5,),
) -> list:
    """Subject Prompts' CONDITIONING of so many pictures, or of these: picture i has the same row in every batch."""
    who = range(pictures) if isinstance(pictures, int) else pictures
    each = tuple(((p,),) * len(who) for p in by_word)
    subject = SubjectTokens(("cat", "dog", "bird")[: len(each)], (tuple(by_word),) * len(who), each)
    rows = [random_prompt(family, 50 + i, tokens)[0] for i in who]
    extras = {
        "kindred_text": "\n".join(f"a cat in scene {i}" for i in who),
        "kindred_subject": subject,
    }
    if "pooled_output" in rows[0][1]:
        extras["pooled_output"] = torch.cat([more["pooled_output"] for _, more in rows])
    return [[torch.cat([cross for cross, _ in rows]), extras]]


def noise_of(who: Sequence[int], size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """An empty LATENT whose picture i gets the same noise in every batch."""
    return {"samples": torch.zeros(len(who), 4, *size), "batch_index": list(who)}


@torch.inference_mode()
def pictures(
    model: Any,
    who: Sequence[int] = (0, 1, 2),
    steps: int = MOMENTS,
    cfg: float = 4.0,
    sampler: str = "euler",
    size: tuple[int, int] = SIZE,
    positive: list | None = None,
    uncond: list | None = None,
    seed: int = 1,
    scheduler: str = SCHEDULER,
    family: str = "tiny",
    latent: dict | None = None,
    **more: Any,
) -> Tensor:
    """KSampler over the pictures `who` of the endless story that prompts_of and noise_of tell -> [b c y x]."""
    return nodes.common_ksampler(
        model,
        seed,
        steps,
        cfg,
        sampler,
        scheduler,
        positive or prompts_of(who, family),
        uncond or negative(family),
        noise_of(who, size) | (latent or {}),
        **more,
    )[0]["samples"]


@torch.inference_mode()
def anchors(
    model: Any,
    who: Sequence[int] = (0, 1, 2),
    steps: int = MOMENTS,
    cfg: float = 4.0,
    sampler: str = "euler",
    size: tuple[int, int] = SIZE,
    positive: list | None = None,
    scheduler: str = SCHEDULER,
    family: str = "tiny",
) -> tuple[Tensor, ReferenceBank]:
    """ConsiStory Anchor Sampler over the same pictures -> [b c y x], bank."""
    out, bank = AnchorSampler.execute(
        model,
        1,
        steps,
        cfg,
        sampler,
        scheduler,
        positive or prompts_of(who, family),
        negative(family),
        noise_of(who, size),
    ).result
    return out["samples"], bank


@contextmanager
def passes(model: Any) -> Iterator[list[int]]:
    """The rows of every pass through the UNet inside; two may come in one call of the model."""
    rows: list[int] = []
    hook = model.model.diffusion_model.time_embed.register_forward_pre_hook(
        lambda module, args: rows.append(args[0].shape[0])
    )
    try:
        yield rows
    finally:
        hook.remove()
