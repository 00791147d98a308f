"""Trains the reader's head for one whole subject on renderings and collages; everything else of the reader stays as it is.

Every eleventh picture has passed an autoencoder, half of these the flow miniature's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .autoencoder import Autoencoder
from .collages import FAULTS, WHOLE, collage, kind_of
from .pack import CHECKPOINT, FLOW_CHECKPOINT, load_autoencoder
from .reader import GRID, Reader, load_reader
from .training import Run, as_pictures, follow, load, mixed, rate, save
from .world import HELD_OUT, world_hash

log = logging.getLogger(__name__)
LATENT_NOISE = 0.15  # of the latents' spread: sampled latents are never exact
SAVE_EVERY = 250
SHIFT = 3  # of 64 pixels, up, down and sideways
Autoencode = Callable[[Tensor], Tensor]  # [b 3 y x] -> [b 3 y x]


def small(images: np.ndarray) -> Tensor:
    """Pictures [b y x 3] at reading size: uint8 [b 3 64 64]."""
    shrunk = F.interpolate(as_pictures(images, torch.device("cpu")), (GRID, GRID), mode="area")
    return (shrunk * 255).round().byte()


@torch.no_grad()
def round_trip(model: Autoencoder, images: np.ndarray, draw: torch.Generator) -> Tensor:
    """Pictures [b y x 3] after an autoencoder, with some noise in the latents, at reading size: uint8 [b 3 64 64]."""
    shown = as_pictures(images, torch.device("cpu")).contiguous(memory_format=torch.channels_last)
    with mixed(torch.device("cpu")):
        latents = model.encode(shown).float()
        share = LATENT_NOISE * torch.rand((len(latents), 1, 1, 1), generator=draw)
        latents = latents + share * latents.std() * torch.randn(latents.shape, generator=draw)
        rebuilt = model.decode(latents.contiguous(memory_format=torch.channels_last)).float()
    rebuilt = F.interpolate(rebuilt, (GRID, GRID), mode="area")
    return (rebuilt * 255).round().byte()


def pictures_of(run: Run, count: int, tripped: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [count 3 64 64] and which are whole, float [count]; the first `tripped` have passed an autoencoder. Made once."""
    path = run.folder / f"collages-{world_hash()}-{count}-{tripped}.pt"
    if not path.exists():
        models = [
            load_autoencoder(file).to(memory_format=torch.channels_last)
            for file in (CHECKPOINT, FLOW_CHECKPOINT)
        ]
        draw, parts, kinds = torch.Generator().manual_seed(run.seed), [], []
        for first in range(0, count, 32):
            kinds += [kind_of(seed) for seed in range(first, min(first + 32, count))]
            images = np.stack([collage(kinds[s], s) for s in range(first, len(kinds))])
            model = models[first // 32 % 2]
            parts.append(round_trip(model, images, draw) if first < tripped else small(images))
        whole = torch.tensor([float(kind in WHOLE) for kind in kinds])
        save(path, {"pictures": torch.cat(parts), "whole": whole})
    state = load(path, torch.device("cpu"))
    return state["pictures"], state["whole"]


def shifted(pictures: Tensor, corner: Sequence[int]) -> Tensor:
    """[b 3 y x] moved by y, x in -SHIFT..SHIFT, counted from 0; the rim is its mirror."""
    (y, x), size = corner, pictures.shape[-1]
    wide = F.pad(pictures, (SHIFT,) * 4, mode="reflect")
    return wide[:, :, y : y + size, x : x + size]


@torch.no_grad()
def verdicts(
    reader: Reader, count: int, autoencode: Autoencode | None = None, first: int = 0
) -> dict[str, float]:
    """The share that the reader takes for what they are, of `count` held-out pictures of every kind; and "balanced".

    Balanced: the mean of the renderings' share and the mean of the faults'; a rendering cut out and laid elsewhere is told beside them.
    """
    figures = {}
    for kind in WHOLE | FAULTS:
        images = np.stack([collage(kind, HELD_OUT + first + n) for n in range(count)])
        parts = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).split(16)
        shown = torch.cat([autoencode(part) if autoencode else part for part in parts])
        said = reader.read(shown.permute(0, 2, 3, 1)).whole > 0.5
        figures[kind] = float((said == (kind in WHOLE)).float().mean())
    right = [np.mean([figures[kind] for kind in FAULTS]), figures["as drawn"]]
    return figures | {"balanced": float(np.mean(right))}


def train_whole(
    run: Run,
    steps: int,
    batch: int = 64,
    peak: float = 2e-3,
    count: int = 36_000,
    tripped: int = 3_200,
) -> Reader:
    """Resumes from whole.pt in the run's folder; the rest of the reader is the shipped one."""
    path = run.folder / "whole.pt"
    torch.manual_seed(run.seed)
    reader, fresh = load_reader(), Reader().whole
    reader.whole = fresh.requires_grad_(True)
    average = {name: value.clone() for name, value in fresh.state_dict().items()}
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=peak, weight_decay=0.02)
    start, state = 0, load(path, run.device)
    if state is not None:
        fresh.load_state_dict(state["raw"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["model"], state["step"]
    pictures, whole = pictures_of(run, count, tripped)
    began, total = time.monotonic(), 0.0
    for step in range(start, steps):
        draw = torch.Generator().manual_seed((run.seed << 42) + step)
        index = torch.randint(count, (batch,), generator=draw)
        shown = pictures[index].float() / 255
        shown = shifted(shown, torch.randint(2 * SHIFT + 1, (2,), generator=draw).tolist())
        shown = shown + 0.02 * torch.randn(shown.shape, generator=draw)
        flip = torch.rand(batch, generator=draw) < 0.5
        shown = torch.where(flip[:, None, None, None], shown.flip(3), shown)
        loss = F.binary_cross_entropy_with_logits(reader(shown)["whole"], whole[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        optimizer.step()
        follow(average, fresh, step, 0.995)
        total += float(loss.detach())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            log.info(
                "whole %d/%d loss %.4f %.3f s/step", step + 1, steps, total / SAVE_EVERY, seconds
            )
            total = 0.0
            state = {"model": average, "raw": fresh.state_dict(), "step": step + 1}
            save(path, state | {"optimizer": optimizer.state_dict()})
    fresh.load_state_dict(average)
    return reader.eval().requires_grad_(False)
