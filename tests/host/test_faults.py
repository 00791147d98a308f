"""Whatever goes wrong in the middle of a run, the next run is as if it had not: interrupts, and neighbours that raise."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import comfy.model_management
import pytest
from comfy.ldm.modules.attention import optimized_attention
from disturbances import (
    EVERY,
    JOBS,
    MODEL,
    Interrupted,
    OutOfMemory,
    at_pass,
    disturbed,
    few,
    nothing_is_left,
    passes_of,
    starve,
    state,
    undisturbed,
)
from kindred.nodes.host import KEY

LAW = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("frozen_heap")


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
