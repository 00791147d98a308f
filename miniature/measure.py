"""Measures a packed miniature: `python -m miniature.measure --host <ComfyUI> [--count 20] [--json FILE]`.

Samples in batches with the host's own UNet class and the sampler's equations written out (Euler on the model's own
sigmas, which is DDIM), in bfloat16 autocast: the same pictures as the host's within rounding, at a third of the time.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .autoencoder import Autoencoder, psnr
from .data import Renderings, held_out
from .denoiser import MASK_LAYERS, Attention, build_text, build_unet, load_tokenizer, schedule
from .pack import CHECKPOINT, TABLE, load_autoencoder
from .program import measuring_options, prepare, run_program, tell_figures
from .reader import Reading, load_reader
from .train_reader import accuracy
from .train_whole import verdicts
from .world import CLASSES, SCENES, prompt, rgb

log = logging.getLogger(__name__)
CFG, STEPS = 4.0, 30


@dataclass(frozen=True)
class Miniature:
    """A packed checkpoint, opened without the host's loader."""

    unet: nn.Module
    text: nn.Module
    tokens: object  # captions -> token numbers [b 77]
    autoencoder: Autoencoder
    spread: float  # raw latents are this many times the UNet's

    def context(self, prompts: list[str]) -> Tensor:
        """[b 77 64], one text encoder row per different prompt."""
        different = list(dict.fromkeys(prompts))
        rows = self.text(input_ids=self.tokens(different)).last_hidden_state
        return rows[torch.tensor([different.index(text) for text in prompts])]

    def encode(self, images: Tensor) -> Tensor:
        """Images [b y x 3] in 0..1 -> the UNet's latents [b 8 y/8 x/8]."""
        return (
            torch.cat(
                [self.autoencoder.encode(part) for part in images.permute(0, 3, 1, 2).split(16)]
            )
            / self.spread
        )

    def decode(self, latents: Tensor) -> Tensor:
        """The UNet's latents -> images [b y x 3] in 0..1."""
        with torch.autocast("cpu", torch.bfloat16):
            parts = [
                self.autoencoder.decode(part * self.spread).float() for part in latents.split(16)
            ]
        return torch.cat(parts).permute(0, 2, 3, 1)


def open_miniature(host: Path, path: Path = CHECKPOINT) -> Miniature:
    """Weights of the shipped checkpoint in the classes that trained them."""
    from safetensors.torch import load_file

    weights = {name: value.float() for name, value in load_file(path).items()}

    def under(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }

    unet, text = build_unet(host), build_text(TABLE)
    unet.load_state_dict(under("model.diffusion_model."))
    own = next(iter(text.state_dict())).partition("embeddings")[
        0
    ]  # "text_model." or nothing, as transformers has it
    text.load_state_dict(
        {
            own + name: value
            for name, value in under("cond_stage_model.transformer.text_model.").items()
        },
        strict=False,
    )
    spread = float(weights["first_stage_model.vae_scale"])
    return Miniature(unet.eval(), text.eval(), load_tokenizer(host), load_autoencoder(path), spread)


