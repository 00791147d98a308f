"""Wrong settings in one table: each is said with what to do about it before the network is asked once."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from kindred.miniature.pack import CHECKPOINT
from kindred.nodes.anchors import AnchorSampler
from kindred.nodes.capture import RefUNetCapture
from kindred.nodes.host import page
from kindred.nodes.photos import LoadPhoto
from kindred.nodes.prompts import SubjectPrompts
from networks import random_model
from remedy import REMEDY
from studio import (
    STEPS,
    bank_of,
    capture,
    counted,
    inject,
    invert,
    negative,
    photo,
    pictures,
    prompt,
    prompts_of,
    sample,
    story,
)

import nodes

MODEL = random_model("tiny")


def read_by(**how) -> torch.Tensor:
    return sample(inject(MODEL, bank_of()), **how)


def spot(y: int, x: int) -> torch.Tensor:
    """A mask with a subject in its middle."""
    mask = torch.zeros(1, y, x)
    mask[:, y // 4 : -y // 4, x // 4 : -x // 4] = 1
    return mask


@cache
def miniature_clip():
    if not CHECKPOINT.exists():
        pytest.skip("no weights: python -m miniature.train pack writes them")
    return nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT.name)[1]


@torch.inference_mode()
def miniature_prompts(prompts: str, subject: str):
    return SubjectPrompts.execute(miniature_clip(), prompts, subject)


@torch.inference_mode()
def anchors_of_no_step():
    given = prompts_of((0, 1)), negative(), photo(pictures=2)
    return AnchorSampler.execute(story(MODEL), 1, 2, 4.0, "euler", "normal", *given, 0.0)


# what is wrong -> what is done, what is said of it in this order
TABLE: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "three lines, one picture": (
        lambda: read_by(positive=prompts_of(3)),
        ("3 lines", "1 picture,", "2 would never be drawn", "scene 1", "Wire count"),
    ),
    "a story of three lines, two pictures": (
        lambda: pictures(story(MODEL), (0, 1), positive=prompts_of(3)),
        ("3 lines", "2 pictures", "1 would never be drawn", "scene 2"),
    ),
    "a story of one picture": (
        lambda: pictures(story(MODEL), (0,)),
        ("one picture has nobody to share with", "Raise the batch size, or wire a reference"),
    ),
    "other steps than the reference's": (
        lambda: read_by(steps=STEPS + 2),
        (
            "live in 4 of 5 steps (one extra model pass in each)",
            "3 steps)",
            "steps and the scheduler",
        ),
    ),
    "another scheduler than the reference's": (
        lambda: read_by(scheduler="karras"),
        ("live in 3 of 3 steps (one extra model pass in each)", "made with ddim_uniform"),
    ),
    "another size than the reference's": (
        lambda: read_by(size=(12, 10)),
        ("was read at 64x64 pixels", "pictures are 80x96", "Make it at the size"),
    ),
    "lines without the subject": (
        lambda: SubjectPrompts.validate_inputs("a cat\na dog\n\nthe Cat!\na bird", "cat"),
        ("2 of 4 lines do not contain", "'cat'", "2: 'a dog'", "4: 'a bird'", "every line"),
    ),
    "a subject that stands nowhere": (
        lambda: SubjectPrompts.validate_inputs("a cat", "cat, dgo"),
        ("no line contains the subject 'dgo'", "Correct the word"),
    ),
    "no line": (
        lambda: SubjectPrompts.validate_inputs(" \n", "cat"),
        ("prompts is empty", "Write one prompt per line"),
    ),
    "a word that the miniature does not know": (
        lambda: miniature_prompts("a giraffe in a bar\na giraffe", "giraffe"),
        ("never learnt 'giraffe', 'bar',", "It knows", "cat", "robot", "Use words that it knows"),
    ),
    "no photo": (
        lambda: RefUNetCapture.validate_inputs({"model": "MODEL"}),
        ("neither an inversion nor a latent is wired", "exactly one"),
    ),
    "two photos": (
        lambda: RefUNetCapture.validate_inputs(
            {"latent": "LATENT", "inversion": "KINDRED_INVERSION"}
        ),
        ("both an inversion and a latent are wired", "exactly one"),
    ),
    "a wire of another type": (
        lambda: RefUNetCapture.validate_inputs({"latent": "IMAGE"}),
        ("latent is wired to IMAGE, where LATENT belongs", "Wire LATENT"),
    ),
    "an autoencoder of another layout": (
        lambda: capture(MODEL, {"samples": torch.ones(1, 16, 8, 8)}),
        ("[1, 16, 8, 8]", "4 channels", "Encode the photo with this checkpoint's VAE"),
    ),
    "an empty latent for the photo": (
        lambda: invert(MODEL, {"samples": torch.zeros(1, 4, 8, 8)}),
        ("the latent is empty", "not Empty Latent Image"),
    ),
    "a prompt without a subject": (
        lambda: capture(MODEL, positive=prompt(1)),
        ("marks no subject word", "Subject Prompts"),
    ),
    "a mask that was not fitted": (
        lambda: capture(MODEL, mask=spot(96, 64)),
        ("mask is 64x96 and the photo 8:8", "Take both from Load Photo"),
    ),
    "a mask of the background": (
        lambda: capture(MODEL, mask=1 - spot(64, 64)),
        ("all four corners", "75 %", "InvertMask"),
    ),
    "a window that ends before it begins": (
        lambda: inject(MODEL, bank_of(), start_percent=0.6, end_percent=0.4),
        ("start_percent is 0.6 and end_percent is 0.4", "never read", "Give an end"),
    ),
    "a black target mask": (
        lambda: inject(MODEL, bank_of(), target_mask=torch.zeros(1, 64, 64)),
        ("the target mask is black", "Make the part"),
    ),
    "a photo that is gone": (
        lambda: LoadPhoto.validate_inputs("gone.png"),
        ("there is no picture 'gone.png'", "Choose one of the list"),
    ),
    "a reference of another model": (
        lambda: inject(random_model("tiny", seed=1), bank_of()),
        ("was made with model", "but the model given is", "make the reference again"),
    ),
    "anchors of no step": (anchors_of_no_step, ("denoise is 0.0", "Give more than 0")),
}


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the page shows under the node that runs."""
    texts: list[str] = []
    server = SimpleNamespace(
        client_id="a page",
        send_progress_text=lambda text, node, client: texts.append(text),
        send_sync=lambda event, data, client: None,
    )
    monkeypatch.setattr(page, "PromptServer", SimpleNamespace(instance=server))
    return texts


