"""Where a subject's words stand among the tokens of a prompt.

They are matched as text, since what stands beside a word changes how it is cut.
A piece is a token as its vocabulary spells it: "cat</w>" of CLIP's byte-level vocabulary,
"\u0120cat" of GPT-2's and its heirs' (`byte_level` spells sentencepiece's so), or the bytes of an
embedding's vector, which has no spelling.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

Piece = tuple[int, str | bytes]  # its place among the tokens, and what it spells
SPACED_BEFORE = ("\u2581", "\u0120")  # sentencepiece, GPT-2
# scripts without spaces between words
UNSPACED = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TIBETAN",
)
PRIVATE = 0xF0000  # code points that no text has: they stand for an embedding's vectors


@dataclass(frozen=True)
class SubjectTokens:
    """Where the subject's words stand in an encoded prompt: one tuple of positions per row of the
    conditioning.
    """

    words: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    # the same for each word alone; (): there is but one
    by_word: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def of_words(self, rows: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Positions per word, per picture; the host repeats the rows of a conditioning to the size
        of the batch.
        """
        return tuple(
            tuple(word[i % len(word)] for i in range(rows))
            for word in self.by_word or (self.positions,)
        )


def subjects_in(field: str) -> list[str]:
    """The words or phrases of a subject field, separated by commas, semicolons (of any width) or
    line ends.
    """
    return [word.strip() for word in re.split("[,;\uff0c\u3001\uff1b\r\n]+", field) if word.strip()]


def may_hold(text: str, word: str) -> bool:
    """Whether a word can stand in a text, by their letters alone, before any tokenizer is asked:
    False is certain, True is not. Embeddings, which have names and no letters, always may.
    """
    wanted = _letters(word)
    return "embedding:" in word or not wanted or wanted in _letters(text)


def _letters(text: str) -> str:
    """Without weights, marks, spaces, accents and capitals, which tokenizers treat differently."""
    bare = re.sub(r":\s*[-+]?[0-9.]+\s*\)", ")", text)
    return "".join(c for c in unicodedata.normalize("NFKD", bare.casefold()) if c.isalnum())


def positions_of(prompt: Sequence[Piece], words: Iterable[Sequence[Piece]]) -> tuple[int, ...]:
    """The places of every token of `prompt` that holds a part of any of `words`, each cut by the
    same tokenizer; sorted, each once.

    A match begins where a word begins and ends where one ends, but in scripts without spaces, and
    Korean words may go on (particles). All pieces of all occurrences count (method.md 3.6 Q4).
    """
    text, places = _spelled(prompt)
    indices: set[int] = set()
    for word in words:
        wanted = _spelled(word)[0].strip()
        start = text.find(wanted) if any(map(_is_letter, wanted)) else -1
        while start >= 0:
            end = start + len(wanted)
            if _begins(text, start) and _ends(text, end):
                indices.update(place for held in places[start:end] for place in held)
            start = text.find(wanted, start + 1)
    return tuple(sorted(indices))


def _spelled(pieces: Sequence[Piece]) -> tuple[str, list[tuple[int, ...]]]:
    """The text that the pieces spell, one space between words and none beside marks, and the tokens
    that hold each character.
    """
    raw: list[tuple[bytes, int]] = []  # of every byte its token; b"" is the end of a word
    text, places = "", []

    def flush() -> None:
        nonlocal text
        for character, held in _characters(raw):
            for small in character.lower():  # CLIP's tokenizers know no capitals, others do
                text += small
                places.append(held)
        raw.clear()

    for place, piece in pieces:
        if isinstance(piece, bytes):
            flush()
            for symbol in _symbols(piece):
                text += symbol
                places.append((place,))
            continue
        spelling, before, after = _parted(piece)
        if before:
            raw.append((b"", place))
        raw.extend((bytes([byte]), place) for byte in spelling)
        if after:
            raw.append((b"", place))
    flush()
    once = [i for i, c in enumerate(text) if c != " " or text[i - 1 : i] != " "]
    text, places = "".join(text[i] for i in once), [places[i] for i in once]
    kept = [
        i
        for i, c in enumerate(text)
        if c != " " or 0 < i < len(text) - 1 and _is_letter(text[i - 1]) and _is_letter(text[i + 1])
    ]
    return "".join(text[i] for i in kept), [places[i] for i in kept]


def _characters(raw: Sequence[tuple[bytes, int]]) -> Iterable[tuple[str, tuple[int, ...]]]:
    """UTF-8 put together; a character that several tokens share belongs to all of them."""
    i = 0
    while i < len(raw):
        if not raw[i][0]:
            yield " ", ()
            i += 1
            continue
        first = raw[i][0][0]
        length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        part = raw[i : i + length]
        try:
            character = b"".join(byte for byte, _ in part).decode()
        except UnicodeDecodeError:  # cut off, or with the end of a word inside
            part, character = raw[i : i + 1], "\ufffd"
        yield character, tuple(dict.fromkeys(place for _, place in part))
        i += len(part)


@cache
def _bytes_of_symbols() -> dict[str, int]:
    """GPT-2's byte-level alphabet, which CLIP shares: printable bytes stand for themselves, the
    others for code points from 256 on.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + n): byte for n, byte in enumerate(hidden)
    }


def byte_level(piece: str) -> str:
    """A piece of sentencepiece's, "\u2581cat" or "<0xE7>", in GPT-2's alphabet."""
    raw = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    data = (
        bytes([int(raw[1], 16)]) if raw else piece.replace("\u2581", " ").encode("utf-8", "replace")
    )
    symbols = {byte: symbol for symbol, byte in _bytes_of_symbols().items()}
    return "".join(symbols[byte] for byte in data)


def _parted(piece: str) -> tuple[bytes, bool, bool]:
    """A vocabulary's piece -> its bytes, and whether a word begins before or ends behind it."""
    before = piece.startswith(SPACED_BEFORE)
    after = piece.endswith("</w>")
    spelling = piece.removesuffix("</w>")[1 if before else 0 :]
    alphabet = _bytes_of_symbols()
    if all(c in alphabet for c in spelling):
        return bytes(alphabet[c] for c in spelling), before, after
    return spelling.encode("utf-8", "replace"), before, after


def _symbols(vector: bytes) -> str:
    """Four characters that no other vector and no text has."""
    digest = hashlib.blake2b(vector, digest_size=8).digest()
    return "".join(
        chr(PRIVATE + int.from_bytes(digest[i : i + 2], "big") % 0xFFFE) for i in range(0, 8, 2)
    )


def _is_letter(c: str) -> bool:
    """Part of a word, of an embedding or of a character that was cut."""
    return c.isalnum() or unicodedata.category(c)[0] == "M" or unicodedata.category(c) == "Co"


def _script(c: str) -> str:
    return unicodedata.name(c, "").split(" ")[0]


def _begins(text: str, start: int) -> bool:
    before, first = text[start - 1 : start], text[start]
    inside = before and _is_word(before) and _is_word(first)
    return not inside or _script(first) in UNSPACED


def _ends(text: str, end: int) -> bool:
    last, behind = text[end - 1], text[end : end + 1]
    inside = behind and _is_word(behind) and _is_word(last)
    return not inside or _script(last) in (*UNSPACED, "HANGUL")


def _is_word(c: str) -> bool:
    return _is_letter(c) and unicodedata.category(c) != "Co"
