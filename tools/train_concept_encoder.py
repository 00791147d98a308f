"""Trains a concept encoder for a base model from a folder of pictures (paper A, arXiv 2403.11284, section 2.3 and 3.1).

  accelerate launch tools/train_concept_encoder.py --host COMFYUI --checkpoint sd15.safetensors --clip-vision vit-l.safetensors \\
      --images FOLDER --prompt "a photo of a face" --out RUN

One process, on a GPU or (--cpu) the CPU. Several GPUs: accelerate launch --multi_gpu --num_processes 4 tools/train_concept_encoder.py ...
Several processes on a CPU, where accelerate launch starts but one: python -m torch.distributed.run --nproc_per_node 2 tools/... --cpu
p processes with --batch b are one with --batch p * b. The same command goes on from the newest state in --out after any kill.
Pictures may lie in subfolders, one per subject: then the tower sees another picture of the subject than the UNet draws.
NAME.txt beside NAME.png is its prompt. Writes RUN/<name>.safetensors (put it into models/concept_encoders), log.csv, validation
pictures and state.pt.
"""

from __future__ import annotations

import argparse
import csv
import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from boot import boot
from pictures import NoPictures, PictureFolder, load_examples, prepare
from results import IN_GIT, make_folder
from safetensors.torch import load_file
from terminal import run_program
from torch import Tensor, nn
from tqdm import tqdm

MOST_PROMPTS = 4096  # kept encoded
VALIDATION_DRAWS = 8  # micro-steps of the validation loss, always the same ones


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


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--host", type=Path, default=os.environ.get("KINDRED_HOST"), help="ComfyUI's folder"
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="SD1.5, SD2.x or SDXL .safetensors, or a name in models/checkpoints",
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of this run{IN_GIT}")
    parser.add_argument("--name", help="of the encoder's file (default: the run's folder)")
    parser.add_argument(
        "--prompt",
        default="a photo",
        help='what every picture shows, for instance "a photo of a face"',
    )
    tower = parser.add_mutually_exclusive_group(required=True)
    tower.add_argument(
        "--clip-vision", help="CLIP ViT-L or ViT-H .safetensors, or a name in models/clip_vision"
    )
    tower.add_argument("--new-tower", help="JSON of a CLIPVisionConfig for a tower from nothing")
    parser.add_argument(
        "--tower-weights", type=Path, help="weights for --new-tower, in transformers' names"
    )
    tower.add_argument(
        "--start", type=Path, help="a concept encoder with a tower of its own to go on from"
    )
    parser.add_argument(
        "--size", type=int, help="pixels of a side (default: what the model was trained at)"
    )
    parser.add_argument("--merge", choices=("concat", "add"), default="concat")
    parser.add_argument(
        "--held-out",
        type=int,
        default=8,
        help="subjects kept out for validation (default: %(default)s)",
    )
    parser.add_argument("--save-every", type=int, default=500, help="steps between states")
    parser.add_argument(
        "--validate-every", type=int, default=1000, help="steps between validations; 0 for none"
    )
    parser.add_argument(
        "--mixed-precision",
        choices=("no", "bf16"),
        default="bf16",
        help="of the forward pass; fp16 would need its losses scaled (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="recompute the UNet in the backward pass: less memory, slower",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write TensorBoard events (needs the tensorboard package)",
    )
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    loop = parser.add_argument_group("the loop")
    words = {
        "accumulate": "micro-steps per step",
        "rate": "learning rate",
        "tower_rate": "of the tower; 0 freezes it",
        "batch": "pictures per process and micro-step",
        "min_snr": "gamma of min-SNR weights; none is the paper's plain loss",
    }
    from checkout import as_kindred

    as_kindred()
    from kindred.models.concept.training import TrainSettings

    for setting in fields(TrainSettings):
        kind = {"int": int, "float": float, "float | None": float, "str": str}[setting.type]
        loop.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=kind,
            default=setting.default,
            help=f"{words.get(setting.name, '')} (default: {setting.default})".strip(),
        )
    given = parser.parse_args(argv)
    if not given.host:
        parser.error("--host is missing: ComfyUI's folder")
    given.settings = {s.name: getattr(given, s.name) for s in fields(TrainSettings)}
    return given


