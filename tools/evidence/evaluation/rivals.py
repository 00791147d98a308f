"""What people would use instead of the pack: img2img, reference-only, textual inversion, a LoRA.

Each as its users do it, with the host's own nodes wherever it has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .pixels import as_png
from .rows import Row

if TYPE_CHECKING:
    from miniature_host import Studio

    from .personalize import Subject

KIB = 1024
Draw = Callable[[Sequence[str], int, "float | None"], Any]  # prompts, seed, cfg -> [b y x 3]


@dataclass(frozen=True)
class Concept:
    """What a rival makes of a photo once: how it draws, and what is known of it."""

    draw: Draw
    figures: Mapping[str, float]


def concept(studio: Studio, row: Row, subject: Subject) -> Concept:
    """The row's rival on the photo that the row reads."""
    from . import rival_training

    makers = {
        "img2img": img2img,
        "reference-only": reference_only,
        "textual inversion": rival_training.textual_inversion,
        "lora": rival_training.lora,
        "lora with prior": rival_training.lora,
    }
    return makers[row.get("rival", "none")](studio, row, subject)


def img2img(studio: Studio, row: Row, subject: Subject) -> Concept:
    """The photo, noised to a share of the noise levels, and sampled from there."""
    photo, share = subject.shown(row)[0], row.get("denoise", 0.5)

    def draw(lines: Sequence[str], seed: int, cfg: float | None) -> Any:
        latent = {"samples": studio.encode(photo)["samples"].repeat(len(lines), 1, 1, 1)}
        positive = studio.prompts(lines, subject.word)
        return studio.sample(studio.model, positive, len(lines), seed, cfg, latent, share)

    return Concept(draw, {"kept_kib": len(as_png(photo)) / KIB})


def reference_only(studio: Studio, row: Row, subject: Subject) -> Concept:
    """The photo first in the batch, noised anew to each step's level, and read by the others.

    As the control "reference_only" is described by its authors: self-attention in all layers reads
    the pictures' own tokens and the photo's; no mask, no inversion. The row's `halves`: both, as
    nodes without a dial for fidelity have it, or cond only, which is the most of that dial.
    """
    photo, torch = subject.shown(row)[0], studio.torch
    both = row.get("halves", "both") == "both"

    def draw(lines: Sequence[str], seed: int, cfg: float | None) -> Any:
        count = len(lines)
        first = studio.encode(photo)["samples"]
        noised = torch.ones(count + 1, 1, *first.shape[2:])
        noised[0] = 0  # the host keeps what is masked as it is, at each step's own noise
        latent = {"samples": torch.cat([first, studio.blank(count)]), "noise_mask": noised}
        positive = studio.prompts([subject.coarse, *lines], subject.word)
        model = reading_the_first(studio.model, count, both)
        return studio.sample(model, positive, count + 1, seed, cfg, latent)[1:]

    return Concept(draw, {"kept_kib": len(as_png(photo)) / KIB})


def reading_the_first(model: Any, count: int, both: bool = True) -> Any:
    """The MODEL whose self-attention lets `count` pictures read the one before them.

    both: in the half without the prompt too; otherwise a picture reads itself twice there, which
    is what it reads alone.
    """
    import torch

    def patch(q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        # hidden states [b t c], of one half after the other; keys and values are made of them later
        halves = k.view(-1, count + 1, *k.shape[1:])
        first = halves[:, :1].expand_as(halves)
        if not both:
            first = torch.stack([halves[i] if half else first[i] for i, half in kinds(options)])
        read = torch.cat([halves, first], 2).flatten(0, 1)
        return q, read, read

    model = model.clone()
    model.set_model_attn1_patch(patch)
    return model


def kinds(options: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The halves of a batch in order: 0 with the prompt, 1 without, as the host tells them."""
    yield from enumerate(options["cond_or_uncond"])


def timed(start: float) -> dict[str, float]:
    return {"seconds_concept": time.monotonic() - start}
