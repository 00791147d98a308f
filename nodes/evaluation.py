"""Consistency Score: numbers and a sheet that people can post (method.md 2.5 and 3.5, the papers'
evaluations).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..miniature.reader import Reading, load_reader, pairwise_similarity
from ..miniature.world import CLASSES, SCENES
from ..models.metrics import cosine_similarity, mean_with_others, paired_cosines
from ..models.scores import CLIP_SCALE, READER_SCALE, Scores, counted, cut_out
from ..models.scores import NODE as SCORE
from . import host
from .drawing.card import Card, Line, score_card
from .drawing.pen import as_image, as_pictures

AUTO, READER, CLIP = "auto", "miniature reader", "CLIP"
READER_TITLE = "the miniature's attribute reader (it only knows the miniature's world)"
log = logging.getLogger(__name__)


# judges -------------------------------------------------------------------------------------------


def read_scores(images: Tensor, reference: Tensor | None, prompts: Sequence[str]) -> Scores:
    """The miniature's attribute reader: identity is exactly what it was trained to tell, in that
    world alone.
    """
    with torch.random.fork_rng(
        devices=[]
    ):  # layers draw weights when they are made, before the trained ones are there
        reader = load_reader()
    reading = reader.read(images)
    known = None if reference is None else pairwise_similarity(reading, reader.read(reference))
    texts = tuple(agreement(reading, i, line) for i, line in enumerate(prompts)) or (None,) * len(
        images
    )
    seen = tuple(
        f"shows a {kind}, {scene}"
        for kind, scene in zip(reading.names("class"), reading.names("scene"))
    )
    return Scores(
        READER_TITLE,
        pairwise_similarity(reading, reading),
        known,
        texts,
        "no prompt names a class or scene of the miniature" if prompts else "no prompts",
        seen,
        READER_SCALE,
    )


def agreement(reading: Reading, index: int, line: str) -> float | None:
    """1 where a picture shows the class and the scene that its line names, else 0; None where the
    line names neither.
    """
    words = {
        word
        for token in re.findall(r"[a-z]+", line.lower())
        for word in (token, token.removesuffix("s"))
    }
    wanted = {
        kind: words.intersection(names) for kind, names in (("class", CLASSES), ("scene", SCENES))
    }
    if not any(wanted.values()):
        return None
    return float(
        all(reading.names(kind)[index] in names for kind, names in wanted.items() if names)
    )


def clip_scores(
    images: Tensor,
    reference: Tensor | None,
    masks: Tensor | None,
    reference_masks: Tensor | None,
    prompts: Sequence[str],
    vision: Any,
    clip: Any,
) -> Scores:
    """Cosines of the host's CLIP: of the subjects' pictures with one another, with the reference's,
    and of whole pictures with texts.
    """
    mean = vision.image_mean  # what the tower reads as zero
    subjects = cut_out(images, masks, mean, "masks")
    photos = (
        [] if reference is None else cut_out(reference, reference_masks, mean, "reference_masks")
    )
    own = host.picture_embeddings(vision, subjects, SCORE)
    known = (
        cosine_similarity(own, host.picture_embeddings(vision, photos, SCORE))
        if len(photos)
        else None
    )
    texts: tuple[float | None, ...] = (None,) * len(own)
    if prompts and clip is not None:
        whole = own if subjects is images else host.picture_embeddings(vision, images, SCORE)
        lines = list(dict.fromkeys(prompts))
        said = host.text_embeddings(clip, own.shape[1], lines, SCORE)
        texts = tuple(paired_cosines(whole, said[[lines.index(line) for line in prompts]]).tolist())
    return Scores(
        host.tower_title(vision)
        + ("" if subjects is images else ", subjects cut out by their masks"),
        cosine_similarity(own, own),
        known,
        texts,
        "no CLIP wired" if prompts else "no prompts",
        ("",) * len(own),
        CLIP_SCALE,
    )


# the table ----------------------------------------------------------------------------------------


def markdown(scores: Scores, prompts: Sequence[str]) -> str:
    """The numbers, and what they are of, picture by picture."""
    lines = [f"**{SCORE}**, judged by {scores.judge}", "", "| score | value | |", "|---|---:|---|"]
    lines += [
        f"| {name} | {digits(value)} | {meaning} |" for name, value, meaning in scores.figures()
    ]
    others = (
        mean_with_others(scores.pairs).tolist()
        if len(scores.pairs) > 1
        else [None] * len(scores.pairs)
    )
    columns: list[tuple[str, Sequence[str]]] = [
        ("picture", [str(i + 1) for i in range(len(others))]),
        ("with the others", [digits(value) for value in others]),
    ]
    if scores.known is not None:
        columns.append(
            ("with the reference", [digits(value) for value in scores.known.mean(1).tolist()])
        )
    if scores.text is not None:
        columns.append(("text", [digits(value) for value in scores.texts]))
    if any(scores.labels):
        columns.append(("found", scores.labels))
    if prompts:
        columns.append(
            ("prompt", [line.replace("\\", "\\\\").replace("|", "\\|") for line in prompts])
        )
    rows = [
        [name for name, _ in columns],
        ["---"] * len(columns),
        *zip(*(values for _, values in columns)),
    ]
    return "\n".join([*lines, "", *(f"| {' | '.join(row)} |" for row in rows)])


def digits(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"  # + 0: no -0.000


def card_of(
    scores: Scores, images: Tensor, reference: Tensor | None, prompts: Sequence[str]
) -> Card:
    """The same, to be drawn."""

    def beside(seen: str, value: float | None) -> str:
        if value is None or not seen:
            return seen if value is None else f"text {value:.3f}"
        return f"{seen}: {'as asked' if value else 'not as asked'}"

    lines = [
        Line(prompt, beside(label, value), bool(label) and value == 0)
        for prompt, label, value in zip(prompts or ("",) * len(images), scores.labels, scores.texts)
    ]
    return Card(
        SCORE,
        f"judged by {scores.judge}",
        scores.figures(),
        as_pictures(images),
        [] if reference is None else as_pictures(reference),
        scores.pairs,
        scores.known,
        lines,
        scores.scale,
    )


class ConsistencyScore(io.ComfyNode):
    """Paper B's subject consistency (section 5.3), paper A's identity and text scores, as one table
    and one picture.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredConsistencyScore",
            display_name=SCORE,
            category="Kindred",
            is_output_node=True,
            description="How consistently a batch shows the same subject, the subject of a "
            "reference, and what its prompts ask for: three numbers, a table, and a "
            "picture of every pair's similarity.",
            search_aliases=[
                "evaluate",
                "identity score",
                "clip score",
                "similarity",
                "compare images",
                "metrics",
                "benchmark",
            ],
            inputs=[
                io.Image.Input(
                    "images", tooltip="The batch whose pictures should show one subject."
                ),
                io.Combo.Input(
                    "judge",
                    options=[AUTO, READER, CLIP],
                    default=AUTO,
                    tooltip="auto: CLIP if clip_vision is wired, else the miniature's "
                    "reader. miniature reader: only for pictures of the miniature; "
                    "its numbers mean nothing for others. CLIP: for all other "
                    "pictures.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    dynamic_prompts=False,
                    optional=True,
                    tooltip="For the text score: one line per picture, as in Subject Prompts, or "
                    "one for all.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="Photos of the subject: for the identity score.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White = the subject of each picture. CLIP then ignores the "
                    "surroundings, which otherwise count a lot. The miniature's "
                    "reader needs no masks.",
                ),
                io.Mask.Input(
                    "reference_masks",
                    optional=True,
                    tooltip="The same for the reference: wire both or neither.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Load CLIP Vision: ViT-L or ViT-H as the judge (DINOv2 judges too, "
                    "without texts).",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For the text score, the text half of the same CLIP: clip_l for "
                    "ViT-L, SD2.x's for ViT-H. SD1.5 checkpoints lack its last "
                    "layer: use Load CLIP.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="consistency",
                    tooltip="Mean similarity of all pairs of the batch; 1 = the same "
                    "subject. 0 for a single picture.",
                ),
                io.Float.Output(
                    display_name="identity",
                    tooltip="Mean similarity to the reference; 1 = its subject. 0 without a "
                    "reference.",
                ),
                io.Float.Output(
                    display_name="text",
                    tooltip="Reader: share of pictures with their prompt's class and scene. CLIP: "
                    "mean "
                    "raw cosine with the prompt, 0.2 to 0.35 as a rule. 0 without prompts.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="All numbers as a markdown table, which names its judge.",
                ),
                io.Image.Output(
                    display_name="picture",
                    tooltip="The pictures, the similarity of every pair, and the numbers.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: Tensor,
        judge: str = AUTO,
        prompts: str = "",
        reference: Tensor | None = None,
        masks: Tensor | None = None,
        reference_masks: Tensor | None = None,
        clip_vision: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        images = host.pictures_in(images, SCORE, "images")
        known = None if reference is None else host.pictures_in(reference, SCORE, "reference")
        lines = lines_of(prompts, len(images))
        require_judgeable(images, known, lines, judge, clip_vision, reference_masks)
        if judge == READER or clip_vision is None:
            warn_of_reader(
                judge,
                clip_vision=clip_vision,
                clip=clip,
                masks=masks,
                reference_masks=reference_masks,
            )
            scores = read_scores(images, known, lines)
        else:
            scores = clip_scores(images, known, masks, reference_masks, lines, clip_vision, clip)
        log_scores(scores)
        table = markdown(scores, lines)
        picture = as_image(score_card(card_of(scores, images, known, lines)))
        shown = ui.ImageSaveHelper.save_images(
            picture, "kindred_consistency_score", io.FolderType.temp, cls, compress_level=1
        )
        return io.NodeOutput(
            scores.consistency or 0.0,
            scores.identity or 0.0,
            scores.text or 0.0,
            table,
            picture,
            ui=ui.SavedImages(shown).as_dict() | ui.PreviewText(table).as_dict(),
        )


def log_scores(scores: Scores) -> None:
    said = ", ".join(f"{name} {digits(value)}" for name, value, _ in scores.figures())
    log.info("%s: %s: %s", SCORE, scores.judge, said)


def require_judgeable(
    images: Tensor,
    reference: Tensor | None,
    lines: Sequence[str],
    judge: str,
    clip_vision: Any,
    reference_masks: Tensor | None,
) -> None:
    """ValueError where there is nothing to judge, or not what the judge needs."""
    if len(images) < 2 and reference is None and not lines:
        raise ValueError(
            f"{SCORE}: consistency compares pictures with one another and takes 2 at least, but "
            f"images has 1. Wire "
            "more of them as one batch, or a reference to compare it with."
        )
    if judge == CLIP and clip_vision is None:
        raise ValueError(
            f"{SCORE}: judge is {CLIP}, but no clip_vision is wired. Wire Load CLIP Vision (ViT-L "
            f"or ViT-H), or choose "
            f"{AUTO}."
        )
    if reference_masks is not None and reference is None:
        raise ValueError(
            f"{SCORE}: reference_masks is wired, but reference is not. Wire the photos as well, or "
            f"unwire the masks."
        )


def warn_of_reader(judge: str, **inputs: Any) -> None:
    """Say that the miniature's reader judges, and what it does not look at; inputs: those that are
    for CLIP alone.
    """
    unused = [name for name, wired in inputs.items() if wired is not None]
    if unused:
        log.warning("%s: %s judges, so %s is not used.", SCORE, READER, " and ".join(unused))
    if judge == AUTO:
        log.warning(
            "%s: no clip_vision is wired, so the %s judges. It only knows the miniature's world: "
            "for photos and other "
            "models' pictures its numbers mean nothing. Wire Load CLIP Vision for those.",
            SCORE,
            READER,
        )


def lines_of(prompts: str, pictures: int) -> list[str]:
    """A prompt per picture, or none at all; ValueError where the counts differ."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if len(lines) not in (0, 1, pictures):
        raise ValueError(
            f"{SCORE}: prompts has {len(lines)} lines for {counted(pictures, 'picture')}. Write a "
            f"line for each, one for all, "
            "or none."
        )
    return lines * pictures if len(lines) == 1 else lines
