"""Any text in any field, by hypothesis: a node does what it says of it, or refuses in a sentence; it never raises anything else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kindred.models.network.blocks import select_blocks
from kindred.models.subject.words import subjects_in
from kindred.nodes.comparison import ComparisonGrid
from kindred.nodes.concept import ConceptEncoderLoad
from kindred.nodes.host import (
    SUBJECT,
    TEXT,
    attention_sites,
    concept_folder,
    new_reference_path,
)
from kindred.nodes.host.tokens import tokens_of
from kindred.nodes.library import LoadReference
from kindred.nodes.prompts import SubjectPrompts
from kindred.nodes.training import Order
from networks import random_model
from refusals import faults_of
from remedy import REMEDY
from words import clip, pieces_of

OUT = Path(folder_paths.get_output_directory()).resolve()
BLOCKS = tuple(attention_sites(random_model("tiny").model.diffusion_model))
PIECES = st.sampled_from(
    (
        "cat",
        "a ",
        " ",
        ",",
        "\n",
        "\r\n",
        "\u2028",
        "\0",
        "(",
        ")",
        ":1.2)",
        ":1e999)",
        ":nan)",
        "\\",
        "[",
        "]",
        "{a|b}",
        "embedding:x",
        "BREAK",
        "<lora:x:1>",
        "\U0001f431",
        "\u202e",
        "e\u0301",
        "\ufeff",
        "\ud800",
        "red " * 90,
        "x" * 3000,
        "\U000e0001" * 300,
    )
)
TEXTS = st.lists(PIECES | st.text(max_size=6), max_size=12).map("".join)
TERMS = st.sampled_from(
    (
        "all",
        "encoder",
        "masactrl",
        "input",
        "middle",
        "output",
        "input 1",
        "output 3-5",
        "middle 0.0",
        "-",
        ".",
        ",",
        " ",
        "9" * 5000,
        "\u0661",
        "\xb2",
        "0",
        "1",
        "ALL",
    )
)
STEPS = st.sampled_from(
    (
        "..",
        "/",
        "\\",
        "x",
        ".",
        "~",
        "%date:yyyy%",
        "%width%",
        "kindred",
        " [temp]",
        "\0",
        str(OUT.parent),
        "C:",
        "\ud800",
    )
)
THE_HOSTS = re.compile("^Model in folder '.*not found.$", re.S)
PATHS = st.lists(STEPS | st.text(max_size=6), max_size=10).map("".join)


@settings(max_examples=60)
@given(TEXTS.filter(lambda text: len(text.splitlines()) < 9), TEXTS, TEXTS)
@example("a (cat:1.2) on a mat", "cat", "")
@example("\U000e0001" * 300, "cat", "")
@example("a cat\nred " + "red " * 90 + "cat", "cat,", "watercolour of (")
@torch.inference_mode()
def test_any_prompt_is_a_row_whose_subject_stands_where_it_is_marked_or_is_refused(
    prompts, subject, style
):
    made, fault = faults_of(
        lambda: SubjectPrompts.execute(clip(), prompts, subject, style).result, "Subject Prompts: "
    )
    assert not fault, fault
    if made is None:
        return
    ((cross, extras),), count, texts = made
    assert (
        len(cross) == count == len(extras[TEXT].split("\n"))
        and torch.isfinite(cross).all()
        and texts == extras[TEXT]
    )
    words = subjects_in(subject)
    assert (SUBJECT in extras) == bool(words)
    for row, text in enumerate(texts.split("\n") if words else ()):
        pieces, places = dict(pieces_of(clip(), text)), extras[SUBJECT].positions[row]
        own = {c for word in words for _, piece in pieces_of(clip(), word) for c in piece}
        length = len([t for chunk in tokens_of(clip(), text) for t in chunk])
        assert (
            places
            and places[-1] < cross.shape[1]
            and all(own & {*pieces[p % length]} for p in places)
        )


@settings(max_examples=200)
@given(st.lists(TERMS | st.text(max_size=4), max_size=6).map("".join))
@example("input " + "9" * 5000)
def test_any_choice_of_blocks_is_some_of_them_or_is_refused(wanted):
    made, fault = faults_of(
        lambda: select_blocks(wanted, BLOCKS, "Masked Self-Attn Inject"),
        "Masked Self-Attn Inject: ",
    )
    assert not fault and (made is None or made and {*made} <= {*BLOCKS}), fault


def said_of(act: Callable[[], Any]) -> tuple[Any, str]:
    """What `act` gives, or the sentence it refuses with."""
    try:
        return act(), ""
    except (ValueError, FileNotFoundError) as error:
        return None, str(error)


def named(prefix: str) -> tuple[Path, str]:
    with new_reference_path(prefix) as made:
        return made


@settings(max_examples=200)
@given(PATHS)
def test_any_name_of_a_reference_stays_in_the_output_folder_or_is_refused(prefix):
    try:
        made, said = said_of(lambda: named(prefix))
    except Exception as error:
        assert "outside the output folder is not allowed" in str(error)  # the host's own word
        return
    finally:
        for folder in sorted(
            (p for p in OUT.rglob("*") if p.is_dir() and not any(p.iterdir())), reverse=True
        ):
            folder.rmdir()
    fits = made and made[0].resolve().is_relative_to(OUT) and not made[0].exists()
    assert fits or re.search("^filename_prefix is .*Give a short name", said)


@settings(max_examples=200)
@given(PATHS)
def test_any_name_of_an_encoder_stays_in_its_folder_or_is_refused(name):
    home, before = concept_folder().resolve(), set(concept_folder().rglob("*"))
    made, said = said_of(
        Order(model=None, vae=None, clip=None, images=[], prompt=["x"], save_name=name).files
    )
    for folder in sorted(set(concept_folder().rglob("*")) - before, reverse=True):
        folder.rmdir()
    assert (
        all(path.resolve().is_relative_to(home) and not path.exists() for path in made)
        if made
        else re.search("^Concept Encoder Train: save_name is .*Give the name of a file", said)
    )


@settings(max_examples=200)
@given(PATHS)
def test_any_name_to_load_that_is_none_of_the_hosts_files_is_refused(name):
    for act in (
        LoadReference.execute,
        LoadReference.fingerprint_inputs,
        ConceptEncoderLoad.execute,
        ConceptEncoderLoad.fingerprint_inputs,
    ):
        made, said = said_of(lambda act=act: act(name))
        assert made is None and (THE_HOSTS.search(said) or REMEDY.search(said)), said


@given(TEXTS, TEXTS)
def test_any_caption_is_drawn_or_there_are_too_many(labels, captions):
    pictures = torch.rand(2, 8, 8, 3)
    made, fault = faults_of(
        lambda: ComparisonGrid.execute({"image0": pictures}, labels, captions, cell=64).result[0],
        "Comparison Grid: ",
    )
    assert not fault and (made is None or torch.isfinite(made).all() and made.shape[0] == 1), fault