def sample(
    model: Miniature,
    prompts: list[str],
    seed: int,
    steps: int = STEPS,
    cfg: float = CFG,
    batch: int = 40,
    control: Callable[[slice, Tensor, Tensor, Tensor], dict] | None = None,
) -> Tensor:
    """One picture per prompt [b y x 3], picture i from noise seed + i, so that batches change nothing.

    control: (pictures, their latents at unit spread, timestep, context) -> what a ControlNet adds; both of the last have the negative's
    rows behind the positive's.
    """
    times = torch.linspace(999, 0, steps).round().long()
    alphas = schedule()
    sigmas = torch.cat((((1 - alphas) / alphas).sqrt()[times], torch.zeros(1)))
    options = Attention().options()
    empty, pictures = model.context([""]), []
    for first in range(0, len(prompts), batch):
        chosen = prompts[first : first + batch]
        noise = [
            torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(seed + first + i))
            for i in range(len(chosen))
        ]
        x = torch.stack(noise) * (1 + sigmas[0] ** 2).sqrt()
        context = torch.cat((model.context(chosen), empty.expand(len(chosen), -1, -1)))
        for index, t in enumerate(times):
            scaled = (x / (1 + sigmas[index] ** 2).sqrt()).repeat(2, 1, 1, 1)
            with torch.autocast("cpu", torch.bfloat16):
                added = (
                    None
                    if control is None
                    else control(
                        slice(first, first + batch), scaled, t.expand(len(scaled)), context
                    )
                )
                eps = model.unet(
                    scaled,
                    t.expand(len(scaled)),
                    context=context,
                    control=added,
                    transformer_options=options,
                ).float()
            positive, negative = eps.chunk(2)
            x = x + (negative + cfg * (positive - negative)) * (sigmas[index + 1] - sigmas[index])
        pictures.append(model.decode(x))
        log.info("sampled %d of %d", first + len(chosen), len(prompts))
    return torch.cat(pictures)


def otsu(values: np.ndarray) -> float:
    """Otsu's threshold over 256 bins, as method.md section 4 has it."""
    counts, edges = np.histogram(values.astype(np.float64), 256)
    centres = (edges[1:] + edges[:-1]) / 2
    below, above = counts.cumsum(), counts[::-1].cumsum()[::-1]
    mean_below = (counts * centres).cumsum() / np.maximum(below, 1)
    mean_above = ((counts * centres)[::-1].cumsum() / np.maximum(above[::-1], 1))[::-1]
    return float(
        centres[:-1][np.argmax(below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2)]
    )


def word_masks(
    model: Miniature, latents: Tensor, prompts: list[str], time: int, seed: int
) -> np.ndarray:
    """Masks [b 8 8] from the class word's map, mean over heads and over the layers of the 8 x 8 grid, at one timestep."""
    alpha, attention = schedule()[time], Attention()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    tokens, names = model.tokens(prompts), model.tokens(list(CLASSES))[:, 1]
    word = torch.isin(tokens, names).int().argmax(1)
    maps = []
    for rows in torch.arange(len(latents)).split(50):
        context = model.context([prompts[i] for i in rows.tolist()])
        model.unet(
            noised[rows],
            torch.full((len(rows),), time),
            context=context,
            transformer_options=attention.options(),
        )
        layers = torch.stack([attention.maps[layer] for layer in MASK_LAYERS]).mean(0)  # [b n w]
        maps.append(layers[torch.arange(len(rows)), :, word[rows]])
    soft = torch.cat(maps).double().numpy()
    return np.stack([row > otsu(row) for row in soft]).reshape(-1, 8, 8)


def overlap(seen: np.ndarray, true: np.ndarray) -> float:
    """Mean intersection over union of masks [b y x]."""
    return float(np.mean((seen & true).sum((1, 2)) / np.maximum((seen | true).sum((1, 2)), 1)))


def mask_figures(model: Miniature, pictures: Renderings, latents: Tensor) -> dict[str, float]:
    """Word masks against the true ones, at the 8 x 8 grid and against every pixel, early, in the middle and late.

    mask.iou is what paper A uses: the union of the first two of 50 steps (t = 980, 960), coarse prompt.
    """
    names = [CLASSES[index] for index in pictures.labels[:, 0]]
    prompts = [prompt(name) for name in names]
    true = (
        F.avg_pool2d(torch.from_numpy(pictures.masks).float().unsqueeze(1), 16)[:, 0].numpy() > 0.5
    )
    at = {
        time: word_masks(model, latents, prompts, time, time) for time in (980, 960, 700, 400, 100)
    }
    early = at[980] | at[960]
    figures = {
        "mask.iou": overlap(early, true),
        "mask.iou_pixels": overlap(early.repeat(16, axis=1).repeat(16, axis=2), pictures.masks),
    }
    return figures | {f"mask.iou_t{time}": overlap(mask, true) for time, mask in at.items()}


def body_spread(reading: Reading) -> float:
    """Spread of the read body colours."""
    return colour_spread(*(reading.colours[name] for name in ("hue", "saturation", "value")))


