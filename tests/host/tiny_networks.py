"""Tiny random models of the host's transformer families, run through the host's own samplers.

READ are the families that Kindred reads, REFUSED those that it refuses in words. A model is what `comfy.supported_models` makes of a
small configuration, on the CPU in float32, with weights that make every part count. Tests share it and must leave it as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from comfy.ldm.krea2.model import RMSNorm as KreaNorm
from torch import Tensor, nn

Extras = Callable[[Tensor], dict[str, Any]]  # what a CONDITIONING carries beside a text [b w c]


def drawn(*shape: int, seed: int) -> Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nothing(text: Tensor) -> dict[str, Any]:
    return {}


def pooled(text: Tensor) -> dict[str, Any]:
    return {"pooled_output": drawn(1, 32, seed=5)}


def unpooled(text: Tensor) -> dict[str, Any]:
    return {"pooled_output": None}


def masked(text: Tensor) -> dict[str, Any]:
    """One row, whatever the batch, as the host's text encoders give it."""
    return {"attention_mask": torch.ones(1, text.shape[1], dtype=torch.long)}


def two_texts(text: Tensor) -> dict[str, Any]:
    """HunyuanDiT: a second text of mT5."""
    return {
        "attention_mask": torch.ones(1, 77, dtype=torch.long),
        "conditioning_mt5xl": drawn(1, 256, 48, seed=9),
        "attention_mask_mt5xl": torch.ones(1, 256, dtype=torch.long),
    }


def llama(text: Tensor) -> dict[str, Any]:
    """HiDream-I1: two layers of Llama beside T5."""
    return pooled(text) | {"conditioning_llama3": text[:, None, :, :24].repeat(1, 2, 1, 1)}


def token_numbers(text: Tensor) -> dict[str, Any]:
    """HiDream-O1: the tokens of a chat, with the prompt's between its marks."""
    prompt = torch.arange(1000, 1000 + text.shape[1])
    before = torch.tensor([151644, 872, 198])
    behind = torch.tensor([151645, 198, 151644, 77091, 198, 151669, 151673])
    return {"text_input_ids": torch.cat((before, prompt, behind))[None]}


@dataclass(frozen=True)
class Family:
    """A tiny model: its class in comfy.supported_models, its constructor's arguments, and what it is fed."""

    config: str
    sizes: dict[str, Any]
    channels: int = 16  # of the latents
    width: int = 48  # of the text
    patch: int = 2
    frames: bool = False  # latents are [b c 1 y x]
    extras: Extras = nothing
    words: int = 6
    step: int = 3  # how many words make the text of the network longer
    grid: tuple[int, int] = (8, 6)  # tokens (y, x)
    odd: bool = True  # sides that the patch does not divide

    def shape(self, y: int, x: int) -> tuple[int, ...]:
        """Of a latent of so many cells, without its batch."""
        return (self.channels, 1, y, x) if self.frames else (self.channels, y, x)


FLUX = dict(
    in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=48, hidden_size=64, mlp_ratio=4.0, num_heads=2, depth=2,
    depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
FLUX2 = FLUX | dict(
    in_channels=128, out_channels=128, vec_in_dim=None, mlp_ratio=3.0, axes_dim=[8, 8, 8, 8], theta=2000, patch_size=1, qkv_bias=False,
    global_modulation=True, mlp_silu_act=True, ops_bias=False, default_ref_method="index", ref_index_scale=10.0, txt_ids_dims=[3],
)  # fmt: skip
CHROMA = dict(
    in_channels=64, out_channels=64, context_in_dim=48, hidden_size=64, mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2,
    axes_dim=[8, 12, 12], theta=10000, patch_size=2, qkv_bias=True, in_dim=64, out_dim=64, hidden_dim=32, n_layers=2, txt_ids_dims=[],
    vec_in_dim=None,
)  # fmt: skip
RADIANCE = CHROMA | dict(
    in_channels=3, out_channels=3, patch_size=4, nerf_hidden_size=16, nerf_mlp_ratio=2, nerf_depth=1, nerf_max_freqs=4, nerf_tile_size=512,
    nerf_final_head_type="linear", nerf_embedder_dtype=torch.float32, use_x0=False, use_sequential_txt_ids=False,
)  # fmt: skip
HUNYUAN = dict(
    in_channels=64, out_channels=64, vec_in_dim=None, context_in_dim=48, hidden_size=64, mlp_ratio=4.0, num_heads=2, depth=2,
    depth_single_blocks=2, axes_dim=[16, 16], theta=256, patch_size=[1, 1], qkv_bias=True, guidance_embed=False, byt5=False,
    meanflow=False, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False,
)  # fmt: skip
HUNYUAN_VIDEO = HUNYUAN | dict(
    in_channels=65, out_channels=32, axes_dim=[8, 12, 12], patch_size=[1, 1, 1], use_cond_type_embedding=True, vision_in_dim=32,
    meanflow_sum=True,
)  # fmt: skip
KREA2 = dict(
    features=64, tdim=32, txtdim=24, heads=2, kvheads=1, multiplier=2, layers=3, patch=2, channels=16, txtlayers=2, txtheads=2,
    txtkvheads=2,
)  # fmt: skip
SD35 = dict(
    in_channels=16, patch_size=2, out_channels=16, depth=3, input_size=None, adm_in_channels=32, qk_norm="rms", num_patches=1024,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 192}}, pos_embed_max_size=32,
    pos_embed_scaling_factor=None, x_block_self_attn_layers=[0, 1],
)  # fmt: skip
QWEN = dict(in_channels=64, out_channels=16, num_layers=3, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48,
            axes_dims_rope=(8, 12, 12))  # fmt: skip
