"""The settings of a concept encoder's training (arXiv 2403.11284, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainSettings:
    """The paper's run is batch 2 (it does not say whether on each of its 4 GPUs), rate 1e-5,
    100,000 steps, tower and projections updated (section 3.1).
    """

    steps: int = 100_000
    batch: int = 2  # per process and micro-step
    accumulate: int = 1  # micro-steps per step
    rate: float = 1e-5
    tower_rate: float | None = None  # None: `rate`; 0 leaves the tower as it came
    schedule: str = "constant"  # or cosine, down to 2 % of the rate
    warm_up: int = 0  # steps of rising rate
    # steps over which W_C rises from 1 % to 1 (method.md 2.3: null columns absorb mass)
    weight_warm_up: int = 0
    # arXiv 2308.06721's dropout, so that guidance has something to compare with
    drop_text: float = 0.05
    drop_image: float = 0.05
    drop_both: float = 0.05
    average: float = 0.9999  # decay of the averaged weights; 0 keeps none
    clip: float = 1.0  # greatest norm of a step's gradient
    weight_decay: float = 0.01
    # noise levels are drawn from this share of the schedule up: what a subject is, is decided where
    # it is noisy
    noise_from: float = 0.0
    # eq. (10) as it is; velocity: the same error as one of v, which weighs the noisy levels up
    # (arXiv 2202.00512)
    weighting: str = "plain"
    min_snr: float | None = None  # gamma of arXiv 2303.09556, on top; None for none
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError names the setting, its value and what it may be."""
        for name, fits, remedy in (
            ("steps", self.steps >= 1, "1 or more"),
            ("batch", self.batch >= 1, "1 or more"),
            ("accumulate", self.accumulate >= 1, "1 or more"),
            ("warm_up", self.warm_up >= 0, "0 or more"),
            ("weight_warm_up", self.weight_warm_up >= 0, "0 or more"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("rate", 0 < self.rate < 1, "above 0 and below 1, for instance 1e-5"),
            ("average", 0 <= self.average < 1, "0 to 0.99999"),
            (
                "tower_rate",
                self.tower_rate is None or 0 <= self.tower_rate < 1,
                "0 (frozen tower) to 1",
            ),
            ("schedule", self.schedule in ("constant", "cosine"), "constant or cosine"),
            ("noise_from", 0 <= self.noise_from < 1, "0 (every level) to below 1"),
            ("weighting", self.weighting in ("plain", "velocity"), "plain or velocity"),
            (
                "drop_text",
                min(self.drop_text, self.drop_image, self.drop_both) >= 0
                and self.drop_text + self.drop_image + self.drop_both < 1,
                "0 or more, and below 1 together with drop_image and drop_both",
            ),
            ("clip", self.clip > 0, "above 0"),
            ("min_snr", self.min_snr is None or self.min_snr > 0, "above 0, or none"),
        ):
            if not fits:
                raise ValueError(f"training: {name} is {getattr(self, name)}; it must be {remedy}.")

    def rate_at(self, step: int) -> float:
        """Share of the rate at a step."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warm_up) / max(self.steps - self.warm_up, 1)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def weight_at(self, step: int) -> float:
        """W_C at a step."""
        return 1.0 if step >= self.weight_warm_up else 0.01 ** (1 - step / self.weight_warm_up)
