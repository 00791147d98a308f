"""Concept Encoder Train: the loop of models/concept/training.py in the canvas (paper A, arXiv 2403.11284, sections 2.3 and 3.1)."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.v0_0_2 import io, ui
from PIL import Image, ImageDraw
from torch import Tensor

from ..models.concept.encoder import ConceptConfig, ConceptEncoder, Preprocessing, check_layers
from ..models.concept.training import Examples, OneProcess, Trainer, TrainSettings, read_state
from ..models.files import remedy
from ..models.identity import tell_key
from ..models.injection import Merge
from . import host
from .drawing import as_image, typeface

NODE = "Concept Encoder Train"
WRITABLE = "another folder for concept_encoders (extra_model_paths.yaml)"
WIRED, SMALL = "as wired", "new, small"
EACH, BATCHES = "every picture", "every batch"
AUTO, BF16, NO = "auto", "bf16", "no"
SMALL_TOWER = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
}  # the miniature's: 1 million weights, learns from nothing
PREVIEW_EVERY = 2.0  # seconds
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """What is asked of the node, in the names of its inputs."""

    model: Any
    vae: Any
    clip: Any
    images: Sequence[Tensor]  # each [b Y X c] in 0..1, of any size
    prompt: Sequence[str]
    save_name: str
    steps: int = 1000
    learning_rate: float = 1e-5
    batch: int = 2
    tower: str = WIRED
    tower_rate: float = 1e-5
    clip_vision: Any = None
    concept_encoder: host.ManagedEncoder | None = None
    subjects: str = EACH
    size: int = 0
    accumulate: int = 1
    drop_text: float = 0.05
    drop_image: float = 0.05
    drop_both: float = 0.05
    average: float = 0.999
    weighting: str = "plain"
    noise_from: float = 0.0
    merge: str = Merge.CONCAT.value
    mixed_precision: str = AUTO
    gradient_checkpointing: bool = False
    save_every: int = 250
    resume: bool = True
    seed: int = 0

    @property
    def settings(self) -> TrainSettings:
        same = (
            "steps",
            "batch",
            "accumulate",
            "drop_text",
            "drop_image",
            "drop_both",
            "average",
            "weighting",
            "noise_from",
            "seed",
        )
        tower = (
            None if self.tower == SMALL else self.tower_rate
        )  # a new tower has everything to learn, as the projections have
        return TrainSettings(
            rate=self.learning_rate,
            tower_rate=tower,
            **{name: getattr(self, name) for name in same},
        )

    def check_images(self) -> None:
        """ValueError for no pictures, a batch that is none, NaN."""
        if not sum(len(batch) for batch in self.images):
            raise ValueError(
                f"{NODE}: there are no pictures. Wire Load Image, or Load Image Dataset from Folder for many, into images."
            )
        for number, batch in enumerate(self.images, 1):
            if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4) or 0 in batch.shape[1:]:
                raise ValueError(
                    f"{NODE}: batch {number} of images is {list(batch.shape)}; a picture is [b y x 3]. Wire an IMAGE into it."
                )
            if not torch.isfinite(batch).all():
                raise ValueError(
                    f"{NODE}: {int((~torch.isfinite(batch)).sum())} values of batch {number} of images are NaN or infinite. "
                    "Look at the picture with Preview Image and make it again."
                )

    def captions(self) -> list[str]:
        """A prompt for each picture: one for all, or one line or list item each; ValueError where the counts differ."""
        count = sum(len(batch) for batch in self.images)
        given = (
            list(self.prompt)
            if len(self.prompt) > 1
            else [line for line in self.prompt[0].splitlines() if line.strip()] or [""]
        )
        if len(given) not in (1, count):
            raise ValueError(
                f"{NODE}: there are {len(given)} prompts for {count} pictures. Write one line for all of them, such as "
                "'a photo of a face', or a line for each."
            )
        return [text.strip() for text in (given * count if len(given) == 1 else given)]

    def files(self) -> tuple[Path, Path]:
        """The encoder's file and its state's; ValueError for a name that is no file in the folder or would replace a stranger's."""
        folder, name = (
            host.concept_folder().resolve(),
            self.save_name.strip().removesuffix(".safetensors").replace("\\", "/"),
        )
        path, fits = (
            folder / f"{name}.safetensors",
            host.nameable(name) and len(name.encode()) < 200,
        )  # systems allow 255, less for ours
        if (
            not fits
            or not Path(name).name.strip(". ")
            or set(name) & set(':*?"<>|')
            or not path.resolve().is_relative_to(folder)
        ):
            raise ValueError(
                f"{NODE}: save_name is {self.save_name!r:.60}. Give the name of a file in {folder}, for instance my_subject."
            )
        state = path.with_suffix(".training")
        if self.resume and path.exists() and not state.exists():
            raise ValueError(
                f"{NODE}: {path.name} is there already, without the state of a training beside it. Choose another save_name, "
                "or switch resume off to replace it; to train it further, wire Concept Encoder Load into concept_encoder."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        return path, state

    def encoder(self, family: str, layers: Any, width: int, text: Mapping) -> ConceptEncoder:
        """Where the training starts; text: (to_k, to_v) of every cross-attention layer. ValueError says what to wire."""
        wired = [
            name for name in ("clip_vision", "concept_encoder") if getattr(self, name) is not None
        ]
        if len(wired) + (self.tower == SMALL) != 1:
            raise ValueError(
                f"{NODE}: tower is {self.tower!r} and {' and '.join(wired) or 'nothing'} wired. Wire either clip_vision (CLIP "
                "ViT-L or ViT-H) or a concept_encoder to go on from; or choose 'new, small' and wire neither."
            )
        own = self.concept_encoder
        if own is not None:
            check_layers(own.encoder.config, family, layers, width, NODE)
            config, weights = own.encoder.config, own.encoder.state_dict()
            if (
                config.tower is None
            ):  # full-face weights: its CLIP Vision becomes a tower of its own
                config, tower = self.with_tower(config, own.vision)
                encoder = ConceptEncoder(config)
                encoder.tower.load_clip(tower)
            else:
                encoder = ConceptEncoder(config)
            encoder.load_state_dict(
                {name: value.detach().float().cpu().clone() for name, value in weights.items()},
                strict=False,
            )
            return encoder
        config = ConceptConfig(
            family,
            layers,
            width,
            SMALL_TOWER["hidden_size"],
            SMALL_TOWER,
            Preprocessing(SMALL_TOWER["image_size"]),
            Merge(self.merge),
        )
        tower = None
        if self.clip_vision is not None:
            config, tower = self.with_tower(config, self.clip_vision)
        torch.default_generator.manual_seed(self.seed)  # the CPU's, which host.training puts back
        encoder = ConceptEncoder(config)
        if tower:
            encoder.tower.load_clip(tower)
        encoder.start_from_text(text)
        return encoder

    def with_tower(
        self, config: ConceptConfig, vision: Any
    ) -> tuple[ConceptConfig, dict[str, Tensor]]:
        try:
            tower, weights = host.ManagedEncoder.tower_of(vision)
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error
        pixels = Preprocessing(vision.image_size, tuple(vision.image_mean), tuple(vision.image_std))
        return replace(
            config, tower=tower, tower_width=tower["hidden_size"], preprocessing=pixels
        ), weights


class ConceptEncoderTrain(io.ComfyNode):
    """Eq. (10) of paper A: the encoder learns to draw the pictures it is shown; UNet, VAE and text encoder stay as they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredConceptEncoderTrain",
            display_name=NODE,
            category="Kindred",
            is_input_list=True,
            is_output_node=True,
            description="Trains a concept encoder on your pictures and saves it into models/concept_encoders. Cancelling keeps what was "
            "learned so far; the same settings then go on from there.",
            search_aliases=[
                "train ip adapter",
                "train concept",
                "finetune encoder",
                "training",
                "personalize",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model, from Load Checkpoint, with any LoRA. It is not changed.",
                ),
                io.Vae.Input("vae", tooltip="Of the same checkpoint."),
                io.Clip.Input("clip", tooltip="Of the same checkpoint."),
                io.Image.Input(
                    "images",
                    tooltip="The pictures to learn from, as batches or lists of any sizes. Centre squares are used.",
                ),
                io.String.Input(
                    "prompt",
                    default="a photo",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="What the pictures show in general, such as 'a photo of a face'; or one line per picture.",
                ),
                io.String.Input(
                    "save_name",
                    default="my_subject",
                    tooltip="Name of the file in models/concept_encoders.",
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=10_000_000,
                    tooltip="The paper trains a domain in 100,000.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-5,
                    min=1e-8,
                    max=0.1,
                    step=1e-7,
                    round=False,
                    tooltip="Of the projections, and of a new small tower. 1e-5 is the paper's; the miniature took 2e-3.",
                ),
                io.Int.Input(
                    "batch",
                    default=2,
                    min=1,
                    max=1024,
                    tooltip="Pictures per step; more needs more memory.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="CLIP ViT-L or ViT-H: the tower to start from.",
                ),
                host.Encoder.Input(
                    "concept_encoder",
                    optional=True,
                    tooltip="Instead of clip_vision: an encoder to train further.",
                ),
                io.Combo.Input(
                    "tower",
                    options=[WIRED, SMALL],
                    default=WIRED,
                    tooltip="as wired: clip_vision or concept_encoder. new, small: from nothing, for small worlds.",
                ),
                io.Float.Input(
                    "tower_rate",
                    default=1e-5,
                    min=0.0,
                    max=0.1,
                    step=1e-7,
                    round=False,
                    advanced=True,
                    tooltip="Learning rate of the tower; 0 leaves it as it came, which needs far less memory.",
                ),
                io.Combo.Input(
                    "subjects",
                    options=[EACH, BATCHES],
                    default=EACH,
                    advanced=True,
                    tooltip="every picture: each is rebuilt from itself (the paper). every batch: the pictures of one batch "
                    "show one subject, and each is rebuilt from another of them.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    advanced=True,
                    tooltip="Pixels of a side while training; 0 is what the model was made for.",
                ),
                io.Int.Input(
                    "accumulate",
                    default=1,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip="Batches per step, one after the other.",
                ),
                io.Float.Input(
                    "drop_text",
                    default=0.05,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of pictures seen without their prompt.",
                ),
                io.Float.Input(
                    "drop_image",
                    default=0.05,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of pictures seen without the photo.",
                ),
                io.Float.Input(
                    "drop_both",
                    default=0.05,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of pictures seen with neither. Guidance compares with these.",
                ),
                io.Float.Input(
                    "average",
                    default=0.999,
                    min=0.0,
                    max=0.99999,
                    step=0.0001,
                    round=False,
                    advanced=True,
                    tooltip="Decay of the averaged weights, which are the ones kept; 0 keeps the last ones.",
                ),
                io.Combo.Input(
                    "weighting",
                    options=["plain", "velocity"],
                    default="plain",
                    advanced=True,
                    tooltip="plain: the paper's loss. velocity: noisy levels count more, where colours are decided.",
                ),
                io.Float.Input(
                    "noise_from",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    advanced=True,
                    tooltip="0 trains on every noise level (the paper), 0.6 on the noisiest 40 % alone.",
                ),
                io.Combo.Input(
                    "merge",
                    options=[m.value for m in Merge],
                    default=Merge.CONCAT.value,
                    advanced=True,
                    tooltip="concat: one softmax over text and photo (the paper). add: beside it (IP-Adapter).",
                ),
                io.Combo.Input(
                    "mixed_precision",
                    options=[AUTO, BF16, NO],
                    default=AUTO,
                    advanced=True,
                    tooltip="auto: bf16 on a GPU, none on a CPU.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=False,
                    advanced=True,
                    tooltip="Compute the UNet twice instead of remembering it: less memory, slower.",
                ),
                io.Int.Input(
                    "save_every",
                    default=250,
                    min=1,
                    max=1_000_000,
                    advanced=True,
                    tooltip="Steps between two saves.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    advanced=True,
                    tooltip="Go on where an earlier run of the same settings stopped. Off: begin again and replace the file.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Order of the pictures and noise.",
                ),
            ],
            outputs=[
                host.Encoder.Output(
                    display_name="concept_encoder", tooltip="Wire it into Cross-Attn Detail Inject."
                ),
                io.Image.Output(
                    display_name="loss_curve",
                    tooltip="The loss of every step, and its running mean.",
                ),
            ],
        )

    @classmethod
    def execute(cls, images: list[Tensor], prompt: list[str], **given: list[Any]) -> io.NodeOutput:
        order = Order(
            images=images, prompt=prompt, **{name: value[0] for name, value in given.items()}
        )
        encoder, losses = train(order)
        curve = draw_curve(losses, order.steps)
        image = as_image(curve)
        shown = ui.ImageSaveHelper.save_images(
            image, "kindred_loss", io.FolderType.temp, cls, compress_level=1
        )
        managed = host.ManagedEncoder.of(encoder, order.save_name)
        return io.NodeOutput(managed, image, ui=ui.SavedImages(shown))


def train(order: Order) -> tuple[ConceptEncoder, list[float]]:
    """The whole training -> the averaged encoder and every step's loss. Saves as it goes, also on the user's interrupt."""
    try:
        settings = order.settings
    except ValueError as error:
        raise ValueError(f"{NODE}: {error}") from error
    family, layers, width = host.cross_layers(order.model, NODE)
    order.check_images()
    captions, (path, state) = order.captions(), order.files()
    dtype, device = precision(order)
    base = host.model_key(order.model)
    with host.training(order.model, dtype or torch.float32, NODE) as copy:
        sites = host.attention_sites(host.require_unet(copy, NODE))
        text = {
            b: (s.module.attn2.to_k.weight.float().cpu(), s.module.attn2.to_v.weight.float().cpu())
            for b, s in sites.items()
        }
        encoder = order.encoder(family, layers, width, text)
        size = order.size or host.SIDES.get(family, 512)
        examples = look(order, encoder.config.preprocessing.size, size, captions)
        prompts = {
            text: order.clip.encode_from_tokens_scheduled(order.clip.tokenize(text))
            for text in {*captions, ""}
        }
        wide = prompts[""][0][0].shape[-1]
        if wide != width:
            raise ValueError(
                f"{NODE}: the CLIP given writes text of width {wide}, but the model reads width {width}. Wire the CLIP of the "
                "same checkpoint."
            )
        denoise = host.FrozenUNet(copy, encoder.config.merge, prompts, order.gradient_checkpointing)
        trainer = Trainer(encoder, denoise, examples, settings, OneProcess(device, dtype))
        made_with = {
            "base": tell_key(base),
            "pictures": digest(examples),
            "size": size,
            "merge": encoder.config.merge.value,
            "tower": dict(encoder.config.tower),
            "precision": str(dtype or "no"),
        }
        facts = {
            "pictures": len(examples),
            "subjects": len(examples.groups),
            "batch": order.batch * order.accumulate,
            "base": str(base),
            "rate": settings.rate,
            "prompt": captions[0],
            "seed": settings.seed,
            "drop": [settings.drop_text, settings.drop_image, settings.drop_both],
        }
        try:
            if order.resume and state.exists():
                trainer.resume(known_state(state), **made_with)
                log.info("%s: going on from step %d of %s", NODE, trainer.step_number, path.name)
            run(trainer, order.save_every, Saving(trainer, path, state, made_with, facts))
        except (ValueError, FloatingPointError) as error:
            raise ValueError(f"{NODE}: {error}") from error
        return trainer.kept(**facts), trainer.losses


def known_state(path: Path) -> dict[str, Any]:
    """A state to go on from; OSError, in this node's words, where the system does not give it."""
    try:
        return read_state(path)
    except OSError as error:
        raise OSError(
            f"{NODE}: {error}. It stays as it is; look at that folder and its disk, then queue it again."
        ) from error


@dataclass
class Saving:
    """Saves a trainer's state and averaged encoder; knows which step the files hold."""

    trainer: Trainer
    path: Path
    state: Path
    made_with: Mapping[str, Any]
    facts: Mapping[str, Any]
    saved: int = 0

    def __post_init__(self) -> None:
        self.saved = self.trainer.step_number if self.path.exists() else 0

    def __call__(self) -> None:
        """OSError says what there still is."""
        if self.trainer.step_number == self.saved:
            return
        try:
            self.trainer.save(self.path, self.state, self.made_with, self.facts)
        except OSError as error:
            kept = (
                f"{self.path.name} of step {self.saved} is whole and stays"
                if self.saved
                else "nothing was saved before"
            )
            raise OSError(
                f"{NODE}: step {self.trainer.step_number} could not be saved ({error}); {kept}. To go on, "
                f"{remedy(error, WRITABLE)} and queue the same again: it goes on from step {self.saved}."
            ) from error
        self.saved = self.trainer.step_number
        log.info(
            "%s: step %d of %d saved as %s",
            NODE,
            self.saved,
            self.trainer.settings.steps,
            self.path,
        )


def run(trainer: Trainer, save_every: int, save: Saving) -> None:
    """Every step up to the last. The host's interrupt, or a loss that is not finite, is raised once what was learned is saved."""
    steps, shown = trainer.settings.steps, -math.inf
    tell = host.progress(steps)
    try:
        tell(trainer.step_number)
        while trainer.step_number < steps:
            trainer.step()
            now = time.monotonic()
            due = (
                now - shown >= PREVIEW_EVERY or trainer.step_number == steps
            )  # the last one stays on the node beside the result
            picture = draw_curve(trainer.losses, steps) if due else None
            shown = now if picture else shown
            tell(trainer.step_number, picture)
            if trainer.step_number % save_every == 0:
                save()
    except (host.Interrupted, FloatingPointError) as stop:
        try:
            save()
        except OSError as error:
            log.warning("%s", error)
        if isinstance(stop, host.Interrupted):
            log.info(
                "%s: cancelled at step %d; %s holds what was learned",
                NODE,
                trainer.step_number,
                save.path,
            )
        raise
    save()


def precision(order: Order) -> tuple[torch.dtype | None, torch.device]:
    """The autocast's dtype, None for float32, and where it runs."""
    device = order.model.load_device
    fast = order.mixed_precision == BF16 or order.mixed_precision == AUTO and device.type == "cuda"
    return torch.bfloat16 if fast else None, device


def look(order: Order, small: int, size: int, captions: Sequence[str]) -> Examples:
    """The pictures as the tower (`small` pixels) and the UNet (latents of `size` pixels) see them."""
    pixels, latents, subjects = [], [], []
    whole = {side: Preprocessing(side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) for side in (small, size)}
    tell = host.progress(len(captions))
    with torch.inference_mode():
        for number, batch in enumerate(order.images):
            for image in batch:
                tell(len(subjects))
                side = min(
                    image.shape[:2]
                )  # the centre square first: a strip would be enlarged beyond all memory
                top, left = ((n - side) // 2 for n in image.shape[:2])
                image = image[top : top + side, left : left + side]
                pixels.append(
                    whole[small](image[None].cpu())[0].mul(255).round().byte().movedim(0, -1)
                )
                encoded = order.vae.encode(whole[size](image[None].cpu()).movedim(1, -1))
                latents.append(host.latent_in(order.model, encoded, NODE)[0])
                subjects.append(number if order.subjects == BATCHES else len(subjects))
    return Examples(
        torch.stack(latents), torch.stack(pixels), captions, subjects
    )  # copies, made outside of inference_mode


def digest(examples: Examples) -> str:
    told = hashlib.blake2b(examples.pixels.numpy().tobytes(), digest_size=4)
    told.update(repr((list(examples.prompts), list(examples.subjects))).encode())
    return f"{len(examples)} {told.hexdigest()}"


def draw_curve(
    losses: Sequence[float], steps: int, width: int = 768, height: int = 432
) -> Image.Image:
    """Every step's loss, faint, and its running mean, over all steps to come; a logarithmic axis where the mean spans 8 times."""
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), typeface()
    left, top, right, bottom = 64, 32, width - 16, height - 40
    if not losses:
        pen.text((width / 2, height / 2), "no steps yet", "#555555", font, "mm")
        return picture
    values = np.asarray(losses, dtype=np.float64).clip(1e-12)
    window = max(1, min(len(values) // 12, 400))
    sums = np.concatenate(([0.0], values.cumsum()))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    mean = (sums[ends] - sums[starts]) / (ends - starts)
    logarithmic = bool(mean.max() / mean.min() > 8)
    low, high = (float(v) for v in np.quantile(values, (0.005, 0.995)))
    low, high = min(low, mean.min()), max(high, mean.max())
    low, high = (low / 1.1, high * 1.1) if logarithmic else (0.0, high * 1.05)
    scale: Callable[[Any], Any] = np.log if logarithmic else np.asarray

    def place(step: Any, loss: Any) -> Any:
        y = (
            scale(np.clip(loss, max(low, 1e-12) if logarithmic else low, high)) - scale(low)
        ) / max(scale(high) - scale(low), 1e-12)
        return left + (right - left) * step / max(steps, 1), bottom - (bottom - top) * y

    for loss in ticks(low, high, logarithmic):
        y = place(0, loss)[1]
        pen.line(((left, y), (right, y)), "#e6e6e6")
        pen.text((left - 6, y), f"{loss:.3g}", "#555555", font, "rm")
    for step in ticks(0, steps, False):
        x = place(step, high)[0]
        pen.line(((x, bottom), (x, bottom + 4)), "#555555")
        pen.text((x, bottom + 7), f"{step:g}", "#555555", font, "mt")
    for series, colour, thick in ((values, "#b9cfe8", 1), (mean, "#1f4e8c", 3)):
        points = [(float(x), float(y)) for x, y in zip(*place(ends, series))]
        pen.line(points if len(points) > 1 else points * 2, colour, thick)
        if len(points) == 1:
            pen.ellipse(
                [points[0][0] - 2, points[0][1] - 2, points[0][0] + 2, points[0][1] + 2], colour
            )
    pen.line(((left, top), (left, bottom), (right, bottom)), "#555555")
    pen.text((left, 8), f"loss{' (log)' if logarithmic else ''}", "#555555", font)
    pen.text((right, 8), f"step {len(values)} of {steps}: {mean[-1]:.4g}", "#1f4e8c", font, "ra")
    pen.text(((left + right) / 2, height - 4), "step", "#555555", font, "mb")
    return picture


def ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers between low and high: about five, or 1, 2 and 5 of every power of ten."""
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [n * 10.0**p for p in powers for n in (1, 2, 5) if low <= n * 10.0**p <= high]
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12) / 4))
    step *= next(n for n in (1, 2, 5, 10) if (high - low) / (n * step) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
