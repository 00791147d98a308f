"""A CLIP's tokens as the rows of its CONDITIONING: whose rows they are, and what the host puts
around a prompt and cuts again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor

from ...models.subject.words import Piece, byte_level

CLIP = frozenset("lgh")  # the keys of CLIP's own text encoders
# encoders whose rows are an input of their own, beside the CONDITIONING
OTHERS = frozenset({"byt5"})
TRIALS = "the", "of"  # prompts without a token in common: what both have is the template
WORD_PIECES = {"[CLS]", "##s"}  # of BERT's vocabularies alone
# how vocabularies name the one token of all that they have no tokens for
UNKNOWN = frozenset({"<unk>", "[UNK]"})
LOST = "\ufffd"  # what such a token spells
# tokenizers of CLIPs whose networks do not read the rows of a CONDITIONING that its attention_mask
# hides, to the last bits: a text may be padded there
HIDING = frozenset(
    f"comfy.text_encoders.{name}"
    for name in (
        "gpt_oss.LensTokenizer",
        "ideogram4.Ideogram4Tokenizer",
        "ideogram4.Ideogram4Qwen3VLTokenizer",
        "mage_flow.MageFlowTokenizer",
        "qwen_image.QwenImageTokenizer",
    )
)
# (id or embedding, weight, word number) as the host's tokenizer gives it; word number 0 is padding
Token = tuple[Any, ...]


@dataclass(frozen=True)
class Prompt:
    """A text as one encoder cuts it."""

    pieces: tuple[Piece, ...]  # of the text itself, with their places among all tokens
    tokens: int  # all of them, with the template, marks and pads
    before: int = 0  # those before the text
    behind: int = 0  # those of the template behind it

    def first_row(self, rows: int) -> int | None:
        """The row of token 0, negative where the beginning of the template is cut; None where the
        rows are no part of the tokens.
        """
        cut = self.tokens - rows
        if 0 <= cut <= self.before:
            return -cut
        return -self.before if cut == self.before + self.behind else None


@dataclass(frozen=True)
class Reader:
    """A text encoder whose tokens may become rows of the CONDITIONING."""

    clip: Any
    key: str  # of its tokens
    spell: Callable[[int], str]  # as a vocabulary spells a token, in CLIP's or GPT-2's alphabet
    template: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # ids before and behind a prompt

    def __call__(self, text: str) -> Prompt:
        every = [token for chunk in tokens_of(self.clip, text, self.key) for token in chunk]
        said = [(place, token[0]) for place, token in enumerate(every) if not _pads(token)]
        ids = [t if isinstance(t, int) else None for _, t in said]
        head, tail = self.template
        first = len(head) if tuple(ids[: len(head)]) == head else 0
        behind = len(tail) if tail and tuple(ids[-len(tail) :]) == tail else 0
        own = said[first : len(said) - behind]
        before = own[0][0] if own else len(every)
        pieces = tuple((place, self._spelled(token)) for place, token in own)
        return Prompt(pieces, len(every), before, behind)

    def lacks(self, word: str) -> bool:
        """Whether its vocabulary has no token for a part of a word: it reads any other such word
        alike.
        """
        return any(piece in (LOST, byte_level(LOST)) for _, piece in self(word).pieces)

    def _spelled(self, token: Any) -> str | bytes:
        """Of an embedding's vector its bytes, which no other has."""
        return (
            token.float().cpu().numpy().tobytes()
            if isinstance(token, Tensor)
            else self.spell(int(token))
        )

    @property
    def missing(self) -> bool:
        """Whether the CLIP was loaded without this encoder."""
        model = getattr(self.clip, "cond_stage_model", None)
        names = [name for name in (self.key, f"clip_{self.key}") if hasattr(model, name)]
        return any(getattr(model, name) is None for name in names)


def tokens_of(clip: Any, text: str, key: str | None = None) -> Sequence[Sequence[Token]]:
    """A text's tokens with their word numbers, in chunks, by one encoder; SDXL's two see the same
    tokens, so the first answers.
    """
    tokens = clip.tokenize(text, return_word_ids=True)
    return tokens[key] if key else next(iter(tokens.values()))