@pytest.mark.parametrize("wrong", TABLE)
def test_it_is_said_with_a_remedy_before_the_network_is_asked(wrong, said):
    """By the page before a run, by an error, or under the node that is running."""
    act, words = TABLE[wrong]
    bank_of(), miniature_clip()  # what a row needs is made before anything is counted
    at_first: list[str] = []
    with counted(MODEL) as calls, CurrentNodeContext("a prompt", "7"):
        hook = MODEL.model.diffusion_model.register_forward_pre_hook(
            lambda module, args: at_first.extend(said) if not calls[1:] else None
        )
        try:
            answer = act()
        except ValueError as error:
            answer = str(error)
        finally:
            hook.remove()
    if isinstance(answer, str):
        assert not calls
        texts = [answer]
    else:
        texts = at_first if calls else said
    wanted = re.compile(".*".join(map(re.escape, words)), re.DOTALL)
    told = [text for text in texts if wanted.search(text)]
    assert told and REMEDY.search(told[0]), texts


def test_what_is_right_is_not_warned_of(said, caplog):
    caplog.set_level("WARNING")
    with CurrentNodeContext("a prompt", "7"):
        read_by(positive=prompts_of(3), batch=3)
        capture(MODEL, mask=spot(64, 64))
        miniature_prompts("a photo of a cat\na cat in the snow", "cat")
    assert SubjectPrompts.validate_inputs("(a:1.2) Black-cat\nCAT, black", "black cat, cat") is True
    assert SubjectPrompts.validate_inputs(None, "cat") is True  # a wired text
    assert RefUNetCapture.validate_inputs({"latent": "LATENT", "model": "MODEL"}) is True
    assert not said and not caplog.records
