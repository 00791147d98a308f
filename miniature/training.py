"""What the three trainings share: a resumable state file, the rate schedule, a moving average of the weights."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .muon import Muon

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Where and how one training runs."""

    folder: Path  # checkpoints and the rendered set
    device: torch.device
    seed: int = 1
    renderings: int = 24_000
    workers: int = 1  # processes that share one step and average their gradients (gloo); 1 trains in this process
    rank: int = 0
    compiled: bool = False  # the flow's forward pass: needs a C++ compiler


def as_pictures(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [b y x 3] -> float [b 3 y x] in 0..1."""
    return (
        torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255
    )


def mixed(device: torch.device) -> torch.autocast:
    """A context in bfloat16 where a step is quicker in it than in float32: of CPUs those that have
    tiles for it (AMX).
    """
    quick = device.type != "cpu" or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=quick)


def rate(step: int, steps: int, peak: float, warm_up: int = 100, floor: float = 0.02) -> float:
    """Linear warm-up, then half a cosine down to `floor` times the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = min((step - warm_up) / max(steps - warm_up, 1), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def follow(average: dict[str, Tensor], module: nn.Module, step: int, decay: float) -> None:
    """Moves the averaged weights towards the module's; the decay starts low so that early averages forget the start."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, value in module.state_dict().items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value, 1 - decay)


def save(path: Path, state: dict) -> None:
    """Written beside and renamed, so a kill leaves the older file whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load(path: Path, device: torch.device) -> dict | None:
    """A state written by `save`, or None where there is none yet."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def build_optimizers(
    matrices: list[Tensor], others: list[Tensor], peak: float, run: Run
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of a network's blocks, AdamW for the rest."""
    return [
        Muon(matrices, lr=peak, rank=run.rank, workers=run.workers),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def resume(
    path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer], run: Run
) -> tuple[dict[str, Tensor], dict | None]:
    """Put a saved state back, where there is one -> the averaged weights, and the state."""
    average, state = (
        {name: value.clone() for name, value in module.state_dict().items()},
        load(path, run.device),
    )
    if state is not None:
        module.load_state_dict(state["model"])
        average = state["average"]
        if "optimizers" in state:  # shipped weights come without
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
    return average, state


def spread_of(latents: Tensor, state: dict | None, run: Run) -> float:
    """The spread that latents are divided by, the same for all workers: the state's, or the first worker's of its first 2,000."""
    spread = state["spread"] if state is not None else float(latents[:2000].float().std())
    if run.workers > 1:
        shared = torch.tensor([spread])
        torch.distributed.broadcast(shared, 0)
        spread = float(shared)
    return spread


def location_loss(columns: Sequence[Tensor], target: Tensor) -> Tensor:
    """Cross-entropy between where a word is looked at and where its subject is, mean over layers.

    columns: of each layer, how much every position looks at the word [b n]; target: how much of
    each position the subject covers [b n] in 0..1. 0 where no picture names it.
    """
    if not len(target):
        return target.new_zeros(())
    share = target / target.sum(1, keepdim=True)
    losses = []
    for column in columns:
        seen = (column / column.sum(1, keepdim=True)).clamp(min=1e-6).log()
        losses.append((share * (share.clamp(min=1e-6).log() - seen)).sum(1).mean())
    return torch.stack(losses).mean()


def average_gradients(parameters: list[Tensor], workers: int) -> None:
    """Replaces every gradient by its mean over the worker processes."""
    if workers == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= workers
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def advance(optimizers: list[torch.optim.Optimizer], rate_now: float) -> None:
    """One step of all of them at this rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate_now
        optimizer.step()
