"""Concept Encoder Train: the loop of models/concept/training.py in the canvas (paper A,
arXiv 2403.11284, sections 2.3 and 3.1).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..models.attention.parts import Merge
from ..models.concept.config import new_config
from ..models.concept.draws import Examples
from ..models.concept.encoder import ConceptEncoder
from ..models.concept.pictures import NODE, captions_of, check_images, digest
from ..models.concept.saving import Saving, Watching, known_state, run
from ..models.concept.settings import TrainSettings
from ..models.concept.training import OneProcess, Trainer
from ..models.identity import tell_key
from . import host
from .drawing.curve import draw_curve
from .drawing.pen import as_image

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
    tie_blocks: int = 1

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
        # a new tower has everything to learn, as the projections have
        tower = None if self.tower == SMALL else self.tower_rate
        return TrainSettings(
            rate=self.learning_rate,
            tower_rate=tower,
            **{name: getattr(self, name) for name in same},
        )

    def files(self) -> tuple[Path, Path]:
        """The encoder's file and its state's; ValueError for a name that is no file in the folder
        or would replace a stranger's.
        """
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
                f"{NODE}: save_name is {self.save_name!r:.60}. Give the name of a file in "
                f"{folder}, for instance my_subject."
            )
        state = path.with_suffix(".training")
        if self.resume and path.exists() and not state.exists():
            raise ValueError(
                f"{NODE}: {path.name} is there already, without the state of a training beside it. "
                f"Choose another save_name, "
                "or switch resume off to replace it; to train it further, wire Concept Encoder "
                "Load into concept_encoder."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        return path, state

    def encoder(self, family: str, layers: Any, width: int | None, text: Mapping) -> ConceptEncoder:
        """Where the training starts; text: (to_k, to_v) of a UNet. ValueError says what to wire."""
        wired = [
            name for name in ("clip_vision", "concept_encoder") if getattr(self, name) is not None
        ]
        if len(wired) + (self.tower == SMALL) != 1:
            raise ValueError(
                f"{NODE}: tower is {self.tower!r} and {' and '.join(wired) or 'nothing'} wired. "
                f"Wire either clip_vision (CLIP "
                "ViT-L or ViT-H) or a concept_encoder to train further; or choose 'new, small' and "
                "wire neither."
            )
        if self.concept_encoder is not None:
            return host.continued_encoder(self.concept_encoder, family, layers, width, NODE)
        how = (SMALL_TOWER, Merge(self.merge), self.tie_blocks, NODE)
        config = new_config(family, layers, width, *how)
        return host.new_encoder(config, self.clip_vision, self.seed, text, NODE)


class ConceptEncoderTrain(io.ComfyNode):
    """Eq. (10) of paper A: the encoder learns to draw the pictures it is shown; UNet, VAE and text
    encoder stay as they are.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredConceptEncoderTrain",
            display_name=NODE,
            category="Kindred",
            is_input_list=True,
            is_output_node=True,
            description="Trains a concept encoder on your pictures and saves it into "
            "models/concept_encoders. Cancelling keeps what was learned so far; run "
            "the same settings again to resume.",
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
                    tooltip="The base model, from Load Checkpoint, with any LoRA. It is not "
                    "changed.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Image.Input(
                    "images",
                    tooltip="The pictures to learn from, as batches or lists of any size. "
                    "The centre square of each is used.",
                ),
                io.String.Input(
                    "prompt",
                    default="a photo",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="What the pictures show in general, such as 'a photo of a face'; or "
                    "one line per picture.",
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
                    tooltip="Training steps. The paper takes 100,000 for one kind of subject.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-5,
                    min=1e-8,
                    max=0.1,
                    step=1e-7,
                    round=False,
                    tooltip="Learning rate of the projections and of a new small tower. The "
                    "paper takes 1e-5; the miniature took 2e-3.",
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
                    tooltip="The part that looks at the photo. as wired: starts from "
                    "clip_vision or concept_encoder. new, small: starts from "
                    "scratch, for small models such as the miniature.",
                ),
                io.Float.Input(
                    "tower_rate",
                    default=1e-5,
                    min=0.0,
                    max=0.1,
                    step=1e-7,
                    round=False,
                    advanced=True,
                    tooltip="Learning rate of the tower; 0 leaves it unchanged, which needs "
                    "far less memory.",
                ),
                io.Combo.Input(
                    "subjects",
                    options=[EACH, BATCHES],
                    default=EACH,
                    advanced=True,
                    tooltip="every picture: each is rebuilt from itself (the paper). every batch: "
                    "the pictures of one batch "
                    "show one subject, and each is rebuilt from another of them.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    advanced=True,
                    tooltip="Pixels per side while training; 0 = the model's own size.",
                ),
                io.Int.Input(
                    "accumulate",
                    default=1,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip="Batches per step, one after the other (gradient accumulation).",
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
                    tooltip="Decay of the running average of the weights, which is what is "
                    "saved; 0 saves the last weights.",
                ),
                io.Combo.Input(
                    "weighting",
                    options=["plain", "velocity"],
                    default="plain",
                    advanced=True,
                    tooltip="plain: the paper's loss. velocity: noisy levels count more, where "
                    "colours are decided.",
                ),
                io.Float.Input(
                    "noise_from",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    advanced=True,
                    tooltip="0 trains on every noise level (the paper), 0.6 on the noisiest 40 % "
                    "alone.",
                ),
                io.Combo.Input(
                    "merge",
                    options=[m.value for m in Merge],
                    default=Merge.CONCAT.value,
                    advanced=True,
                    tooltip="concat: prompt and photo share one attention (the paper). add: "
                    "the photo gets its own (IP-Adapter).",
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
                    tooltip="Computes the UNet twice instead of storing it: less memory, "
                    "slower. Not on transformers.",
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
                    tooltip="Resumes an earlier run with the same settings where it "
                    "stopped. Off: starts again and replaces the file.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Random seed for the order of the pictures and the noise.",
                ),
                io.Int.Input(
                    "tie_blocks",
                    default=1,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="Transformers only: neighbouring blocks that share keys and values.",
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
    def execute(cls, images: list[Tensor], prompt: list[str], **inputs: list[Any]) -> io.NodeOutput:
        order = Order(
            images=images, prompt=prompt, **{name: value[0] for name, value in inputs.items()}
        )
        encoder, losses = train(order)
        image = as_image(draw_curve(losses, order.steps))
        shown = ui.ImageSaveHelper.save_images(
            image, "kindred_loss", io.FolderType.temp, cls, compress_level=1
        )
        managed = host.ManagedEncoder.of(encoder, order.save_name)
        return io.NodeOutput(managed, image, ui=ui.SavedImages(shown))


def train(order: Order) -> tuple[ConceptEncoder, list[float]]:
    """The whole training -> the averaged encoder and every step's loss. Saves as it goes, also on
    the user's interrupt.
    """
    try:
        settings = order.settings
    except ValueError as error:
        raise ValueError(f"{NODE}: {error}") from error
    layout = host.concept_layers(order.model, NODE)
    check_images(order.images)
    captions = captions_of(order.prompt, sum(map(len, order.images)))
    path, state = order.files()
    dtype, device = precision(order)
    base = host.model_key(order.model)
    with host.training(order.model, dtype or torch.float32, NODE) as copy:
        encoder = order.encoder(*layout, host.text_layers(copy, NODE))
        family, _, width = layout
        size = order.size or host.SIDES.get(family, 512)
        examples = look(order, encoder.config.preprocessing.size, size, captions)
        prompts = host.encoded(order.clip, captions, width, NODE)
        merge = encoder.config.merge
        denoise = host.frozen(copy, merge, prompts, order.gradient_checkpointing, NODE)
        trainer = Trainer(encoder, denoise, examples, settings, OneProcess(device, dtype))
        made_with = {
            "base": tell_key(base),
            "pictures": digest(examples),
            "size": size,
            "merge": merge.value,
            "tower": dict(encoder.config.tower),
            "precision": str(dtype or "no"),
        }
        facts = facts_of(order, examples, base, captions)
        try:
            if order.resume and state.exists():
                trainer.resume(known_state(state), **made_with)
                log.info("%s: resuming at step %d of %s", NODE, trainer.step_number, path.name)
            save = Saving(trainer, path, state, made_with, facts)
            watch = Watching(trainer, host.progress(settings.steps), draw_curve)
            run(order.save_every, save, watch, host.Interrupted)
        except (ValueError, FloatingPointError) as error:
            raise ValueError(f"{NODE}: {error}") from error
        return trainer.kept(**facts), trainer.losses


def facts_of(
    order: Order, examples: Examples, base: str, captions: Sequence[str]
) -> dict[str, Any]:
    """What the encoder's file tells of its training."""
    settings = order.settings
    return {
        "pictures": len(examples),
        "subjects": len(examples.groups),
        "batch": order.batch * order.accumulate,
        "base": str(base),
        "rate": settings.rate,
        "prompt": captions[0],
        "seed": settings.seed,
        "drop": [settings.drop_text, settings.drop_image, settings.drop_both],
    }


def precision(order: Order) -> tuple[torch.dtype | None, torch.device]:
    """The autocast's dtype, None for float32, and where it runs."""
    device = order.model.load_device
    fast = order.mixed_precision == BF16 or order.mixed_precision == AUTO and device.type == "cuda"
    return torch.bfloat16 if fast else None, device


def look(order: Order, small: int, size: int, captions: Sequence[str]) -> Examples:
    """The pictures as the tower (`small` pixels) and the UNet (latents of `size` pixels)
    see them.
    """
    return host.examples_of(
        order.model,
        order.vae,
        order.images,
        captions,
        small,
        size,
        order.subjects == BATCHES,
        NODE,
        host.progress(len(captions)),
    )
