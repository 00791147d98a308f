"""Trains the attribute reader on renderings, half of them passed through the autoencoder."""

from __future__ import annotations

import logging
import time
from math import pi

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .autoencoder import Autoencoder
from .data import COLOURS, Renderings, held_out, training_set
from .reader import GRID, HUES, KINDS, MASK_GRID, Reader
from .training import Run, as_pictures, follow, load, mixed, rate, save
from .world import HATS

log = logging.getLogger(__name__)
LATENT_NOISE = 0.15  # sampled latents are never exact


@torch.no_grad()
def _round_trips(run: Run, images: np.ndarray) -> Tensor:
    """Pictures after the autoencoder, with a little noise in the latents, at reading size: uint8 [b 3 64 64]; made once."""
    path = run.folder / f"round-trips-{len(images)}.pt"
    if not path.exists():
        model = Autoencoder().to(run.device, memory_format=torch.channels_last)
        model.load_state_dict(load(run.folder / "autoencoder.pt", run.device)["model"])
        draw, parts = torch.Generator().manual_seed(run.seed), []
        for index in range(0, len(images), 32):
            with mixed(run.device):
                pictures = as_pictures(images[index : index + 32], run.device).contiguous(
                    memory_format=torch.channels_last
                )
                shape = (len(pictures), 8, 16, 16)
                noise = (
                    torch.rand((shape[0], 1, 1, 1), generator=draw)
                    * LATENT_NOISE
                    * torch.randn(shape, generator=draw)
                )
                rebuilt = model.coarse(pictures, noise.to(run.device))[1].clamp(0, 1)
            parts.append(
                (F.interpolate(rebuilt, (GRID, GRID), mode="area") * 255).round().byte().cpu()
            )
        save(path, {"pictures": torch.cat(parts)})
    return load(path, torch.device("cpu"))["pictures"]


def reader_loss(out: dict[str, Tensor], labels: Tensor, colours: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropies of the kinds, squared error of the colours, binary cross-entropy of the mask [b 16 16]."""
    loss = sum(F.cross_entropy(out[kind], labels[:, index]) for index, kind in enumerate(KINDS))
    for index, name in enumerate(HUES):
        angle = colours[:, COLOURS.index(name)] * 2 * pi
        squared = (
            (out["hues"][:, index] - torch.stack((angle.cos(), angle.sin()), 1)).square().sum(1)
        )
        counts = (
            labels[:, 3] != HATS.index("none")
            if name == "hat_hue"
            else torch.ones_like(squared, dtype=torch.bool)
        )
        loss = loss + (squared * counts).mean()
    loss = loss + 4 * F.mse_loss(out["tones"], colours[:, 1:3])
    return loss + F.binary_cross_entropy_with_logits(out["mask"], mask)


@torch.no_grad()
def accuracy(
    reader: Reader, pictures: Renderings, images: Tensor | None = None
) -> dict[str, float]:
    """Share right of every kind, of hat or no hat, and mean absolute errors of the colours, on known pictures.

    `images` [b y x 3] in 0..1 are read instead of the renderings where given (their round trips, say).
    """
    images = torch.from_numpy(pictures.images).float() / 255 if images is None else images
    reading, truth = reader.read(images), torch.from_numpy(pictures.labels)
    figures = {
        kind: float((reading.probabilities[kind].argmax(1) == truth[:, i]).float().mean())
        for i, kind in enumerate(KINDS)
    }
    figures["hat_presence"] = float(
        ((reading.probabilities["hat"].argmax(1) == 0) == (truth[:, 3] == 0)).float().mean()
    )
    for index, name in enumerate(COLOURS):
        apart = reading.colours[name] - torch.from_numpy(pictures.colours[:, index])
        apart = (apart + 0.5) % 1 - 0.5 if name in HUES else apart
        counts = truth[:, 3] != 0 if name == "hat_hue" else torch.ones(len(apart), dtype=torch.bool)
        figures[f"{name}_error"] = float(apart.abs()[counts].mean())
    return figures


def train_reader(
    run: Run,
    steps: int,
    batch: int = 64,
    peak: float = 2e-3,
    tripped: int = 3000,
    count: int = 12_000,
) -> Reader:
    """Resumes from reader.pt in the run's folder."""
    path = run.folder / "reader.pt"
    torch.manual_seed(run.seed)
    reader = Reader().to(run.device)
    average = {name: value.clone() for name, value in reader.state_dict().items()}
    optimizer = torch.optim.AdamW(reader.parameters(), lr=peak, weight_decay=0.02)
    start, state = 0, load(path, run.device)
    if state is not None:
        reader.load_state_dict(state["raw"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["model"], state["step"]
    everything = training_set(run.folder, run.renderings)
    labels, colours = torch.from_numpy(everything.labels), torch.from_numpy(everything.colours)
    masks = F.avg_pool2d(
        torch.from_numpy(everything.masks[:count]).float().unsqueeze(1), 128 // MASK_GRID
    )[:, 0]
    cpu = torch.device("cpu")
    parts = np.array_split(everything.images[:count], 40)
    sharp = torch.cat(
        [F.interpolate(as_pictures(part, cpu), (GRID, GRID), mode="area") for part in parts]
    )
    blurred = _round_trips(run, everything.images[:tripped])
    del everything
    began, total = time.monotonic(), 0.0
    for step in range(start, steps):
        draw = torch.Generator().manual_seed((run.seed << 41) + step)
        half = batch // 2
        index = torch.cat(
            (
                torch.randint(count, (half,), generator=draw),
                torch.randint(tripped, (half,), generator=draw),
            )
        )
        pictures = torch.cat((sharp[index[:half]], blurred[index[half:]].float() / 255))
        pictures = (pictures + 0.02 * torch.randn(pictures.shape, generator=draw)).to(run.device)
        flip = (
            torch.rand(batch, generator=draw) < 0.5
        )  # the world is drawn mirrored as often as not
        pictures = torch.where(flip[:, None, None, None].to(run.device), pictures.flip(3), pictures)
        mask = torch.where(flip[:, None, None], masks[index].flip(2), masks[index]).to(run.device)
        with mixed(run.device):
            out = reader(pictures)
        loss = reader_loss(out, labels[index].to(run.device), colours[index].to(run.device), mask)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        optimizer.step()
        follow(average, reader, step, 0.995)
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            log.info(
                "reader %d/%d loss %.4f %.3f s/step",
                step + 1,
                steps,
                total / 100,
                (time.monotonic() - began) / (step + 1 - start),
            )
            total = 0.0
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(
                path,
                {
                    "model": average,
                    "raw": reader.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )
            judge = Reader()
            judge.load_state_dict(average)
            log.info("held-out %s", accuracy(judge.eval(), held_out(200)))
    return reader
