"""Subject Prompts: a prompt per line, encoded as one batch, with the subject's token positions
inside the CONDITIONING.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy_api.v0_0_2 import io
from torch import Tensor
from torch.nn.functional import pad

from ..models.subject.words import Piece, SubjectTokens, may_hold, positions_of, subjects_in
from . import host
from .host import REPEATS, SUBJECT, TEXT, Prompt

NODE = "Subject Prompts"
EMPTY = "prompts is empty. Write one prompt per line, for instance: a photo of a cat on the beach."
# a line's rows [1 w c], and what stands beside them
Encoded = tuple[Tensor, dict[str, Any]]
MOST_TOKENS = 24 * 77  # prompts of unequal length are repeated to a common multiple


def batch_rows(
    rows: Sequence[Tensor], positions: Sequence[tuple[int, ...]]
) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """[1 w_i c] per prompt -> [b w c] with positions moved along: shorter prompts are repeated,
    which attention cannot tell.
    """
    w = math.lcm(*(row.shape[1] for row in rows))
    if w > MOST_TOKENS:
        raise ValueError(
            f"{NODE}: the prompts are {', '.join(str(row.shape[1]) for row in rows)} tokens long, "
            f"which only fit one batch at "
            f"{w} tokens each (the limit is {MOST_TOKENS}). Shorten the longest, bring the lines "
            f"to similar lengths, or "
            "sample them apart."
        )
    moved = tuple(repeated(places, row.shape[1], w) for row, places in zip(rows, positions))
    return torch.cat([row.repeat(1, w // row.shape[1], 1) for row in rows]), moved


def repeated(places: Sequence[int], length: int, whole: int) -> tuple[int, ...]:
    """Positions in a text of `length` tokens, in all of its copies in `whole` tokens."""
    return tuple(place + start for start in range(0, whole, length) for place in places)


def encode(clip: Any, text: str) -> tuple[Tensor, dict[str, Any]]:
    """One prompt through the host's CLIP -> cross [1 w c] and its extras."""
    entries = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if len(entries) != 1:
        raise ValueError(
            f"{NODE}: this CLIP schedules {len(entries)} encodings for one prompt (a hook with "
            f"keyframes). "
            "Use a CLIP without scheduled hooks; schedule the model's LoRA instead."
        )
    cross, extras = entries[0]
    if not torch.isfinite(cross).all():
        raise ValueError(
            f"{NODE}: the line {text!r:.200} is encoded as {int((~torch.isfinite(cross)).sum())} "
            f"NaN or infinite values. "
            "Correct a weight such as (cat:nan), or start ComfyUI with --fp32-text-enc."
        )
    return cross, dict(extras)


# of one word in one line: its tokens by each encoder of the CLIP
Places = tuple[tuple[int, ...], ...]


def words_in(
    texts: Sequence[str],
    words: Sequence[str],
    prompts: Sequence[Sequence[Prompt]],
    readers: Sequence[host.Reader],
) -> list[list[Places]]:
    """Where each word stands in each line; ValueError where a line has none of them, or a word is
    in no line.
    """
    spelled = [[spelled_by(reader, word) for reader in readers] for word in words]
    each = [[places_in(prompt, by) for by in spelled] for prompt in prompts]
    here = [{word for word, own in zip(words, line) if any(own)} for line in each]
    if why := unheld(words, readers) or misses(texts, words, here):
        raise ValueError(f"{NODE}: {why}")
    return each


def spelled_by(reader: host.Reader, word: str) -> tuple[Piece, ...]:
    """A word's pieces; none where the vocabulary lacks some, which stand for any other word too."""
    return () if reader.lacks(word) else reader(word).pieces


def unheld(words: Sequence[str], readers: Sequence[host.Reader]) -> str:
    """Which words none of these encoders has tokens for; "" where all are held."""
    lost = [word for word in words if readers and all(reader.lacks(word) for reader in readers)]
    if not lost:
        return ""
    return (
        f"the text encoder of this CLIP ({readers[-1].key}) has no token for the subject "
        f"{' or '.join(map(repr, lost)):.200}: it reads every such word alike. Write the word in a "
        "language that the model knows, in prompts and subject, or leave subject empty and wire a "
        "mask."
    )