MAGE = {name: size for name, size in QWEN.items() if name != "out_channels"} | {"in_channels": 128}
JOY = dict(patch_size=[1, 2, 2], in_channels=16, hidden_size=64, num_attention_heads=2, text_dim=48, num_layers=3,
           rope_dim_list=[8, 12, 12], theta=10000)  # fmt: skip
NEXT = dict(
    patch_size=2, in_channels=16, dim=64, n_layers=3, n_refiner_layers=2, n_heads=2, n_kv_heads=1, axes_dims=[8, 12, 12],
    axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=4.0, cap_feat_dim=48, qk_norm=True,
)  # fmt: skip
ZNEXT = NEXT | dict(
    dim=256,
    n_heads=8,
    n_kv_heads=8,
    rope_theta=256.0,
    z_image_modulation=True,
    time_scale=1000.0,
    pad_tokens_multiple=32,
)
ZPIXEL = ZNEXT | dict(patch_size=4, in_channels=3, decoder_hidden_size=32, decoder_num_res_blocks=1, decoder_max_freqs=4,
                      decoder_in_channels=48)  # fmt: skip
OMNI = dict(
    patch_size=2, in_channels=16, hidden_size=64, num_layers=3, num_refiner_layers=2, num_attention_heads=2, num_kv_heads=1,
    multiple_of=32, ffn_dim_multiplier=None, axes_dim_rope=(8, 12, 12), axes_lens=(1024, 1664, 1664), timestep_scale=1000.0,
)  # fmt: skip
HIDREAM = dict(
    patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
    caption_channels=[48, 24], text_emb_dim=32, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=[12, 10, 10],
    max_resolution=[128, 128], llama_layers=[0, 1, 0, 1],
)  # fmt: skip
HIDREAM_O1 = dict(
    text_config_overrides=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                               head_dim=32, rope_dims=[6, 5, 5]),
    vision_config_overrides=dict(hidden_size=32, num_heads=2, intermediate_size=32, depth=1, num_position_embeddings=16,
                                 deepstack_visual_indexes=[]),
)  # fmt: skip
PREDICT = dict(
    max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=64,
    num_blocks=3, num_heads=2, crossattn_emb_channels=48, pos_emb_cls="rope3d", pos_emb_learnable=True, use_adaln_lora=True,
    adaln_lora_dim=16, rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0, rope_enable_fps_modulation=False,
)  # fmt: skip
KANDINSKY = dict(in_text_dim=48, in_text_dim2=32, time_dim=32, model_dim=64, ff_dim=128, visual_embed_dim=64, num_text_blocks=1,
                 num_visual_blocks=3, axes_dims=(8, 12, 12), rope_scale_factor=(1.0, 1.0, 1.0))  # fmt: skip
LENS = dict(
    patch_size=2, in_channels=128, out_channels=32, num_layers=3, attention_head_dim=32, num_attention_heads=2, enc_hidden_dim=24,
    axes_dims_rope=(8, 12, 12), multi_layer_encoder_feature=True, selected_layer_index=(0, 1),
)  # fmt: skip
PIXELDIT = dict(num_groups=2, hidden_size=64, pixel_hidden_size=8, pixel_attn_hidden_size=64, pixel_num_groups=2, patch_depth=2,
                pixel_depth=2, patch_size=4, txt_embed_dim=48, txt_max_length=20)  # fmt: skip
IDEOGRAM = dict(
    in_channels=128, num_layers=3, num_attention_heads=2, attention_head_dim=32, intermediate_size=64, adaln_dim=16, llm_features_dim=48,
    rope_theta=5000000, mrope_section=[6, 5, 5], norm_eps=1e-5,
)  # fmt: skip
WAN = dict(model_type="t2v", patch_size=(1, 2, 2), in_dim=16, dim=64, ffn_dim=128, freq_dim=32, text_dim=48, out_dim=16, num_heads=2,
           num_layers=3, qk_norm=True, cross_attn_norm=True)  # fmt: skip
