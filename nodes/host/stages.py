"""ConsiStory's two stages inside one sampler run: one progress bar, no UNet call twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...models.story.plan import NODE, SLACK
from ...models.story.story import Story
from .latents import unframed
from .model import KEY, log


def answering(model_options: Mapping[str, Any]) -> list[Any]:
    """Keys of the other nodes that stand between the sampler and the model, and may answer in its
    place.
    """
    wrappers = (
        model_options.get("transformer_options", {})
        .get("wrappers", {})
        .get(WrappersMP.PREDICT_NOISE, {})
    )
    return [key for key, many in wrappers.items() if key != KEY and many]


class _FirstStageDone(Exception):
    """Leaves the host's sampler where the first stage needs no more of it."""


def begin_keyframes(guider: Any) -> None:
    """Those of hooks only move forward, and a sampler that ran before has moved them."""
    for cond in (cond for conds in guider.conds.values() for cond in conds if cond.get("hooks")):
        for hook in cond["hooks"].hooks:
            hook.initialize_timesteps(guider.inner_model)


def _later(callback: Any, done: int, most: int, both: int) -> Callable[..., Any] | None:
    """A sampler's callback for the one bar of two stages, `done` of whose steps lie behind; most:
    steps of this stage.
    """
    return callback and (
        lambda step, denoised, x, total: callback(done + min(step, most - 1), denoised, x, both)
    )


@dataclass
class Stages:
    """The sampler runs again from the same noise; until the first injection it is handed the first
    stage's answers.

    So every sampler may be used, those with memory and those with noise of their own too. Where it
    asks something else than the first time, the model answers.
    """

    story: Story
    # sigma, x, denoised: before the first injection
    _answers: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)
    _replaying: bool = False
    _calls: int = 0  # questions of the sampler in its last run that came to the story
    # the first injection's noise level was reached: what follows differs in the second stage
    _done: bool = False

    def sample(
        self,
        executor: Callable[..., Tensor],
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        story, second = self.story, len(sigmas) - 1

        def run(extra_args: dict[str, Any], callback: Any, noise: Tensor, silent: bool) -> Tensor:
            return executor(
                guider,
                sigmas,
                extra_args,
                callback,
                noise,
                latent_image,
                denoise_mask,
                silent,
                **kwargs,
            )

        if story.stage:
            first = story.schedule.first_stage
            begun = _later(callback, 0, second, first + second)
            self._first_stage(run, extra_args, begun, noise)
            begin_keyframes(guider)
            callback = _later(callback, first, second, first + second)
        out = run(extra_args, callback, noise, disable_pbar)
        self._finish(extra_args["model_options"], second)
        return out

    def _first_stage(
        self, run: Callable[..., Tensor], extra_args: dict[str, Any], callback: Any, noise: Tensor
    ) -> None:
        """As far as the second one needs it; the draws that it makes are made again in the
        second.
        """
        devices = [noise.device] if noise.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            try:
                run(dict(extra_args), callback, noise.clone(), True)
            except _FirstStageDone:
                pass
        self.story.begin_second_stage()
        self._replaying, self._calls = True, 0

    def _finish(self, model_options: dict[str, Any], steps: int) -> None:
        """The story is told; steps that another node answered before it could be asked are
        named.
        """
        self.story.finish()
        if (
            answering(model_options) and self._calls < steps
        ):  # adaptive samplers may ask less often by themselves
            log.warning(
                "%s: %d of %d steps were answered by another node without the model, so nothing "
                "was shared there. LazyCache does "
                "this: remove it, or let it begin later.",
                NODE,
                steps - self._calls,
                steps,
            )

    def level_of(self, x: Tensor, timestep: Tensor) -> tuple[float, bool | None]:
        """A question's noise level, and whether its picture is that of the next answer, None where
        there is none: read in one wait, and what the story needs beside it too.
        """
        level = timestep.flatten()[:1]
        if level.dtype is torch.float64:
            return float(level), None
        if not self._expects:
            wired = self.story.user_masks is not None
            return float(level) if wired else self.story.words.maps.read_with(level), None
        seen = self._answers[0][1]
        if seen.shape != x.shape:
            return float(level), False
        sigma, equal = torch.cat([level.float(), (seen == x).all()[None]]).tolist()
        return sigma, bool(equal)

    @property
    def _expects(self) -> bool:
        """Whether the question may be one that the first stage answered."""
        return self._replaying and bool(self._answers)

    def replayed(self, sigma: float, x: Tensor, equal: bool | None = None) -> Tensor | None:
        """What the first stage answered to this very question, in its order; None: the model has to
        be asked. equal: as of `level_of`.
        """
        if not self._expects:
            return None
        level, seen, answer = self._answers.pop(0)
        if level == sigma and (torch.equal(seen, x) if equal is None else equal):
            self._record(sigma, x)
            return answer
        self._answers.clear()
        self.story.words.maps.forget(sigma)
        return None

    def answered(self, sigma: float, x: Tensor, denoised: Tensor) -> None:
        self._record(sigma, x)
        self.story.end_step()
        if self.story.stage != 1:
            return
        if (
            sigma > self.story.settings.inject[0] * (1 + SLACK) and not self._done
        ):  # a sampler may ask between two steps
            self._answers.append((sigma, x.clone(), denoised.clone()))
        else:
            self._done = True
        if self.story.first_stage_ends:
            raise _FirstStageDone

    def _record(self, sigma: float, x: Tensor) -> None:
        self._calls += 1
        if self.story.recorder:
            self.story.recorder.latent(sigma, unframed(x))
