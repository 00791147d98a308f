"""A CLIP for tests of text: the host's tokenizers and text encoder with one narrow layer of random weights."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import torch
from kindred.models.subject.words import Piece
from kindred.nodes.host.tokens import readers_of

WIDTH = 32


class TinyText(comfy.sd1_clip.SDClipModel):
    """The host's CLIP text model with one narrow layer."""

    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(
            device=device,
            dtype=dtype,
            return_projected_pooled=False,
            model_options=model_options,
            textmodel_json_config={
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "hidden_act": "quick_gelu",
                "max_position_embeddings": 77,
                "eos_token_id": 49407,
                "projection_dim": WIDTH,
                "layer_norm_eps": 1e-5,
            },
        )


class TinyClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(
            device=device, dtype=dtype, model_options=model_options, clip_model=TinyText
        )


@cache
def clip():
    """A CLIP as CheckpointLoaderSimple gives it: real tokenizer, random text model."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, TinyClip)
    made = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    generator = torch.Generator().manual_seed(0)
    for name, p in made.cond_stage_model.named_parameters():
        p.data = (
            torch.randn(p.shape, generator=generator) * 0.3
            if p.ndim > 1
            else torch.full(p.shape, float(name.endswith("weight")))
        )
    return made


@cache
def tokenizer(kind: str):
    """Only the words: what a reader of tokens needs of a CLIP."""
    made = {"sd1": comfy.sd1_clip.SD1Tokenizer, "sdxl": comfy.sdxl_clip.SDXLTokenizer}[kind]()
    return SimpleNamespace(tokenize=made.tokenize_with_weights, tokenizer=made)


def pieces_of(clip, text: str) -> tuple[Piece, ...]:
    """A text's tokens as CLIP's vocabulary spells them, counted over all chunks, without start, end and padding."""
    (reader,) = readers_of(clip)
    return reader(text).pieces