def found(folder_paths: Any, kind: str, name: str, host: Path) -> str:
    """A path as given, or a name in models/ of the host or of the pack; SystemExit names both."""
    for path in (Path(name), host / "models" / kind / name):
        if path.is_file():
            return str(path)
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise SystemExit(
            f"train_concept_encoder: {name} is neither a file nor in {host / 'models' / kind}."
        )
    return path


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


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    try:
        PictureFolder(given.images, given.prompt).files()
    except NoPictures as problem:  # said before seconds of loading
        raise SystemExit(f"train_concept_encoder: {problem}") from problem
    if given.tensorboard and find_spec("tensorboard") is None:
        raise SystemExit(
            "train_concept_encoder: --tensorboard needs the tensorboard package; log.csv is written in any case."
        )
    quiet = int(os.environ.get("RANK", "0")) != 0
    if torch.cuda.is_available() and not given.cpu:
        torch.cuda.set_device(
            int(os.environ.get("LOCAL_RANK", 0))
        )  # before the host asks the first GPU for its memory
    boot(Path(given.host), cpu=given.cpu or not torch.cuda.is_available())
    from datetime import timedelta

    accelerator = Accelerator(
        mixed_precision=given.mixed_precision,
        cpu=given.cpu or not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )  # the first process reads the pictures
    if accelerator.device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    try:
        return Training(given, accelerator, quiet).run()
    except NoPictures as problem:
        raise SystemExit(f"train_concept_encoder: {problem}") from problem
    except OSError as problem:
        full = problem.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise SystemExit(
            f"train_concept_encoder: {problem}. What was saved is whole; {'make room and ' * full}run the same command."
        ) from problem
    except (ValueError, FloatingPointError) as problem:
        raise SystemExit(f"train_concept_encoder: {problem}") from problem


