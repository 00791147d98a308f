"""Judges of real pictures: CLIP, DINOv2 and an aesthetic head, from files that the user gives (method.md 2.5 and 3.5).

Nothing is downloaded. CLIP and DINOv2 run in the host's own classes, so call `boot` first. Every error of a file is a ValueError that
names the file and what to do.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

NAME = "evaluate"
HEAD_WIDTH = 768  # of CLIP ViT-L/14's common space, which LAION's head reads
SPACES = {
    512: "ViT-B",
    768: "ViT-L",
    1024: "ViT-H",
    1280: "ViT-bigG",
}  # common spaces by their width


@dataclass(frozen=True)
class Column:
    """What a judge measures: the key of its values, the table's head, and what it is."""

    name: str
    title: str
    meaning: str


@dataclass(frozen=True)
class Request:
    """What pictures were made from: a prompt per picture, and photos of the subject [Y X 3] in 0..1, of any sizes; () without any."""

    prompts: tuple[str, ...]
    references: tuple[Tensor, ...] = ()


class Judge(Protocol):
    """Says of pictures [b Y X 3] in 0..1 one number per picture and column; NaN where there is nothing to measure."""

    columns: Sequence[Column]

    def __call__(self, images: Tensor, request: Request) -> dict[str, list[float]]: ...


# judges --------------------------------------------------------------------------------------------------------------------


class Clip:
    """CLIP by its picture tower, with the text half of the same CLIP and LAION's aesthetic head where they are given.

    vision, clip: from load_vision and load_text (the host's CLIP_VISION and CLIP); head: from load_head. ValueError where their widths
    do not fit one another. Cosines are raw: no factor, nothing cut off at 0.
    """

    def __init__(self, vision: Any, clip: Any = None, head: AestheticHead | None = None) -> None:
        from kindred.nodes.host.judging import text_towers, tower_title

        self.clip, self.head, self.title = clip, head, tower_title(vision)
        if vision.model_type != "clip_vision_model":
            raise ValueError(
                f"{NAME}: {self.title} is no CLIP and shares no space with texts. Give a CLIP Vision, such as ViT-L/14's; "
                "a DINO has its own judge."
            )
        self.width = vision.config.get("projection_dim", vision.config["hidden_size"])
        if clip is not None and self.width not in (towers := text_towers(clip)):
            raise ValueError(
                f"{NAME}: {self.title} gives pictures as {space(self.width)}, but the text encoder gives texts as "
                f"{' or '.join(map(space, towers)) or 'no vector at all'}. Give the two halves of one CLIP."
            )
        if head is not None and self.width != head.width:
            raise ValueError(
                f"{NAME}: the aesthetic head reads {space(head.width)}, but {self.title} gives {space(self.width)}. Give the "
                "CLIP Vision of ViT-L/14, which the head was trained on, or leave the head out."
            )
        every = [
            Column("text", "CLIP text", "raw cosine with the picture's own prompt"),
            Column("image", "CLIP image", "mean cosine with the photos"),
            Column(
                "consistency",
                "CLIP consistency",
                "mean cosine with the other pictures of its batch",
            ),
            Column("aesthetic", "aesthetic", "LAION's improved aesthetic predictor, 1 to 10"),
        ]
        has = {"text": clip is not None, "aesthetic": head is not None}
        self.columns = tuple(
            replace(c, meaning=f"{c.meaning} ({self.title})")
            for c in every
            if has.get(c.name, True)
        )
        self.embed = partial(embedded, vision)
        self.photos, self.texts = Kept(self.embed), Kept(self.read)

    def read(self, texts: Sequence[str]) -> Tensor:
        from kindred.nodes.host import text_embeddings

        return text_embeddings(self.clip, self.width, texts, NAME)

    @torch.inference_mode()
    def __call__(self, images: Tensor, request: Request) -> dict[str, list[float]]:
        """Raises ValueError for pictures or photos that are none or not finite, and where prompts and pictures differ in count."""
        from kindred.models.metrics import paired_cosines

        images, photos = pictures_of(images, request)
        own = self.embed(images)
        image, consistency = similarities(own, self.photos(photos))
        columns = {"image": image, "consistency": consistency}
        if self.clip is not None:
            columns["text"] = paired_cosines(own, torch.stack(self.texts(request.prompts))).tolist()
        if self.head is not None:
            columns["aesthetic"] = self.head(own).tolist()
        return {column.name: columns[column.name] for column in self.columns}


