"""Where the files come from that the transformers' workflows name, as ComfyUI's own templates tell: the canvas offers what is missing.

Only links that the host's shipped blueprints hold; a test compares them. A file without one has none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# a loader's inputs that name a file
LOADERS = {
    "UNETLoader": ("unet_name",),
    "CLIPLoader": ("clip_name",),
    "DualCLIPLoader": ("clip_name1", "clip_name2"),
    "TripleCLIPLoader": ("clip_name1", "clip_name2", "clip_name3"),
    "VAELoader": ("vae_name",),
    "CheckpointLoaderSimple": ("ckpt_name",),
}
NETWORKS, TEXTS, VAES = "diffusion_models", "text_encoders", "vae"
# file -> its folder under models, and the repository with the path in it
PLACES = {
    "flux1-dev.safetensors": (NETWORKS, "Comfy-Org/flux1-dev", ""),
    "flux-2-klein-base-4b-fp8.safetensors": (
        NETWORKS,
        "black-forest-labs/FLUX.2-klein-base-4b-fp8",
        "",
    ),
    "qwen_image_fp8_e4m3fn.safetensors": (
        NETWORKS,
        "Comfy-Org/Qwen-Image_ComfyUI",
        "split_files/diffusion_models/",
    ),
    "z_image_turbo_bf16.safetensors": (
        NETWORKS,
        "Comfy-Org/z_image_turbo",
        "split_files/diffusion_models/",
    ),
    "clip_l.safetensors": (TEXTS, "comfyanonymous/flux_text_encoders", ""),
    "t5xxl_fp16.safetensors": (TEXTS, "comfyanonymous/flux_text_encoders", ""),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": (
        TEXTS,
        "Comfy-Org/Qwen-Image_ComfyUI",
        "split_files/text_encoders/",
    ),
    "qwen_3_4b.safetensors": (TEXTS, "Comfy-Org/z_image_turbo", "split_files/text_encoders/"),
    "ae.safetensors": (VAES, "Comfy-Org/z_image_turbo", "split_files/vae/"),
    "flux2-vae.safetensors": (VAES, "Comfy-Org/flux2-dev", "split_files/vae/"),
    "qwen_image_vae.safetensors": (VAES, "Comfy-Org/Qwen-Image_ComfyUI", "split_files/vae/"),
}


def files_of(node: Mapping[str, Any]) -> list[str]:
    """The files that a node of an API form loads."""
    return [node["inputs"][at] for at in LOADERS.get(node["class_type"], ())]


def models_of(node: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a loader's `properties.models` says on the canvas, of the files that have a link."""
    return [entry(file) for file in files_of(node) if file in PLACES]


def entry(file: str) -> dict[str, str]:
    """A file as ComfyUI's templates give it."""
    folder, repository, path = PLACES[file]
    url = f"https://huggingface.co/{repository}/resolve/main/{path}{file}"
    return {"name": file, "url": url, "directory": folder}
