"""The nodes of the pack as functions of a MODEL and a setting, and what they read.

For bit_guard.py; as in bit_guard_host.py nothing but the host and node ids is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bit_guard_host import (
    FIRST,
    SIZE,
    Setting,
    coarse,
    conditioning,
    image,
    kindred,
    latent,
    model_of,
    negative,
    noise,
    photo,
    split_calls,
)

WINDOWS = {  # wide enough for a few steps
    "blend_end_percent": 0.5,
    "injection_start_percent": 0.3,
    "injection_end_percent": 0.7,
}
ELSEWHERE = (
    13.1,
    5.3,
    1.17,
    0.31,
    0.0,
)  # noise levels that no sampler asks for: such a reference is read live


# references and encoders -------------------------------------------------------------------------


def levels(s: Setting) -> tuple[float, ...]:
    """The noise levels of the setting's schedule, of both passes where there are two."""
    import comfy.samplers

    found = set()
    for denoise in {s.denoise, 0.5} if s.begins == "hires" else {s.denoise}:
        how = (s.steps, torch.device("cpu"), s.sampler, s.scheduler, denoise)
        found.update(comfy.samplers.KSampler(model_of(s.family), *how).sigmas.tolist())
    return tuple(sorted(found | {0.0}, reverse=True))


def capture(model: Any, sigmas: Sequence[float], family: str = "sd15", **inputs: Any) -> Any:
    """Ref-UNet Feature Capture of a photo -> reference, mask."""
    inputs = {
        "latent": photo(),
        "negative": negative(family),
        "sigmas": torch.tensor(sigmas),
    } | inputs
    inputs = {name: value for name, value in inputs.items() if value is not None}
    return kindred(
        "RefUNetCapture", model, coarse(family), steps=3, scheduler="ddim_uniform", **inputs
    )


@cache
def reference(
    sigmas: tuple[float, ...],
    size: tuple[int, int],
    seed: int = 3,
    family: str = "sd15",
    pictures: int = 1,
) -> Any:
    return capture(model_of(family), sigmas, family, latent=photo(size, pictures, seed))[0]


@cache
def anchors(s: Setting, precision: str = "as computed", **inputs: Any) -> Any:
    """Anchor Sampler over pictures 0 and 1 of the endless story -> pictures, reference."""
    who = tuple(range(FIRST))
    with split_calls(s.split):
        return kindred(
            "AnchorSampler",
            story(model_of(s.family), s, query_blend=0.0, **inputs),
            s.seed,
            s.steps,
            s.cfg,
            s.sampler,
            s.scheduler,
            *conditioning(s, who),
            latent(s, who),
            denoise=s.denoise,
            precision=precision,
        )


def anchored(s: Setting) -> Setting:
    """What of a setting anchors are drawn under: they need whole pictures and KSampler."""
    sampler = "euler" if s.sampler == "dpm_adaptive" else s.sampler
    return replace(s, batch=FIRST, way="KSampler", graph="", sampler=sampler)


def cross_layers(family: str) -> list[tuple[str, int, int, int]]:
    """(stage, block, depth, channels) of the family's cross-attentions, in the UNet's order."""
    unet, found = model_of(family).model.diffusion_model, []
    stages = (
        ("input", unet.input_blocks),
        ("middle", [unet.middle_block or []]),
        ("output", unet.output_blocks),
    )
    for stage, blocks in stages:
        for i, block in enumerate(blocks):
            for part in block:
                for depth, layer in enumerate(getattr(part, "transformer_blocks", ())):
                    found.append((stage, i, depth, layer.attn2.to_k.out_features))
    return found


