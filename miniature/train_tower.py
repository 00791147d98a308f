"""Trains the small vision tower that the miniature's concept encoder starts from: what CLIP's tower is to the paper's.

CLIP learnt from captions what pictures show; this one learns it from the renderer's attributes, with the reader's losses.
Its tokens behind the last kept layer are what CLIP calls penultimate.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .data import held_out, training_set
from .muon import Muon
from .reader import HUES, KINDS, MASK_GRID
from .train_reader import reader_loss
from .training import Run, advance, as_pictures, follow, load, mixed, rate, save

log = logging.getLogger(__name__)
TOWER = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
    "projection_dim": 64,
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


class TowerReader(nn.Module):
    """The tower and, on its class token and the mean of its patches, a head per attribute."""

    def __init__(self) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        config = CLIPVisionConfig(
            **{**TOWER, "num_hidden_layers": TOWER["num_hidden_layers"] - 1},
            attn_implementation="eager",
        )
        self.tower = CLIPVisionModel(config)
        d = TOWER["hidden_size"]
        self.norm = nn.LayerNorm(d)
        self.kinds = nn.ModuleDict(
            {kind: nn.Linear(2 * d, len(names)) for kind, names in KINDS.items()}
        )
        self.hues, self.tones, self.subject = (
            nn.Linear(2 * d, 2 * len(HUES)),
            nn.Linear(2 * d, 2),
            nn.Linear(d, 4),
        )

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Pictures [b 3 128 128] in 0..1 -> what reader_loss judges."""
        mean, std = (pictures.new_tensor(v)[:, None, None] for v in (MEAN, STD))
        model = getattr(self.tower, "vision_model", self.tower)
        x = model.embeddings((pictures - mean) / std)
        x = model.encoder(inputs_embeds=model.pre_layrnorm(x)).last_hidden_state
        x = self.norm(x)
        seen = torch.cat((x[:, 0], x[:, 1:].mean(1)), 1)
        side = TOWER["image_size"] // TOWER["patch_size"]
        mask = nn.functional.pixel_shuffle(
            self.subject(x[:, 1:]).transpose(1, 2).unflatten(2, (side, side)), MASK_GRID // side
        )
        out = {kind: head(seen).float() for kind, head in self.kinds.items()}
        hues = self.hues(seen).float().unflatten(1, (len(HUES), 2))
        return out | {"hues": hues, "tones": self.tones(seen).float(), "mask": mask[:, 0].float()}


def train_tower(
    run: Run, steps: int, batch: int = 64, peak: float = 2e-3, count: int = 24_000
) -> None:
    """Resumes from tower.pt in the run's folder; writes tower.safetensors beside it, under transformers' names."""
    path = run.folder / "tower.pt"
    torch.manual_seed(run.seed)
    model = TowerReader().to(run.device)
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    chosen = {id(p) for p in inner}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [Muon(inner, lr=peak), torch.optim.AdamW(others, lr=peak, weight_decay=0.01)]
    average = {name: value.clone() for name, value in model.state_dict().items()}
    start, state = 0, load(path, run.device)
    if state is not None:
        model.load_state_dict(state["raw"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average, start = state["model"], state["step"]
    everything = training_set(run.folder, run.renderings)
    labels, colours = torch.from_numpy(everything.labels), torch.from_numpy(everything.colours)
    began, total = time.monotonic(), 0.0
    for step in range(start, steps):
        draw = torch.Generator().manual_seed((run.seed << 42) + step)
        index = torch.randint(count, (batch,), generator=draw)
        rows = index.numpy()
        pictures = as_pictures(everything.images[rows], run.device)
        mask = torch.from_numpy(everything.masks[rows]).float().unsqueeze(1)
        mask = nn.functional.avg_pool2d(mask, pictures.shape[-1] // MASK_GRID)[:, 0].to(run.device)
        with mixed(run.device):
            out = model(pictures)
        loss = reader_loss(out, labels[index].to(run.device), colours[index].to(run.device), mask)
        model.zero_grad(set_to_none=True)
        loss.backward()
        advance(optimizers, rate(step, steps, peak))
        follow(average, model, step, 0.995)
        total += float(loss.detach())
        if (step + 1) % 50 == 0:
            log.info(
                "tower %d/%d loss %.4f %.3f s/step",
                step + 1,
                steps,
                total / 50,
                (time.monotonic() - began) / (step + 1 - start),
            )
            total = 0.0
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save(
                path,
                {
                    "model": average,
                    "raw": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step + 1,
                },
            )
            log.info("held-out %s", held_out_figures(model, average))
            weights = {
                n.removeprefix("tower.").removeprefix("vision_model."): v
                for n, v in average.items()
                if n.startswith("tower.")
            }
            save_file(
                {n: v.contiguous() for n, v in weights.items() if v.is_floating_point()},
                run.folder / "tower.safetensors",
            )


@torch.no_grad()
def held_out_figures(
    model: TowerReader, weights: dict[str, Tensor], count: int = 200
) -> dict[str, float]:
    """Share right of every kind and mean errors of the hues (of the circle) on held-out renderings."""
    judge, pictures = TowerReader(), held_out(count)
    judge.load_state_dict(weights)
    out = judge.eval()(torch.from_numpy(pictures.images).permute(0, 3, 1, 2).float() / 255)
    figures = {
        kind: float(np.mean(out[kind].argmax(1).numpy() == pictures.labels[:, i]))
        for i, kind in enumerate(KINDS)
    }
    turns = (torch.atan2(out["hues"][..., 1], out["hues"][..., 0]) / (2 * np.pi) % 1).numpy()
    for i, (name, column) in enumerate((("hue", 0), ("second_hue", 3))):
        figures[name] = float(
            np.abs((turns[:, i] - pictures.colours[:, column] + 0.5) % 1 - 0.5).mean()
        )
    return figures
