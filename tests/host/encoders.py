"""CLIPs of the host's transformer families: its own tokenizers and cutting code around text models that number their tokens.

A row of the CONDITIONING holds, in its first channel, which token of its encoder it was made of. Tokenizers that come with
weights (Gemma's, Mistral's, GPT-OSS's) have another vocabulary in their place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import comfy.text_encoders.flux
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

FOLDER = Path(comfy.text_encoders.flux.__file__).parent
PILE = FOLDER / "t5_pile_tokenizer" / "tokenizer.model"


class Numbered(nn.Module):
    """In place of a text model: every row holds the number of its token, in each of the layers that are stacked."""

    def __init__(self, width: int = 4, layers: int = 0, masked: bool = False) -> None:
        super().__init__()
        self.width, self.layers, self.masked = width, layers, masked

    def encode_token_weights(self, chunks: list) -> tuple[Any, ...]:
        count = sum(map(len, chunks))
        rows = torch.arange(count).float()[:, None].repeat(1, self.width)
        if self.layers:
            rows = rows.repeat(self.layers, 1, 1)
        mask = {"attention_mask": torch.ones(1, count, dtype=torch.long)}
        return rows[None], torch.zeros(1, self.width), *([mask] if self.masked else [])


@dataclass(frozen=True)
class Kind:
    """A family's text encoder: where its classes are, which of the model's parts are numbered, and where a word stands."""

    module: str
    tokenizer: str
    model: str
    parts: dict[str, Numbered | None]
    cat: tuple[int, ...]  # rows of "cat" in "a photo of a cat on the beach", as measured
    facts: dict[str, Any] = field(default_factory=dict)  # attributes of the model
    reads: str = ""  # the key of the tokens that the rows are made of; "": the only one


def one(name: str, layers: int = 0) -> dict[str, Numbered | None]:
    return {name: Numbered(4, layers, masked=True)}


QWEN = one("qwen25_7b")
SD3 = {"clip_l": Numbered(768), "clip_g": Numbered(1280), "t5xxl": Numbered(4096)}
HIDREAM = {**SD3, "llama": Numbered(4, 3)}
NO_T5, ONLY_T5 = {"t5xxl": None}, {"clip_l": None, "clip_g": None}
MASKED = {"t5_attention_mask": False}

KINDS: dict[str, Kind] = {
    "Flux": Kind("flux", "FluxTokenizer", "FluxClipModel",
                 {"clip_l": Numbered(768), "t5xxl": Numbered()}, (6,), reads="t5xxl"),
    "SD3": Kind("sd3_clip", "SD3Tokenizer", "SD3ClipModel", SD3, (5, 77 + 6), MASKED),
    "SD3 without T5": Kind("sd3_clip", "SD3Tokenizer", "SD3ClipModel", SD3 | NO_T5, (5,), MASKED, "l"),
    "SD3 with T5 alone": Kind("sd3_clip", "SD3Tokenizer", "SD3ClipModel", SD3 | ONLY_T5, (6,), MASKED, "t5xxl"),
    "HiDream": Kind("hidream", "HiDreamTokenizer", "HiDreamTEModel", HIDREAM, (6,), reads="t5xxl"),
    "HiDreamO1": Kind("hidream_o1", "HiDreamO1Tokenizer", "HiDreamO1TE", {}, (7,)),
    "Chroma": Kind("pixart_t5", "PixArtTokenizer", "PixArtT5XXL", one("t5xxl"), (6,)),
    "CosmosPredict2": Kind("cosmos", "CosmosT5Tokenizer", "CosmosT5XXL", one("t5xxl"), (6,)),
    "AuraFlow": Kind("aura_t5", "AuraT5Tokenizer", "AuraT5Model", one("pile_t5xl"), (4,)),
    "Anima": Kind("anima", "AnimaTokenizer", "AnimaTEModel", one("qwen3_06b"), (6,), reads="t5xxl"),
    "QwenImage": Kind("qwen_image", "QwenImageTokenizer", "QwenImageTEModel", QWEN, (4,)),
    "HunyuanImage21": Kind("hunyuan_image", "HunyuanImageTokenizer", "HunyuanImageTEModel", QWEN, (4,), {"byt5_small": None}),
    "Kandinsky5Image": Kind("kandinsky5", "Kandinsky5TokenizerImage", "Kandinsky5TEModel",
                            QWEN | {"clip_l": Numbered(768)}, (4,), reads="qwen25_7b"),
    "LongCatImage": Kind("longcat_image", "LongCatImageTokenizer", "LongCatImageTEModel", QWEN, (4,)),
    "ZImage": Kind("z_image", "ZImageTokenizer", "ZImageTEModel", one("qwen3_4b"), (7,)),
    "Klein": Kind("flux", "KleinTokenizer", "Flux2TEModel", one("qwen3_4b", 3), (7,)),
    "Krea2": Kind("krea2", "Krea2Tokenizer", "Krea2TEModel", one("qwen3vl_4b", 12), (4,)),
    "MageFlow": Kind("mage_flow", "MageFlowTokenizer", "MageFlowTEModel", one("qwen3vl_4b"), (4,)),
    "JoyImage": Kind("joyimage", "JoyImageTokenizer", "JoyImageTEModel", one("qwen3vl_8b"), (6,)),
    "Ideogram4": Kind("ideogram4", "Ideogram4Tokenizer", "Ideogram4TEModel", one("qwen3vl_8b", 13), (7,)),
    "Boogu": Kind("boogu", "BooguTokenizer", "BooguTEModel", one("qwen3vl_8b"), (33,)),
    "Omnigen2": Kind("omnigen2", "Omnigen2Tokenizer", "Omnigen2Model", one("qwen25_3b"), (27,)),
    "HunyuanDiT": Kind("hydit", "HyditTokenizer", "HyditModel",
                       {**one("hydit_clip"), **one("mt5xl")}, (5,), reads="hydit_clip"),
    "ErnieImage": Kind("ernie", "ErnieTokenizer", "ErnieTEModel", one("ministral3_3b"), ()),
    "Lumina2": Kind("lumina2", "LuminaTokenizer", "LuminaModel", one("gemma2_2b"), ()),
    "PixelDiT": Kind("pixeldit", "PixelDiTGemma2Tokenizer", "PixelDiTGemma2TE", one("gemma2_2b"), ()),
    "Flux2": Kind("flux", "Flux2Tokenizer", "Flux2TEModel", one("mistral3_24b", 3), ()),
    "Lens": Kind("gpt_oss", "LensTokenizer", "LensTEModel", {}, ()),
}  # fmt: skip
PADDED = (
    "Flux",
    "SD3",
    "SD3 without T5",
    "SD3 with T5 alone",
    "HiDream",
    "AuraFlow",
    "CosmosPredict2",
    "Klein",
    "LongCatImage",
    "PixelDiT",
    "HunyuanDiT",
)  # short lines are equally long


def qwen_bytes() -> Tensor:
    """Qwen's vocabulary with the marks of the other templates, as a file of tokenizers'."""
    made = Qwen2Tokenizer.from_pretrained(FOLDER / "qwen25_tokenizer").backend_tokenizer
    made.add_special_tokens([*(f"<|{mark}|>" for mark in ("start", "message", "end", "channel")),
                             *(f"[{mark}]" for mark in ("INST", "/INST", "SYSTEM_PROMPT", "/SYSTEM_PROMPT"))])  # fmt: skip
    return torch.tensor(list(made.to_str().encode()), dtype=torch.uint8)


def mistral(data: Any) -> dict[str, Any]:
    """In place of the host's reading of Mistral's file, which newer transformers refuse: Qwen's vocabulary."""
    return {"tokenizer_object": Tokenizer.from_str(bytes(qwen_bytes().tolist()).decode())}


