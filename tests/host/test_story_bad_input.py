"""Every misuse of a story is one sentence before sampling: the node, both values, the remedy; and the plain picture stays plain."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from kindred.models.network.blocks import block_name
from kindred.models.reference.bank import BANK_VERSION
from kindred.nodes.anchors import AnchorSampler
from kindred.nodes.host import model_key
from networks import random_model
from studio import (
    MOMENTS,
    anchors,
    bank_of,
    capture,
    coarse,
    counted,
    differs,
    inject,
    negative,
    photo,
    pictures,
    prompt,
    prompts_of,
    story,
)

MODEL = random_model("tiny")
LAW = pytest.mark.parametrize
NODE, SAMPLER = "ConsiStory Shared Attention:", "ConsiStory Anchor Sampler:"


@cache
def plain(**how):
    return pictures(MODEL, **how)


@pytest.fixture(autouse=True)
def the_plain_pictures_stay():
    before = plain(steps=1)
    yield
    assert torch.equal(pictures(MODEL, steps=1), before)


@cache
def bank(**how):
    """Shared anchors of the first two pictures; how: inputs of the node, or of the sampler."""
    sampling = {k: how.pop(k) for k in ("steps", "sampler", "scheduler", "cfg", "size") if k in how}
    return anchors(story(MODEL, **how), (0, 1), **sampling)[1]


def refuse(act, *said: str) -> None:
    """`act` raises a ValueError that says all of this, in this order, without one call of the UNet."""
    with counted(MODEL) as rows, pytest.raises(ValueError, match=".*".join(map(re.escape, said))):
        act()
    assert not rows


def nameless(rows: int = 3) -> list:
    return [[prompts_of(rows)[0][0], {}]]


# the subject -----------------------------------------------------------------------------------------------------------------


@LAW("positive", [nameless(), prompt(5)], ids=["rows", "plain prompt"])
@LAW("sampled", [pictures, anchors])
def test_no_subject_word_and_no_mask(positive, sampled):
    refuse(
        lambda: sampled(story(MODEL), positive=positive),
        NODE,
        "the positive prompt marks no subject word, and no masks are wired",
        "Subject Prompts",
        "or wire masks of the subject",
    )


@LAW("count", [2, 4])
def test_a_wrong_number_of_masks(count):
    model = story(MODEL, masks=torch.ones(count, 64, 64))
    refuse(
        lambda: pictures(model),
        NODE,
        f"{count} masks for 3 pictures.",
        "Wire one mask, or one per picture",
    )


def test_masks_that_are_all_empty_leave_the_pictures_plain():
    assert torch.equal(pictures(story(MODEL, masks=torch.zeros(3, 64, 64))), plain())


def test_a_word_that_lights_up_nowhere_is_said_once(caplog, monkeypatch):
    """A constant map has no subject (I15): nothing is shared, and the log names the remedy."""
    monkeypatch.setattr(
        "kindred.models.story.followed.token_map",
        lambda q, k, positions, heads, bias: q.new_zeros(*q.shape[:2], positions.shape[-1]),
    )
    assert torch.equal(pictures(story(MODEL)), plain())
    assert caplog.text.count("lights up nowhere") == 1 and "or wire masks" in caplog.text


# settings --------------------------------------------------------------------------------------------------------------------


@LAW("name", ["dropout", "query_blend", "feature_injection", "query_blend_end"])
@LAW("value", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none(name, value):
    refuse(
        lambda: story(MODEL, **{name: value}),
        NODE,
        f"{name} is {value}.",
        "Give a number from 0 to 1",
    )


@LAW("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_that_is_none(strength):
    refuse(
        lambda: story(MODEL, strength=strength),
        NODE,
        f"strength is {strength}.",
        "Give a number from 0",
        "to 1",
    )


@LAW("how", [{"weight": -1.0}, {"weight": float("nan")}, {"anchors": -1}], ids=str)
def test_a_weight_or_a_count_that_is_none(how):
    refuse(lambda: story(MODEL, **how), NODE, str(*how.values()), "Give 0 or more")


@LAW("name", ["blocks", "mask_blocks"])
def test_an_unknown_block(name):
    refuse(
        lambda: story(MODEL, **{name: "up_blocks 3"}),
        NODE,
        "no attention block matches 'up_blocks 3'",
        "output 0",
        "a preset: all",
    )


def test_two_of_the_node():
    refuse(
        lambda: story(story(MODEL)),
        NODE,
        "the model already comes from ConsiStory Shared Attention",
        "Use one",
        "commas",
    )


def test_a_flow_model():
    import comfy.model_sampling

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    m = MODEL.clone()
    m.add_object_patch("model_sampling", Flow(m.model.model_config))
    refuse(
        lambda: story(m),
        NODE,
        "needs a UNet that predicts noise or v",
        "flow",
        "Load an SD1.5, SD2.x or SDXL checkpoint",
    )


def test_multigpu_work_units():
    model = story(MODEL)
    model.model_options["multigpu_clones"] = {}
    refuse(lambda: pictures(model), "MultiGPU Work Units", "Remove that node")


# references that do not fit --------------------------------------------------------------------------------------------------


def with_lora(model):
    m, key = model.clone(), "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    assert m.add_patches(
        {key: ("diff", (torch.randn(64, 64, generator=torch.Generator().manual_seed(0)),))}, 1.0
    ) == [key]
    return m


@LAW(
    "other",
    [
        lambda: random_model("tiny", seed=1),
        lambda: with_lora(MODEL),
        lambda: random_model("tiny_xl"),
    ],
    ids=["weights", "lora", "family"],
)
def test_anchors_of_another_model(other):
    given, held = other(), bank()
    refuse(
        lambda: story(given, reference=held),
        NODE,
        "the reference was made with model",
        model_key(MODEL),
        "but the model given is",
        model_key(given),
        "or make the reference again with this one.",
    )


def test_a_lora_added_behind_the_node():
    model = with_lora(story(MODEL, reference=bank()))
    refuse(
        lambda: pictures(model, [2]),
        NODE,
        "the reference was made with model",
        model_key(MODEL),
        "but the model given is",
        model_key(model),
    )


@LAW("version", [BANK_VERSION - 1, BANK_VERSION + 1])
def test_anchors_of_another_version(version):
    old = replace(bank(), version=version)
    refuse(
        lambda: story(MODEL, reference=old),
        NODE,
        f"the reference is of version {version}",
        f"reads version {BANK_VERSION}",
    )


@LAW("how", [{"steps": 4}, {"scheduler": "karras"}, {"steps": 2 * MOMENTS}], ids=str)
def test_anchors_of_another_schedule(how):
    model = story(MODEL, reference=bank())
    refuse(
        lambda: pictures(model, [2], **how),
        NODE,
        "this sampler asks for noise level",
        f"({how.get('steps', MOMENTS)} steps)",
        f"they were made with ddim_uniform, euler, {MOMENTS} steps ({MOMENTS} noise levels)",
        "Take the sampler, scheduler and steps",
        "or make anchors with these",
    )


def test_anchors_of_a_sampler_that_asks_elsewhere():
    """Only the sampler itself knows where it will ask: an error, though not before its first step."""
    with pytest.raises(
        ValueError,
        match="this sampler asks for noise level.*they were made with ddim_uniform, euler.*Take the sampler",
    ):
        pictures(story(MODEL, reference=bank()), [2], sampler="dpm_2")


def test_anchors_of_another_size_are_read_as_they_are():
    """Tokens are read wherever they stood; the answer is a picture of the subject, as with photos."""
    out = pictures(story(MODEL, reference=bank(size=(12, 10))), (2, 3))
    assert differs(out, pictures(MODEL, (2, 3))) > 1e-2


def test_anchors_made_without_injection():
    held = bank(feature_injection=0.0)
    refuse(
        lambda: pictures(story(MODEL, reference=held), [2]),
        NODE,
        "feature_injection is 0.8, but the anchors of the reference were made with 0.",
        "Set it to 0 here, or make the anchors with feature injection",
    )


@LAW("order", ["fast", "official"])
def test_anchors_of_the_other_order(order):
    held, other = bank(order=order), {"fast": "official", "official": "fast"}[order]
    refuse(
        lambda: pictures(story(MODEL, reference=held, order=other), [2]),
        NODE,
        f"order is {other!r}, but the reference's anchors were made with {order!r}",
        "Choose the same",
    )


@LAW("how", [{"injection_end_percent": 0.5}, {"injection_start_percent": 0.5}], ids=str)
def test_anchors_of_a_shorter_window(how):
    held = bank(**how)
    refuse(
        lambda: pictures(story(MODEL, reference=held), [2]),
        NODE,
        "features are to be injected at 1 noise levels, from",
        "where the reference holds none",
        "injection_end_percent that the reference was made with",
    )


def test_anchors_that_hold_nothing_of_a_layer_that_features_go_into():
    """As a damaged file may tell it."""
    held, sound = bank(), bank().anchors
    first, *others = sound.output_layers
    other = replace(
        held,
        anchors=replace(sound, output_layers=(replace(first, block=("input", 99, 0)), *others)),
    )
    refuse(
        lambda: pictures(story(MODEL, reference=other), [2]),
        NODE,
        f"features are to be injected in {block_name(first.block)}, of "
        "which the reference's anchors hold nothing",
        "Make the anchors again",
    )


def test_anchors_without_masks_are_read_where_they_hold_the_noise_level():
    """As they are left where nobody heard the subject's words in the cross-attention."""
    held, bare = bank(), replace(bank(), masks={})
    out, meant = (pictures(inject(MODEL, b, 2.0), [2]) for b in (bare, held))
    assert torch.equal(out, meant) and differs(out, pictures(MODEL, [2])) > 1e-3
    refuse(
        lambda: pictures(inject(MODEL, bare, 2.0), [2], sampler="dpm_2"),
        "this sampler asks for noise level",
        "which the reference does not hold",
        "Take the sampler, scheduler and steps of the reference",
    )


