"""Whatever goes wrong in the middle of a run, the next run is as if it had not: interrupts, neighbours that raise, memory that runs out."""

from __future__ import annotations

import gc
import shutil
import weakref
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from kindred.models.concept.inject import ActiveConcept
from kindred.models.copies import RowWriter
from kindred.models.reference.bank import ReferenceBank
from kindred.models.reference.builder import BankBuilder
from kindred.models.reference.file import Parcel
from kindred.models.reference.inject import ActiveMaskedSelf
from kindred.models.reference.recorder import Recorder
from kindred.models.run import Run
from kindred.models.story.anchors import AnchorRecorder
from kindred.models.story.sources import QueryRecorder
from kindred.models.story.story import Story
from kindred.nodes.host import KEY, ManagedEncoder, SamplerRun
from kindred.nodes.host.stages import Stages
from kindred.nodes.library import SaveReference
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
from torch.utils._python_dispatch import TorchDispatchMode

MODEL = random_model("tiny")
LAW = pytest.mark.parametrize
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


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The host's own objects are no garbage, and looking through them takes longer than a run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def born(monkeypatch):
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


# interrupts ------------------------------------------------------------------------------------------------------------------


@LAW("name", JOBS)
def test_interrupted_at_any_unet_call_the_next_run_is_as_if_it_had_not_been(name, born):
    """The flag is set at the call; the host itself finds it at its next operation, and takes it back."""
    n = passes_of(name)
    assert n >= 3
    for number in range(1, n + 1) if name in EVERY else few(n):
        press = at_pass(number, comfy.model_management.interrupt_current_processing)
        disturbed(name, born, Interrupted, press, f"pass {number}", again=number in (1, n))


def test_a_wish_to_stop_that_came_before_the_run_is_not_swallowed(born):
    """And one that nobody heard stays the host's to forget."""
    for name in JOBS:
        undisturbed(name)
    before = state()
    for name, job in JOBS.items():
        comfy.model_management.interrupt_current_processing()
        with at_pass(0, None) as begun, pytest.raises(Interrupted):
            job(MODEL)
        assert len(begun) <= 1 and not comfy.model_management.processing_interrupted(), name
    nothing_is_left(born, before, "all")


# neighbours ------------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Another node's failure in the middle of a run."""


def stop() -> None:
    raise Stop


def starve() -> None:
    raise OutOfMemory("CUDA out of memory. Tried to allocate 2.00 GiB")


@contextmanager
def at_call(number: int, act, called: list):
    """Arms a neighbour's function, which tells its calls in `called`, to `act` at call `number`."""
    happened: list[int] = []
    called[:] = [number, lambda: (happened.append(number), act())]
    try:
        yield happened
    finally:
        called.clear()


def armed(called: list) -> None:
    """What the neighbours below do first."""
    if called:
        called[0] -= 1
        if called[0] == 0:
            called[1]()


def with_patch(model, called):
    m = model.clone()

    def patch(n, context, value, options):
        armed(called)
        return n, context, value

    m.set_model_attn1_patch(patch)
    return m


def with_override(model, called):
    """Sage attention and the like: every attention of the UNet, ours included, is computed by it."""
    m = model.clone()

    def override(func, *args, **kwargs):
        armed(called)
        return func(*args, **kwargs)

    m.model_options["transformer_options"]["optimized_attention_override"] = override
    return m


def with_replacement(model, called):
    """IP-Adapter and the like."""
    m = model.clone()

    def replaced(q, k, v, options):
        armed(called)
        return optimized_attention(q, k, v, options["n_heads"], transformer_options=options)

    for block in (("middle", 0), ("output", 1)):
        m.set_model_attn2_replace(replaced, *block)
    return m


NEIGHBOURS = {  # who fails, how, and when: so far into all its calls
    "a patch raises at first": (with_patch, stop, Stop, 0.0),
    "a replacement raises in the middle": (with_replacement, stop, Stop, 0.5),
    "no memory for an attention in the middle": (with_override, starve, OutOfMemory, 0.5),
    "no memory for the last attention": (with_override, starve, OutOfMemory, 1.0),
}


@cache
def calls_of(name: str) -> dict:
    """How often each neighbour is called; a replacement computes its attention beside ours, so the override counts alone."""
    called = {make: [0, None] for make in (with_patch, with_replacement, with_override)}
    undisturbed(name)
    JOBS[name](with_patch(with_replacement(MODEL, called[with_replacement]), called[with_patch]))
    JOBS[name](with_override(MODEL, called[with_override]))
    return {make: -calls[0] for make, calls in called.items()}