class Training:
    """One run of the program."""

    def __init__(self, given: argparse.Namespace, accelerator: Accelerator, quiet: bool) -> None:
        import comfy.clip_vision
        import comfy.sd
        import folder_paths
        from kindred.models.concept.encoder import (
            ConceptConfig,
            ConceptEncoder,
            Preprocessing,
            check_layers,
            load_concept_encoder,
        )
        from kindred.models.concept.training import Trainer, TrainSettings, read_state
        from kindred.models.identity import tell_key
        from kindred.models.injection import Merge
        from kindred.nodes import host

        self.given, self.accelerator, self.quiet, self.host = given, accelerator, quiet, host
        self.name = given.name or given.out.resolve().name
        make_folder(given.out)
        settings, node = TrainSettings(**given.settings), "train_concept_encoder"
        checkpoint = found(folder_paths, "checkpoints", given.checkpoint, Path(given.host))
        self.model, clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(
            checkpoint, output_vae=True, output_clip=True, model_options=self.precision()
        )
        if clip is None or self.vae is None:
            raise ValueError(
                f"{Path(checkpoint).name} lacks its CLIP or its VAE. Give a whole checkpoint."
            )
        family, layers, width = host.cross_layers(self.model, node)
        if given.start:
            config = load_concept_encoder(given.start).config
            check_layers(config, family, layers, width, node)
            if config.tower is None:
                raise ValueError(
                    f"{given.start.name} holds no CLIP tower. Start from one that does, or give --clip-vision."
                )
            tower, weights, pixels = dict(config.tower), None, config.preprocessing
            given.merge = config.merge.value
        elif given.clip_vision:
            vision = comfy.clip_vision.load(
                found(folder_paths, "clip_vision", given.clip_vision, Path(given.host))
            )
            if vision is None:
                raise ValueError(f"{given.clip_vision} is no CLIP vision model.")
            tower, weights = host.ManagedEncoder.tower_of(vision)
            pixels = Preprocessing(
                vision.image_size, tuple(vision.image_mean), tuple(vision.image_std)
            )
        else:
            tower, weights = (
                json.loads(given.new_tower),
                load_file(given.tower_weights) if given.tower_weights else None,
            )
            pixels = Preprocessing(tower["image_size"])
        torch.manual_seed(settings.seed)
        config = ConceptConfig(
            family, layers, width, tower["hidden_size"], tower, pixels, Merge(given.merge)
        )
        encoder = ConceptEncoder(config)
        if weights:
            encoder.tower.load_clip(weights)
        sites = host.attention_sites(self.model.model.diffusion_model)
        encoder.start_from_text(
            {
                b: (
                    s.module.attn2.to_k.weight.float().cpu(),
                    s.module.attn2.to_v.weight.float().cpu(),
                )
                for b, s in sites.items()
            }
        )
        if given.start:
            encoder.load_state_dict(load_concept_encoder(given.start).state_dict())
        self.say(estimate(encoder, settings, self.model.model.diffusion_model, accelerator))
        size = given.size or host.SIDES.get(family, 512)
        folder = PictureFolder(given.images, given.prompt)
        unreadable = prepare(
            folder,
            given.out / "cache",
            size,
            pixels,
            f"{Path(checkpoint).name} {host.model_key(self.model)}",
            self.encode,
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.wait_for_everyone,
        )
        if unreadable and not quiet:
            print(
                f"left out {len(unreadable)} unreadable files:",
                *unreadable,
                sep="\n  ",
                file=sys.stderr,
            )
        self.examples, self.validation = load_examples(given.out / "cache", given.held_out)
        self.prompts = Prompts(clip)
        for text in list(dict.fromkeys(("", *self.examples.prompts)))[:MOST_PROMPTS]:
            self.prompts[text]  # before the UNet is loaded, which the text encoder would push aside
        self.denoise = host.FrozenUNet(self.model, config.merge, self.prompts, given.checkpointing)
        self.trainer = Trainer(
            encoder, self.denoise, self.examples, settings, Accelerated(accelerator)
        )
        base = host.model_key(self.model)
        self.made_with = {
            "pictures": self.digest(),
            "size": size,
            "merge": given.merge,
            "tower": tower,
            "base": tell_key(base),
            "processes": accelerator.num_processes,
            "precision": given.mixed_precision,
        }
        if (given.out / "state.pt").is_file():
            self.trainer.resume(read_state(given.out / "state.pt"), **self.made_with)
        self.facts = {
            "pictures": len(self.examples),
            "subjects": len(self.examples.groups),
            "batch": settings.batch * settings.accumulate * accelerator.num_processes,
            "rate": settings.rate,
            "prompt": given.prompt,
            "seed": settings.seed,
            "drop": [settings.drop_text, settings.drop_image, settings.drop_both],
            "base": str(base),
        }

    def digest(self) -> str:
        """Names, sizes and prompts of the pictures, in short."""
        known = json.loads((self.given.out / "cache" / "index.json").read_text("utf-8"))
        told = (
            [[name, size] for name, size, _ in known["key"]["files"]],
            known["unreadable"],
            known["prompts"],
            self.given.held_out,
        )
        return f"{len(self.examples)} {hashlib.blake2b(json.dumps(told).encode(), digest_size=4).hexdigest()}"

    def precision(self) -> dict[str, torch.dtype]:
        """bf16 weights where a GPU computes in bf16; on a CPU casting each time costs more than it saves."""
        return {
            "dtype": torch.bfloat16
            if self.given.mixed_precision == "bf16"
            and torch.cuda.is_available()
            and not self.given.cpu
            else torch.float32
        }

    def encode(self, images: Tensor) -> Tensor:
        """Images [b Y X 3] -> latents in model scale."""
        with (
            torch.no_grad(),
            self.accelerator.autocast() if self.accelerator.device.type == "cpu" else nullcontext(),
        ):
            return self.model.model.process_latent_in(self.vae.encode(images))

    def say(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def run(self) -> int:
        given, trainer, s = self.given, self.trainer, self.trainer.settings
        began, first, board = time.monotonic(), trainer.step_number, self.board()
        if first:
            self.say(f"going on from step {first}")
            if not (given.out / f"{self.name}.safetensors").is_file():
                self.save()
        bar = tqdm(
            total=s.steps, initial=first, disable=self.quiet, file=sys.stderr, mininterval=1.0
        )
        while trainer.step_number < s.steps:
            loss = trainer.step()
            step = trainer.step_number
            bar.update()
            if step % 10 == 0:
                bar.set_postfix_str(
                    f"loss {sum(trainer.losses[-100:]) / len(trainer.losses[-100:]):.4f}"
                )
            if board:
                board.add_scalar("loss", loss, step)
            if step % given.save_every == 0 or step == s.steps:
                self.save()
            if (
                given.validate_every
                and (step % given.validate_every == 0 or step == s.steps)
                and self.validation is not None
            ):
                figures = self.validate()
                self.say(
                    f"step {step}: validation loss {figures['loss']:.4f}, without the concept {figures['plain']:.4f}"
                )
                for name, value in figures.items() if board else ():
                    board.add_scalar(f"validation/{name}", value, step)
        bar.close()
        per_second = (s.steps - first) * self.facts["batch"] / max(time.monotonic() - began, 1e-9)
        peak = (
            f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            if self.accelerator.device.type == "cuda"
            else ""
        )
        self.say(f"{per_second:.2f} pictures a second{peak}\n{given.out / self.name}.safetensors")
        if board:
            board.close()
        self.accelerator.end_training()
        return 0

    def board(self) -> Any:
        if not self.given.tensorboard or self.quiet:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.given.out / "tensorboard")

    def save(self) -> None:
        """State, encoder and log: each whole or as it was."""
        from kindred.models.files import whole

        if not self.accelerator.is_main_process:
            return
        out = self.given.out
        self.trainer.save(
            out / f"{self.name}.safetensors", out / "state.pt", self.made_with, self.facts
        )
        with whole(out / "log.csv") as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "loss", "rate"))
            s = self.trainer.settings
            writer.writerows(
                (i + 1, f"{loss:.8g}", f"{s.rate * s.rate_at(i):.3g}")
                for i, loss in enumerate(self.trainer.losses)
            )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Eq. (10) on pictures kept out, always with the same noise, with the concept and without; and what they look like."""
        from dataclasses import replace

        from kindred.models.concept.training import Trainer, draw

        trainer, s = self.trainer, self.trainer.settings
        clean = replace(s, drop_text=0.0, drop_image=0.0, drop_both=0.0, seed=s.seed + 1)
        judge = Trainer.__new__(Trainer)
        judge.__dict__ |= {
            **trainer.__dict__,
            "examples": self.validation,
            "forward": trainer.encoder,
        }
        kept = {name: p.detach().clone() for name, p in trainer.trained.items()}
        figures = {"loss": 0.0, "plain": 0.0}
        try:
            for name, p in trainer.trained.items() if trainer.average else ():
                p.data.copy_(trainer.average[name])
            for i in range(VALIDATION_DRAWS):
                d = draw(clean, self.validation, len(self.denoise.sigmas), i)
                for name, weight in (("loss", 1.0), ("plain", 0.0)):
                    figures[name] += float(judge.loss(d, weight)) / VALIDATION_DRAWS
        finally:
            for name, p in trainer.trained.items():
                p.data.copy_(kept[name])
        if self.accelerator.is_main_process:
            self.pictures()
        self.accelerator.wait_for_everyone()
        return figures

    def pictures(self, count: int = 4, steps: int = 20, cfg: float = 4.0) -> None:
        """validation-STEP.png: what the tower saw, the plain picture, the picture with the concept; a column per kept-out subject."""
        import numpy as np
        from PIL import Image

        import nodes

        managed = self.host.ManagedEncoder.of(self.trainer.kept(**self.facts), self.name)
        firsts = [rows[0] for rows in self.validation.groups.values()][:count]
        inject = nodes.NODE_CLASS_MAPPINGS["KindredCrossAttnDetailInject"]
        columns = []
        for n, i in enumerate(firsts):
            seen = self.validation.pixels[self.validation.partner(i, 0.0)].float()[None] / 255
            latent = {"samples": torch.zeros(1, *self.validation.latents.shape[1:])}
            positive, negative = self.prompts[self.validation.prompts[i]], self.prompts[""]
            made = []
            for weight in (0.0, 1.0):
                model = inject.execute(
                    model=self.model, concept_encoder=managed, image=seen, weight=weight
                ).result[0]
                samples = nodes.common_ksampler(
                    model, n, steps, cfg, "euler", "normal", positive, negative, latent
                )[0]["samples"]
                made.append(self.vae.decode(samples)[0].clamp(0, 1))
            side = made[0].shape[0]
            shown = torch.nn.functional.interpolate(seen.movedim(-1, 1), (side, side), mode="area")[
                0
            ].movedim(0, -1)
            columns.append(torch.cat((shown, *made)))
        grid = (torch.cat(columns, 1) * 255).round().byte().cpu().numpy()
        self.denoise.load()  # the host may have moved it away for the VAE
        Image.fromarray(np.ascontiguousarray(grid)).save(
            self.given.out / f"validation-{self.trainer.step_number:06d}.png"
        )


if __name__ == "__main__":
    run_program(main)
