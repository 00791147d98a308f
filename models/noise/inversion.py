"""A picture run back to noise, and forth again, on diffusions and on flows (models/noise/path.py).

DDIM: Song et al. 2021, arXiv 2010.02502, eq. 12-14; A inverts its reference so (arXiv 2403.11284,
section 3.1). FireFlow: Deng et al., arXiv 2412.07517. Edit-friendly: Huberman-Spiegelglas et al.,
arXiv 2304.06140; ConsiStory's anchors (arXiv 2402.03286, appendix E). Everything is in the host's
scale: for a diffusion x = x_0 + sigma eps, where sigma = sqrt((1 - abar) / abar) and x = z /
sqrt(abar) for the papers' z. In it a DDIM step is an Euler step, x' = x + (sigma' - sigma) eps (law
I34).
Axes: t steps, b batch, c channels, y x latent grid.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, log
from typing import Any, Literal

import torch
from torch import Tensor

from .path import DIFFUSION, Noise, slope

# (x [b c y x], sigma [b]) -> the denoised x [b c y x]
Denoiser = Callable[[Tensor, Tensor], Tensor]
# (index, total, x the denoiser was asked at, its answer)
OnStep = Callable[[int, int, Tensor, Tensor], None]
# (step, denoised, x), for a progress bar and its preview
Progress = Callable[[int, Tensor, Tensor], None]
# what is done with a loaded model: (denoise, its device, progress) -> whatever it makes
Loop = Callable[[Denoiser, torch.device, Progress], Any]
Label = Literal["target", "source"]

# relative; what a sigma may lose on its way through float32 and still count as the same
SIGMA_SLACK = 1e-5


@dataclass(frozen=True, eq=False)
class InversionTrajectory:
    """The latents of one inverted picture at every noise level, in float32 on the CPU.

    Raises ValueError where the fields do not fit together.
    """

    sigmas: Tensor  # [t+1] ascending, sigmas[0] == 0
    latents: Tensor  # [t+1 b c y x] in the model's latent scale; latents[i] lies at sigmas[i]
    method: str  # how it was made, as DDIM Invert calls it
    prompt: str  # the text the denoiser was given
    model_key: str  # identity of the model with its patches
    schedule: str  # name of the sigma list
    # [t b c y x], edit friendly only; [i] leads from sigmas[i+1] to sigmas[i]
    noise_maps: Tensor | None = None
    noise: Noise = DIFFUSION  # the path that the latents lie on

    def __post_init__(self) -> None:
        for name in ("sigmas", "latents", "noise_maps"):
            x = getattr(self, name)
            if x is None:
                continue
            if x.dtype != torch.float32 or x.device.type != "cpu":
                raise ValueError(
                    f"Inversion trajectory: {name} must be float32 on the CPU; got {x.dtype} on "
                    f"{x.device}."
                )
            if not x.isfinite().all():
                bad = int((~x.isfinite()).sum())
                raise ValueError(
                    f"Inversion trajectory: {bad} of {x.numel()} values of {name} are not finite "
                    f"(NaN or infinite)."
                )
        if self.sigmas.ndim != 1 or len(self.sigmas) < 2:
            raise ValueError(
                f"Inversion trajectory: sigmas must be [t+1] with t >= 1; got "
                f"{list(self.sigmas.shape)}."
            )
        _require_ascending(self.sigmas, "Inversion trajectory")
        require_below_top(self.sigmas, self.noise, "Inversion trajectory")
        if self.latents.ndim != 5 or len(self.latents) != len(self.sigmas):
            raise ValueError(
                f"Inversion trajectory: latents must be [t+1 b c y x] with t+1 = "
                f"{len(self.sigmas)} sigmas; "
                f"got {list(self.latents.shape)}."
            )
        wanted = [len(self.sigmas) - 1, *self.latents.shape[1:]]
        if self.noise_maps is not None and list(self.noise_maps.shape) != wanted:
            raise ValueError(
                f"Inversion trajectory: noise maps must be [t b c y x] = {wanted}; got "
                f"{list(self.noise_maps.shape)}."
            )

    def at(self, sigma: float) -> Tensor:
        """The latent at any sigma from 0 to the last -> [b c y x]; a stored one is returned as it
        is.

        Between two levels, linear in sigma: exact where dx/dsigma (a diffusion's eps, a flow's
        velocity) is constant over the interval, and the path of the inverting Euler step itself.
        (Not for edit-friendly latents: their levels have independent noise, of which a mean has too
        little. Use nearest.) Raises ValueError outside the range.
        """
        known = self.sigmas.tolist()
        if not 0 <= sigma <= known[-1] * (1 + SIGMA_SLACK):
            raise ValueError(
                f"Inversion trajectory: sigma {sigma:.6g} lies outside of the inverted range 0 to "
                f"{known[-1]:.6g}."
            )
        index = self.nearest(sigma, SIGMA_SLACK)
        if index is not None:
            return self.latents[index]
        after = bisect_left(known, sigma)
        share = (sigma - known[after - 1]) / (known[after] - known[after - 1])
        return torch.lerp(self.latents[after - 1], self.latents[after], share)

    def nearest(self, sigma: float, tolerance_log: float) -> int | None:
        """Index of the stored sigma nearest in log sigma, or None if none lies within the tolerance
        (0.01: one per cent).

        Sigma 0 is near itself only.
        """
        if not 0 < sigma < inf:
            return 0 if sigma == 0 else None
        gap, index = min(
            (abs(log(known / sigma)), i) for i, known in enumerate(self.sigmas.tolist()) if i > 0
        )
        return index if gap <= tolerance_log else None


def ddim_invert(
    denoise: Denoiser,
    x0: Tensor,
    sigmas_ascending: Tensor,
    *,
    label: Label = "target",
    on_step: OnStep | None = None,
    evaluate_last: bool = False,
    noise: Noise = DIFFUSION,
) -> Tensor:
    """Run x0 [b c y x] up the sigmas [t+1] (the first is 0) -> latents [t+1 b c y x], of x0's dtype
    and device.

    label "target" reads eps with the noise level it goes to (diffusers' DDIMInverseScheduler; what
    the sampler will see on its way back): the same z = x / sqrt(1 + sigma^2), told to be at the
    target, hence x * sqrt((1 + target^2) / (1 + source^2)). label "source" reads eps at (x_i,
    sigma_i), Euler on the flipped list: the very points that a denoising run over the trajectory
    asks at, so one pass inverts and captures. Its first point is at sigma 0, where eps is 0/0: it
    is asked at the noise path's floor. `evaluate_last` asks once more at the last point, whose
    answer only on_step sees. On a flow "source" is Euler's inversion; "target" does not exist
    there.

    Calls of the denoiser: t, or t + 1 with evaluate_last. on_step(index, total, x asked at,
    denoised) follows each: "source" asks at sigmas[index], "target" at sigmas[index + 1]. Raises
    ValueError if the sigmas do not ascend from 0 or pass the noise path's top, for "target" on a
    flow, or if evaluate_last comes with "target", which never asks at a stored point.
    """
    sigmas = _ladder(sigmas_ascending, x0, noise=noise)
    if label not in ("target", "source"):
        raise ValueError(f'DDIM inversion: label must be "target" or "source"; got {label!r}.')
    if evaluate_last and label == "target":
        raise ValueError(
            'DDIM inversion: evaluate_last needs label "source"; got "target", which asks at no '
            "point of the path."
        )
    total = len(sigmas) - 1 + evaluate_last
    floor = min(noise.floor, sigmas[1])
    slope_at = _slopes(denoise, on_step, total)
    x, latents = x0, [x0]
    for i, (source, target) in enumerate(pairwise(sigmas)):
        if label == "target":
            direction = slope_at(i, noise.relabel(x, source, target), target)
        else:
            direction = slope_at(i, x, source or floor)
        x = x + (target - source) * direction
        latents.append(x)
    if evaluate_last:
        slope_at(total - 1, x, sigmas[-1])
    return torch.stack(latents)


def fireflow_invert(
    denoise: Denoiser,
    x0: Tensor,
    sigmas_ascending: Tensor,
    *,
    on_step: OnStep | None = None,
    noise: Noise,
) -> Tensor:
    """Run x0 [b c y x] up the sigmas [t+1] (the first is 0) -> latents [t+1 b c y x], of x0's dtype
    and device.

    FireFlow (arXiv 2412.07517): the midpoint rule, whose predictor takes the slope of the midpoint
    before instead of
    asking for its own: second order for one call a step and one at the start, at the path's floor.
    It asks at no sigma above the last midpoint, so a flow's last latent, at sigma 1, is finite
    whatever the network says there.

    t + 1 calls; on_step(index, total, x asked at, denoised) follows each: index 0 at (x0, floor),
    index i at the midpoint between sigmas[i-1] and sigmas[i]. Midpoints are not kept, and the
    latents that are kept were never asked at: what a network holds at these cannot be captured in
    the same pass. That needs ddim_invert's "source", or a pass of its own over the latents.
    Raises ValueError if the sigmas do not ascend from 0 or pass the noise path's top.
    """
    sigmas = _ladder(sigmas_ascending, x0, noise=noise)
    slope_at = _slopes(denoise, on_step, len(sigmas))
    x, latents = x0, [x0]
    direction = slope_at(0, x0, min(noise.floor, sigmas[1]))
    for i, (source, target) in enumerate(pairwise(sigmas), 1):
        middle = (source + target) / 2
        direction = slope_at(i, x + (middle - source) * direction, middle)
        x = x + (target - source) * direction
        latents.append(x)
    return torch.stack(latents)


def forward_noise(
    x0: Tensor, sigmas_ascending: Tensor, generator: torch.Generator, *, noise: Noise
) -> Tensor:
    """x0 [b c y x] under one noise at every level -> latents [t+1 b c y x]; no call of a model.

    For models distilled to a few steps, whose path no inversion can follow. One noise for all
    levels: `at` between them is exact, and the level a sampler comes to is the picture's own from
    the level before. `generator` lives where it likes.
    Raises ValueError if the sigmas do not ascend from 0 or pass the noise path's top.
    """
    sigmas = _ladder(sigmas_ascending, x0, noise=noise)
    eps = _drawn(x0, generator)
    return torch.stack([x0, *(noise.mix(x0, eps, sigma) for sigma in sigmas[1:])])


def ddim_sample(
    denoise: Denoiser, x: Tensor, sigmas_descending: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """Run x [b c y x] down the sigmas [t+1] -> [b c y x] at the last of them (0: the picture).

    Song et al. 2021, eq. 12 with no noise, in sigma form: the host's `euler`, and its `ddim` on the
    same sigmas; on a flow too.
    Raises ValueError if the sigmas do not descend.
    """
    sigmas = _ladder(sigmas_descending.flip(0), x, zero_first=False)[::-1]
    for i, (source, target) in enumerate(pairwise(sigmas)):
        denoised = _ask(denoise, x, source)
        if on_step is not None:
            on_step(i, len(sigmas) - 1, x, denoised)
        x = x + (target - source) * (x - denoised) / source if target else denoised
    return x


def edit_friendly_invert(
    denoise: Denoiser,
    x0: Tensor,
    sigmas_ascending: Tensor,
    generator: torch.Generator,
    *,
    on_step: OnStep | None = None,
    noise: Noise = DIFFUSION,
) -> tuple[Tensor, Tensor]:
    """x0 [b c y x], sigmas [t+1] (the first is 0) -> latents [t+1 b c y x], noise maps [t b c y x].

    arXiv 2304.06140, eq. 6 and 5: every level has its own, independent noise, x_i = mix(x_0, eps_i,
    sigma_i), and z solves x_{i-1} = mu(x_i) + spread z; then x_{i-1} is overwritten by that right
    side, so rounding does not pile up. The last step, to sigma 0, has no spread: its map is the
    remainder x_0 - D in units of the sigma it leaves (the paper drops it; zero noise_maps[0] for
    that). Replay with the same denoiser gives back x_0 whatever the maps' size; their statistics,
    and so what an edit keeps, need independent eps (law I35). `generator` lives where it likes; the
    global one is left alone.

    t calls; on_step(index, total, x asked at, denoised) in denoising order, index 0 at the last
    sigma. Raises ValueError if the sigmas do not ascend from 0 or pass the noise path's top.
    """
    sigmas = _ladder(sigmas_ascending, x0, noise=noise)
    total = len(sigmas) - 1
    latents, noise_maps = [x0], []
    for sigma in sigmas[1:]:
        latents.append(noise.mix(x0, _drawn(x0, generator), sigma))
    for i in range(total, 0, -1):
        denoised = _ask(denoise, latents[i], sigmas[i])
        if on_step is not None:
            on_step(total - i, total, latents[i], denoised)
        mean, spread = noise.posterior(latents[i], denoised, sigmas[i], sigmas[i - 1])
        noise_maps.append((latents[i - 1] - mean) / spread)
        latents[i - 1] = mean + spread * noise_maps[-1]
    return torch.stack(latents), torch.stack(noise_maps[::-1])


def edit_friendly_replay(
    denoise: Denoiser,
    x: Tensor,
    sigmas_ascending: Tensor,
    noise_maps: Tensor,
    *,
    start: int | None = None,
    on_step: OnStep | None = None,
    noise: Noise = DIFFUSION,
) -> Tensor:
    """x [b c y x] at sigmas[start] (default: the last), down through the noise maps [t b c y x] ->
    x_0 [b c y x].

    With the inverting denoiser this is the inverted picture; with another (a new prompt,
    references) its edit, closer to the picture the lower `start`. on_step(index, total, x asked at,
    denoised) counts from 0 at `start`. Raises ValueError if the maps do not fit the sigmas or start
    is no level.
    """
    sigmas = _ladder(sigmas_ascending, x, noise=noise)
    levels = len(sigmas) - 1
    start = levels if start is None else start
    if len(noise_maps) != levels or not 0 < start <= levels:
        raise ValueError(
            f"Edit-friendly replay: {levels} steps need {levels} noise maps and a start from 1 to "
            f"{levels}; "
            f"got {len(noise_maps)} maps and start {start}."
        )
    for i in range(start, 0, -1):
        denoised = _ask(denoise, x, sigmas[i])
        if on_step is not None:
            on_step(start - i, start, x, denoised)
        mean, spread = noise.posterior(x, denoised, sigmas[i], sigmas[i - 1])
        x = mean + spread * noise_maps[i - 1].to(x)
    return x


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    """Unit noise of like's shape, drawn in float32 where the generator lives."""
    eps = torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return eps.to(like)


