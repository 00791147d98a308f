"""What a concept encoder does with pictures that were kept out of its training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # the pack is there once the host has loaded it
    import numpy as np
    from kindred.models.concept.draws import Examples
    from kindred.models.concept.training import Trainer

DRAWS = 8  # micro-steps of the validation loss, always the same ones


@torch.no_grad()
def losses_of(trainer: Trainer, examples: Examples, sigmas: int) -> dict[str, float]:
    """Eq. (10) on pictures kept out, always with the same noise, with the concept and without; sigmas: how many the UNet has."""
    from kindred.models.concept.draws import draw
    from kindred.models.concept.training import Trainer

    s = trainer.settings
    clean = replace(s, drop_text=0.0, drop_image=0.0, drop_both=0.0, seed=s.seed + 1)
    judge = Trainer.__new__(Trainer)
    judge.__dict__ |= {**trainer.__dict__, "examples": examples, "forward": trainer.encoder}
    figures = {"loss": 0.0, "plain": 0.0}
    with averaged(trainer):
        for i in range(DRAWS):
            d = draw(clean, examples, sigmas, i)
            for name, weight in (("loss", 1.0), ("plain", 0.0)):
                figures[name] += float(judge.loss(d, weight)) / DRAWS
    return figures


@contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """The averaged weights in the place of the trained ones, where an average is kept."""
    kept = {name: p.detach().clone() for name, p in trainer.trained.items()}
    try:
        for name, p in trainer.trained.items() if trainer.average else ():
            p.data.copy_(trainer.average[name])
        yield
    finally:
        for name, p in trainer.trained.items():
            p.data.copy_(kept[name])


@torch.no_grad()
def draw_subjects(
    model: Any,
    vae: Any,
    encoder: Any,
    examples: Examples,
    prompts: Mapping[str, Any],
    count: int = 4,
    steps: int = 20,
    cfg: float = 4.0,
) -> np.ndarray:
    """uint8 [y x 3]: what the tower saw, the plain picture, the picture with the concept; a column per kept-out subject."""
    import nodes

    inject = nodes.NODE_CLASS_MAPPINGS["KindredCrossAttnDetailInject"]
    columns = []
    for n, i in enumerate([rows[0] for rows in examples.groups.values()][:count]):
        photo = examples.pixels[examples.partner(i, 0.0)].float()[None] / 255
        latent = {"samples": torch.zeros(1, *examples.latents.shape[1:])}
        positive, negative = prompts[examples.prompts[i]], prompts[""]
        drawn = []
        for weight in (0.0, 1.0):
            injected = inject.execute(
                model=model, concept_encoder=encoder, image=photo, weight=weight
            ).result[0]
            samples = nodes.common_ksampler(
                injected, n, steps, cfg, "euler", "normal", positive, negative, latent
            )[0]["samples"]
            drawn.append(vae.decode(samples)[0].clamp(0, 1))
        columns.append(torch.cat((at_side(photo, drawn[0].shape[0]), *drawn)))
    return (torch.cat(columns, 1) * 255).round().byte().cpu().numpy()


def at_side(photo: Tensor, side: int) -> Tensor:
    """[1 y x 3] -> [side side 3]"""
    small = torch.nn.functional.interpolate(photo.movedim(-1, 1), (side, side), mode="area")
    return small[0].movedim(0, -1)