VOCABULARIES: dict[str, Callable[[], dict[str, Any]]] = {
    "Lumina2": lambda: {
        "spiece_model": torch.frombuffer(bytearray(PILE.read_bytes()), dtype=torch.uint8)
    },
    "Lens": lambda: {"tokenizer_json": qwen_bytes()},
}
VOCABULARIES["PixelDiT"] = VOCABULARIES["Lumina2"]
VOCABULARIES["HunyuanDiT"] = lambda: {
    "mt5xl.spiece_model": VOCABULARIES["Lumina2"]()["spiece_model"]
}


def lens_encoder(tokenizer: Any) -> nn.Module:
    """The host's own encoder with a numbered transformer; its cut is as long as the stand-in's template."""
    part = importlib.import_module("comfy.text_encoders.gpt_oss")
    encoder = part.LensGptOssClipModel.__new__(part.LensGptOssClipModel)
    nn.Module.__init__(encoder)
    encoder.selected_layers, encoder._pad_token_id, encoder.execution_device = (0, 1), 0, None
    plain = [t[0] for t in tokenizer.tokenize_with_weights("@")["gpt_oss"][0]]
    encoder.txt_offset = plain.index(tokenizer.gpt_oss.tokenizer("@")["input_ids"][0])

    def transformer(ids: Tensor, **kwargs: Any) -> dict[str, list[Tensor]]:
        return {
            "hidden_states": [torch.arange(ids.shape[1]).float()[None, :, None].repeat(1, 1, 4)] * 2
        }

    encoder.__dict__["transformer"] = transformer
    return encoder


def model_of(name: str, tokenizer: Any) -> Any:
    """The host's text encoder of a family, whose parts are numbered."""
    kind = KINDS[name]
    made = getattr(importlib.import_module(f"comfy.text_encoders.{kind.module}"), kind.model)
    encoder = made.__new__(made)
    nn.Module.__init__(encoder)
    parts = {"gpt_oss": lens_encoder(tokenizer)} if name == "Lens" else kind.parts
    for attribute, value in {**parts, **kind.facts}.items():
        setattr(encoder, attribute, value)
    encoder.clip_name = encoder.clip = next(iter(parts), "")
    return encoder


@cache
def clip(name: str) -> Any:
    """A CLIP as the host's loaders give it, as far as Subject Prompts sees it."""
    kind = KINDS[name]
    part = importlib.import_module(f"comfy.text_encoders.{kind.module}")
    data = VOCABULARIES.get(name, dict)()
    with patch("comfy.text_encoders.flux.load_mistral_tokenizer", mistral):
        tokenizer = getattr(part, kind.tokenizer)(tokenizer_data=data)
    encoder = model_of(name, tokenizer)

    def encode(tokens: dict[str, Any]) -> list:
        cross, pooled, *more = encoder.encode_token_weights(tokens)
        return [[cross, {"pooled_output": pooled, **(more[0] if more else {})}]]

    return SimpleNamespace(tokenize=tokenizer.tokenize_with_weights, tokenizer=tokenizer, cond_stage_model=encoder,
                           encode_from_tokens_scheduled=encode)  # fmt: skip


def tokens(name: str, text: str, key: str) -> list[int]:
    """The numbers of one encoder's tokens of a text, over all chunks."""
    return [token[0] for chunk in clip(name).tokenize(text)[key] for token in chunk]


def spelled(name: str, key: str, ids: list[int]) -> str:
    """The text of some tokens, by the vocabulary's own decoder."""
    every = clip(name).tokenizer
    part = getattr(every, key, None) or getattr(every, f"clip_{key}")
    return part.tokenizer.decode([int(i) for i in ids])