@LAW("name", JOBS)
def test_a_neighbour_that_fails_at_a_chosen_call(name, born):
    for what, (make, act, error, share) in NEIGHBOURS.items():
        called: list = []
        number = max(1, round(share * calls_of(name)[make]))
        disturbed(
            name,
            born,
            error,
            at_call(number, act, called),
            f"{what}: {number}",
            make(MODEL, called),
            share == 1.0,
        )


# memory ----------------------------------------------------------------------------------------------------------------------


@LAW("name", JOBS)
def test_memory_that_runs_out_at_a_unet_call(name, born):
    for number in few(passes_of(name))[1:]:
        disturbed(
            name,
            born,
            OutOfMemory,
            at_pass(number, starve),
            f"pass {number}",
            again=number < passes_of(name),
        )


class Scarce(TorchDispatchMode):
    """Counts the operations inside, and has no memory for operation `number`."""

    def __init__(self, counted: list, number: int) -> None:
        super().__init__()
        self.counted, self.number = counted, number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted.append(func)
        if len(self.counted) == self.number:
            starve()
        return func(*args, **(kwargs or {}))


@contextmanager
def scarce(monkeypatch, cls, name: str, number: int):
    """Memory runs out at operation `number` of all those that cls.name makes; yields the operations."""
    counted, original = [], getattr(cls, name)

    def inside(*args, **kwargs):
        with Scarce(counted, number):
            return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cls, name, inside)
        yield counted


COPIES = [  # what copies a bank, in which job
    ("capture in one pass", BankBuilder, "add"),
    ("capture in one pass", BankBuilder, "finish"),
    ("cached", ReferenceBank, "tokens"),
    ("live", ReferenceBank, "keep"),
    ("one more picture", ReferenceBank, "tokens"),
    *(
        ("anchor sampler", AnchorRecorder, method)
        for method in ("latent", "output", "matched", "finish")
    ),
]


@LAW(
    ("name", "cls", "method"), COPIES, ids=[f"{cls.__name__}.{method}" for _, cls, method in COPIES]
)
def test_memory_that_runs_out_while_a_bank_is_copied(name, cls, method, born, monkeypatch):
    undisturbed(name)
    with scarce(monkeypatch, cls, method, 0) as operations:
        JOBS[name](MODEL)
    assert operations
    for number in few(len(operations)):
        disturbed(
            name,
            born,
            OutOfMemory,
            scarce(monkeypatch, cls, method, number),
            f"operation {number}",
            again=number == len(operations),
        )


def test_memory_that_runs_out_while_a_photo_is_read(born, monkeypatch):
    """By the node, before any sampler begins."""
    (whole, *_), before = undisturbed("concept"), state()
    for share in (0.0, 0.5, 1.0):
        with scarce(
            monkeypatch, ManagedEncoder, "encode", 0
        ) as operations:  # counted anew: whether it had to be loaded is the host's
            assert JOBS["concept"](MODEL) == whole and len(operations) > 10
        number = max(1, round(share * len(operations)))
        with scarce(monkeypatch, ManagedEncoder, "encode", number), pytest.raises(OutOfMemory):
            JOBS["concept"](MODEL)
        assert state() == before and JOBS["concept"](MODEL) == whole, (
            f"operation {number} of {len(operations)}"
        )


def test_memory_that_runs_out_while_a_reference_is_saved_leaves_no_file(born, monkeypatch):
    place = Path(folder_paths.get_output_directory()) / "kindred"
    shutil.rmtree(place, ignore_errors=True)
    before = state()
    with scarce(monkeypatch, Parcel, "bank", 2), pytest.raises(OutOfMemory):
        SaveReference.execute(half_bank())
    assert not [p for p in place.rglob("*") if p.is_file()]
    SaveReference.execute(half_bank())
    assert [p.name for p in place.iterdir()] == ["reference_00001_.safetensors"]
    shutil.rmtree(place)
    assert state() == before


@LAW("name", JOBS)
def test_whoever_keeps_the_options_of_a_failed_run_keeps_no_features(name):
    """A guider in a traceback, another node: also of the Ref-UNet's own pass, in whose first attention it failed."""
    for number in few(calls_of(name)[with_patch])[:2]:
        held, m = [], MODEL.clone()

        def patch(n, context, value, options, held=held, number=number):
            held.append(options[KEY])
            if len(held) == number:
                stop()
            return n, context, value

        m.set_model_attn1_patch(patch)
        with pytest.raises(Stop):
            JOBS[name](m)
        assert not [
            run for run in held if run.watchers or run.active or run.sites or run.parts or run.turn
        ], number