def test_blocks_that_the_anchors_do_not_hold():
    held = bank()
    refuse(
        lambda: story(MODEL, reference=held, blocks="encoder, output 1"),
        NODE,
        "blocks is 'encoder, output 1', but the reference does "
        "not hold input 1, input 3; it holds output 0, output 1",
        "Choose the same blocks where the reference is made",
    )


@LAW("how", [{"cfg": 1.0}, {"halves": "cond only"}], ids=["guidance 1", "cond only"])
def test_both_halves_of_anchors_that_have_one(how):
    held = bank(**how)
    refuse(
        lambda: story(MODEL, reference=held),
        NODE,
        "halves is 'both', but the reference holds only the cond half",
        "Make the anchors with halves 'both' and a CFG above 1, or choose 'cond only'",
    )


def test_both_halves_of_photos_that_have_one():
    held = bank_of(both=False, steps=MOMENTS)
    refuse(
        lambda: story(MODEL, reference=held),
        NODE,
        "halves is 'both', but the reference holds only the cond half",
        "Wire the negative into Ref-UNet Feature Capture, or choose 'cond only'",
    )


# the anchor sampler ----------------------------------------------------------------------------------------------------------


def test_an_anchor_sampler_without_a_story():
    refuse(
        lambda: anchors(MODEL),
        SAMPLER,
        "the model given does not come from ConsiStory Shared Attention",
        "Wire ConsiStory Shared Attention before it",
    )


def test_an_anchor_sampler_that_samples_nothing():
    given = prompts_of((0, 1)), negative(), photo(pictures=2)
    refuse(
        lambda: AnchorSampler.execute(story(MODEL), 1, 2, 4.0, "euler", "normal", *given, 0.0),
        SAMPLER,
        "denoise is 0.0",
        "Give more than 0",
    )


def test_an_anchor_sampler_behind_a_reader():
    model = story(MODEL, reference=bank())
    refuse(
        lambda: anchors(model),
        SAMPLER,
        "the model given already reads a reference, so it makes no anchors",
        "Wire ConsiStory Shared Attention without a reference before it",
    )


def test_photos_beside_a_story_of_the_same_model_are_no_error():
    held, _ = capture(MODEL, photo(), coarse(), MOMENTS, negative=negative())
    assert differs(pictures(story(MODEL, reference=held), [0]), pictures(MODEL, [0])) > 1e-2