COSMOS = dict(
    max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=64,
    block_config="FA-CA-MLP", num_blocks=3, num_heads=2, concat_padding_mask=True, crossattn_emb_channels=48, pos_emb_cls="rope3d",
    pos_emb_learnable=False, pos_emb_interpolation="crop", block_x_format="THWBD", affline_emb_norm=True, use_adaln_lora=True,
    adaln_lora_dim=16, extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable", rope_h_extrapolation_ratio=1.0,
    rope_w_extrapolation_ratio=1.0, rope_t_extrapolation_ratio=2.0,
)  # fmt: skip
PIXART = dict(hidden_size=96, num_heads=2, depth=3, in_channels=4, patch_size=2, caption_channels=48, model_max_length=300,
              micro_condition=False, pe_interpolation=1)  # fmt: skip
HYDIT = dict(hidden_size=64, num_heads=2, depth=4, text_states_dim=48, text_states_dim_t5=48)
ERNIE = dict(
    hidden_size=64,
    num_attention_heads=2,
    num_layers=3,
    ffn_hidden_size=128,
    text_in_dim=48,
    rope_axes_dim=(8, 12, 12),
)
LTXV = dict(
    in_channels=128,
    cross_attention_dim=64,
    attention_head_dim=32,
    num_attention_heads=2,
    caption_channels=48,
    num_layers=3,
)

READ: dict[str, Family] = {
    "Flux": Family("Flux", FLUX, extras=pooled),
    "FluxSchnell": Family("FluxSchnell", FLUX | {"guidance_embed": False}, extras=pooled),
    "Flux2": Family("Flux2", FLUX2, channels=128, patch=1),
    "LongCatImage": Family(
        "LongCatImage", FLUX | dict(vec_in_dim=None, guidance_embed=False, txt_ids_dims=[1, 2])
    ),
    "Chroma": Family("Chroma", CHROMA),
    "ChromaRadiance": Family("ChromaRadiance", RADIANCE, channels=3, patch=4),
    "HunyuanImage21": Family("HunyuanImage21", HUNYUAN, channels=64, patch=1),
    "Krea2": Family("Krea2", KREA2, frames=True),
    "QwenImage": Family("QwenImage", QWEN, frames=True),
    "MageFlow": Family("MageFlow", MAGE, channels=128, patch=1),
    "JoyImage": Family("JoyImage", JOY, frames=True),
    "SD3": Family("SD3", SD35 | {"x_block_self_attn_layers": []}, extras=pooled),
    "SD3.5": Family("SD3", SD35, extras=pooled),
    "AuraFlow": Family(
        "AuraFlow",
        dict(
            dim=64,
            n_layers=4,
            n_double_layers=2,
            n_heads=2,
            global_conddim=64,
            cond_seq_dim=48,
            max_seq=1024,
        ),
        channels=4,
    ),  # fmt: skip
    "Lumina2": Family("Lumina2", NEXT, extras=masked),
    "ZImage": Family("ZImage", ZNEXT, extras=masked, step=32, grid=(8, 10)),
    "ZImagePixel": Family(
        "ZImagePixelSpace", ZPIXEL, channels=3, patch=4, extras=masked, step=32, grid=(8, 10)
    ),
    "Omnigen2": Family("Omnigen2", OMNI | {"text_feat_dim": 48}, extras=masked),
    "Boogu": Family(
        "Boogu", OMNI | dict(instruction_feat_dim=48, num_double_stream_layers=2), extras=masked
    ),
    "HiDream": Family("HiDream", HIDREAM, extras=llama),
    "HiDreamO1": Family(
        "HiDreamO1",
        HIDREAM_O1,
        channels=3,
        width=1,
        patch=32,
        extras=token_numbers,
        grid=(4, 3),
        odd=False,
    ),
    "CosmosPredict2": Family("CosmosT2IPredict2", PREDICT, frames=True),
    "Anima": Family("Anima", PREDICT, frames=True),
    "Kandinsky5Image": Family("Kandinsky5Image", KANDINSKY, extras=pooled, odd=False),
    "Lens": Family("Lens", LENS, channels=128, patch=1, extras=masked),
    "PixelDiT": Family("PixelDiTT2I", PIXELDIT, channels=3, patch=4),
    "Ideogram4": Family("Ideogram4", IDEOGRAM, channels=128, patch=1, extras=masked),
    "PixArtSigma": Family("PixArtSigma", PIXART, channels=4, grid=(20, 16), odd=False),
    "HunyuanDiT": Family("HunyuanDiT", HYDIT, channels=4, extras=two_texts, words=77),
    "ErnieImage": Family("ErnieImage", ERNIE, channels=128, patch=1),
}
REFUSED: dict[str, Family] = {
    "Wan2.1": Family("WAN21_T2V", WAN, frames=True),
    "Wan2.2-5B": Family("WAN22_T2V", WAN | dict(in_dim=48, out_dim=48), channels=48, frames=True),
    "HunyuanVideo1.5": Family(
        "HunyuanVideo15", HUNYUAN_VIDEO, channels=32, patch=1, frames=True, extras=unpooled
    ),
    "LTXV": Family("LTXV", LTXV, channels=128, patch=1, frames=True, extras=masked),
    "CosmosVideo": Family("CosmosT2V", COSMOS, frames=True, extras=masked, odd=False),
    "HunyuanImage21Refiner": Family("HunyuanImage21Refiner", HUNYUAN_VIDEO),
    "CosmosI2VPredict2": Family("CosmosI2VPredict2", PREDICT | {"in_channels": 17}, frames=True),
    "Kandinsky5": Family("Kandinsky5", KANDINSKY, frames=True, extras=pooled, odd=False),
}
FAMILIES = READ | REFUSED


