"""What a concept encoder is trained with: accelerate, prompts that are encoded once, and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

MOST_PROMPTS = 4096  # kept encoded


class Accelerated:
    """The Engine of models/concept/training.py on accelerate."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.device = accelerator, accelerator.device
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes

    def prepare(self, module: nn.Module) -> Any:
        return self.accelerator.prepare_model(module)

    def autocast(self) -> AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def mean(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "mean")


class Prompts(Mapping):
    """CONDITIONING by text, encoded when first asked for."""

    def __init__(self, clip: Any) -> None:
        @lru_cache(MOST_PROMPTS)
        def encode(text: str) -> Any:
            with torch.no_grad():
                return clip.encode_from_tokens_scheduled(clip.tokenize(text))

        self.encode = encode

    def __getitem__(self, text: str) -> Any:
        return self.encode(text)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return self.encode.cache_info().currsize


def estimate(encoder: Any, settings: Any, unet: nn.Module, accelerator: Accelerator) -> str:
    """What will be held whatever the batch: the frozen UNet, the encoder, its gradients, averages and Adam's two moments."""
    device = accelerator.device
    frozen = sum(p.numel() * p.element_size() for p in unet.parameters())
    tower = sum(p.numel() for p in encoder.tower.parameters())
    every = sum(p.numel() for p in encoder.parameters())
    trained = every - (tower if settings.tower_rate == 0 else 0)
    held = every * 4 + trained * (16 + 4 * (accelerator.num_processes > 1))
    text = (
        f"memory: UNet {frozen / 2**30:.2f} GiB + encoder, gradients, average and optimizer {held / 2**30:.2f} GiB, "
        "and the activations of a batch"
    )
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        text += f"; {free / 2**30:.1f} of {whole / 2**30:.1f} GiB are free on {device}"
        if frozen + held > free:
            text += ". That is more than there is: freeze the tower (--tower-rate 0)"
    return text
