"""What people would use instead of shared attention to keep one subject through several pictures.

One seed for all, a description of the subject in every line, a LoRA trained on the first picture,
and StyleAligned (Hertz et al. 2024, arXiv 2312.02133): everything is shared with the first picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .rivals import Concept
from .rows import Row

if TYPE_CHECKING:
    from miniature_host import Studio

    from .story import StorySet

# behind the subject's word: what a person writes who wants one character
DESCRIPTION = "with red fur, blue ears, white stripes and a yellow hat"
DEPTH = {"input": 12, "middle": 1, "output": 12}  # at least as many attention layers as a UNet has


def concept(studio: Studio, row: Row, sets: StorySet, seed: int) -> Concept:
    """How the row's rival draws a set; `seed` is that of its pictures."""
    makers = {
        "one seed": one_seed,
        "description": described,
        "lora": lora_of_the_first,
        "style aligned": aligned,
    }
    return makers[row.get("rival", "none")](studio, row, sets, seed)


def one_seed(studio: Studio, row: Row, sets: StorySet, seed: int) -> Concept:
    """The same noise for all pictures."""

    def draw(lines: Sequence[str], seed: int, cfg: float | None) -> Any:
        latent = {"samples": studio.blank(len(lines)), "batch_index": [0] * len(lines)}
        positive = studio.prompts(lines, sets.word)
        return studio.sample(studio.model, positive, len(lines), seed, cfg, latent)

    return Concept(draw, {})


def described(studio: Studio, row: Row, sets: StorySet, seed: int) -> Concept:
    """The same long description of the subject in every line."""
    subject = f"{sets.word} {DESCRIPTION}"

    def draw(lines: Sequence[str], seed: int, cfg: float | None) -> Any:
        longer = [line.replace(sets.word, subject, 1) for line in lines]
        positive = studio.prompts(longer, sets.word)
        return studio.sample(studio.model, positive, len(lines), seed, cfg)

    return Concept(draw, {})


def lora_of_the_first(studio: Studio, row: Row, sets: StorySet, seed: int) -> Concept:
    """The first line is drawn, a LoRA is trained on that picture, and all lines are drawn with it."""
    from .personalize import Subject
    from .rival_training import lora

    lines = sets.prompts[:1]
    positive = studio.prompts(lines, sets.word)
    first = studio.sample(studio.model, positive, 1, seed, row.get("cfg", None))
    subject = Subject(first, sets.word, f"a photo of a {sets.word}", sets.prompts, sets.judge)
    return lora(studio, row, subject)


def aligned(studio: Studio, row: Row, sets: StorySet, seed: int) -> Concept:
    """StyleAligned with the first picture of the set."""

    def draw(lines: Sequence[str], seed: int, cfg: float | None) -> Any:
        model = reading_the_first_aligned(studio.model, len(lines))
        positive = studio.prompts(lines, sets.word)
        return studio.sample(model, positive, len(lines), seed, cfg)

    return Concept(draw, {})


def reading_the_first_aligned(model: Any, count: int) -> Any:
    """The MODEL whose `count` pictures read, in every self-attention, the first one's tokens and
    their own, after queries and keys were given the first one's mean and deviation.
    """
    from comfy.ldm.modules.attention import optimized_attention

    def attend(q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> Any:
        q, k, v = (part.unflatten(0, (-1, count)) for part in (q, k, v))  # [halves count t c]
        keys, values = beside_the_first(like_the_first(k)), beside_the_first(v)
        parts = (part.flatten(0, 1) for part in (like_the_first(q), keys, values))
        return optimized_attention(*parts, options["n_heads"])

    model = model.clone()
    for room, depth in DEPTH.items():
        for number in range(depth):
            model.set_model_attn1_replace(attend, room, number)
    return model


def like_the_first(x: Any, eps: float = 1e-5) -> Any:
    """AdaIN: every picture's features [halves count t c] with the first one's mean and deviation
    over its tokens.
    """
    mean, deviation = x.mean(2, keepdim=True), (x.var(2, keepdim=True) + eps).sqrt()
    return (x - mean) / deviation * deviation[:, :1] + mean[:, :1]


def beside_the_first(x: Any) -> Any:
    """[halves count t c] -> [halves count 2t c]: the first one's tokens before each one's own."""
    import torch

    return torch.cat([x[:, :1].expand_as(x), x], 2)
