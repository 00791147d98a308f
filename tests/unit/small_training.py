"""Training in small: a frozen network small enough to know, an encoder, and examples from a seed."""

from __future__ import annotations

import io
import math
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from kindred.models.concept.config import ConceptConfig, Preprocessing
from kindred.models.concept.draws import Draw, Examples
from kindred.models.concept.encoder import ConceptEncoder
from kindred.models.concept.settings import TrainSettings
from kindred.models.concept.training import Trainer
from kindred.models.noise.path import DIFFUSION, Diffusion, Flow
from small_attention import sdpa_attend
from torch import Tensor, nn

TOWER = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
LAYERS = ((("input", 1, 0), 8), (("middle", 0, 0), 12))
CONFIG = ConceptConfig("SD15", LAYERS, 6, 8, TOWER, Preprocessing(8))
SETTINGS = TrainSettings(steps=20, batch=3, rate=1e-3, average=0.9, seed=5)


class Denoise(nn.Module):
    """A frozen network small enough to know: a fixed function of all it is given, its own weight included."""

    noise: Diffusion | Flow = DIFFUSION
    learning = staticmethod(nullcontext)

    def __init__(self, velocity: bool = False, levels: int = 12) -> None:
        super().__init__()
        self.sigmas, self.velocity = torch.linspace(0.05, 8.0, levels), velocity
        self.own = nn.Parameter(torch.full((), 0.7), requires_grad=False)
        self.broken, self.prompts = False, []

    def forward(
        self, x: Tensor, sigma: Tensor, prompts: Any, keys_values: Any, weight: float
    ) -> Tensor:
        self.prompts.append(list(prompts))
        told = torch.tensor([0.1 * len(p) for p in prompts])
        queries = x.flatten(2)[..., :4].flatten(1)[:, None, :8]  # [b 1 8]
        read = 0
        for k, v in keys_values.values():
            q = torch.cat((queries, queries), -1)[..., : k.shape[-1]]
            read = read + sdpa_attend(q, k, v, 2).tanh().mean((1, 2))
        wide = sigma[:, None, None, None]
        out = self.own * x / (1 + wide**2) + (told + weight * read)[:, None, None, None] * x.cos()
        return out * math.nan if self.broken else out


def examples(subjects: tuple[int, ...] = (0, 0, 0, 1, 1, 2, 3)) -> Examples:
    generator, n = torch.Generator().manual_seed(3), len(subjects)
    return Examples(
        torch.randn(n, 4, 3, 3, generator=generator).half(),
        torch.randint(0, 256, (n, 8, 8, 3), generator=generator, dtype=torch.uint8),
        ["a " * i for i in range(n)],
        subjects,
    )


FRESH: list[ConceptEncoder] = []


def fresh() -> ConceptEncoder:
    """The same new encoder each time."""
    if not FRESH:
        torch.manual_seed(2)
        FRESH.append(ConceptEncoder(CONFIG))
        for p in FRESH[0].parameters():
            p.data += 0.1 * torch.randn_like(
                p
            )  # no zero biases: a tanh of nothing has no gradient to tell apart
    return deepcopy(FRESH[0])


def trainer(settings: TrainSettings = SETTINGS, velocity: bool = False, **how) -> Trainer:
    return Trainer(
        fresh(), Denoise(velocity), how.pop("pictures", None) or examples(), settings, **how
    )


def join(draws: list[Draw]) -> Draw:
    return Draw(
        [i for d in draws for i in d.index],
        [i for d in draws for i in d.partner],
        torch.cat([d.level for d in draws]),
        torch.cat([d.noise for d in draws]),
        [x for d in draws for x in d.no_text],
        torch.cat([d.no_image for d in draws]),
    )


def gradients(of: Trainer, d: Draw) -> dict[str, Tensor]:
    of.optimizer.zero_grad(set_to_none=True)
    of.loss(d).backward()
    return {name: p.grad.clone() for name, p in of.trained.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