def misses(texts: Sequence[str], words: Sequence[str], here: Sequence[set[str]]) -> str:
    """Which lines hold none of the words, all at once, else which words are in no line; "" where
    neither is. here: the words of each line.
    """
    bare = [i for i, present in enumerate(here, 1) if not present] if words else []
    names = " or ".join(map(repr, words))
    remedy = "Write the subject word in every line exactly as in the subject field."
    if len(bare) == 1:
        line = texts[bare[0] - 1]
        return f"line {bare[0]}, {line!r:.200}, does not contain the subject {names:.200}. {remedy}"
    if bare:
        said = "; ".join(f"{i}: {texts[i - 1]!r:.80}" for i in bare[:10])
        more = f" and {len(bare) - 10} more" if len(bare) > 10 else ""
        return (
            f"{len(bare)} of {len(texts)} lines do not contain the subject {names:.200} "
            f"({said}{more}). {remedy}"
        )
    if lost := [word for word in words if not any(word in present for present in here)]:
        return (
            f"no line contains the subject {' or '.join(map(repr, lost)):.200}; the lines are "
            f"{str(list(texts)):.400}. Correct the word or take it out of the subject field."
        )
    return ""


def places_in(prompt: Sequence[Prompt], word: Sequence[Any]) -> Places:
    """Where the pieces of a word stand in a line, by each encoder."""
    return tuple(positions_of(own.pieces, [pieces]) for own, pieces in zip(prompt, word))


def rows_of(word: Places, starts: Sequence[int | None]) -> tuple[int, ...]:
    """The rows of the CONDITIONING that a word of a line is; starts: the row of each encoder's
    token 0.
    """
    known = [(places, start) for places, start in zip(word, starts) if start is not None]
    return tuple(
        sorted({place + start for places, start in known for place in places if place + start >= 0})
    )


def subject_tokens(
    words: Sequence[str],
    each: Sequence[Sequence[Places]],
    starts: Sequence[Sequence[int | None]],
    rows: Sequence[Tensor],
    readers: Sequence[host.Reader],
) -> SubjectTokens | None:
    """Where the words stand in the batch of rows [1 w_i c]; None, with a warning, where the rows of
    a line are not known. ValueError where the encoder that makes them has no token for a word.
    """
    if not words:
        return None
    by_line = [[rows_of(word, start) for word in line] for line, start in zip(each, starts)]
    if lost := [number for number, line in enumerate(by_line, 1) if not any(line)]:
        if why := unheld(words, readers[-1:]):
            raise ValueError(f"{NODE}: {why}")
        host.warn(
            f"{NODE}: {', '.join(map(repr, words)):.200} was not located among the tokens of line "
            f"{lost[0]}: this CLIP is not known, "
            "or the word stands behind the last token that the model reads. No subject is "
            "marked; wire a mask "
            "where a node looks for it."
        )
        return None
    union = [tuple(sorted(set().union(*line))) for line in by_line]
    by_word = ()
    if len(words) > 1:
        by_word = tuple(batch_rows(rows, of_word)[1] for of_word in zip(*by_line))
    return SubjectTokens(tuple(words), batch_rows(rows, union)[1], by_word)


def joined_extras(encoded: Sequence[Encoded]) -> dict[str, Any]:
    """The extras of all lines; tensors become rows of the batch, a mask that all lines share stays
    one. ValueError where they cannot.
    """
    extras = dict(encoded[0][1])
    for key, value in extras.items():
        if not isinstance(value, Tensor):
            continue
        values = [e.get(key) for _, e in encoded]
        if key == "attention_mask" and all(
            isinstance(v, Tensor) and torch.equal(v, value) for v in values
        ):
            continue
        if len(values) > 1 and not all(
            isinstance(v, Tensor) and v.ndim > 1 and v.shape == value.shape for v in values
        ):
            shapes = ", ".join(
                str(tuple(v.shape)) if isinstance(v, Tensor) else "none" for v in values
            )
            raise ValueError(
                f"{NODE}: this CLIP gives the lines a {key} of {shapes}, which no batch can hold. "
                f"Write one line, and sample "
                "the others apart."
            )
        extras[key] = torch.cat(values)
    return extras


def of_one_length(encoded: Sequence[Encoded], hides: bool) -> list[Encoded]:
    """Lines for one joint softmax of text and picture; hides: its network leaves out what an
    attention_mask hides, so that shorter ones may be padded. ValueError as require_one_length.
    """
    if not hides:
        require_one_length([rows for rows, _ in encoded])
    longest = max(rows.shape[1] for rows, _ in encoded)
    if all(rows.shape[1] == longest for rows, _ in encoded):
        return list(encoded)
    return [padded(rows, extras, longest) for rows, extras in encoded]


def padded(rows: Tensor, extras: Mapping[str, Any], length: int) -> Encoded:
    """A line's rows [1 w c] with zeros behind them, which its attention_mask [1 length] hides."""
    more = length - rows.shape[1]
    mask = extras.get("attention_mask")
    if mask is None:
        mask = torch.ones(1, rows.shape[1], dtype=torch.long, device=rows.device)
    extras = {**extras, "attention_mask": pad(mask, (0, more))}
    return pad(rows, (0, 0, 0, more)), extras


