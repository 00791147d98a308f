"""Trains the flow miniature's transformer on latents of renderings: rectified flow (Liu et al. 2022), z_s = (1 - s) x + s noise.

Noise levels are logit-normal (Esser et al. 2024), with mean 0.6 and deviation 1. A small loss pulls
the class word's maps towards the subject's true mask, as in the UNet miniature's training.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import training_set
from .flow import build_flow, captions_encoded, class_rows
from .flow_forward import Forward
from .latents import latents_of
from .layout import FLOW
from .training import (
    Run,
    advance,
    average_gradients,
    build_optimizers,
    follow,
    location_loss,
    mixed,
    rate,
    resume,
    save,
    spread_of,
)
from .world import CLASSES, SCENES, all_captions, caption

log = logging.getLogger(__name__)
DECAY = 0.998  # of the averaged weights
MEAN, DEVIATION = 0.6, 1.0  # of the logits of the noise levels
MASK_WEIGHT = 0.01
SAVE_EVERY = 50
PROGRESS = "flow %d/%d velocity %.4f mask %.3f %.3f s/step"
AT_THE_RIM = (
    "img_in.",
    "txt_in.",
    "time_in.",
    "vector_in.",
    "final_layer.",
)  # what AdamW trains beside norms and biases


def noise_levels(count: int, draw: torch.Generator) -> Tensor:
    """[b] in 0..1, one from each of `count` equal parts of the distribution, in no order."""
    share = (torch.randperm(count, generator=draw) + torch.rand(count, generator=draw)) / count
    return torch.sigmoid(
        MEAN + DEVIATION * torch.special.ndtri(share.double().clamp(1e-6, 1 - 1e-6))
    ).float()


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    clean: Tensor  # latents of spread 1 [b c y x]
    noise: Tensor
    sigma: Tensor  # [b]
    context: Tensor  # [b 77 64]
    pooled: Tensor  # [b 64]
    word: Tensor  # the class word's row of the text [b]; 0: the caption has none
    masks: Tensor  # how much of each token the subject covers [b (y x)]

    @property
    def noised(self) -> Tensor:
        s = self.sigma[:, None, None, None]
        return (1 - s) * self.clean + s * self.noise


class Examples:
    """The renderings of one worker, from which each step draws its own."""

    def __init__(self, run: Run, host: Path, latents: Tensor, spread: float, count: int) -> None:
        """latents [r c y x]: this worker's share of the first `count` renderings."""
        captions = all_captions()
        everything = training_set(run.folder, run.renderings)
        share = slice(run.rank, count, run.workers)
        self.run, self.latents, self.spread = run, latents, spread
        self.labels = everything.labels[share]
        self.masks = covered(everything.masks[share], latents.shape[-1])
        self.rows = {text: row for row, text in enumerate(captions)}
        context, pooled = captions_encoded(host, captions)
        words = class_rows(host, captions)
        self.texts = tuple(part.to(run.device) for part in (context, pooled, words))

    def draw(self, step: int, size: int) -> Batch:
        """The same for the same seed, step and worker."""
        run = self.run
        draw = torch.Generator().manual_seed((run.seed << 40) + step * run.workers + run.rank)
        index = torch.randint(len(self.latents), (size,), generator=draw)
        seeds = torch.randint(1 << 30, (size,), generator=draw).tolist()
        drawn = zip(self.labels[index].tolist(), seeds, strict=True)
        text = [self.rows[caption(CLASSES[c], SCENES[s], seed)] for (c, s, *_), seed in drawn]
        clean = self.latents[index].float() / self.spread
        noise = torch.randn(clean.shape, generator=draw)
        sigma = noise_levels(size, draw)
        moved = (part.to(run.device) for part in (clean, noise, sigma))
        return Batch(
            *moved, *(part[text] for part in self.texts), self.masks[index].float().to(run.device)
        )


def covered(masks: np.ndarray, grid: int) -> Tensor:
    """Subject masks bool [r y x] -> the share of each token that is the subject [r (grid grid)]."""
    parts = [
        F.avg_pool2d(torch.from_numpy(part).unsqueeze(1).float(), masks.shape[-1] // grid)
        for part in np.array_split(masks, max(len(masks) // 1000, 1))
    ]
    return torch.cat(parts).flatten(1).half()


def losses_of(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
    """The velocity's squared error, and how far the class word's maps are from the masks."""
    predicted, maps = forward(batch.noised, batch.sigma, batch.context, batch.pooled, batch.word)
    named = batch.word.nonzero()[:, 0]
    located = location_loss([shown[named] for shown in maps], batch.masks[named])
    return (predicted.float() - (batch.noise - batch.clean)).square().mean(), located


def learners(flow: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What Muon trains, the matrices of the blocks, and what AdamW trains."""
    named = list(flow.named_parameters())
    matrices = [p for n, p in named if p.ndim > 1 and not n.startswith(AT_THE_RIM)]
    chosen = {id(p) for p in matrices}
    return matrices, [p for _, p in named if id(p) not in chosen]


def train_flow(
    run: Run, host: Path, steps: int, batch: int = 32, peak: float = 2e-3, count: int = 16_000
) -> None:
    """Resumes from flow-transformer.pt in the run's folder. `batch` is of all workers together."""
    path = run.folder / f"{FLOW}transformer.pt"
    torch.manual_seed(run.seed)
    flow = build_flow(host).to(run.device)
    matrices, others = learners(flow)
    optimizers = build_optimizers(matrices, others, peak, run)
    average, state = resume(path, flow, optimizers, run)
    start = state["step"] if state else 0
    latents = latents_of(run, count, FLOW)
    spread = spread_of(latents, state, run)
    examples = Examples(run, host, latents, spread, count)
    forward = Forward(flow).compiled() if run.compiled else Forward(flow)
    began, totals = time.monotonic(), np.zeros(2)
    for step in range(start, steps):
        with mixed(run.device):
            losses = losses_of(forward, examples.draw(step, batch // run.workers))
            flow.zero_grad(set_to_none=True)
            (losses[0] + MASK_WEIGHT * losses[1]).backward()
        average_gradients([*matrices, *others], run.workers)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        advance(optimizers, rate(step, steps, peak))
        follow(average, flow, step, DECAY)
        totals += [float(loss.detach()) for loss in losses]
        if run.rank:
            continue
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            log.info(PROGRESS, step + 1, steps, *(totals / 50), seconds)
            totals[:] = 0
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {
                "model": flow.state_dict(),
                "average": average,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
                "spread": spread,
                "seed": run.seed,
                "loss": float(losses[0].detach()),
            }
            save(path, state)
