"""The training pictures, and all that is random in one step: it follows from (seed, step) alone.

Axes: b pictures of a step, c y x latents, n examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .settings import TrainSettings


@dataclass(frozen=True, eq=False)
class Examples:
    """The training pictures: latents [n c y x] in model scale, pixels uint8 [n s s 3] for the
    tower, a prompt each.

    Pictures of one subject share a number in `subjects`: then the tower sees another one of them
    than the UNet has to draw, so that only the subject carries over; a picture alone is its own
    partner, which is the paper's reconstruction.
    """

    latents: Tensor
    pixels: Tensor
    prompts: Sequence[str]
    subjects: Sequence[int]
    groups: Mapping[int, list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        groups: dict[int, list[int]] = {}
        for i, subject in enumerate(self.subjects):
            groups.setdefault(subject, []).append(i)
        object.__setattr__(self, "groups", groups)

    def __len__(self) -> int:
        return len(self.prompts)

    def partner(self, index: int, draw: float) -> int:
        """The picture that the tower sees beside picture `index`; draw in [0, 1)."""
        others = [i for i in self.groups[self.subjects[index]] if i != index]
        return others[int(draw * len(others))] if others else index


@dataclass(frozen=True)
class Draw:
    """All that is random in one micro-step, for this process's b pictures."""

    index: list[int]  # pictures to draw
    partner: list[int]  # pictures the tower sees
    level: Tensor  # [b] into the denoiser's sigmas, uniform, one of b equal strata each
    noise: Tensor  # [b c y x]
    no_text: list[bool]
    no_image: Tensor  # bool [b]


def draw(
    settings: TrainSettings,
    examples: Examples,
    levels: int,
    micro_step: int,
    rank: int = 0,
    processes: int = 1,
) -> Draw:
    """This process's share of the whole step: p processes with batch b are one with p * b."""
    total = settings.batch * processes
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + micro_step) % (1 << 63))
    index = torch.randint(len(examples), (total,), generator=generator).tolist()
    chosen, dropped, offset = torch.rand(3, total, generator=generator)
    share = (torch.randperm(total, generator=generator) + offset) / total
    level = (
        ((settings.noise_from + (1 - settings.noise_from) * share) * levels)
        .long()
        .clamp(max=levels - 1)
    )
    noise = torch.randn(total, *examples.latents.shape[1:], generator=generator)
    own = slice(rank * settings.batch, (rank + 1) * settings.batch)
    text, image = settings.drop_text, settings.drop_text + settings.drop_image
    both = image + settings.drop_both
    dropped = dropped[own]
    partners = [examples.partner(i, float(d)) for i, d in zip(index, chosen)]
    return Draw(
        index[own],
        partners[own],
        level[own],
        noise[own],
        [bool(d < text or image <= d < both) for d in dropped],
        (dropped >= text) & (dropped < both),
    )
