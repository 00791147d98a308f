"""Laws of Subject Prompts over the text encoders of the host's transformers: where a word stands among the rows that they give."""

from __future__ import annotations

import pytest
import torch
from encoders import KINDS, PADDED, clip, spelled, tokens
from kindred.nodes.host import REPEATS, SUBJECT, TEXT
from kindred.nodes.prompts import SubjectPrompts
from torch import Tensor

PHRASE = "a photo of a cat on the beach"
MEASURED = tuple(name for name, kind in KINDS.items() if kind.cat)


def encode(name: str, prompts: str, subject: str = "") -> tuple[Tensor, dict]:
    ((cross, extras),) = SubjectPrompts.execute(clip(name), prompts, subject).result[0]
    return cross, extras


def marked(name: str, text: str, subject: str) -> list[str]:
    """What the tokens spell of which the marked rows were made, one text for every encoder that makes rows."""
    cross, extras = encode(name, text, subject)
    places = extras[SUBJECT].positions[0]
    assert places and list(places) == sorted(set(places))
    if name == "Anima":  # the network makes its rows of T5's tokens, by an adapter
        return [spelled(name, "t5xxl", [tokens(name, text, "t5xxl")[p] for p in places])]
    if name == "HiDreamO1":  # rows are the tokens' ids themselves
        return [spelled(name, "hidream_o1", [int(cross[0, p, 0]) for p in places])]
    if name == "SD3":  # 77 rows of both CLIPs, then T5's
        keys = {"l": [p for p in places if p < 77], "t5xxl": [p for p in places if p >= 77]}
        assert all(keys.values())
    else:
        (only,) = [KINDS[name].reads] if KINDS[name].reads else clip(name).tokenize("x")
        keys = {only: list(places)}
    return [
        spelled(name, key, [tokens(name, text, key)[int(cross[0, p, 0])] for p in at])
        for key, at in keys.items()
    ]


@pytest.mark.parametrize("name", MEASURED)
def test_the_rows_of_a_word_are_those_that_were_measured(name: str) -> None:
    assert encode(name, PHRASE, "cat")[1][SUBJECT].positions == (KINDS[name].cat,)


@pytest.mark.parametrize("name", KINDS)
def test_a_marked_row_was_made_of_the_words_token(name: str) -> None:
    for text in (PHRASE, f"{PHRASE}, sunset", "cat", "a (cat), really"):
        assert [s.strip(" ()") for s in marked(name, text, "cat")] == ["cat"] * len(
            marked(name, text, "cat")
        )


@pytest.mark.parametrize("name", KINDS)
def test_every_piece_of_a_word_and_every_occurrence(name: str) -> None:
    for said in marked(name, "a photo of a wolpertinger on the beach", "wolpertinger"):
        assert said.strip() == "wolpertinger"
    for said in marked(name, "a cat beside a cat", "cat"):
        assert said.replace(" ", "") == "catcat"


@pytest.mark.parametrize("name", KINDS)
def test_case_does_not_matter(name: str) -> None:
    assert all(said.strip().lower() == "cat" for said in marked(name, "A Cat on the beach", "cat"))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "word", ["user", "image", "assistant", "system", "describe the image", "prompt", "images"]
)
def test_words_of_a_template_are_no_words_of_the_prompt(name: str, word: str) -> None:
    with pytest.raises(ValueError, match="does not contain the subject"):
        encode(name, PHRASE, word)
    for said in marked(name, f"a cat and a {word}", word):
        assert said.strip().lower() == word


@pytest.mark.parametrize("name", ["Flux", "QwenImage", "Lumina2", "AuraFlow", "ZImage"])
@pytest.mark.parametrize("word, other", [("caf\u00e9", "caf\u00e8"), ("\u732b", "\u72d7")])
def test_letters_that_a_vocabulary_spells_in_bytes(name: str, word: str, other: str) -> None:
    """A word is found by its own letters alone; T5's vocabulary has no Chinese."""
    if name == "Flux" and word == "\u732b":
        return
    assert encode(name, f"a {word} on the beach", word)[1][SUBJECT].positions[0]
    with pytest.raises(ValueError, match="does not contain the subject"):
        encode(name, f"a {other} on the beach", word)


LACKING = ("Flux", "SD3 with T5 alone", "HiDream", "Chroma", "CosmosPredict2", "Anima")


@pytest.mark.parametrize("name", LACKING)
@pytest.mark.parametrize("line", ["a \u732b on the beach", "a \u72d7 on the beach"])
def test_a_word_that_the_vocabulary_does_not_hold_is_said(name: str, line: str) -> None:
    """T5 has one token for all of Chinese: one word would be found where another stands."""
    said = r"text encoder of this CLIP \(t5xxl\) has no token for the subject '\u732b'.*wire a mask"
    if line.startswith("a \u72d7") and name in ("Flux", "SD3 with T5 alone", "HiDream"):
        said = "does not contain the subject"  # CLIP, which stands beside it, tells them apart
    with pytest.raises(ValueError, match=said):
        encode(name, line, "\u732b")
    assert all(text.strip() == "beach" for text in marked(name, line, "beach"))


