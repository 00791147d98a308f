"""Laws of finding a subject's words among tokens, on pieces written by hand: spelled as CLIP's or a sentencepiece vocabulary does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from kindred.models.subject.words import Piece, positions_of, subjects_in

SPACE = "\u2581"


def clip(*words: str) -> list[Piece]:
    """A token per word."""
    return list(enumerate(f"{word}</w>" for word in words))


def sentence(*pieces: str | bytes) -> list[Piece]:
    """Pieces of a sentencepiece vocabulary, with _ where a word begins."""
    return [(i, p if isinstance(p, bytes) else p.replace("_", SPACE)) for i, p in enumerate(pieces)]


def test_an_occurrence_may_begin_inside_another() -> None:
    assert positions_of(clip("a", "cat", "cat", "cat"), [clip("cat", "cat")]) == (1, 2, 3)


def test_a_space_beside_a_mark_is_none() -> None:
    """A bracket is the same with a space before it and without."""
    spaced, close = sentence("_saber", "_(", "fate", ")"), sentence("_saber", "(", "_fate", ")")
    assert positions_of(spaced, [close]) == positions_of(close, [spaced]) == (0, 1, 2, 3)
    assert positions_of(sentence("_sea", "_horse"), [sentence("_sea", "horse")]) == ()


def test_a_letter_with_a_mark_of_its_own_is_another_letter() -> None:
    assert positions_of(sentence("_cafe\u0301"), [sentence("_cafe")]) == ()
    assert positions_of(sentence("_cafe", "s"), [sentence("_cafe")]) == ()
    assert positions_of(sentence("_cafe", "'s"), [sentence("_cafe")]) == (0,)


def test_a_word_right_behind_an_embedding_is_a_word() -> None:
    """An embedding's vector has no spelling and needs no space; it is itself alone."""
    prompt = sentence(b"one", "cat", b"two")
    assert positions_of(prompt, [sentence("cat")]) == (1,)
    assert positions_of(prompt, [sentence(b"two")]) == (2,)
    assert positions_of(prompt, [sentence(b"three")]) == ()


def test_scripts_without_spaces() -> None:
    """Thai, whose letters begin with the byte E0: a cat in a sentence, and no dog."""
    prompt = sentence("_\u0e41\u0e21\u0e27", "\u0e1a\u0e19\u0e0a\u0e32\u0e22", "\u0e2b\u0e32\u0e14")
    assert positions_of(prompt, [sentence("_\u0e41\u0e21\u0e27")]) == (0,)
    assert positions_of(prompt, [sentence("_\u0e2b\u0e32\u0e14")]) == (2,)
    assert positions_of(prompt, [sentence("_\u0e2b\u0e21\u0e32")]) == ()


def test_a_korean_word_may_go_on_and_does_not_begin_inside_one() -> None:
    cat, black = "\uace0\uc591\uc774", "\uac80\uc740"
    assert positions_of(sentence(f"_{cat}", "\uac00"), [sentence(f"_{cat}")]) == (0,)
    assert positions_of(sentence(f"_{black}", cat), [sentence(f"_{cat}")]) == ()


def test_a_token_that_holds_a_part_of_a_character_is_marked() -> None:
    """The bytes of one character over three tokens, as CLIP's vocabulary cuts what it does not know."""
    byte = {0xE7: "\u00e7", 0x8C: "\u012e", 0xAB: "\u00ab"}  # GPT-2's alphabet of bytes
    cut = [(n, byte[b] + ("</w>" if n == 3 else "")) for n, b in ((1, 0xE7), (2, 0x8C), (3, 0xAB))]
    assert positions_of([(0, "a</w>"), *cut], [sentence("_\u732b")]) == (1, 2, 3)
    broken = [(1, byte[0xE7] + "</w>"), (2, byte[0x8C]), (3, byte[0xAB] + "</w>")]
    assert positions_of([(0, "a</w>"), *broken], [sentence("_\u732b")]) == ()


def test_marks_alone_are_nowhere() -> None:
    assert positions_of(clip("cat", "(", ")"), [clip("(", ")")]) == ()
    assert positions_of(clip("cat"), [[]]) == positions_of([], [clip("cat")]) == ()


@given(st.lists(st.sampled_from(["cat", "cats", "dog", "(", "a"]), max_size=8))
def test_a_word_is_every_token_that_spells_it(words: list[str]) -> None:
    assert positions_of(clip(*words), [clip("cat"), clip("dog")]) == tuple(
        i for i, word in enumerate(words) if word in ("cat", "dog")
    )


def test_subjects_are_parted_by_commas_semicolons_and_lines_of_any_width() -> None:
    field = " a cat,\u732b\uff0c dog \u3001horse;owl\uff1bfish\r\nhat,, \n"
    assert subjects_in(field) == ["a cat", "\u732b", "dog", "horse", "owl", "fish", "hat"]
    assert subjects_in(" ,\uff1b ") == []
