"""Laws of Subject Prompts over the host's own tokenizer and text encoder (I18)."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import comfy.sd1_clip
import pytest
import torch
from kindred.models.subject.words import SubjectTokens, positions_of
from kindred.nodes.host import SUBJECT, TEXT
from kindred.nodes.host.tokens import tokens_of
from kindred.nodes.prompts import SubjectPrompts, batch_rows
from words import WIDTH, clip, pieces_of, tokenizer

LAW = pytest.mark.parametrize


@torch.inference_mode()
def encode(prompts: str, subject: str = "", style: str = ""):
    """-> cross [b w c], extras, count."""
    (entry,), count, texts = SubjectPrompts.execute(clip(), prompts, subject, style).result
    assert texts.splitlines() == [
        f"{' '.join(style.split())} {line.strip()}".strip()
        for line in prompts.splitlines()
        if line.strip()
    ]
    return entry[0], entry[1], count


def pieces(text: str, positions: tuple[int, ...], kind: str = "sd1") -> list[str]:
    """The vocabulary's pieces at these positions of the text, "</w>" at a word's end."""
    words = comfy_vocabulary()
    flat = [t for chunk in tokens_of(tokenizer(kind), text) for t in chunk]
    return [words[flat[p][0]] for p in positions]


@cache
def comfy_vocabulary() -> dict[int, str]:
    return comfy.sd1_clip.SDTokenizer().inv_vocab


def find(text: str, *subject: str, kind: str = "sd1") -> tuple[int, ...]:
    door = tokenizer(kind)
    return positions_of(pieces_of(door, text), [pieces_of(door, s) for s in subject])


# where the words stand (I18) ---------------------------------------------------------------------------------------------------


def test_a_word_stands_after_the_start_token():
    assert find("cat", "cat") == (1,) and find("a photo of a cat", "cat") == (5,)


@LAW("word", ["axolotl", "wolpertinger", "gryphon-cat"])
def test_every_piece_of_a_word_in_pieces(word):
    places = find(f"a photo of a {word} on the beach", word)
    assert len(places) > 1 and places == tuple(range(5, 5 + len(places)))
    assert "".join(pieces(f"a photo of a {word} on the beach", places)).replace("</w>", "") == word


def test_every_occurrence():
    assert find("a cat and a cat, my cat", "cat") == (2, 5, 8)


def test_a_phrase_is_its_words_in_order():
    text = "a teddy bear beside a bear called teddy"
    places = find(text, "teddy bear")
    assert pieces(text, places) == ["teddy</w>", "bear</w>"] and find(text, "bear teddy") == ()


def test_a_word_inside_another_is_not_the_word():
    assert find("a catfish in a category", "cat") == () and find("cats", "cat") == ()


@LAW(
    "text",
    [
        "a Photo of a CAT",
        "a photo of a cat.",
        "a photo of a cat's dinner",
        "a  photo  of a (cat)",
        "a photo of a cat, on a mat",
    ],
)
def test_case_marks_and_spaces_do_not_matter(text):
    assert pieces(text, find(text, "Cat")) == ["cat</w>"]


@LAW(
    "weighted",
    [
        "a (cat:1.3) on a mat",
        "a ((cat)) on a mat",
        "a (cat on a:0.5) mat",
        "(a:1.2) cat on a mat",
        "a cat on a (mat:1.4)",
    ],
)
def test_weights_shift_nothing(weighted):
    """I18: neither the word nor what stands after it."""
    for word, place in (("cat", (2,)), ("mat", (5,))):
        assert find(weighted, word) == place == find("a cat on a mat", word)


def test_escaped_brackets_are_text():
    text = r"a \(small\) cat"
    assert pieces(text, find(text, "cat")) == ["cat</w>"]


def test_words_after_the_subject_change_nothing():
    assert find("a photo of a cat", "cat") == find(
        "a photo of a cat wearing a red hat in the snow at night", "cat"
    )


def test_a_word_beyond_77_tokens_is_counted_over_the_chunks():
    """It is the 76th: the first of the second chunk, after the 77 of the first and its own start token."""
    text = ", ".join(["red"] * 37) + ", a cat and a dog"
    places = find(text, "cat")
    assert len(tokens_of(tokenizer("sd1"), text)) == 2 and places == (77 + 1,)
    assert pieces(text, places) == ["cat</w>"] and pieces(text, find(text, "dog")) == ["dog</w>"]
    assert find("cat " + text, "cat")[0] == 1 and len(find("cat " + text, "cat")) == 2


def test_a_phrase_across_two_chunks_is_found():
    """74 tokens before it: the 75 of a chunk end between its words."""
    text = "red " * 74 + "teddy bear"
    assert pieces(text, find(text, "teddy bear")) == ["teddy</w>", "bear</w>"] and find(
        text, "teddy bear"
    ) == (75, 78)


def test_several_subjects_are_all_marked():
    text = "a cat beside a teddy bear"
    assert pieces(text, find(text, "cat", "teddy bear")) == ["cat</w>", "teddy</w>", "bear</w>"]


def test_sdxls_two_encoders_see_the_same_places():
    for text in ("a photo of a axolotl", "a (axolotl:1.3) " + "red " * 90 + "axolotl"):
        assert find(text, "axolotl", kind="sdxl") == find(text, "axolotl")
        both = tokenizer("sdxl").tokenize(text, return_word_ids=True)
        wide, narrow = ([(t[0], t[2]) for chunk in both[k] for t in chunk if t[2]] for k in "gl")
        assert wide == narrow


# words as text: what stands beside a word changes how it is cut -----------------------------------------------------------------


def marked(text: str, *subject: str) -> str:
    """What the marked tokens spell."""
    return "".join(pieces(text, find(text, *subject))).replace("</w>", "")


@LAW(
    "text, subject, spelled",
    [
        (r"1girl, saber \(fate\), solo", r"saber \(fate\)", "saber(fate),"),
        ("a (cat:1.2), sitting", "cat", "cat"),
        ("a photo of a teddy bear's hat", "teddy bear", "teddybear"),
        ("a gryphon-cat.", "gryphon-cat", "gryphon-cat"),
        ("cat, dog", "dog", "dog"),
        ("2girls", "girls", "girls"),
    ],
)
def test_a_word_is_found_whatever_stands_beside_it(text, subject, spelled):
    assert marked(text, subject) == spelled


@LAW(
    "text, subject",
    [
        ("a policewoman", "woman"),
        ("a seahorse", "horse"),
        ("cats", "cat"),
        ("a catfish", "cat"),
        ("bulldogs", "dog"),
        ("a teddybear", "teddy bear"),
    ],
)
def test_a_match_neither_begins_nor_ends_inside_a_word(text, subject):
    assert find(text, subject) == ()


@LAW(
    "text, subject",
    [
        ("\u4e00\u53ea\u732b\u5728\u6d77\u6ee9\u4e0a", "\u732b"),  # Chinese: a cat on the beach
        (
            "\ud574\ubcc0\uc758 \uace0\uc591\uc774\uac00",
            "\uace0\uc591\uc774",
        ),  # Korean: with a particle
        ("\u6d77\u8fba\u306e\u732b", "\u732b"),
    ],
)  # Japanese
def test_scripts_without_spaces_and_particles(text, subject):
    """Every token that holds a byte of it, and at least as many as it has characters."""
    door = tokenizer("sd1")
    places = find(text, subject)
    assert (
        places
        and len(places) <= len(pieces_of(door, subject)) + 2
        and set(places) < {p for p, _ in pieces_of(door, text)}
    )
    assert find(text, "\u72d7") == ()  # a dog


def test_a_korean_match_does_not_begin_inside_a_word():
    assert find("\uac80\uc740\uace0\uc591\uc774", "\uace0\uc591\uc774") == ()


@LAW("between", [",", "\uff0c", "\u3001", ";", "\uff1b", "\n"])
def test_subjects_are_parted_by_any_comma_or_line(between):
    assert encode("a cat beside a dog", f"cat{between}dog")[1][SUBJECT].words == ("cat", "dog")


def test_an_embedding_is_found_by_its_word(monkeypatch):
    """Three vectors; other vectors are another embedding."""
    door = tokenizer("sd1").tokenizer.clip_l
    vectors = {"mydog": torch.arange(3 * 768.0).view(3, 768), "other": torch.ones(2, 768)}

    def load(name: str):
        name, _, left = name.partition(" ")
        return vectors.get(name), name, left

    monkeypatch.setattr(door, "_try_get_embedding", load)
    monkeypatch.setattr(door, "embedding_directory", "somewhere")
    assert find("a photo of embedding:mydog on the beach", "embedding:mydog") == (4, 5, 6)
    assert find("a photo of embedding:other on the beach", "embedding:mydog") == ()
    assert find("a photo of embedding:mydog on the beach", "beach") == (9,)


# what the node gives -----------------------------------------------------------------------------------------------------------


def test_one_line_is_the_hosts_own_encoding(host):
    ((own, extras),) = host.NODE_CLASS_MAPPINGS["CLIPTextEncode"]().encode(
        clip(), "a photo of a cat"
    )[0]
    cross, mine, count = encode("a photo of a cat", "cat")
    assert (
        torch.equal(cross, own)
        and torch.equal(mine["pooled_output"], extras["pooled_output"])
        and count == 1
    )
    assert mine[SUBJECT] == SubjectTokens(("cat",), ((5,),)) and mine[TEXT] == "a photo of a cat"
    assert mine.keys() - {SUBJECT, TEXT} == extras.keys()


def test_lines_are_pictures_and_empty_ones_are_skipped():
    cross, extras, count = encode("a cat on a beach\n\n  my cat in the snow \n", "cat")
    assert cross.shape == (2, 77, WIDTH) and count == 2 and extras["pooled_output"].shape[0] == 2
    assert (
        extras[SUBJECT].positions == ((2,), (2,))
        and extras[TEXT] == "a cat on a beach\nmy cat in the snow"
    )
    for i, line in enumerate(("a cat on a beach", "my cat in the snow")):
        alone, its, _ = encode(line)
        assert torch.equal(cross[i : i + 1], alone) and torch.equal(
            extras["pooled_output"][i : i + 1], its["pooled_output"]
        )


def test_lines_of_different_length_are_repeated_and_the_positions_with_them():
    """Attention cannot tell a repeated prompt from one: 77 beside 154 tokens, each row its own encoding again and again."""
    long = "red " * 80 + "cat"
    cross, extras, _ = encode(f"a cat\n{long}", "cat")
    short, tall = encode("a cat")[0], encode(long)[0]
    assert cross.shape == (2, 154, WIDTH)
    assert torch.equal(cross[:1], short.repeat(1, 2, 1)) and torch.equal(cross[1:], tall)
    assert extras[SUBJECT].positions == ((2, 79), find(long, "cat"))


def test_rows_of_two_and_three_chunks_meet_at_six():
    rows, places = batch_rows([torch.ones(1, 2, 1), torch.zeros(1, 3, 1)], [(1,), (0, 2)])
    assert rows.shape == (2, 6, 1) and places == ((1, 3, 5), (0, 2, 3, 5))


def test_the_style_goes_before_every_line():
    cross, extras, _ = encode("a cat\nmy cat", "cat", "watercolour of")
    assert extras[TEXT] == "watercolour of a cat\nwatercolour of my cat"
    assert torch.equal(cross, encode("watercolour of a cat\nwatercolour of my cat")[0])
    assert extras[SUBJECT].positions == (find("watercolour of a cat", "cat"),) * 2


def test_a_style_of_several_lines_stands_in_one():
    """A line of texts is a picture to whoever reads them."""
    _, extras, count = encode("a cat\nmy cat", "cat", " watercolour\nof \r\n")
    assert count == 2 and extras[TEXT] == "watercolour of a cat\nwatercolour of my cat"


def test_without_a_subject_nothing_is_marked():
    assert SUBJECT not in encode("a cat")[1] and SUBJECT not in encode("a cat", " , ")[1]


def test_each_line_may_hold_another_of_the_subjects():
    _, extras, _ = encode("a cat on a mat\na dog on a mat", "cat, dog")
    assert extras[SUBJECT] == SubjectTokens(("cat", "dog"), ((2,), (2,)), (((2,), ()), ((), (2,))))


# bad input ---------------------------------------------------------------------------------------------------------------------


def test_the_line_without_the_subject_is_named():
    with pytest.raises(
        ValueError,
        match=r"Subject Prompts: line 2, 'a dog in the snow', does not contain the subject 'cat'.*every line",
    ):
        encode("a cat on a beach\n\na dog in the snow", "cat")


def test_a_subject_that_stands_nowhere_is_named():
    with pytest.raises(
        ValueError,
        match=r"no line contains the subject 'dgo'; the lines are \['a cat on a beach'\].*Correct the word",
    ):
        encode("a cat on a beach", "cat, dgo")


@LAW("subject", ["()", "<>"])
def test_a_subject_of_marks_alone_is_not_in_the_line(subject):
    with pytest.raises(ValueError, match="does not contain the subject"):
        encode("a cat", subject)


@LAW("weight", ["nan", "inf", "1e999"])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(
        ValueError,
        match=r"the line 'a \(cat:.*' is encoded as \d+ NaN or infinite values. Correct a weight such as",
    ):
        encode(f"a cat\na (cat:{weight})", "cat")


@LAW("prompts", ["", "  \n \n"])
def test_no_prompt_is_refused(prompts):
    with pytest.raises(
        ValueError, match="Subject Prompts: prompts is empty. Write one prompt per line"
    ):
        encode(prompts, "cat")


def test_a_clip_with_scheduled_hooks_is_refused():
    scheduled = SimpleNamespace(
        tokenize=tokenizer("sd1").tokenize,
        tokenizer=tokenizer("sd1").tokenizer,
        encode_from_tokens_scheduled=lambda tokens: [[None, {}], [None, {}]],
    )
    with pytest.raises(
        ValueError, match="schedules 2 encodings for one prompt.*without scheduled hooks"
    ):
        SubjectPrompts.execute(scheduled, "a cat", "cat")
