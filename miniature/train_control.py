"""Trains the miniature's ControlNet on silhouettes, the UNet and the text encoder frozen as they are shipped.

Zhang et al. 2023 (arXiv 2302.05543, section 3): a copy of the encoder whose outputs enter through zero convolutions, captions dropped
in part so that the hint alone says enough. Two things differ: only a low-rank update of the copy is learnt, and errors are those of v,
with noise levels drawn towards the upper end, because a silhouette is decided there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .control import LowRank, build_network, control, encoder_of, hint_of, whole_weights
from .data import Renderings, held_out, training_set
from .denoiser import Attention, schedule
from .latents import latents_of
from .measure import Miniature, open_miniature
from .training import Run, follow, load, mixed, rate, save
from .world import CLASSES, SCENES, all_captions, caption

log = logging.getLogger(__name__)
DECAY = 0.99  # of the averaged weights
DROPPED = 0.2  # share of captions emptied, beside the tenth that the world itself leaves empty
SAVED = 100  # steps between states


class Lesson:
    """Draws batches and judges a network's answers on the frozen UNet; the same step gives the same batch."""

    def __init__(
        self,
        model: Miniature,
        network: nn.Module,
        latents: Tensor,
        masks: np.ndarray,
        labels: np.ndarray,
        seed: int,
    ) -> None:
        self.model, self.network, self.seed = model, network, seed
        self.latents, self.masks, self.labels = (
            latents,
            masks,
            labels,
        )  # [b 8 y x] of unit spread, [b 8y 8x], [b 4]
        self.alphas, self.attention = schedule(), Attention().options()
        captions = all_captions()
        with torch.no_grad():
            self.rows, self.contexts = (
                {text: row for row, text in enumerate(captions)},
                model.context(captions),
            )

    def batch(self, step: int, size: int) -> tuple[Tensor, ...]:
        """Clean latents, hints, contexts, timesteps and noise of one step."""
        draw = torch.Generator().manual_seed((self.seed << 44) + step)
        index = torch.randint(len(self.latents), (size,), generator=draw)
        words = [
            caption(CLASSES[self.labels[i, 0]], SCENES[self.labels[i, 1]], int(seed))
            if keep
            else ""
            for i, seed, keep in zip(
                index.tolist(),
                torch.randint(1 << 30, (size,), generator=draw).tolist(),
                (torch.rand(size, generator=draw) >= DROPPED).tolist(),
                strict=True,
            )
        ]
        even = (torch.arange(size) + torch.rand(size, generator=draw)) / size
        t = (even.sqrt() * 1000).long().clamp(max=999)  # density rises with the noise
        noise = torch.randn((size, *self.latents.shape[1:]), generator=draw)
        context = self.contexts[torch.tensor([self.rows[text] for text in words])]
        return self.latents[index].float(), hint_of(self.masks[index.numpy()]), context, t, noise

    def loss(self, weights: dict[str, Tensor] | None, step: int, size: int) -> Tensor:
        """Mean squared error of v over one batch, with the ControlNet of these weights or, for None, without."""
        clean, hint, context, t, noise = self.batch(step, size)
        alpha = self.alphas[t][:, None, None, None]
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with mixed(torch.device("cpu")):
            added = (
                None
                if weights is None
                else control(self.network, weights, noised, hint, t, context)
            )
            predicted = self.model.unet(
                noised, t, context=context, control=added, transformer_options=self.attention
            ).float()
        return ((predicted - noise).square() / alpha).mean()  # (v' - v)^2 = (eps' - eps)^2 / alpha


def fit(
    path: Path,
    low: LowRank,
    loss_of: Callable[[dict[str, Tensor], int], Tensor],
    steps: int,
    peak: float,
    saved: int = SAVED,
    verdict: Callable[[LowRank], str] | None = None,
) -> LowRank:
    """Minimises loss_of(weights, step); resumes from `path` bit for bit. Returns the averaged weights.

    verdict: says something of the averaged weights whenever a state is saved.
    """
    optimizer = torch.optim.AdamW(low.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    average = {name: value.clone() for name, value in low.state_dict().items()}
    start, state = 0, load(path, torch.device("cpu"))
    if state is not None:
        low.load_state_dict(state["raw"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["model"], state["step"]
    began, total = time.monotonic(), []
    for step in range(start, steps):
        loss = loss_of(low(), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(low.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak, warm_up=50)
        optimizer.step()
        follow(average, low, step, DECAY)
        total.append(float(loss.detach()))
        if (step + 1) % 25 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            log.info(
                "control %d/%d loss %.4f %.2f s/step", step + 1, steps, np.mean(total), seconds
            )
            total.clear()
        if (step + 1) % saved == 0 or step + 1 == steps:
            save(
                path,
                {
                    "model": average,
                    "raw": low.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )
            if verdict is not None:
                log.info("%s", verdict(averaged(low, average)))
    return averaged(low, average)


def averaged(low: LowRank, average: dict[str, Tensor]) -> LowRank:
    """The same network with other values."""
    other = deepcopy(low).requires_grad_(False)
    other.load_state_dict(average)
    return other


def train_control(
    run: Run, host: Path, steps: int, batch: int = 16, peak: float = 2e-3, count: int = 16_000
) -> None:
    """Resumes from control.pt in the run's folder; the shipped checkpoint must have been packed. On the CPU."""
    torch.manual_seed(run.seed)
    model = open_miniature(host)
    model.unet.requires_grad_(False)
    low, network = (
        LowRank(encoder_of(model.unet.state_dict()), whole_weights(run.seed), seed=run.seed),
        build_network(host),
    )
    everything = training_set(run.folder, run.renderings)
    masks, labels = everything.masks[:count].copy(), everything.labels[:count].copy()
    del everything
    lesson = Lesson(
        model, network, latents_of(run, count).cpu() / model.spread, masks, labels, run.seed
    )
    exam = _exam(model, network, held_out(96, offset=20_000), run.seed)
    with torch.no_grad():
        without = float(exam.loss(None, 0, 96))

    @torch.no_grad()
    def verdict(current: LowRank) -> str:
        return f"held-out loss {float(exam.loss(current(), 0, 96)):.4f}, without it {without:.4f}"

    fit(
        run.folder / "control.pt",
        low,
        lambda weights, step: lesson.loss(weights, step, batch),
        steps,
        peak,
        verdict=verdict,
    )


@torch.no_grad()
def _exam(model: Miniature, network: nn.Module, pictures: Renderings, seed: int) -> Lesson:
    latents = model.encode(torch.from_numpy(pictures.images).float() / 255)
    return Lesson(model, network, latents, pictures.masks, pictures.labels, seed + 1)