class Dino:
    """DINOv2 (or 3) as the host's own CLIP Vision loads it: likeness of what is shown rather than of what it is called."""

    def __init__(self, vision: Any) -> None:
        from kindred.nodes.host import tower_title

        title = tower_title(vision)
        if not vision.model_type.startswith("dino"):
            raise ValueError(
                f"{NAME}: {title} is no DINO. Give a DINOv2 that the host's Load CLIP Vision reads, large or giant."
            )
        self.columns = (
            Column("dino", "DINO", f"mean cosine with the photos ({title})"),
            Column(
                "dino_consistency",
                "DINO consistency",
                f"mean cosine with the other pictures of its batch ({title})",
            ),
        )
        self.embed = partial(embedded, vision)
        self.photos = Kept(self.embed)

    @torch.inference_mode()
    def __call__(self, images: Tensor, request: Request) -> dict[str, list[float]]:
        """Raises ValueError as Clip does."""
        images, photos = pictures_of(images, request)
        image, consistency = similarities(self.embed(images), self.photos(photos))
        return {"dino": image, "dino_consistency": consistency}


class Kept:
    """Embeddings by what they are of: the same photo or prompt is never embedded twice."""

    def __init__(self, embed: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self.embed, self.rows = embed, dict[Any, Any]()

    def __call__(self, wanted: Sequence[Any]) -> list[Any]:
        """A row for each of them."""
        keys = [content(one) for one in wanted]
        new = {key: one for key, one in zip(keys, wanted) if key not in self.rows}
        if new:
            self.rows |= zip(new, self.embed(list(new.values())))
        return [self.rows[key] for key in keys]


def content(one: Tensor | str) -> Any:
    """What tells one text or picture from another, whatever object holds it."""
    return (
        one
        if isinstance(one, str)
        else (tuple(one.shape), hashlib.blake2b(one.contiguous().numpy().tobytes()).digest())
    )


def pictures_of(images: Tensor, request: Request) -> tuple[Tensor, list[Tensor]]:
    """Pictures [b Y X 3] and photos [Y X 3], float32 in 0..1 on the CPU; ValueError for what is none, or where a prompt is missing."""
    from kindred.nodes.host import pictures_in

    images = pictures_in(images, NAME, "the pictures")
    if len(request.prompts) != len(images):
        raise ValueError(
            f"{NAME}: {len(images)} pictures come with {len(request.prompts)} prompts; each has its own."
        )
    return images, [
        pictures_in(photo[None], NAME, f"photo {i}")[0]
        for i, photo in enumerate(request.references, 1)
    ]


def embedded(vision: Any, pictures: Sequence[Tensor]) -> Tensor:
    """Pictures [Y X 3] in 0..1 -> [b c], through the host's CLIP_VISION."""
    from kindred.nodes.host import picture_embeddings

    return picture_embeddings(vision, pictures, NAME)


def similarities(own: Tensor, photos: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Pictures [b c] and photos [c] -> each picture's mean cosine with the photos, and with the others; NaN where there are none."""
    from kindred.models.metrics import cosine_similarity, mean_with_others

    known = (
        cosine_similarity(own, torch.stack(photos)).mean(1).tolist() if photos else [nan] * len(own)
    )
    others = mean_with_others(cosine_similarity(own, own)).tolist() if len(own) > 1 else [nan]
    return known, others


def space(width: int) -> str:
    """A common space of CLIP by its width, as people know it."""
    return f"{width} numbers ({SPACES[width]})" if width in SPACES else f"{width} numbers"


# the aesthetic head --------------------------------------------------------------------------------------------------------


class AestheticHead(nn.Module):
    """LAION's improved aesthetic predictor: one linear layer after another over a normalised picture embedding of CLIP ViT-L/14.

    Source: christophschuhmann/improved-aesthetic-predictor, the model of paper A's third column (method.md 2.5).
    """

    def __init__(self, width: int = HEAD_WIDTH) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
        self.eval()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Picture embeddings [b c] of any length -> scores [b], about 1..10."""
        return self.layers(nn.functional.normalize(embeddings.float(), dim=1))[:, 0]


# from files ----------------------------------------------------------------------------------------------------------------


def load_vision(path: Path | str) -> Any:
    """A CLIP Vision or DINO through the host's own loader. ValueError: no such file, no such model, or weights are missing in it."""
    import comfy.clip_vision

    remedy = "Give a file that the host's Load CLIP Vision reads, such as CLIP ViT-L/14's or DINOv2 large."
    names = set(weights_in(path, remedy))
    try:
        vision = comfy.clip_vision.load(str(path))
    except (
        RuntimeError,
        KeyError,
        UnboundLocalError,
    ) as error:  # the host's, for towers it knows half of
        raise ValueError(
            f"{NAME}: {path} is no picture tower that ComfyUI can load ({why(error)}). {remedy}"
        ) from error
    if vision is None:
        raise ValueError(f"{NAME}: {path} holds no picture tower. {remedy}")
    # the host only warns of what is missing, and leaves those weights as the memory was; OpenCLIP names all of them otherwise
    missing = (
        []
        if any(name.startswith("visual.") for name in names)
        else [name for name in vision.model.state_dict() if name not in names]
    )
    if missing:
        raise ValueError(
            f"{NAME}: {path} lacks {len(missing)} weights of its picture tower, such as {missing[0]}. {remedy}"
        )
    return vision


def load_text(path: Path | str) -> Any:
    """A CLIP's text encoder as the host's CLIP. ValueError: no such file, no such model, or it cannot meet pictures in one space."""
    import comfy.sd

    remedy = "Give the whole text encoder of the same CLIP, such as clip_l.safetensors."
    names = set(weights_in(path, remedy))
    if not names & {
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "transformer.resblocks.0.ln_1.weight",
    }:
        raise ValueError(f"{NAME}: {path} holds no text encoder of CLIP. {remedy}")
    if not names & {"text_projection.weight", "text_projection"}:
        raise ValueError(
            f"{NAME}: {path} holds no text projection, so its texts cannot be compared with pictures. {remedy}"
        )
    return comfy.sd.load_clip([str(path)])


def load_head(path: Path | str) -> AestheticHead:
    """LAION's aesthetic head from .pth or .safetensors. ValueError: no such file, another model, or made for another CLIP."""
    remedy = "Give the head for CLIP ViT-L/14 of LAION's improved aesthetic predictor, such as sac+logos+ava1-l14-linearMSE.pth."
    weights = {name: value.float() for name, value in weights_in(path, remedy).items()}
    with torch.random.fork_rng(devices=[]):  # layers draw weights when they are made
        head = AestheticHead()
    first = weights.get("layers.0.weight")
    if first is None or first.ndim != 2:
        raise ValueError(
            f"{NAME}: {path} is no aesthetic head of this kind: it has no layers.0.weight. {remedy}"
        )
    if first.shape[1] != HEAD_WIDTH:
        raise ValueError(
            f"{NAME}: the aesthetic head in {path} reads {space(first.shape[1])}, not {space(HEAD_WIDTH)}. {remedy}"
        )
    return filled(head, weights, path, remedy)


def weights_in(path: Path | str, remedy: str) -> Mapping[str, Tensor]:
    """The tensors of a file by name, read without running anything in it. ValueError where there is no such file or it holds none."""
    import comfy.utils

    if not Path(path).is_file():
        raise ValueError(f"{NAME}: there is no file {path}. {remedy}")
    try:
        weights = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception as error:  # pickle, zip and safetensors have each their own
        raise ValueError(
            f"{NAME}: {path} is no file of weights ({why(error)}). {remedy}"
        ) from error
    if not isinstance(weights, Mapping) or not all(
        isinstance(value, Tensor) for value in weights.values()
    ):
        raise ValueError(f"{NAME}: {path} holds something else than named weights. {remedy}")
    return weights


def filled(module: nn.Module, weights: Mapping[str, Tensor], path: Path | str, remedy: str) -> Any:
    """The module with these weights, all of them and no others, all finite."""
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ValueError(
            f"{NAME}: the weights in {path} are not those of {type(module).__name__} ({why(error)}). {remedy}"
        ) from error
    if not all(value.isfinite().all() for value in module.state_dict().values()):
        raise ValueError(
            f"{NAME}: {path} holds NaN or infinite weights: the file is broken. {remedy}"
        )
    return module.requires_grad_(False)


def why(error: Exception) -> str:
    """What an error says, on one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
