"""Jobs of every kind, a fault in the middle of one, and whether all is as it was and the next run as if it had not been."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from kindred.models.concept.inject import ActiveConcept
from kindred.models.copies import RowWriter
from kindred.models.reference.bank import ReferenceBank
from kindred.models.reference.builder import BankBuilder
from kindred.models.reference.inject import ActiveMaskedSelf
from kindred.models.reference.recorder import Recorder
from kindred.models.run import Run
from kindred.models.story.anchors import AnchorRecorder
from kindred.models.story.sources import QueryRecorder
from kindred.models.story.story import Story
from kindred.nodes.host import SamplerRun
from kindred.nodes.host.stages import Stages
from networks import random_model
from studio import (
    anchors,
    bank_of,
    capture,
    concept,
    encoder_of,
    fingerprint,
    inject,
    invert,
    negative,
    of_bank,
    of_encoder,
    of_model,
    pictures,
    plain,
    sample,
    story,
)

MODEL = random_model("tiny")
Interrupted, OutOfMemory = (
    comfy.model_management.InterruptProcessingException,
    comfy.model_management.OOM_EXCEPTION,
)
OURS = (
    Run,
    SamplerRun,
    Recorder,
    BankBuilder,
    RowWriter,
    Story,
    QueryRecorder,
    Stages,
    AnchorRecorder,
    ActiveMaskedSelf,
    ActiveConcept,
)


@cache
def path_of_photo():
    return invert(MODEL)[0]


@cache
def half_bank() -> ReferenceBank:
    """In half precision: every step is copied where the model reads it."""
    return capture(MODEL, negative=negative(), precision="float16")[0]


@cache
def anchor_bank() -> ReferenceBank:
    return anchors(story(MODEL), (0, 1))[1]


def of_anchors(found):
    drawn, bank = found
    a = bank.anchors
    return fingerprint(
        [
            drawn,
            a.features,
            a.subject,
            *a.outputs,
            *(row for rows in bank.features.values() for row in rows),
        ]
    ), of_bank(bank)


JOBS = {  # a node, or one that samples, over a MODEL -> what it made, as fingerprints
    "inversion": lambda m: fingerprint(invert(m)[0].latents),
    "edit-friendly inversion": lambda m: fingerprint(
        [invert(m, method="edit-friendly ddpm", seed=7)[0].latents]
    ),
    "capture in one pass": lambda m: of_bank(capture(m, negative=negative())[0]),
    "capture of an inversion": lambda m: of_bank(capture(m, inversion=path_of_photo())[0]),
    "cached": lambda m: fingerprint(sample(inject(m, half_bank(), 2.0, halves="both"))),
    "live": lambda m: fingerprint(
        sample(inject(m, bank_of(), 2.0, halves="both"), sampler="dpm_2")
    ),
    "concept": lambda m: fingerprint(sample(concept(m, 2.0, halves="both"))),
    "both": lambda m: fingerprint(sample(concept(inject(m, bank_of(), 2.0), 2.0))),
    "sharing": lambda m: fingerprint(pictures(story(m, feature_injection=0.0))),
    "whole story": lambda m: fingerprint(pictures(story(m))),
    "story in the official order": lambda m: fingerprint(pictures(story(m, order="official"))),
    "story from a photo": lambda m: fingerprint(pictures(story(m, reference=bank_of()))),
    "one more picture": lambda m: fingerprint(pictures(story(m, reference=anchor_bank()), (2,))),
    "anchor sampler": lambda m: of_anchors(anchors(story(m), (0, 1))),
}


def dice() -> bytes:
    return torch.get_rng_state().numpy().tobytes()


@contextmanager
def at_pass(number: int, act):
    """`act` at the beginning of UNet pass `number`; yields the passes begun."""
    begun = []

    def hook(module, args) -> None:
        begun.append(1)
        if len(begun) == number:
            act()

    held = MODEL.model.diffusion_model.time_embed.register_forward_pre_hook(hook)
    try:
        yield begun
    finally:
        held.remove()


@cache
def undisturbed(name: str):
    """What the job makes, where the dice lie afterwards (the host throws them for its noise), and its UNet passes."""
    half_bank(), anchor_bank(), path_of_photo(), plain()
    torch.manual_seed(0)
    with at_pass(0, None) as begun:
        made = JOBS[name](MODEL)
    return made, dice(), len(begun)


def passes_of(name: str) -> int:
    return undisturbed(name)[2]


def few(n: int) -> list[int]:
    """The first, a middle and the last of n."""
    return sorted({1, (n + 1) // 2, n})


EVERY = [
    "inversion",
    "edit-friendly inversion",
    "capture in one pass",
    "capture of an inversion",
    "cached",
    "live",
    "concept",
    "sharing",
    "whole story",
    "anchor sampler",
]  # the others are made of these, and are stopped at a few calls


def births(monkeypatch) -> list[weakref.ref]:
    """Weak references to everything of ours that begins with a run."""
    seen: list[weakref.ref] = []

    def watched(cls):
        made = cls.__init__

        def init(self, *given, **named):
            seen.append(weakref.ref(self))
            made(self, *given, **named)

        return init

    for cls in OURS:
        monkeypatch.setattr(cls, "__init__", watched(cls))
    return seen


def files() -> list[str]:
    """Everything in the host's folders for what it writes."""
    places = (
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
        folder_paths.get_input_directory(),
    )
    return sorted(str(p) for place in places for p in Path(place).rglob("*"))


def state():
    """What no fault may change: the inputs, the host's flags, and the folders."""
    return {
        "model": of_model(MODEL),
        "banks": [of_bank(bank) for bank in (bank_of(), half_bank(), anchor_bank())],
        "path": fingerprint(path_of_photo().latents),
        "encoder": of_encoder(encoder_of()),
        "files": files(),
        "modes": [
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            comfy.model_management.processing_interrupted(),
            comfy.model_management.in_training,
        ],
    }


def nothing_is_left(born, before, what) -> None:
    assert born, what
    gc.collect()
    assert not [r() for r in born if r() is not None], what
    now = state()
    assert not [part for part in now if now[part] != before[part]], what
    born.clear()


def disturbed(name, born, error, fault, what="", model=MODEL, again=True) -> None:
    """The job under a fault that happens; afterwards all is as it was, and the same job (again) gives what it always gave."""
    (whole, thrown, _), before = undisturbed(name), state()
    born.clear()
    torch.manual_seed(0)
    with fault as happened, pytest.raises(error):
        JOBS[name](model)
    assert happened and dice() == thrown, what
    if error is OutOfMemory:
        comfy.model_management.unload_all_models()  # as the host does then
    nothing_is_left(born, before, what)
    assert not again or JOBS[name](MODEL) == whole and torch.equal(sample(MODEL), plain()), what


def starve() -> None:
    raise OutOfMemory("CUDA out of memory. Tried to allocate 2.00 GiB")
