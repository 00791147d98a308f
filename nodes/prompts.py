"""Subject Prompts: a prompt per line, encoded as one batch, with the subject's token positions inside the CONDITIONING."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..models.run import REPEATS, SUBJECT
from ..models.subject.words import Piece, SubjectTokens, positions_of, subjects_in
from .host import TEXT

NODE = "Subject Prompts"
MOST_TOKENS = 24 * 77  # prompts of unequal length are repeated to a common multiple
Token = tuple[
    Any, ...
]  # (id or embedding, weight, word number) as the host's tokenizer gives it; word number 0 is padding


def pieces_of(clip: Any, text: str) -> list[Piece]:
    """A text's tokens as the vocabulary spells them, counted over all chunks, without start, end and padding."""
    tokens = [token for chunk in tokens_of(clip, text) for token in chunk]
    return [
        (
            place,
            clip.tokenizer.untokenize([(token[0], 1.0)])[0][1]
            if isinstance(token[0], int)
            else token[0].float().cpu().numpy().tobytes(),
        )
        for place, token in enumerate(tokens)
        if token[2] != 0
    ]


def batch_rows(
    rows: Sequence[Tensor], positions: Sequence[tuple[int, ...]]
) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """[1 w_i c] per prompt -> [b w c] with positions moved along: shorter prompts are repeated, which attention cannot tell."""
    w = math.lcm(*(row.shape[1] for row in rows))
    if w > MOST_TOKENS:
        raise ValueError(
            f"{NODE}: the prompts are {', '.join(str(row.shape[1]) for row in rows)} tokens long, which only fit one batch at "
            f"{w} tokens each (the limit is {MOST_TOKENS}). Shorten the longest, bring the lines to similar lengths, or "
            "sample them apart."
        )
    moved = tuple(
        tuple(p + start for start in range(0, w, row.shape[1]) for p in places)
        for row, places in zip(rows, positions)
    )
    return torch.cat([row.repeat(1, w // row.shape[1], 1) for row in rows]), moved


def encode(clip: Any, text: str) -> tuple[Tensor, dict[str, Any]]:
    """One prompt through the host's CLIP -> cross [1 w c] and its extras."""
    entries = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if len(entries) != 1:
        raise ValueError(
            f"{NODE}: this CLIP schedules {len(entries)} encodings for one prompt (a hook with keyframes). "
            "Use a CLIP without scheduled hooks; schedule the model's LoRA instead."
        )
    cross, extras = entries[0]
    if not torch.isfinite(cross).all():
        raise ValueError(
            f"{NODE}: the line {text!r:.200} is encoded as {int((~torch.isfinite(cross)).sum())} NaN or infinite values. "
            "Correct a weight such as (cat:nan), or start ComfyUI with --fp32-text-enc."
        )
    return cross, dict(extras)


class SubjectPrompts(io.ComfyNode):
    """Prompts of pictures that share a subject (paper A's coarse description, paper B's concept words)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredSubjectPrompts",
            display_name=NODE,
            category="Kindred",
            description="Encodes one prompt per line as one batch and remembers where the subject's words stand, "
            "so that other Kindred nodes find the subject in the picture. Use it wherever CLIP Text Encode would stand.",
            search_aliases=[
                "subject prompt",
                "story prompts",
                "concept words",
                "batch prompts",
                "consistory prompts",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="The checkpoint's CLIP."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a photo of a cat on the beach",
                    tooltip="One line is one picture. Empty lines are skipped. (word:1.2) weighting works as usual.",
                ),
                io.String.Input(
                    "subject",
                    default="cat",
                    tooltip="The word or phrase that names the subject in every line, for instance: cat. "
                    "Several subjects are separated by commas. Empty: no subject is marked.",
                ),
                io.String.Input(
                    "style",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Put before every line, for instance: watercolour of",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="One row per picture, with the subject's token positions.",
                ),
                io.Int.Output(
                    display_name="count",
                    tooltip="The number of pictures: wire it into the batch size of Empty Latent Image.",
                ),
                io.String.Output(
                    display_name="texts",
                    tooltip="The lines as they were encoded, with the style: for Consistency Score's "
                    "prompts and Comparison Grid's captions.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, prompts: str, subject: str, style: str = "") -> io.NodeOutput:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise ValueError(
                f"{NODE}: prompts is empty. Write one prompt per line, for instance: a photo of a cat on the beach."
            )
        words = subjects_in(subject)
        before = " ".join(style.splitlines()).strip()  # a line of texts is a picture
        texts = [f"{before} {line}".strip() for line in lines]
        spelled = [pieces_of(clip, word) for word in words]
        positions, each, seen = [], [], set()
        for number, text in enumerate(texts, 1):
            prompt = pieces_of(clip, text) if words else []
            places = tuple(positions_of(prompt, [word]) for word in spelled)
            here = {word for word, found in zip(words, places) if found}
            if words and not here:
                raise ValueError(
                    f"{NODE}: line {number}, {text!r:.200}, does not contain the subject "
                    f"{' or '.join(map(repr, words)):.200}. "
                    "Write the subject word in every line exactly as in the subject field."
                )
            seen |= here
            positions.append(tuple(sorted({place for found in places for place in found})))
            each.append(places)
        for word in words:
            if word not in seen:
                raise ValueError(
                    f"{NODE}: no line contains the subject {word!r:.100}; the lines are {str(texts):.400}. "
                    "Correct the word or take it out of the subject field."
                )
        encoded = [encode(clip, text) for text in texts]
        rows = [c for c, _ in encoded]
        cross, positions = batch_rows(rows, positions)
        extras = dict(encoded[0][1])
        for (
            key,
            value,
        ) in (
            extras.items()
        ):  # pooled_output and other per-prompt tensors become rows of the batch too
            if isinstance(value, Tensor):
                extras[key] = torch.cat([e[key] for _, e in encoded])
        extras[TEXT] = "\n".join(texts)
        if any(c.shape[1] != cross.shape[1] for c, _ in encoded):
            extras[REPEATS] = tuple(cross.shape[1] // c.shape[1] for c, _ in encoded)
        if words:
            by_word = (
                tuple(batch_rows(rows, [row[i] for row in each])[1] for i in range(len(words)))
                if len(words) > 1
                else ()
            )
            extras[SUBJECT] = SubjectTokens(tuple(words), positions, by_word)
        return io.NodeOutput([[cross, extras]], len(texts), "\n".join(texts))


def tokens_of(clip: Any, text: str) -> Sequence[Sequence[Token]]:
    """The tokens of a text with their word numbers; SDXL's two encoders see the same tokens, so the first one answers."""
    return next(iter(clip.tokenize(text, return_word_ids=True).values()))
