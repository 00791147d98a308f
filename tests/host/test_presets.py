"""Host laws of presets: a preset is its values typed by hand, custom is none, and strength 0 stays the plain picture."""

from __future__ import annotations

import logging

import pytest
import torch
from evaluation.rows import PRESETS
from kindred.models import presets
from kindred.nodes.concept import CrossAttnDetailInject
from kindred.nodes.inject import MaskedSelfAttnInject
from networks import random_model
from studio import bank_of, concept, inject, plain, sample

MODEL = random_model("tiny")
LAW = pytest.mark.parametrize
STEPS = 6  # so that no window of a preset is without a step


def self_half(**more):
    return inject(MODEL, bank_of(steps=STEPS), **more)


def cross_half(**more):
    return concept(MODEL, **{"start_percent": presets.CONCEPT.window[0]} | more)


HALVES = {
    MaskedSelfAttnInject: (self_half, presets.SELF),
    CrossAttnDetailInject: (cross_half, presets.CONCEPT),
}
each_half = LAW("node", HALVES, ids=lambda node: node.__name__)
each_preset = LAW(
    "node, name", [(node, name) for node, (_, ours) in HALVES.items() for name in ours.named]
)


def drawn(model):
    return sample(model, steps=STEPS)


@each_half
def test_the_input_comes_last_and_may_be_absent_so_that_saved_workflows_load_as_before(node):
    last = node.define_schema().inputs[-1]
    assert (last.id, last.optional, last.default) == ("preset", True, presets.CUSTOM)
    assert tuple(last.options) == HALVES[node][1].names


def test_the_evaluation_knows_them_by_their_names():
    assert PRESETS == (presets.SELF.names, presets.CONCEPT.names)


@each_half
def test_custom_is_what_is_typed_bit_for_bit(node):
    half, _ = HALVES[node]
    typed = {"strength": 0.7, "start_percent": 0.3, "end_percent": 0.9}
    assert torch.equal(drawn(half(**typed, preset=presets.CUSTOM)), drawn(half(**typed)))


@each_preset
@LAW("strength", [1.0, 0.6])
def test_a_preset_is_its_values_typed_by_hand_bit_for_bit(node, name, strength):
    half, ours = HALVES[node]
    preset = ours.named[name]
    start, end = preset.window
    typed = half(strength=strength * preset.strength, start_percent=start, end_percent=end)
    made = drawn(half(strength=strength, preset=name))
    assert torch.equal(made, drawn(typed))
    assert not torch.equal(made, sample(MODEL, steps=STEPS))


@each_preset
def test_strength_0_is_the_plain_picture_with_every_preset(node, name):
    half, _ = HALVES[node]
    assert torch.equal(sample(half(strength=0.0, preset=name)), plain())


@each_half
def test_no_preset_goes_past_what_the_strength_can_be(node):
    half, ours = HALVES[node]
    most = next(i for i in node.define_schema().inputs if i.id == "strength").max
    assert most == ours.most and all(0 < p.strength <= most for p in ours.named.values())
    for name, preset in ours.named.items():
        start, end = preset.window
        capped = {"strength": min(most * preset.strength, most)}
        typed = half(**capped, start_percent=start, end_percent=end)
        assert torch.equal(drawn(half(strength=most, preset=name)), drawn(typed))


@each_half
def test_a_window_that_is_not_used_is_said(node, caplog):
    half, ours = HALVES[node]
    name, preset = next(iter(ours.named.items()))
    with caplog.at_level(logging.WARNING):
        half(preset=name)
        start, end = preset.window
        half(preset=name, start_percent=start, end_percent=end)
    assert "preset" not in caplog.text
    with caplog.at_level(logging.WARNING):
        half(preset=name, start_percent=0.35, end_percent=0.95)
    for words in ("start_percent 0.35", "end_percent 0.95", f"preset is {name}", presets.CUSTOM):
        assert words in caplog.text


@each_half
def test_a_preset_that_there_is_not_is_refused_with_those_that_there_are(node):
    half, _ = HALVES[node]
    with pytest.raises(ValueError, match="preset is 'stronger'. Choose from custom, identity"):
        half(preset="stronger")


@each_preset
@LAW("strength", [-0.1, float("nan")])
def test_a_strength_that_is_none_is_refused_in_its_own_number(node, name, strength):
    half, _ = HALVES[node]
    with pytest.raises(ValueError, match=f"strength is {strength}. Give a number from 0"):
        half(strength=strength, preset=name)
