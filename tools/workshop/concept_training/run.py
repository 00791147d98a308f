"""One run of train_concept_encoder.py."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pictures import PictureFolder, load_examples, prepare
from results import make_folder
from torch import Tensor
from tqdm import tqdm

from .encoder import NODE, find_file, make_encoder
from .engine import MOST_PROMPTS, Accelerated, Prompts, estimate
from .validation import draw_subjects, losses_of


class Training:
    """One run of the program."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, quiet: bool) -> None:
        from kindred.models.concept.settings import TrainSettings
        from kindred.models.concept.training import Trainer
        from kindred.models.concept.training_state import read_state
        from kindred.nodes import host

        self.args, self.accelerator, self.quiet, self.host = args, accelerator, quiet, host
        self.name = args.name or args.out.resolve().name
        make_folder(args.out)
        settings = TrainSettings(**args.settings)
        checkpoint, clip = self.load_checkpoint()
        encoder, tower = make_encoder(args, self.model, settings.seed)
        self.say(estimate(encoder, settings, self.model.model.diffusion_model, accelerator))
        size = args.size or host.SIDES.get(encoder.config.family, 512)
        self.read_pictures(checkpoint, size, encoder.config.preprocessing)
        self.prompts = Prompts(clip)
        for text in list(dict.fromkeys(("", *self.examples.prompts)))[:MOST_PROMPTS]:
            self.prompts[text]  # before the UNet is loaded, which the text encoder would push aside
        merge = encoder.config.merge
        self.denoise = host.frozen(self.model, merge, self.prompts, args.checkpointing, NODE)
        self.trainer = Trainer(
            encoder, self.denoise, self.examples, settings, Accelerated(accelerator)
        )
        self.describe(size, tower)
        if (args.out / "state.pt").is_file():
            self.trainer.resume(read_state(args.out / "state.pt"), **self.made_with)

    def load_checkpoint(self) -> tuple[str, Any]:
        """The MODEL and the VAE that are trained for -> the checkpoint's path, its CLIP. Raises ValueError where one is missing."""
        import comfy.sd

        checkpoint = find_file("checkpoints", self.args.checkpoint, self.args.host)
        self.model, clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(
            checkpoint, output_vae=True, output_clip=True, model_options=self.precision()
        )
        if clip is None or self.vae is None:
            raise ValueError(
                f"{Path(checkpoint).name} lacks its CLIP or its VAE. Give a whole checkpoint."
            )
        return checkpoint, clip

    def read_pictures(self, checkpoint: str, size: int, pixels: Any) -> None:
        """Encode what is not in the cache, and take the examples from there."""
        args, accelerator = self.args, self.accelerator
        unreadable = prepare(
            PictureFolder(args.images, args.prompt),
            args.out / "cache",
            size,
            pixels,
            f"{Path(checkpoint).name} {self.host.model_key(self.model)}",
            self.encode,
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.wait_for_everyone,
        )
        if unreadable and not self.quiet:
            print(
                f"left out {len(unreadable)} unreadable files:",
                *unreadable,
                sep="\n  ",
                file=sys.stderr,
            )
        self.examples, self.validation = load_examples(args.out / "cache", args.held_out)

    def describe(self, size: int, tower: dict[str, Any]) -> None:
        """`made_with`, which a state must have been made with to go on from; and the facts of the encoder's file."""
        from kindred.models.identity import tell_key

        args, settings, accelerator = self.args, self.trainer.settings, self.accelerator
        base = self.host.model_key(self.model)
        self.made_with = {
            "pictures": self.digest(),
            "size": size,
            "merge": args.merge,
            "tower": tower,
            "base": tell_key(base),
            "processes": accelerator.num_processes,
            "precision": args.mixed_precision,
        }
        self.facts = {
            "pictures": len(self.examples),
            "subjects": len(self.examples.groups),
            "batch": settings.batch * settings.accumulate * accelerator.num_processes,
            "rate": settings.rate,
            "prompt": args.prompt,
            "seed": settings.seed,
            "drop": [settings.drop_text, settings.drop_image, settings.drop_both],
            "base": str(base),
        }

    def digest(self) -> str:
        """Names, sizes and prompts of the pictures, in short."""
        known = json.loads((self.args.out / "cache" / "index.json").read_text("utf-8"))
        facts = (
            [[name, size] for name, size, _ in known["key"]["files"]],
            known["unreadable"],
            known["prompts"],
            self.args.held_out,
        )
        return f"{len(self.examples)} {hashlib.blake2b(json.dumps(facts).encode(), digest_size=4).hexdigest()}"

    def precision(self) -> dict[str, torch.dtype]:
        """bf16 weights where a GPU computes in bf16; on a CPU casting each time costs more than it saves."""
        return {
            "dtype": torch.bfloat16
            if self.args.mixed_precision == "bf16"
            and torch.cuda.is_available()
            and not self.args.cpu
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
        args, trainer, s = self.args, self.trainer, self.trainer.settings
        began, first, board = time.monotonic(), trainer.step_number, self.board()
        if first:
            self.say(f"going on from step {first}")
            if not (args.out / f"{self.name}.safetensors").is_file():
                self.save()
        bar = tqdm(
            total=s.steps, initial=first, disable=self.quiet, file=sys.stderr, mininterval=1.0
        )
        while trainer.step_number < s.steps:
            loss = trainer.step()
            step = trainer.step_number
            bar.update()
            if step % 10 == 0:
                last = trainer.losses[-100:]
                bar.set_postfix_str(f"loss {sum(last) / len(last):.4f}")
            if board:
                board.add_scalar("loss", loss, step)
            if step % args.save_every == 0 or step == s.steps:
                self.save()
            if self.validates_at(step):
                self.tell_validation(step, board)
        bar.close()
        self.tell_end(s.steps - first, time.monotonic() - began)
        if board:
            board.close()
        self.accelerator.end_training()
        return 0

    def validates_at(self, step: int) -> bool:
        every = self.args.validate_every
        if not every or self.validation is None:
            return False
        return step % every == 0 or step == self.trainer.settings.steps

    def tell_validation(self, step: int, board: Any) -> None:
        figures = self.validate()
        self.say(
            f"step {step}: validation loss {figures['loss']:.4f}, without the concept {figures['plain']:.4f}"
        )
        for name, value in figures.items() if board else ():
            board.add_scalar(f"validation/{name}", value, step)

    def tell_end(self, steps: int, seconds: float) -> None:
        per_second = steps * self.facts["batch"] / max(seconds, 1e-9)
        peak = ""
        if self.accelerator.device.type == "cuda":
            peak = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        self.say(
            f"{per_second:.2f} pictures a second{peak}\n{self.args.out / self.name}.safetensors"
        )

    def board(self) -> Any:
        if not self.args.tensorboard or self.quiet:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.args.out / "tensorboard")

    def save(self) -> None:
        """State, encoder and log: each whole or as it was."""
        from kindred.models.files import whole

        if not self.accelerator.is_main_process:
            return
        out = self.args.out
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

    def validate(self) -> dict[str, float]:
        """Eq. (10) on pictures kept out; and what they look like."""
        figures = losses_of(self.trainer, self.validation, len(self.denoise.sigmas))
        if self.accelerator.is_main_process:
            self.pictures()
        self.accelerator.wait_for_everyone()
        return figures

    @torch.no_grad()
    def pictures(self) -> None:
        """validation-STEP.png"""
        import numpy as np
        from PIL import Image

        managed = self.host.ManagedEncoder.of(self.trainer.kept(**self.facts), self.name)
        grid = draw_subjects(self.model, self.vae, managed, self.validation, self.prompts)
        self.denoise.load()  # the host may have moved it away for the VAE
        Image.fromarray(np.ascontiguousarray(grid)).save(
            self.args.out / f"validation-{self.trainer.step_number:06d}.png"
        )
