"""How a model mixes a picture with noise: x = x_0 + sigma eps (diffusion), or x = (1 - sigma) x_0 +
sigma eps (a flow).

For one x_0 and one eps both are straight lines in sigma, so the path that the model predicts has
the same derivative, dx/dsigma = (x - D) / sigma (`slope`), with D the denoised picture it answers:
Euler, FireFlow and the sampler are one loop for both. What differs stands in the two classes.
Diffusion: Ho et al. 2020, arXiv 2006.11239; flow: Liu et al. 2022, arXiv 2209.03003.
Axes: b batch, c channels, y x latent grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import ClassVar, Protocol

from torch import Tensor, lerp


class Noise(Protocol):
    """A noise path. Its tensors are [b c y x], its sigmas plain numbers."""

    # where a loop asks that stands at sigma 0, at which (x - D) / sigma is 0/0
    floor: ClassVar[float]
    top: ClassVar[float]  # the largest sigma there is

    def mix(self, x0: Tensor, eps: Tensor, sigma: float) -> Tensor:
        """x at sigma of the picture x0 and unit noise eps."""

    def noise_of(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        """The unit noise in x, given its picture: mix(denoised, noise_of(x, denoised, sigma),
        sigma) is x.
        """

    def relabel(self, x: Tensor, source: float, target: float) -> Tensor:
        """x at sigma `source` as the point of sigma `target` that the network would be shown the
        same for.

        Raises ValueError where there is none.
        """

    def posterior(
        self, x: Tensor, denoised: Tensor, source: float, target: float
    ) -> tuple[Tensor, float]:
        """One DDPM step from sigma source down to target < source: its mean and the unit of its
        noise.
        """


def slope(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """dx/dsigma on the model's path, on either one: eps of a diffusion, the velocity eps - x_0 of a
    flow.
    """
    return (x - denoised) / sigma


def ancestral_step(source: float, target: float) -> tuple[float, float]:
    """DDPM from sigma `source` down to `target` -> (share, spread): x' = D + share * (x - D) +
    spread * noise.

    The posterior q(x' | x, D) of Ho et al. 2020, eq. 6-7, in a diffusion's scale: share = target^2
    / source^2 and spread = target * sqrt(1 - share); the same numbers as sigma_down = target^2 /
    source, sigma_up = spread of ancestral samplers.
    """
    share = (target / source) ** 2
    return share, target * (1 - share) ** 0.5


@dataclass(frozen=True)
class Diffusion:
    """x = x_0 + sigma eps, where sigma = sqrt((1 - abar) / abar): eps and v models."""

    # timestep 0 of SD1.x, 2.x and SDXL, sqrt(0.00085 / 0.99915). Much below it the noise is a
    # difference of nearly equal
    # numbers: at the 1e-4 of flipped sigma lists, float32 leaves it two or three digits.
    floor: ClassVar[float] = 0.0292
    top: ClassVar[float] = inf

    def mix(self, x0: Tensor, eps: Tensor, sigma: float) -> Tensor:
        return x0 + sigma * eps

    def noise_of(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        return slope(x, denoised, sigma)

    def relabel(self, x: Tensor, source: float, target: float) -> Tensor:
        # the network is shown x / sqrt(1 + sigma^2)
        return x * ((1 + target**2) / (1 + source**2)) ** 0.5

    def posterior(
        self, x: Tensor, denoised: Tensor, source: float, target: float
    ) -> tuple[Tensor, float]:
        share, spread = ancestral_step(source, target)
        return lerp(denoised, x, share), spread or source


@dataclass(frozen=True)
class Flow:
    """x = (1 - sigma) x_0 + sigma * scale * eps, sigma from 0 to 1: rectified flows. ValueError
    where scale is none.
    """

    scale: float = 1.0  # deviation of the noise at sigma 1 (HiDream-O1: 8)
    # the lowest sigma of the host's unshifted table. On a mixture's exact flow in float32 the
    # velocity read here is 0.3 % off
    # that of sigma 0, ten times as much at 0.01; below 1e-4 rounding is the greater part, at 1e-6
    # it is 5 %.
    floor: ClassVar[float] = 1e-3
    top: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not (self.scale > 0 and isfinite(self.scale)):
            raise ValueError(f"A flow's noise must have a scale above 0; got {self.scale}.")

    def mix(self, x0: Tensor, eps: Tensor, sigma: float) -> Tensor:
        return (1 - sigma) * x0 + (sigma * self.scale) * eps

    def noise_of(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        return (slope(x, denoised, sigma) + denoised) / self.scale

    def relabel(self, x: Tensor, source: float, target: float) -> Tensor:
        raise ValueError(
            f"A flow's network is shown x itself, so no x of sigma {source:.4g} looks like one of "
            f"{target:.4g}. "
            "Read the velocity where the path stands."
        )

    def posterior(
        self, x: Tensor, denoised: Tensor, source: float, target: float
    ) -> tuple[Tensor, float]:
        # a diffusion's step on x / (1 - sigma), whose sigma is sigma / (1 - sigma), times 1 -
        # target; finite at sigma 1
        inner = (target / source) ** 2 * (1 - source) / (1 - target)
        share = inner * (1 - source) / (1 - target)
        mean = (1 - target) * denoised + inner * (x - (1 - source) * denoised)
        return mean, self.scale * (target * (1 - share) ** 0.5 or source)


DIFFUSION = Diffusion()
