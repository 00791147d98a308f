"""A pack for the hosts of the tests: small random models in the files that the transformers' workflows name.

Each file is written when the host starts, into the folder where people keep it, and is loaded by the host's own loaders. Classes, key
names and tokenizers are the host's; widths and depths are less. FLUX.1, FLUX.2, SD3.5 and every autoencoder are recognised by the host's
own detection. Three things it would not take small, so this pack tells it their sizes: the networks of Qwen-Image and Z-Image, the
transformers inside the text encoders, and what a Qwen3 of another width than 2560 is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.text_encoders.flux
import comfy.text_encoders.qwen_image
import comfy.text_encoders.qwen_vl
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.z_image
import folder_paths
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "host"))

from tiny_networks import QWEN, ZNEXT, randomise  # noqa: E402

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
State = dict[str, Tensor]
WIDTH = 64  # of the texts of Qwen's encoders
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
# by the class of the transformer; CLIP G is known by its 32 layers, and Klein reads the 27th of Qwen3
ENCODERS: dict[str, dict[str, Any]] = {
    "CLIPTextModel": CLIP,
    # SD3 wants 4096 of the text; common words are among T5's first 8192
    "T5": {"d_kv": 16, "d_ff": 32, "num_heads": 2, "num_layers": 2, "vocab_size": 8192},
    "Qwen25_7BVLI": {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "Qwen3_4B": {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 28,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
QWEN_IMAGE = QWEN | {"joint_attention_dim": WIDTH}
Z_IMAGE = ZNEXT | {"cap_feat_dim": WIDTH}
FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=4096, hidden_size=128, mlp_ratio=4.0, num_heads=1,
    depth=2, depth_single_blocks=4, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
KLEIN = FLUX | dict(
    image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=3 * WIDTH, mlp_ratio=3.0,
    axes_dim=[32, 32, 32, 32], theta=2000, patch_size=1, qkv_bias=False, guidance_embed=False, global_modulation=True, mlp_silu_act=True,
    ops_bias=False, default_ref_method="index", ref_index_scale=10.0, txt_ids_dims=[3],
)  # fmt: skip
SD35 = dict(
    in_channels=16, patch_size=2, out_channels=16, depth=4, input_size=None, adm_in_channels=64, qk_norm="rms", num_patches=1024,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 256}}, pos_embed_max_size=32,
    pos_embed_scaling_factor=None, x_block_self_attn_layers=[],
)  # fmt: skip


class SmallQwenImage(comfy.supported_models.QwenImage):
    unet_config = {"image_model": "qwen_image", "num_layers": QWEN_IMAGE["num_layers"]}
    unet_extra_config = QWEN_IMAGE


class SmallZImage(comfy.supported_models.ZImage):
    unet_config = {"image_model": "lumina2", "dim": Z_IMAGE["dim"]}
    unet_extra_config = {
        name: size for name, size in Z_IMAGE.items() if name not in ("dim", "n_layers")
    }


def tell_the_host() -> None:
    """The sizes that its detection would not take small."""
    comfy.supported_models.models[:0] = [SmallQwenImage, SmallZImage]
    full, vision = comfy.sd1_clip.SDClipModel.__init__, comfy.text_encoders.qwen_vl
    full_vision, known = vision.Qwen2VLVisionTransformer, comfy.sd.detect_te_model

    def small(self: nn.Module, *args: Any, model_class: Any = None, **kwargs: Any) -> None:
        kind = model_class or comfy.clip_model.CLIPTextModel
        sizes = ENCODERS.get(kind.__name__, {})

        def build(config: dict[str, Any], *rest: Any) -> nn.Module:
            # the miniature's CLIP is small already
            return kind(config if config.get("hidden_size", 768) < 768 else config | sizes, *rest)

        full(self, *args, model_class=build, **kwargs)

    def small_vision(**sizes: Any) -> nn.Module:
        less = {"hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "num_layers": 1}
        return full_vision(**sizes | less)

    def kind_of(state: State) -> Any:
        norm = state.get("model.layers.0.post_attention_layernorm.weight")
        named = "model.layers.0.self_attn.q_norm.weight" in state
        if named and norm is not None and norm.shape[0] == WIDTH:
            return comfy.sd.TEModel.QWEN3_4B
        return known(state)

    comfy.sd1_clip.SDClipModel.__init__ = small
    vision.Qwen2VLVisionTransformer = small_vision
    comfy.sd.detect_te_model = kind_of


def drawn(network: nn.Module, dtype: torch.dtype = torch.float32) -> State:
    """Its weights, at random."""
    randomise(network)
    return {name: value.to(dtype).contiguous() for name, value in network.state_dict().items()}


def diffusion_model(config: type, **sizes: Any) -> State:
    """Of the host's class for a family, under the names that a file of the diffusion model has."""
    settings = config(dict(sizes))
    settings.set_inference_dtype(torch.float32, None)
    return drawn(settings.get_model({}, "", device="cpu").diffusion_model)