def readers_of(clip: Any) -> tuple[Reader, ...]:
    """The encoders of which the CONDITIONING's rows may be made, in the order in which they stand
    in it.
    """
    keys = list(clip.tokenize(TRIALS[0]))
    first = Reader(clip, keys[0], _by_the_clip(clip))
    texts = [key for key in keys if key not in CLIP | OTHERS]
    if not texts:
        return (first,)
    # HiDream's Llama is no row, Anima's Qwen is read as T5's tokens
    main = "t5xxl" if "t5xxl" in texts else texts[0]
    reader = Reader(clip, main, _by_vocabulary(clip, main), _template(clip, main))
    return (first, reader) if keys[0] in CLIP else (reader,)


def plain(readers: Sequence[Reader]) -> bool:
    """Whether all rows are CLIP's own, which UNets read by cross-attention: a text may stand there
    twice.
    """
    return all(reader.key in CLIP for reader in readers)


def hides_padding(clip: Any) -> bool:
    """Whether a CLIP's network leaves out the rows that an attention_mask hides; not so of heirs,
    which are other networks'.
    """
    kind = type(clip.tokenizer)
    return f"{kind.__module__}.{kind.__qualname__}" in HIDING


def rows_of_tokens(
    readers: Sequence[Reader], prompts: Sequence[Prompt], cross: Tensor, extras: Mapping[str, Any]
) -> list[int | None]:
    """The row of each encoder's token 0 in a CONDITIONING [1 w c]; None where its tokens make no
    rows that are known.
    """
    if plain(readers):
        return [0]
    main = prompts[-1]
    ids = extras.get("t5xxl_ids")  # Anima's network makes its text of these
    rows = cross.shape[1] if ids is None else ids.shape[-1]
    if len(readers) == 1:
        return [None if readers[0].missing else main.first_row(rows)]
    clip = prompts[0].tokens
    if readers[-1].missing:
        return [0 if rows == clip else None, None]
    if rows == clip + main.tokens:  # SD3
        return [0, clip]
    return [None, main.first_row(rows)]


def _pads(token: Token) -> bool:
    return len(token) > 2 and token[2] == 0


def _by_the_clip(clip: Any) -> Callable[[int], str]:
    """The first encoder's own vocabulary."""
    return lambda token: clip.tokenizer.untokenize([(token, 1.0)])[0][1]


def _by_vocabulary(clip: Any, key: str) -> Callable[[int], str]:
    """The vocabulary of the encoder of this key."""
    tokenizer = getattr(clip.tokenizer, key, None) or getattr(clip.tokenizer, f"clip_{key}", None)
    if tokenizer is None:
        return _by_the_clip(clip)
    names = {t: LOST if n in UNKNOWN else n for t, n in tokenizer.inv_vocab.items()}
    if WORD_PIECES <= {*names.values()}:
        return lambda token: byte_level(_continued(names.get(token, LOST)))
    if "\u2581" not in names.values():  # else of sentencepiece, whose pieces are text
        return lambda token: names.get(token, LOST)
    return lambda token: byte_level(names.get(token, LOST))


def _said(clip: Any, text: str, key: str) -> list[int]:
    """The ids of a prompt without start, end and pads."""
    return [t[0] for chunk in tokens_of(clip, text, key) for t in chunk if not _pads(t)]


def _continued(piece: str) -> str:
    """A piece of WordPiece's as sentencepiece spells it: "cat" -> "\u2581cat", "##s" -> "s"."""
    if piece == LOST:
        return piece
    return piece[2:] if piece.startswith("##") else f"\u2581{piece}"


def _template(clip: Any, key: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that stand before and behind every prompt, start, end and pads apart."""
    one, other = (_said(clip, text, key) for text in TRIALS)

    def common(pairs: zip) -> tuple[int, ...]:
        return tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    return common(zip(one, other)), common(zip(reversed(one), reversed(other)))[::-1]