def tower_shapes(
    layers: int = 2, wide: int = 32, inner: int = 48
) -> Iterator[tuple[str, list[int]]]:
    """A CLIP vision tower of 3 x 3 patches in transformers' names, and the projection behind it."""
    yield "tower.model.embeddings.class_embedding", [wide]
    yield "tower.model.embeddings.patch_embedding.weight", [wide, 3, 8, 8]
    yield "tower.model.embeddings.position_embedding.weight", [10, wide]
    sizes = {"pre_layrnorm": [wide]}
    for n in range(layers):
        at = f"encoder.layers.{n}"
        sizes |= {f"{at}.self_attn.{x}_proj": [wide, wide] for x in ("k", "v", "q", "out")}
        sizes |= {f"{at}.mlp.fc1": [inner, wide], f"{at}.mlp.fc2": [wide, inner]}
        sizes |= {f"{at}.layer_norm1": [wide], f"{at}.layer_norm2": [wide]}
    sizes = {f"tower.model.{name}": shape for name, shape in sizes.items()}
    for name, shape in (
        sizes | {"mlp.0": [wide, wide], "mlp.2": [64, wide], "mlp.3": [64]}
    ).items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


@cache
def encoder(family: str = "sd15", merge: str = "concat") -> Any:
    """Concept Encoder Load of a file of random weights, keys and values as loud as the text's."""
    import folder_paths
    from safetensors.torch import save_file

    layers, kind = cross_layers(family), type(model_of(family).model.model_config).__name__
    shapes = dict(tower_shapes())
    for stage, i, depth, channels in layers:
        shapes |= {f"to_{x}.{stage}_{i}_{depth}.weight": [channels, 64] for x in "kv"}
    weights = {}
    for n, (name, shape) in enumerate(shapes.items()):
        one = torch.full(shape, float(name.endswith("weight")))
        weights[name] = noise(n, shape) / one[0].numel() ** 0.5 if len(shape) > 1 else one
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
    }
    tower |= {"image_size": 24, "patch_size": 8, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    tower |= {"num_channels": 3, "projection_dim": 16}
    pixels = {"size": 24, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    description = {"version": 1, "family": kind, "layers": layers, "width": 64, "tower_width": 32}
    description |= {"tower": tower, "preprocessing": pixels, "merge": merge, "training": {}}
    folder = Path(folder_paths.get_folder_paths("concept_encoders")[0])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{family} {merge}.safetensors"
    save_file(weights, file, {"kindred.concept_encoder": json.dumps(description)})
    return kindred("ConceptEncoderLoad", file.name)


# the nodes of the pack as columns ----------------------------------------------------------------


def halves(s: Setting) -> dict[str, str]:
    return {"halves": s.halves} if s.halves else {}


def inject(model: Any, bank: Any, **inputs: Any) -> Any:
    return kindred("MaskedSelfAttnInject", model, bank, **{"weight": 2.0} | inputs)


def cached(model: Any, s: Setting, seed: int = 3, **inputs: Any) -> Any:
    return inject(model, reference(levels(s), s.size, seed, s.family), **halves(s) | inputs)


def live(model: Any, s: Setting, seed: int = 3, **inputs: Any) -> Any:
    return inject(model, reference(ELSEWHERE, SIZE, seed, s.family), **halves(s) | inputs)


def concept(model: Any, s: Setting, seed: int = 7, **inputs: Any) -> Any:
    more = {"weight": 2.0, "start_percent": 0.0, "image": image(seed=seed)} | halves(s) | inputs
    given = more.pop("concept_encoder", None) or encoder(s.family)
    return kindred("CrossAttnDetailInject", model, given, **more)


def story(model: Any, s: Setting, **inputs: Any) -> Any:
    return kindred("ConsiStory", model, **{"anchors": 2} | WINDOWS | halves(s) | inputs)


def sharing(model: Any, s: Setting, **inputs: Any) -> Any:
    return story(model, s, feature_injection=0.0, **inputs)


def further(model: Any, s: Setting, **inputs: Any) -> Any:
    return story(model, s, reference=anchors(anchored(s))[1], query_blend=0.0, **inputs)


def everything(model: Any, s: Setting) -> Any:
    shared = story(model, replace(s, halves=s.halves.replace("shared", "")), query_blend=0.0)
    return concept(cached(shared, s), s)


COLUMNS: dict[str, Callable[[Any, Setting], Any]] = {
    "photo": cached,
    "photo, live": live,
    "concept": concept,
    "sharing": sharing,
    "story": story,
    "further": further,
    "all": everything,
}
STORIES = ("sharing", "story", "further")
