"""ConsiStory's schedule, subject masks, dropout and share matrix (arXiv 2402.03286);
models/story/story.py puts them to work.

Axes: b pictures, w subject words, n tokens of a grid (y x, row by row), l kept tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..network.blocks import BlockId, Grid
from ..network.call import Halves
from ..subject.masks import Threshold

NODE = "ConsiStory Shared Attention"
SLACK = 1e-4  # relative: what a sigma loses between a schedule in float64 and a sampler in float32
# where diffusion features correspond best (arXiv 2306.03881); ConsiStory, appendix B
DIFT_TIMESTEP = 261


@dataclass(frozen=True)
class StorySettings:
    """The hyper-parameters, with the paper's values (method.md 3.2, section 5). Windows are sigmas,
    both ends inside.
    """

    blocks: frozenset[BlockId]  # whose self-attention is shared: the decoder
    map_blocks: tuple[BlockId, ...]  # whose cross-attention locates the subject
    anchors: int = 2  # the first so many pictures are read by all; 0: all pictures by all
    seed: int = 0  # of the dropout
    weight: float = 1.0  # 0: no sharing
    dropout: float = 0.5
    blend: tuple[float, float] = (0.9, 0.818)  # nu at the first and last step of its window
    blend_until: float = 0.0
    injection: float = 0.8  # alpha
    inject: tuple[float, float] = (0.0, 0.0)  # from the greater sigma until the smaller
    halves: Halves = Halves.BOTH
    # the first stage runs to its end, and the masks of its last step are used
    official: bool = False
    align_keys: bool = True  # of inverted photos, appendix E; of a transformer never
    # where text and picture share a softmax: what is shared takes of the text's part too
    dims_text: bool = False
    threshold: Threshold = "otsu"


@dataclass(frozen=True)
class Schedule:
    """What happens at which noise level of one sampler run. sigmas: descending, without the last 0;
    timesteps: theirs.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    settings: StorySettings
    # the run goes down to no noise, so its last level is as near to that of DIFT as it comes: true
    # of transformers alone, whose schedules may be short and end at much noise
    ends: bool = False

    def step(self, sigma: float) -> int:
        """The step a sigma belongs to: samplers also ask between two of them."""
        return max(sum(s >= sigma * (1 - SLACK) for s in self.sigmas) - 1, 0)

    def blend(self, sigma: float) -> float:
        """nu of eq. (4), linear over the steps of its window; 0 outside."""
        first, last = self.settings.blend
        count = sum(s >= self.settings.blend_until * (1 - SLACK) for s in self.sigmas)
        if sigma < self.settings.blend_until * (1 - SLACK) or not count or not first:
            return 0.0
        return first + (last - first) * self.step(sigma) / max(count - 1, 1)

    def injects(self, sigma: float) -> bool:
        high, low = self.settings.inject
        return self.settings.injection > 0 and low * (1 - SLACK) <= sigma <= high * (1 + SLACK)

    @cached_property
    def features_at(self) -> float:
        """The sigma nearest t = 261 in this run."""
        return min(zip(self.sigmas, self.timesteps), key=lambda s: abs(s[1] - DIFT_TIMESTEP))[0]

    @cached_property
    def first_injection(self) -> float | None:
        """Where the second stage leaves the first; None: one stage is enough, or the run ends
        before features can be compared.
        """
        inside = [s for s in self.sigmas if self.injects(s)]
        i = self.sigmas.index(self.features_at)
        gap = self.timesteps[i - 1] - self.timesteps[i] if i else 0.0
        # a run that stops before is still noise where it stops
        reached = self.ends or self.timesteps[i] - DIFT_TIMESTEP <= gap
        before = bool(inside) and self.sigmas.index(inside[0]) < i  # not so where sigmas rise
        return inside[0] if before and inside[0] > self.features_at and reached else None

    @cached_property
    def first_stage(self) -> int:
        """Steps of the first of two stages: as far as the features that pictures are compared by,
        or in the official order all.
        """
        return len(self.sigmas) if self.settings.official else self.step(self.features_at) + 1

    def calls(self, known: bool, steps: int) -> int:
        """Passes of the UNet in so many steps of a sampler that asks once a step; known: the
        subject at the first.
        """
        steps, shares = (
            range(min(steps, len(self.sigmas))),
            self.settings.weight and self.settings.dropout < 1,
        )
        twice = self.first_injection is not None
        levels = (
            [*steps[: self.first_stage], *steps[self.step(self.first_injection) :]]
            if twice
            else steps
        )
        return sum(1 + bool(shares and (known or i) and self.blend(self.sigmas[i])) for i in levels)


def dropped(seed: int, picture: int, step: int, grid: Grid, share: float) -> Tensor:
    """Which tokens of a picture nobody else sees at a step: bool [n], True with probability
    `share`, without rescaling (Q10).

    A function of its arguments alone (I45): neither the batch nor the halves nor any other draw
    changes it.
    """
    digest = hashlib.blake2b(
        repr((seed, picture, step, tuple(grid))).encode(), digest_size=8
    ).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(grid[0] * grid[1], generator=generator) < share


def shared_groups(pictures: int, anchors: int) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
    """((first, last + 1), the pictures they read) for neighbours that read the same: anchors one
    another, the others all anchors.

    anchors 0, or as many as there are pictures: all read all. Nobody reads the others (I23, I24).
    """
    k = min(anchors or pictures, pictures)
    alone = [((i, i + 1), tuple(j for j in range(k) if j != i)) for i in range(k)]
    return alone + ([((k, pictures), tuple(range(k)))] if pictures > k else [])
