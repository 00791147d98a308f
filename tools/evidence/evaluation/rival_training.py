"""Rivals that are trained on the one photo: textual inversion, and a LoRA by the host's own node.

Steps and rates are what their users take, scaled where the miniature's numbers are other than
Stable Diffusion's; they were chosen on identities of 1000 and up, which no report has.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .rivals import KIB, Concept, timed
from .rows import Row

if TYPE_CHECKING:
    from miniature_host import Studio

    from .personalize import Subject

TOKEN_STEPS, TOKEN_RATE, TOKEN_BATCH = 500, 5e-3, 4
LORA_STEPS, LORA_RATE, RANK = 500, 5e-4, 8
RARE = "sks"  # the word that DreamBooth's users put before the class
PRIOR = 8  # pictures of the class by the model itself, and as many times the photo
PROBES = 32  # noise levels at which a loss is taken before and after
TEMPLATES = ("a photo of a {}", "a picture of a {}", "a {}", "photo of a {}")


def textual_inversion(studio: Studio, row: Row, subject: Subject) -> Concept:
    """A vector in the place of the class word, trained by the network's own loss on the photo."""
    torch, start = studio.torch, time.monotonic()
    steps, rate = row.get("train_steps", TOKEN_STEPS), row.get("train_rate", TOKEN_RATE)
    latent = studio.encode(subject.shown(row)[0])["samples"]
    with torch.inference_mode(False), torch.enable_grad():
        learner = Learner(studio, latent.clone(), subject.word)
        vector = learner.word.clone().requires_grad_(True)
        before = learner.probe(vector)
        optimizer = torch.optim.AdamW([vector], lr=rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        for step in range(steps):
            text = TEMPLATES[step % len(TEMPLATES)]
            loss = learner.loss(vector, text, TOKEN_BATCH, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = learner.probe(vector)
        vector = vector.detach().clone()

    def draw(lines: Sequence[str], seed: int, cfg: float | None) -> Any:
        positive = encoded(
            studio, [tokens(studio.clip, line, subject.word, vector) for line in lines]
        )
        return studio.sample(studio.model, positive, len(lines), seed, cfg)

    kept = vector.numel() * vector.element_size() / KIB
    return Concept(draw, timed(start) | {"kept_kib": kept, "loss_left": after / before})


class Learner:
    """The miniature's network and text encoder, through which a word's vector is trained."""

    def __init__(self, studio: Studio, latent: Any, word: str) -> None:
        """latent: [1 c y x] as the VAE gives it. Called outside of inference mode."""
        import torch
        from comfy.model_management import load_models_gpu

        self.torch, self.clip, self.word_text = torch, studio.clip, word
        patcher = studio.model.clone(force_deepcopy=True)
        load_models_gpu([patcher], force_full_load=True)
        self.model = patcher.model.requires_grad_(False)
        self.text = copy.deepcopy(studio.clip.cond_stage_model).requires_grad_(False)
        self.text.reset_clip_options()
        for (
            part
        ) in self.text.modules():  # the host adds in place to what a norm keeps for its slope
            if isinstance(part, torch.nn.LayerNorm):
                part.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))
        self.latent = self.model.process_latent_in(latent)
        table = self.text.clip_l.transformer.get_input_embeddings().weight
        self.word = table[word_id(studio.clip, word)].float().clone()

    def context(self, vector: Any, template: str) -> Any:
        """A template about the vector -> [1 t c]."""
        line = tokens(self.clip, template.format(self.word_text), self.word_text, vector)
        return self.text.encode_token_weights(line)[0]

    def loss(self, vector: Any, template: str, count: int, generator: Any) -> Any:
        """As noise_error, of the photo under a template about the vector."""
        return noise_error(
            self.model, self.latent, self.context(vector, template), count, generator
        )

    def probe(self, vector: Any) -> float:
        with self.torch.no_grad():
            return probed(self.model, self.latent, self.context(vector, TEMPLATES[0]))


def noise_error(net: Any, latent: Any, context: Any, count: int, generator: Any) -> Any:
    """Mean square error of the noise that the host's network predicts in a latent [1 c y x] (as it
    reads it) at `count` noise levels, under a text [1 t c].
    """
    import torch

    shares = torch.rand(count, generator=generator).tolist()
    sigma = torch.tensor([float(net.model_sampling.percent_to_sigma(share)) for share in shares])
    clean = latent.repeat(count, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=generator)
    wide = sigma.view(-1, 1, 1, 1)
    texts = context.repeat(count, 1, 1)
    denoised = net.apply_model(clean + wide * noise, sigma, c_crossattn=texts)
    return ((denoised - clean) / wide).square().mean()


