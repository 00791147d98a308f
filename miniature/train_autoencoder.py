"""Trains the TAESD-layout autoencoder on crops of renderings; later only its decoder, against a frozen encoder."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .autoencoder import LATENT_CHANNELS, Autoencoder, psnr
from .data import held_out, training_set
from .latents import latents_of
from .muon import Muon
from .training import Run, advance, as_pictures, average_gradients, follow, load, mixed, rate, save

log = logging.getLogger(__name__)
CROP = 64  # pixels
NOISE = (
    0.06,
    0.03,
    0.01,
)  # spread of the noise in the latents at first, at last, and when the decoder is tuned
WHOLE = 4  # pictures per step when the decoder is tuned
LATENTS = 16_000  # renderings whose latents are kept
DECAY = 0.998  # of the averaged weights when the decoder is tuned
MOMENTS = 0.02  # weight that keeps every latent channel at mean 0 and spread 1


@torch.no_grad()
def held_out_psnr(model: Autoencoder, device: torch.device, count: int = 64) -> float:
    """Mean PSNR in dB over renderings that no training saw, in float32."""
    pictures = as_pictures(held_out(count).images, device)
    return float(
        torch.cat(
            [psnr(model.decode(model.encode(part)), part) for part in pictures.split(16)]
        ).mean()
    )


def _crops(images: np.ndarray, batch: int, draw: torch.Generator, run: Run) -> Tensor:
    """Random crops [b 3 64 64] in 0..1."""
    index = torch.randint(len(images), (batch,), generator=draw)
    corner = torch.randint(128 - CROP + 1, (batch, 2), generator=draw)
    crops = [
        images[i, y : y + CROP, x : x + CROP]
        for i, (y, x) in zip(index.tolist(), corner.tolist(), strict=True)
    ]
    return as_pictures(np.stack(crops), run.device)


def _whole(
    images: np.ndarray, known: Tensor, draw: torch.Generator, run: Run
) -> tuple[Tensor, Tensor]:
    """Crops of 12 x 12 latents and their pixels: the encoder has seen the whole picture, as it will in use."""
    index = torch.randint(len(images), (WHOLE,), generator=draw).tolist()
    y, x = torch.randint(0, 5, (2,), generator=draw).tolist()
    pixels = as_pictures(images[index][:, 8 * y : 8 * y + 96, 8 * x : 8 * x + 96], run.device)
    return pixels, known[index][:, :, y : y + 12, x : x + 12].float().to(run.device)


def train_autoencoder(
    run: Run,
    steps: int,
    batch: int = 8,
    peak: float = 1e-3,
    decoder_only: bool = False,
    channels: int = LATENT_CHANNELS,
    name: str = "",
) -> Autoencoder:
    """Resumes from autoencoder.pt (decoder.pt when only the decoder is tuned) in the run's folder if it is there.

    With `decoder_only` the encoder, and with it every latent that the network has learnt, stays as autoencoder.pt holds it.
    channels: of its latents; name: before the names of its files.
    """
    path = run.folder / f"{name}{'decoder' if decoder_only else 'autoencoder'}.pt"
    torch.manual_seed(run.seed)
    model = _begin(run, decoder_only, channels, name)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = _optimizers(trained, peak, run)
    average, start = _resume(path, model, optimizers, run)
    images = training_set(run.folder, run.renderings).images
    known = latents_of(run, min(LATENTS, run.renderings), name) if decoder_only else None
    images = images[run.rank : LATENTS : run.workers] if decoder_only else images
    began, total = time.monotonic(), 0.0
    for step in range(start, steps):
        draw = torch.Generator().manual_seed((run.seed << 40) + step * run.workers + run.rank)
        if decoder_only:
            pictures, latents = _whole(images, known, draw, run)
        else:
            pictures, latents = _crops(images, batch, draw, run), None
        with mixed(run.device):
            shape = (len(pictures), channels, pictures.shape[2] // 8, pictures.shape[3] // 8)
            noise = torch.randn(shape, generator=draw).to(run.device)
            noise = _spread(step, steps, decoder_only) * noise
            if decoder_only:
                rebuilt = model.taesd_decoder(latents + noise).float()
            else:
                latents, rebuilt = model.coarse(pictures, noise)
        loss, squared, moments = _losses(rebuilt, pictures, latents, decoder_only)
        model.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(trained, run.workers)
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        advance(optimizers, rate(step, steps, peak))
        follow(average, model, step, DECAY if decoder_only else 0.0)
        total += squared.item()
        if (step + 1) % 100 == 0 and run.rank == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            facts = name, step + 1, steps, total / 100, moments.item(), seconds
            log.info("%sautoencoder %d/%d squared %.5f moments %.3f %.3f s/step", *facts)
            total = 0.0
        if ((step + 1) % 500 == 0 or step + 1 == steps) and run.rank == 0:
            _keep(path, model, average, optimizers, step + 1)
            judge = Autoencoder(channels).to(run.device)
            judge.load_state_dict(average)
            log.info("held-out PSNR %.2f dB", held_out_psnr(judge, run.device))
    return model


def _begin(run: Run, decoder_only: bool, channels: int, name: str) -> Autoencoder:
    """The network before its first step, with what does not learn frozen."""
    model = Autoencoder(channels).to(run.device, memory_format=torch.channels_last)
    if decoder_only:
        model.load_state_dict(load(run.folder / f"{name}autoencoder.pt", run.device)["model"])
        model.taesd_encoder.requires_grad_(False)
        return model
    first = training_set(run.folder, run.renderings).images[:200]
    model.start_from_principal_components(as_pictures(first, run.device))
    # the identity until the decoder is tuned
    for block in (model.taesd_encoder[1], model.taesd_decoder[-2]):
        block.requires_grad_(False)
    return model


def _optimizers(trained: list[Tensor], peak: float, run: Run) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions between wide layers, AdamW for the rest."""
    matrices = [p for p in trained if p.ndim == 4 and min(p.shape[:2]) > 8]
    chosen = {id(p) for p in matrices}
    others = [p for p in trained if id(p) not in chosen]
    return [
        Muon(matrices, lr=peak, weight_decay=0.0, rank=run.rank, workers=run.workers),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def _resume(
    path: Path, model: Autoencoder, optimizers: list[torch.optim.Optimizer], run: Run
) -> tuple[dict[str, Tensor], int]:
    """Put a saved state back, where there is one -> averaged weights, steps done. ValueError for one without its optimizers."""
    state = load(path, run.device)
    if state is None:
        return {name: value.clone() for name, value in model.state_dict().items()}, 0
    if "optimizers" not in state:
        raise ValueError(
            f"{path.name} holds the shipped autoencoder, which came without its optimizers. To train one from the start, "
            "name another folder."
        )
    model.load_state_dict(state["raw"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["model"], state["step"]


def _spread(step: int, steps: int, decoder_only: bool) -> float:
    """Of the noise that the decoder has to bear in its latents."""
    if decoder_only:
        return NOISE[2]
    return NOISE[0] + (NOISE[1] - NOISE[0]) * min(step / (0.7 * steps), 1)


def _losses(
    rebuilt: Tensor, pictures: Tensor, latents: Tensor, decoder_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What is minimised, its squared part, and how far the latents' moments are from 0 and 1."""
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    moments = mean.square().mean() + (deviation - 1).square().mean()
    squared, absolute = F.mse_loss(rebuilt, pictures), F.l1_loss(rebuilt, pictures)
    loss = squared * 4 + (0 if decoder_only else absolute * 0.25 + MOMENTS * moments)
    return loss, squared, moments


def _keep(
    path: Path,
    model: Autoencoder,
    average: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    step: int,
) -> None:
    state = {
        "model": average,
        "raw": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
    }
    save(path, state)
