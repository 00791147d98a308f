"""Trains the UNet and the text encoder together on latents of renderings (eps prediction, Ho et al. 2020, eq. 14).

Two things differ from the plain recipe, both to make 4 M parameters on a CPU behave like a large model in what the
methods need: min-SNR weights (Hang et al. 2023, gamma 5), and a small loss that pulls the class word's attention map on
the 8 x 8 grid towards the subject's true mask, which large models learn from much more data by themselves.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import training_set
from .denoiser import MASK_LAYERS, Attention, build_text, build_unet, load_tokenizer, schedule
from .latents import latents_of
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
MASK_GRID = 8
MASK_WEIGHT = 0.01
MIN_SNR = 5.0
DECAY = 0.998  # of the averaged weights


def vocabulary(host: Path) -> tuple[dict[str, int], Tensor, Tensor]:
    """Every caption's row, token rows [captions 77] renumbered from 0, and the token number of each renumbered row.

    Rows 0 and 1 are the start and the end token.
    """
    captions = all_captions()
    tokens = load_tokenizer(host)(captions)
    known = torch.cat(
        (torch.tensor([49406, 49407]), tokens[(tokens != 49406) & (tokens != 49407)].unique())
    )
    renumber = torch.zeros(49408, dtype=torch.long)
    renumber[known] = torch.arange(len(known))
    return {text: row for row, text in enumerate(captions)}, renumber[tokens], known


def mask_loss(maps: dict[tuple[str, int], Tensor], word: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy between where the class word is looked at and where the subject is, mean over the mask layers.

    maps: {layer: [b n w]}, word: column of the class word [b] (0 where the caption has none: such rows do not count),
    target: mask coverage [b n] in 0..1.
    """
    rows = word.nonzero()[:, 0]
    return location_loss([maps[layer][rows, :, word[rows]] for layer in MASK_LAYERS], target[rows])


def train_unet(
    run: Run, host: Path, steps: int, batch: int = 24, peak: float = 2.2e-3, count: int = 16_000
) -> None:
    """Resumes from unet.pt in the run's folder. `batch` is per worker; `steps` may be changed on resuming: the rate follows."""
    path = run.folder / "unet.pt"
    torch.manual_seed(run.seed)
    rows, tokens, known = vocabulary(host)
    unet, text = build_unet(host).to(run.device), build_text(len(known)).to(run.device)
    both = nn.ModuleDict({"unet": unet, "text": text})
    matrices = [
        p
        for n, p in unet.named_parameters()
        if p.ndim > 1 and not n.startswith(("input_blocks.0.", "out.", "time_embed."))
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in both.parameters() if id(p) not in chosen]
    optimizers = build_optimizers(matrices, others, peak, run)
    average, state = resume(path, both, optimizers, run)
    start = state["step"] if state else 0
    latents = latents_of(run, count)
    spread = spread_of(latents, state, run)
    everything = training_set(run.folder, run.renderings)
    seeds = np.arange(count)[run.rank :: run.workers]
    masks = (
        F.avg_pool2d(
            torch.from_numpy(everything.masks[seeds]).unsqueeze(1).float(), 128 // MASK_GRID
        )
        .flatten(1)
        .half()
    )
    labels = everything.labels[seeds]
    del everything
    alphas, attention = schedule().to(run.device), Attention()
    options = attention.options()
    class_tokens = torch.tensor([int(tokens[rows[f"a {name}"], 2]) for name in CLASSES])
    began, totals = time.monotonic(), np.zeros(2)
    for step in range(start, steps):
        draw = torch.Generator().manual_seed((run.seed << 40) + step * run.workers + run.rank)
        index = torch.randint(len(latents), (batch,), generator=draw)
        clean = latents[index].float() / spread
        words = [
            caption(CLASSES[labels[i, 0]], SCENES[labels[i, 1]], int(seed))
            for i, seed in zip(
                index.tolist(),
                torch.randint(1 << 30, (batch,), generator=draw).tolist(),
                strict=True,
            )
        ]
        chosen_rows, back = torch.tensor([rows[text_] for text_ in words]).unique(
            return_inverse=True
        )
        step_tokens = tokens[chosen_rows]
        t = (
            ((torch.arange(batch) + torch.rand(batch, generator=draw)) / batch * 1000)
            .long()
            .clamp(max=999)
        )
        noise = torch.randn(clean.shape, generator=draw)
        alpha = alphas[t][:, None, None, None]
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        is_class = torch.isin(step_tokens, class_tokens)
        word = torch.where(is_class.any(1), is_class.int().argmax(1), 0)[back]
        with mixed(run.device):
            context = text(input_ids=step_tokens).last_hidden_state[back]
            predicted = unet(noised, t, context=context, transformer_options=options).float()
        snr = alphas[t] / (1 - alphas[t])
        squared = (predicted - noise).square().mean((1, 2, 3))
        plain = (squared * snr.clamp(max=MIN_SNR) / snr).mean()
        located = mask_loss(attention.maps, word, masks[index].float())
        both.zero_grad(set_to_none=True)
        (plain + MASK_WEIGHT * located).backward()
        average_gradients([*matrices, *others], run.workers)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        advance(optimizers, rate(step, steps, peak))
        follow(average, both, step, DECAY)
        totals += (float(squared.detach().mean()), float(located.detach()))
        if (step + 1) % 50 == 0 and run.rank == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            log.info(
                "unet %d/%d eps %.4f mask %.3f %.3f s/step",
                step + 1,
                steps,
                *(totals / 50),
                seconds,
            )
            totals[:] = 0
        if ((step + 1) % 200 == 0 or step + 1 == steps) and run.rank == 0:
            save(
                path,
                {
                    "model": both.state_dict(),
                    "average": average,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": step + 1,
                    "spread": spread,
                    "tokens": known,
                    "seed": run.seed,
                    "losses": (float(squared.detach().mean()), float(located.detach())),
                },
            )