def probed(net: Any, latent: Any, context: Any) -> float:
    """The noise's error at the same levels and noises whenever it is asked."""
    import torch

    return float(noise_error(net, latent, context, PROBES, torch.Generator().manual_seed(0)))


def loss_of(model: Any, latent: Any, context: Any) -> float:
    """A MODEL's error of the noise in a latent as the VAE gives it, with its LoRAs."""
    from comfy.model_management import load_models_gpu

    load_models_gpu([model], force_full_load=True)
    return probed(model.model, model.model.process_latent_in(latent), context)


def word_id(clip: Any, word: str) -> int:
    """The one token that a word is. ValueError where it is several."""
    ids = [token for token, *_ in clip.tokenize(word)["l"][0]]
    end = ids.index(ids[-1])  # the first of the padding is the end of the text
    if end != 2:
        raise ValueError(
            f"evaluate: {word!r} is {end - 1} tokens, and textual inversion takes one."
        )
    return ids[1]


def tokens(clip: Any, line: str, word: str, vector: Any) -> dict[str, Any]:
    """A line's tokens with a vector [c] in the place of the word, as the host reads embeddings."""
    known = word_id(clip, word)
    return {
        name: [[(vector if t == known else t, *rest) for t, *rest in batch] for batch in batches]
        for name, batches in clip.tokenize(line).items()
    }


def encoded(studio: Studio, lines: Sequence[dict[str, Any]]) -> Any:
    """CONDITIONING of lines of tokens, a picture each."""
    with studio.torch.inference_mode():
        entries = [studio.clip.encode_from_tokens_scheduled(line)[0] for line in lines]
        return [[studio.torch.cat([rows for rows, _ in entries]), entries[0][1]]]


def lora(studio: Studio, row: Row, subject: Subject) -> Concept:
    """DreamBooth as people do it: the host's own Train LoRA on the photo of "a sks cat".

    With prior preservation the model's own pictures of the class stand beside it, one for one.
    """
    from comfy_extras.nodes_train import LoraModelLoader, TrainLoraNode

    start, prior = time.monotonic(), row.get("rival", "none") == "lora with prior"
    latent = studio.encode(subject.shown(row)[0])["samples"]
    texts = [subject.coarse.replace(subject.word, f"{RARE} {subject.word}")]
    if prior:
        pictures = studio.sample(studio.model, studio.prompts([subject.coarse]), PRIOR, 1)
        latent = studio.torch.cat(
            [latent.repeat(PRIOR, 1, 1, 1), studio.encode(pictures)["samples"]]
        )
        texts = texts * PRIOR + [subject.coarse] * PRIOR
    photo, text = latent[:1], plain(studio, texts[0])[0][0]
    with studio.torch.random.fork_rng(devices=[]), studio.torch.inference_mode():
        before = loss_of(studio.model, photo, text)
        studio.torch.manual_seed(1)
        weights = TrainLoraNode.execute(**lora_inputs(studio, row, latent, texts)).result[0]
        model = LoraModelLoader.execute(studio.model, weights, 1.0, False).result[0]
        left = loss_of(model, photo, text) / before

    def draw(lines: Sequence[str], seed: int, cfg: float | None) -> Any:
        named = [re.sub(rf"\b{subject.word}\b", f"{RARE} {subject.word}", line) for line in lines]
        return studio.sample(model, studio.prompts(named), len(named), seed, cfg)

    kept = sum(value.numel() * value.element_size() for value in weights.values()) / KIB
    return Concept(draw, timed(start) | {"kept_kib": kept, "loss_left": left})


def lora_inputs(studio: Studio, row: Row, latent: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Every input of Train LoRA, as the lists that the host gives it."""
    inputs = {
        "model": studio.model,
        "latents": {"samples": latent},
        "batch_size": 1 if len(latent) == 1 else 2,
        "steps": row.get("train_steps", LORA_STEPS),
        "grad_accumulation_steps": 1,
        "learning_rate": row.get("train_rate", LORA_RATE),
        "rank": RANK,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 1,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }
    with studio.torch.inference_mode(False):
        positive = [
            [rows.clone(), dict(more)] for text in texts for rows, more in plain(studio, text)
        ]
    return {name: [value] for name, value in inputs.items()} | {"positive": [positive]}


def plain(studio: Studio, text: str) -> Any:
    return studio.nodes.CLIPTextEncode().encode(studio.clip, text)[0]