def _slopes(
    denoise: Denoiser, on_step: OnStep | None, total: int
) -> Callable[[int, Tensor, float], Tensor]:
    """dx/dsigma as the denoiser has it: (index of the call, x, sigma) -> [b c y x]; on_step hears
    of every call.
    """

    def slope_at(index: int, x: Tensor, sigma: float) -> Tensor:
        denoised = _ask(denoise, x, sigma)
        if on_step is not None:
            on_step(index, total, x, denoised)
        return slope(x, denoised, sigma)

    return slope_at


def _ask(denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
    return denoise(x, x.new_full((x.shape[0],), sigma))


def _ladder(
    sigmas: Tensor, x: Tensor, zero_first: bool = True, noise: Noise = DIFFUSION
) -> Sequence[float]:
    """Ascending sigmas as numbers: read once, so that the loop never waits for the device."""
    if sigmas.ndim != 1 or len(sigmas) < 2 or x.ndim != 4:
        raise ValueError(
            f"Inversion: needs sigmas [t+1] with t >= 1 and a latent [b c y x]; got "
            f"{list(sigmas.shape)} and {list(x.shape)}."
        )
    _require_ascending(sigmas, "Inversion", zero_first)
    require_below_top(sigmas, noise, "Inversion")
    return sigmas.tolist()


def _require_ascending(sigmas: Tensor, who: str, zero_first: bool = True) -> None:
    known = sigmas.tolist()
    if (zero_first and known[0] != 0) or not known[0] >= 0:
        raise ValueError(
            f"{who}: the lowest sigma must be {'0' if zero_first else '0 or more'}; got "
            f"{known[0]:.6g}."
        )
    for low, high in pairwise(known):
        if not low < high:
            raise ValueError(
                f"{who}: from 0 the sigmas must ascend; got {low:.6g} before {high:.6g}."
            )


def require_below_top(sigmas: Tensor, noise: Noise, who: str) -> None:
    """ValueError, begun by `who`, where the last of the ascending sigmas is none of the noise
    path's.
    """
    if float(sigmas[-1]) > noise.top * (1 + SIGMA_SLACK):
        raise ValueError(
            f"{who}: a flow's sigmas go from 0 to {noise.top:g}; got {float(sigmas[-1]):.6g}. "
            "Take the SIGMAS of the model that generates."
        )