def colour_spread(hue: Tensor, saturation: Tensor, value: Tensor) -> float:
    """Root of the summed variances of red, green and blue in 0..1 of these colours, [b] each."""
    colours = zip(hue.tolist(), saturation.tolist(), value.tolist(), strict=True)
    return float(np.sqrt((np.asarray([rgb(*colour) for colour in colours]) / 255).var(0).sum()))


@torch.no_grad()
def measure(
    host: Path,
    count: int = 20,
    seed: int = 1000,
    path: Path = CHECKPOINT,
    sheet: Path | None = None,
) -> dict[str, float]:
    """Every figure of `evaluate --task miniature`, and some beside them. `count` pictures per class and scene."""
    model, reader = open_miniature(host, path), load_reader()
    pictures = held_out(200)
    images = torch.from_numpy(pictures.images).float() / 255
    latents = model.encode(images)
    rebuilt = model.decode(latents)
    figures = {
        "vae.psnr_db": float(psnr(rebuilt.permute(0, 3, 1, 2), images.permute(0, 3, 1, 2)).mean()),
        "size.mib": sum(file.stat().st_size for file in path.parent.parent.rglob("*.safetensors"))
        / 2**20,
    }
    figures |= {f"reader.{name}": value for name, value in accuracy(reader, pictures).items()}
    figures["reader.accuracy"] = min(
        figures[f"reader.{name}"] for name in ("class", "scene", "pattern", "hat_presence")
    )
    figures |= {
        f"reader_after_vae.{name}": value
        for name, value in accuracy(reader, pictures, rebuilt).items()
    }
    figures |= mask_figures(model, pictures, latents)
    pairs = [(name, scene) for name in CLASSES for scene in SCENES for _ in range(count)]
    samples = sample(model, [prompt(*pair) for pair in pairs], seed)
    reading = reader.read(samples)
    figures["class_accuracy.prompts"] = _share(reading.names("class"), [name for name, _ in pairs])
    figures["scene_accuracy.prompts"] = _share(
        reading.names("scene"), [scene for _, scene in pairs]
    )
    figures["whole_subject.prompts"] = whole_share(reading)
    figures["whole_subject.renderings"] = whole_share(reader.read(rebuilt))
    figures["reader.one_whole"] = verdicts(reader, 50)["balanced"]
    figures["spread_ratio"] = body_spread(reading) / body_spread(reader.read(rebuilt))
    figures["count.pictures"] = len(pairs)
    for kind in CLASSES:
        rows = [i for i, (name, _) in enumerate(pairs) if name == kind]
        figures[f"class_accuracy.{kind}"] = _share(
            [reading.names("class")[i] for i in rows], [kind] * len(rows)
        )
    if sheet is not None:
        save_sheet(samples, count, sheet)
    return figures


def whole_share(reading: Reading) -> float:
    """The share of pictures that show one whole subject."""
    return float((reading.whole > 0.5).float().mean())


def _share(read: list[str], wanted: list[str]) -> float:
    return sum(a == b for a, b in zip(read, wanted, strict=True)) / len(wanted)


def save_sheet(images: Tensor, count: int, path: Path) -> None:
    """Up to two rows per class, one column per scene."""
    from PIL import Image

    grid = images.unflatten(0, (len(CLASSES), len(SCENES), count))[
        :, :, : min(count, 2)
    ]  # [class scene copy y x 3]
    rows = grid.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1, 2)
    Image.fromarray((rows.clamp(0, 1) * 255).round().byte().numpy()).save(path, quality=88)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    measuring_options(parser, 20, "pictures per class and scene", 1000, "a sheet of samples")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    args = parser.parse_args(arguments)
    prepare(None, args.json, args.sheet)
    torch.set_num_threads(args.threads)
    figures = measure(args.host, args.count, args.seed, args.checkpoint, args.sheet)
    tell_figures("evaluate --task miniature", args.seed, figures, args.json)


if __name__ == "__main__":
    run_program(main)