def test_where_another_encoder_holds_the_word_its_rows_are_marked() -> None:
    """SD3's first rows are CLIP's, which spells any letter."""
    line = "a \u732b on the beach"
    assert set(encode("SD3", line, "\u732b")[1][SUBJECT].positions[0]) <= set(range(77))


def test_without_its_rows_nothing_is_marked(caplog: pytest.LogCaptureFixture) -> None:
    """HiDream without T5: the rows are zeros."""
    whole = clip("HiDream").cond_stage_model
    kept, whole.t5xxl = whole.t5xxl, None
    try:
        _, extras = encode("HiDream", PHRASE, "cat")
    finally:
        whole.t5xxl = kept
    assert SUBJECT not in extras and extras[TEXT] == PHRASE
    assert "'cat'" in caplog.text and "wire a mask" in caplog.text


def test_rows_that_are_cut_in_another_way_are_marked_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A newer host may cut more than the template."""
    whole = clip("QwenImage")
    real = whole.encode_from_tokens_scheduled
    monkeypatch.setattr(
        whole, "encode_from_tokens_scheduled", lambda t: [[c[:, 2:], e] for c, e in real(t)]
    )
    assert SUBJECT not in encode("QwenImage", PHRASE, "cat")[1]


# several lines ------------------------------------------------------------------------------------


HIDING = ("QwenImage", "MageFlow", "Ideogram4", "Lens")  # their networks read no masked row


@pytest.mark.parametrize("name", HIDING)
def test_lines_of_unequal_length_are_padded_where_a_mask_hides_the_pads(name: str) -> None:
    """Every line is what it is alone, then zeros that no mask shows; its word stands where it stood."""
    lines = [f"{PHRASE} at night, in the rain", PHRASE, "a cat"]
    cross, extras = encode(name, "\n".join(lines), "cat")
    alone = [encode(name, line, "cat") for line in lines]
    assert REPEATS not in extras and cross.shape[1] == max(c.shape[1] for c, _ in alone)
    for row, mask, (one, its), places in zip(
        cross, extras["attention_mask"], alone, extras[SUBJECT].positions
    ):
        length = one.shape[1]
        assert torch.equal(row[:length], one[0]) and not row[length:].any()
        assert torch.equal(mask, (torch.arange(cross.shape[1]) < length).to(mask))
        assert places == its[SUBJECT].positions[0]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in (*PADDED, *HIDING)])
def test_lines_of_unequal_length_are_refused_where_text_and_picture_share_an_attention(
    name: str,
) -> None:
    lines = f"{PHRASE}\n{PHRASE} at night, in the rain"
    with pytest.raises(ValueError) as error:
        encode(name, lines, "cat")
    one, other = (encode(name, line)[0].shape[1] for line in lines.splitlines())
    assert f"line 1 {one}" in str(error.value) and f"line 2 {other}" in str(error.value)
    assert "the same number of tokens" in str(error.value)


@pytest.mark.parametrize("name", PADDED)
def test_lines_that_the_encoder_pads_are_one_batch(name: str) -> None:
    cross, extras = encode(name, f"{PHRASE}\n{PHRASE} at night, in the rain", "cat")
    assert (
        cross.shape[0] == 2
        and extras[SUBJECT].positions[0] == encode(name, PHRASE, "cat")[1][SUBJECT].positions[0]
    )
    assert REPEATS not in extras


def test_a_long_line_of_sd3_is_refused_beside_a_short_one() -> None:
    with pytest.raises(ValueError, match=r"line 1 154, line 2 2\d\d"):
        encode("SD3", f"{PHRASE}\n{'red ' * 90}cat", "cat")


def equal_lines(name: str) -> str:
    """Two lines that this encoder cuts into as many tokens."""
    said = [PHRASE.replace("beach", word) for word in ("water", "table", "house")]
    return "\n".join(
        (
            PHRASE,
            next(
                line
                for line in said
                if encode(name, line)[0].shape == encode(name, PHRASE)[0].shape
            ),
        )
    )


@pytest.mark.parametrize("name", [name for name in KINDS if name != "Anima"])
def test_lines_of_one_length_are_a_row_each(name: str) -> None:
    cross, extras = encode(name, equal_lines(name), "cat")
    assert torch.equal(
        cross, torch.cat([encode(name, line)[0] for line in extras[TEXT].splitlines()])
    )
    assert extras[SUBJECT].positions == encode(name, PHRASE, "cat")[1][SUBJECT].positions * 2


def test_a_mask_that_all_lines_share_stays_one_row() -> None:
    """Two rows of it stop OmniGen 2 and Boogu."""
    _, extras = encode("Omnigen2", equal_lines("Omnigen2"), "cat")
    assert extras["attention_mask"].shape[0] == 1


def test_what_stands_beside_the_rows_must_be_equally_long_too() -> None:
    """HiDream's Llama is not cut to 128 tokens, as its T5 is."""
    with pytest.raises(
        ValueError, match=r"conditioning_llama3 of \(1, 2, 128, 4\), \(1, 2, 2\d\d, 4\)"
    ):
        encode("HiDream", f"a cat\na cat{' red' * 200}", "cat")


def test_anima_reads_one_line_at_a_time() -> None:
    with pytest.raises(ValueError, match="t5xxl_ids of .* which no batch can hold. Write one line"):
        encode("Anima", equal_lines("Anima"), "cat")