def build(family: Family) -> Any:
    """A fresh ModelPatcher of a family, for tests that change its weights."""
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher

    parent = getattr(comfy.supported_models, family.config)
    small = type(
        parent.__name__, (parent,), {"unet_extra_config": {}}
    )  # its own values would win over ours
    config = small(dict(family.sizes))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu").eval()
    randomise(model.diffusion_model)
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def randomise(network: nn.Module) -> None:
    """Weights of 1 / sqrt(fan-in), norms about 1, small biases; tables of positions are drawn too."""
    tables = [
        (name, table) for name, table in network.named_buffers() if name.endswith("pos_embed")
    ]
    generator = torch.Generator().manual_seed(7)
    added = {id(m.scale) for m in network.modules() if isinstance(m, KreaNorm)}  # to 1, by the host
    for name, values in [*network.named_parameters(), *tables]:
        if (
            "llm_adapter" in name or values.numel() == 0
        ):  # Anima's adapter has one size, and stays out
            continue
        draw = torch.randn(values.shape, generator=generator)
        if values.ndim > 1:
            draw = draw / math.sqrt(values[0].numel())
        else:
            about_zero = name.endswith("bias") or id(values) in added
            draw = 0.2 * draw if about_zero else 1 + 0.2 * draw
        values.data = draw.to(values.dtype)


@cache
def tiny(name: str) -> Any:
    """The family's shared ModelPatcher; clone it to patch it."""
    return build(FAMILIES[name])


def latent(
    name: str, seed: int = 1, size: tuple[int, int] | None = None, pictures: int = 1
) -> Tensor:
    """A picture's latent [b c y x] or [b c 1 y x]; size: its cells (y, x)."""
    family = FAMILIES[name]
    y, x = size or (family.grid[0] * family.patch, family.grid[1] * family.patch)
    return drawn(pictures, *family.shape(y, x), seed=seed)


def prompt(name: str, seed: int = 2, words: int | None = None, **extras: Any) -> list:
    """CONDITIONING of random features, with what the family's text encoder adds."""
    family = FAMILIES[name]
    text = drawn(1, words or family.words, family.width, seed=seed)
    return [[text, family.extras(text) | extras]]


@torch.inference_mode()
def denoised(
    model: Any, noisy: Tensor, positive: list, negative: list | None = None, cfg: float = 1.0
) -> Tensor:
    """The model's denoised picture of one call of the host's guider, at 0.3 of its schedule."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive if negative is None else negative)
    guider.set_cfg(cfg)
    sigmas = torch.tensor(
        [float(model.get_model_object("model_sampling").percent_to_sigma(0.3)), 0.0]
    )
    euler = comfy.samplers.ksampler("euler")
    return guider.sample(noisy, torch.zeros_like(noisy), euler, sigmas, disable_pbar=True, seed=1)


@torch.inference_mode()
def sample(model: Any, name: str, seed: int = 1, steps: int = 3, cfg: float = 3.0, sampler: str = "euler", scheduler: str = "simple",
           positive: list | None = None, negative: list | None = None, start: Tensor | None = None, pictures: int = 1,
           **more: Any) -> Tensor:  # fmt: skip
    """KSampler -> latent samples; `more`: what else KSamplerAdvanced asks for."""
    import nodes

    start = torch.zeros_like(latent(name, pictures=pictures)) if start is None else start
    positive, negative = positive or prompt(name), negative or prompt(name, seed=3)
    return nodes.common_ksampler(
        model, seed, steps, cfg, sampler, scheduler, positive, negative, {"samples": start}, **more
    )[0]["samples"]
