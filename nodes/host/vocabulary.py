"""Which words a checkpoint's text encoder has learnt: its token table has a row of zeros for each
of the others, as small checkpoints have them for all but a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .tokens import CLIP, Token, tokens_of

MOST = 40  # words that a sentence can hold


def unlearnt_words(clip: Any, text: str) -> tuple[list[str], list[str]]:
    """The words of a text that this CLIP reads as nothing, each once, and those that it knows where
    these are few; ([], []) where it knows all, or is none of CLIP's own text encoders.
    """
    key = next(iter(clip.tokenize(text)))
    table = _token_table(clip, key)
    if table is None:
        return [], []
    rows = [token[0] for chunk in tokens_of(clip, text, key) for token in chunk if _says(token)]
    learnt = table[rows].float().any(-1).tolist()
    pieces = zip((_spelled(clip, row) for row in rows), learnt)
    lost = dict.fromkeys(word for word, known in _words(pieces) if not known and word.isalpha())
    return list(lost), _few_known(clip, table) if lost else []


def _token_table(clip: Any, key: str) -> Tensor | None:
    """[tokens c] of one of CLIP's own text encoders, where its numbers can be looked at."""
    if key not in CLIP:
        return None
    part = getattr(getattr(clip, "cond_stage_model", None), f"clip_{key}", None)
    for name in ("transformer", "text_model", "embeddings", "token_embedding", "weight"):
        part = getattr(part, name, None)
    plain = type(part) in (Tensor, torch.nn.Parameter) and part.ndim == 2
    return part if plain and part.is_floating_point() and not part.is_meta else None


def _says(token: Token) -> bool:
    """Whether a token is part of a word: no embedding's vector, start, end or pad."""
    return isinstance(token[0], int) and len(token) > 2 and token[2] != 0


def _spelled(clip: Any, row: int) -> str:
    return clip.tokenizer.untokenize([(row, 1.0)])[0][1]


def _words(pieces: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Whole words of pieces, and whether every piece is known."""
    word, known = "", True
    for spelling, learnt in pieces:
        word, known = word + spelling.removesuffix("</w>"), known and learnt
        if spelling.endswith("</w>"):
            yield word, known
            word, known = "", True


def _few_known(clip: Any, table: Tensor) -> list[str]:
    """The words that the table has rows for, sorted; [] where they are many."""
    rows = table.any(-1).nonzero().flatten().tolist()
    if len(rows) > MOST:
        return []
    spelled = (_spelled(clip, row).removesuffix("</w>") for row in rows)
    return sorted(word for word in spelled if word.isalpha())