def text_encoder(kind: Callable[..., Any], part: str) -> State:
    """One part of a text encoder, under the names that its file has."""
    encoder = kind(device="cpu", dtype=torch.float16)
    return drawn(getattr(encoder, part).transformer, torch.float16)


def autoencoder() -> State:
    """The flow miniature's: 16 channels at an eighth of the picture, as of FLUX.1, SD3 and Z-Image."""
    weights = HERE.parents[1] / "miniature" / "weights" / "kindred_flow_autoencoder.safetensors"
    return load_file(weights)


def flux2_autoencoder() -> State:
    """The encoder has its full width: the host takes only the decoder's from the file."""
    sizes = dict(
        double_z=True, z_channels=32, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2,
        attn_resolutions=[], dropout=0.0, batch_norm_latent=True,
    )  # fmt: skip
    return drawn(
        comfy.ldm.models.autoencoder.AutoencoderKL(
            ddconfig=sizes, embed_dim=32, decoder_ddconfig=sizes | {"ch": 32}
        ),
        torch.float16,
    )


def qwen_autoencoder() -> State:
    sizes = dict(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True],
        image_channels=3, conv_out_channels=3, dropout=0.0,
    )  # fmt: skip
    return drawn(comfy.ldm.wan.vae.WanVAE(**sizes))


def sd35_checkpoint() -> State:
    """Transformer and autoencoder in one file, without text encoders, as it is published."""
    network = diffusion_model(comfy.supported_models.SD3, **SD35)
    parts = {"model.diffusion_model.": network, "first_stage_model.": autoencoder()}
    return {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}


# folder and name -> what is in it
FILES: dict[str, Callable[[], State]] = {
    "diffusion_models/flux1-dev.safetensors": lambda: diffusion_model(
        comfy.supported_models.Flux, **FLUX
    ),
    "diffusion_models/flux-2-klein-base-4b-fp8.safetensors": lambda: diffusion_model(
        comfy.supported_models.Flux2, **KLEIN
    ),
    "diffusion_models/qwen_image_fp8_e4m3fn.safetensors": lambda: diffusion_model(
        SmallQwenImage, image_model="qwen_image"
    ),
    "diffusion_models/z_image_turbo_bf16.safetensors": lambda: diffusion_model(
        SmallZImage, image_model="lumina2", **Z_IMAGE
    ),
    "checkpoints/sd3.5_large.safetensors": sd35_checkpoint,
    "text_encoders/clip_l.safetensors": lambda: text_encoder(
        comfy.text_encoders.sd3_clip.SD3ClipModel, "clip_l"
    ),
    "text_encoders/clip_g.safetensors": lambda: text_encoder(
        comfy.text_encoders.sd3_clip.SD3ClipModel, "clip_g"
    ),
    "text_encoders/t5xxl_fp16.safetensors": lambda: text_encoder(
        comfy.text_encoders.sd3_clip.SD3ClipModel, "t5xxl"
    ),
    "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors": lambda: text_encoder(
        comfy.text_encoders.qwen_image.te(), "qwen25_7b"
    ),
    "text_encoders/qwen_3_4b.safetensors": lambda: text_encoder(
        comfy.text_encoders.z_image.te(), "qwen3_4b"
    ),
    "vae/ae.safetensors": autoencoder,
    "vae/flux2-vae.safetensors": flux2_autoencoder,
    "vae/qwen_image_vae.safetensors": qwen_autoencoder,
}


def write() -> None:
    for name, build in FILES.items():
        path = Path(folder_paths.models_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            save_file(build(), path)


tell_the_host()
with torch.inference_mode():
    write()
