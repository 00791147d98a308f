"""The renderings as latents: encoded once by the frozen encoder, for the UNet and for tuning the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .data import training_set
from .training import Run, as_pictures, load, mixed, save


@torch.no_grad()
def latents_of(run: Run, count: int, name: str = "") -> Tensor:
    """Raw latents [b c 16 16] of this worker's share of the first `count` renderings, half precision; made once.

    name: before the names of its files, of the miniature whose autoencoder it is.
    """
    path = run.folder / f"{name}latents-{count}-{run.rank}of{run.workers}.pt"
    if not path.exists():
        weights = load(run.folder / f"{name}autoencoder.pt", run.device)["model"]
        model = Autoencoder(weights["taesd_decoder.1.weight"].shape[1]).to(
            run.device, memory_format=torch.channels_last
        )
        model.load_state_dict(weights)
        encoder = list(model.taesd_encoder)
        short = nn.Sequential(
            encoder[0], nn.ReLU(), *encoder[2:]
        )  # the full-size block is the identity
        images = training_set(run.folder, run.renderings).images[run.rank : count : run.workers]
        parts = []
        for index in range(0, len(images), 32):
            with mixed(run.device):
                parts.append(
                    short(as_pictures(images[index : index + 32], run.device)).half().cpu()
                )
        save(path, {"latents": torch.cat(parts)})
    return load(path, run.device)["latents"]
