"""Noise levels foreseen: what a sampler will ask for, so that no step waits for the device to say
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.k_diffusion.sampling
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...models.story.story import Story
from .model import KEY

# Their n-th question is at the n-th sigma, and what they draw they draw from their seed:
# comfy/k_diffusion/sampling.py
_IN_ORDER = {
    getattr(comfy.k_diffusion.sampling, name, None)
    for name in (
        "sample_euler",
        "sample_euler_ancestral",
        "sample_dpmpp_2m",
        "sample_dpmpp_2m_sde",
        "sample_dpmpp_3m_sde",
        "sample_lcm",
        "sample_ddpm",
        "sample_lms",
        "sample_ipndm",
        "sample_deis",
    )
} - {None}
# levels of their own between the first and the last: comfy/samplers.py, ksampler
LEAPING = frozenset({"dpm_fast", "dpm_adaptive"})


@dataclass
class Foreseen:
    """Which noise levels a sampler will ask for, so that no step waits for the device to read one;
    checked after the run.
    """

    ahead: list[float]  # the next one last
    timesteps: list[Tensor] = field(default_factory=list)  # [1] each
    answered: list[float] = field(default_factory=list)

    def next(self, timestep: Tensor) -> float | None:
        """None: there are more questions than were foreseen."""
        if not self.ahead:
            return None
        self.timesteps.append(timestep.flatten()[:1])
        self.answered.append(self.ahead.pop())
        return self.answered[-1]

    @property
    def right(self) -> bool:
        return not self.timesteps or torch.cat(self.timesteps).tolist() == self.answered


def foresee(
    sampler: Any, sigmas: Sequence[float], story: Story | None, model_options: dict[str, Any]
) -> Foreseen | None:
    """None where only the question itself tells its noise level, or another node may stand between
    the sampler and us.
    """
    # stages compare each question with the last run's anyway
    compared = story and (story.stage or story.recorder)
    known = any(getattr(sampler, "sampler_function", None) is f for f in _IN_ORDER)
    if compared or not known or getattr(sampler, "extra_options", {}).get("s_churn"):
        return None
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    between = any(
        theirs
        for kind in (WrappersMP.PREDICT_NOISE, WrappersMP.SAMPLER_SAMPLE)
        for key, theirs in wrappers.get(kind, {}).items()
        if key != KEY
    )
    return None if between else Foreseen(list(reversed(sigmas)))
