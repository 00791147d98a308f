"""Trains the TAESD-layout autoencoder on crops of renderings; later only its decoder, against a frozen encoder."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .autoencoder import LATENT_CHANNELS, Autoencoder, psnr
from .data import held_out, training_set
from .latents import latents_of
from .muon import Muon
from .training import Run, as_pictures, average_gradients, follow, load, rate, save

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
    model = Autoencoder(channels).to(run.device, memory_format=torch.channels_last)
    if decoder_only:
        model.load_state_dict(load(run.folder / f"{name}autoencoder.pt", run.device)["model"])
        model.taesd_encoder.requires_grad_(False)
    else:
        first = training_set(run.folder, run.renderings).images[:200]
        model.start_from_principal_components(as_pictures(first, run.device))
        for block in (
            model.taesd_encoder[1],
            model.taesd_decoder[-2],
        ):  # the identity until the decoder is tuned
            block.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 4 and min(p.shape[:2]) > 8]
    chosen = {id(p) for p in matrices}
    others = [p for p in trained if id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=peak, weight_decay=0.0, rank=run.rank, workers=run.workers),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    average = {name: value.clone() for name, value in model.state_dict().items()}
    start, state = 0, load(path, run.device)
    if state is not None and "optimizers" not in state:
        raise ValueError(
            f"{path.name} holds the shipped autoencoder, which came without its optimizers. To train one from the start, "
            "name another folder."
        )
    if state is not None:
        model.load_state_dict(state["raw"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average, start = state["model"], state["step"]
    images = training_set(run.folder, run.renderings).images
    known = latents_of(run, min(LATENTS, run.renderings), name) if decoder_only else None
    images = images[run.rank : LATENTS : run.workers] if decoder_only else images
    began, total = time.monotonic(), 0.0
    for step in range(start, steps):
        draw = torch.Generator().manual_seed((run.seed << 40) + step * run.workers + run.rank)
        pictures, latents = (
            _whole(images, known, draw, run)
            if decoder_only
            else (_crops(images, batch, draw, run), None)
        )
        spread = NOISE[0] + (NOISE[1] - NOISE[0]) * min(step / (0.7 * steps), 1)
        spread = NOISE[2] if decoder_only else spread
        with torch.autocast(run.device.type, torch.bfloat16):
            shape = (len(pictures), channels, pictures.shape[2] // 8, pictures.shape[3] // 8)
            noise = spread * torch.randn(shape, generator=draw).to(run.device)
            if decoder_only:
                rebuilt = model.taesd_decoder(latents + noise).float()
            else:
                latents, rebuilt = model.coarse(pictures, noise)
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        moments = mean.square().mean() + (deviation - 1).square().mean()
        squared, absolute = F.mse_loss(rebuilt, pictures), F.l1_loss(rebuilt, pictures)
        loss = squared * 4 + (0 if decoder_only else absolute * 0.25 + MOMENTS * moments)
        model.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(trained, run.workers)
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, peak)
            optimizer.step()
        follow(average, model, step, DECAY if decoder_only else 0.0)
        total += squared.item()
        if (step + 1) % 100 == 0 and run.rank == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            told = name, step + 1, steps, total / 100, moments.item(), seconds
            log.info("%sautoencoder %d/%d squared %.5f moments %.3f %.3f s/step", *told)
            total = 0.0
        if ((step + 1) % 500 == 0 or step + 1 == steps) and run.rank == 0:
            states = [optimizer.state_dict() for optimizer in optimizers]
            save(
                path,
                {
                    "model": average,
                    "raw": model.state_dict(),
                    "optimizers": states,
                    "step": step + 1,
                },
            )
            judge = Autoencoder(channels).to(run.device)
            judge.load_state_dict(average)
            log.info("held-out PSNR %.2f dB", held_out_psnr(judge, run.device))
    return model
