"""Trains the flow miniature's transformer on latents of renderings: rectified flow (Liu et al. 2022), z_s = (1 - s) x + s noise.

Noise levels are logit-normal (Esser et al. 2024), with mean 0.6 and deviation 1.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch import Tensor

from .data import training_set
from .flow import build_flow, captions_encoded, training, velocity
from .latents import latents_of
from .layout import FLOW
from .training import (
    Run,
    advance,
    average_gradients,
    build_optimizers,
    follow,
    rate,
    resume,
    save,
    spread_of,
)
from .world import CLASSES, SCENES, all_captions, caption

log = logging.getLogger(__name__)
DECAY = 0.998  # of the averaged weights
MEAN, DEVIATION = 0.6, 1.0  # of the logits of the noise levels
SAVE_EVERY = 200
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


def train_flow(
    run: Run, host: Path, steps: int, batch: int = 32, peak: float = 2e-3, count: int = 16_000
) -> None:
    """Resumes from flow-transformer.pt in the run's folder. `batch` is of all workers together."""
    path = run.folder / f"{FLOW}transformer.pt"
    torch.manual_seed(run.seed)
    flow = build_flow(host).to(run.device)
    matrices = [
        p for n, p in flow.named_parameters() if p.ndim > 1 and not n.startswith(AT_THE_RIM)
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in flow.parameters() if id(p) not in chosen]
    optimizers = build_optimizers(matrices, others, peak, run)
    average, state = resume(path, flow, optimizers, run)
    start = state["step"] if state else 0
    captions = all_captions()
    rows = {text: row for row, text in enumerate(captions)}
    context, pooled = (part.to(run.device) for part in captions_encoded(host, captions))
    latents = latents_of(run, count, FLOW)
    spread = spread_of(latents, state, run)
    labels = training_set(run.folder, run.renderings).labels[run.rank : count : run.workers]
    rows_each = batch // run.workers
    began, total = time.monotonic(), 0.0
    for step in range(start, steps):
        draw = torch.Generator().manual_seed((run.seed << 40) + step * run.workers + run.rank)
        index = torch.randint(len(latents), (rows_each,), generator=draw)
        seeds = torch.randint(1 << 30, (rows_each,), generator=draw).tolist()
        drawn = zip(index.tolist(), seeds, strict=True)
        text = torch.tensor(
            [rows[caption(CLASSES[labels[i, 0]], SCENES[labels[i, 1]], seed)] for i, seed in drawn]
        )
        clean = (latents[index].float() / spread).to(run.device)
        noise = torch.randn(clean.shape, generator=draw).to(run.device)
        sigma = noise_levels(rows_each, draw).to(run.device)
        s = sigma[:, None, None, None]
        with training(host), torch.autocast(run.device.type, torch.bfloat16):
            predicted = velocity(
                flow, (1 - s) * clean + s * noise, sigma, context[text], pooled[text]
            ).float()
            loss = (predicted - (noise - clean)).square().mean()
            flow.zero_grad(set_to_none=True)
            loss.backward()
        average_gradients([*matrices, *others], run.workers)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        advance(optimizers, rate(step, steps, peak))
        follow(average, flow, step, DECAY)
        total += float(loss.detach())
        if (step + 1) % 50 == 0 and run.rank == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            log.info("flow %d/%d velocity %.4f %.3f s/step", step + 1, steps, total / 50, seconds)
            total = 0.0
        if ((step + 1) % SAVE_EVERY == 0 or step + 1 == steps) and run.rank == 0:
            state = {
                "model": flow.state_dict(),
                "average": average,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
                "spread": spread,
                "seed": run.seed,
                "loss": float(loss.detach()),
            }
            save(path, state)