def require_one_length(rows: Sequence[Tensor]) -> None:
    """ValueError for lines [1 w_i c] of unequal length, which one joint softmax of text and picture
    cannot hold.
    """
    if len({row.shape[1] for row in rows}) > 1:
        said = ", ".join(f"line {i} {row.shape[1]}" for i, row in enumerate(rows, 1))
        raise ValueError(
            f"{NODE}: the lines have different numbers of tokens ({said:.300}), but this model "
            f"reads text and picture in one attention, so that all lines of a batch need "
            "the same number of tokens. Add or remove a word, or sample the lines one by one."
        )


class SubjectPrompts(io.ComfyNode):
    """Prompts of pictures that share a subject (paper A's coarse description, paper B's concept
    words).
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredSubjectPrompts",
            display_name=NODE,
            category="Kindred",
            description="Encodes one prompt per line as one batch and remembers where the "
            "subject's words stand, "
            "so that other Kindred nodes find the subject in the picture. Use it wherever CLIP "
            "Text Encode would stand.",
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
                    tooltip="One line is one picture. Empty lines are skipped. (word:1.2) "
                    "weighting works as usual.",
                ),
                io.String.Input(
                    "subject",
                    default="cat",
                    tooltip="The word or phrase that names the subject in every line, such "
                    "as cat. Separate several subjects with commas. Leave empty if "
                    "nothing needs to find the subject.",
                ),
                io.String.Input(
                    "style",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Added before every line, such as 'watercolour of'.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="One prompt per picture, with the places of the subject's words.",
                ),
                io.Int.Output(
                    display_name="count",
                    tooltip="The number of pictures: wire it into the batch size of Empty Latent "
                    "Image.",
                ),
                io.String.Output(
                    display_name="texts",
                    tooltip="The lines as they were encoded, with the style: for Consistency "
                    "Score's "
                    "prompts and Comparison Grid's captions.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, prompts: str, subject: str, style: str = "") -> io.NodeOutput:
        texts, words = texts_of(prompts, style), subjects_in(subject)
        if not texts:
            raise ValueError(f"{NODE}: {EMPTY}")
        say_unlearnt(clip, texts)
        readers = host.readers_of(clip)
        cut = [[reader(text) for reader in readers] for text in texts] if words else []
        each = words_in(texts, words, cut, readers) if words else []
        encoded = [encode(clip, text) for text in texts]
        starts = [host.rows_of_tokens(readers, prompt, *line) for prompt, line in zip(cut, encoded)]
        if not host.plain(readers):
            encoded = of_one_length(encoded, host.hides_padding(clip))
        rows = [c for c, _ in encoded]
        cross, _ = batch_rows(rows, [() for _ in rows])
        extras = joined_extras(encoded)
        extras[TEXT] = "\n".join(texts)
        if any(c.shape[1] != cross.shape[1] for c in rows):
            extras[REPEATS] = tuple(cross.shape[1] // c.shape[1] for c in rows)
        if subjects := subject_tokens(words, each, starts, rows, readers):
            extras[SUBJECT] = subjects
        return io.NodeOutput([[cross, extras]], len(texts), "\n".join(texts))

    @classmethod
    def validate_inputs(
        cls, prompts: str | None = None, subject: str | None = None, style: str | None = ""
    ) -> bool | str:
        """What the letters alone tell, before anything runs; of a wired text, None, nothing."""
        if not (isinstance(prompts, str) and isinstance(style, str)):
            return True
        texts = texts_of(prompts, style)
        words = subjects_in(subject if isinstance(subject, str) else "")
        if not texts:
            return f"{NODE}: {EMPTY}"
        here = [{word for word in words if may_hold(text, word)} for text in texts]
        why = misses(texts, words, here)
        return f"{NODE}: {why}" if why else True


def texts_of(prompts: str, style: str) -> list[str]:
    """One text per line that is not empty, the style before it."""
    before = " ".join(style.splitlines()).strip()  # a line of texts is a picture
    lines = (line.strip() for line in prompts.splitlines())
    return [f"{before} {line}".strip() for line in lines if line]


def say_unlearnt(clip: Any, texts: Sequence[str]) -> None:
    """A warning where a checkpoint reads words as nothing, as the miniature does most."""
    lost, known = host.unlearnt_words(clip, " ".join(texts))
    if lost:
        knows = f" It knows {', '.join(known)}." if known else ""
        host.warn(
            f"{NODE}: this checkpoint has never learnt {', '.join(map(repr, lost)):.200}, so it "
            f"cannot draw that.{knows} Use words that it knows, or a checkpoint that knows more."
        )
