"""Every misuse is one sentence before sampling: the node, both values, the remedy; and the next plain picture is the plain picture."""

from __future__ import annotations

import re
from dataclasses import replace

import comfy.lora
import comfy.model_management
import comfy.model_sampling
import pytest
import torch
from kindred.models.reference.bank import BANK_VERSION
from kindred.nodes.host import model_key
from networks import build_model, random_model
from studio import (
    STEPS,
    bank_of,
    capture,
    coarse,
    counted,
    inject,
    invert,
    negative,
    photo,
    plain,
    prompt,
    sample,
)

MODEL = random_model("tiny")
LAW = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def the_plain_picture_stays():
    yield
    assert torch.equal(sample(MODEL), plain())


def refuse(act, *said: str) -> str:
    """`act` raises a ValueError that says all of this, in this order, without one call of the UNet."""
    bank_of(), bank_of(both=False)  # the shared banks are made before anything is counted
    with (
        counted(MODEL) as rows,
        pytest.raises(ValueError, match=".*".join(map(re.escape, said))) as refused,
    ):
        act()
    assert not rows
    return str(refused.value)


def with_lora(model, strength: float = 1.0, seed: int = 0):
    """A clone with a patch on one weight, as a LoRA loader adds it."""
    m, key = model.clone(), "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    delta = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    assert m.add_patches({key: ("diff", (delta,))}, strength) == [key]
    return m


# the model -------------------------------------------------------------------------------------------------------------------


def test_the_key_is_of_the_weights_not_of_their_whereabouts():
    """Clones, loading, unloading, a compute dtype and the same checkpoint loaded twice: one key."""
    model = build_model("tiny")
    key = model_key(model)
    assert key.startswith("SD15 ") and key == model_key(build_model("tiny")) == model_key(
        model.clone()
    )
    lora = with_lora(model)
    changed = model_key(lora)
    comfy.model_management.load_models_gpu([model])
    assert model_key(model) == key
    comfy.model_management.load_models_gpu([lora])  # the patch is now in the weights
    assert model_key(lora) == changed
    sample(lora)
    assert model_key(lora) == changed
    lora.detach()
    assert model_key(lora) == changed and model_key(model) == key
    low = model.clone()
    low.set_model_compute_dtype(torch.bfloat16)
    assert model_key(low) == key


def test_the_key_tells_models_and_loras_apart():
    keys = [
        model_key(m)
        for m in (
            MODEL,
            random_model("tiny", seed=1),
            random_model("tiny_v"),
            random_model("tiny_xl"),
            with_lora(MODEL),
            with_lora(MODEL, 0.5),
            with_lora(MODEL, seed=1),
            with_lora(with_lora(MODEL)),
        )
    ]
    keys.pop(2)  # tiny_v has the weights of tiny: nothing in them says what they predict
    assert len(set(keys)) == len(keys)


@LAW(
    "other",
    [lambda: random_model("tiny", seed=1), lambda: with_lora(MODEL)],
    ids=["weights", "lora"],
)
@LAW("blocks", ["all", "output 0"])
def test_a_reference_of_another_model(other, blocks):
    given = other()
    refuse(
        lambda: inject(given, bank_of(), blocks=blocks),
        "Masked Self-Attn Inject: the reference was made with model",
        model_key(MODEL),
        "but the model given is",
        model_key(given),
        " differ. ",
        "or make the reference again with this one.",
    )


def test_a_reference_of_another_architecture():
    """Whatever blocks are asked for, the model is what is wrong."""
    for blocks in ("all", "middle 0.1"):
        refuse(
            lambda: inject(random_model("tiny_xl"), bank_of(), blocks=blocks),
            "the reference was made with model SD15",
            "but the model given is SDXL",
        )


def test_a_lora_added_behind_the_node():
    model = with_lora(inject(MODEL, bank_of()))
    refuse(
        lambda: sample(model),
        "the reference was made with model",
        model_key(MODEL),
        "but the model given is",
        model_key(model),
    )


def test_an_inversion_of_another_model():
    trajectory = invert(random_model("tiny", seed=1))[0]
    refuse(
        lambda: capture(MODEL, inversion=trajectory),
        "Ref-UNet Feature Capture: the inversion was made with model",
        trajectory.model_key,
        "but the model given is",
        model_key(MODEL),
    )


def flow_model():
    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    m = MODEL.clone()
    m.add_object_patch("model_sampling", Flow(m.model.model_config))
    return m


@LAW(
    "act",
    [lambda m: invert(m), lambda m: capture(m), lambda m: inject(m, bank_of())],
    ids=["invert", "capture", "inject"],
)
def test_a_flow_model(act):
    refuse(
        lambda: act(flow_model()),
        "needs a UNet that predicts noise or v (SD1.5, SD2.x, SDXL)",
        "but the model given is SD15",
        "flow",
        "Load an SD1.5, SD2.x or SDXL checkpoint",
    )


def test_a_model_without_a_unet():
    class Transformer(torch.nn.Module):
        pass

    m = build_model("tiny")
    m.model.diffusion_model = Transformer()
    refuse(
        lambda: inject(m, bank_of()),
        "Masked Self-Attn Inject: SD15 cannot be read",
        "does not know the network Transformer",
        "docs/networks.md",
    )


# the subject -------------------------------------------------------------------------------------------------------------------


def test_no_subject_word_and_no_mask():
    refuse(
        lambda: capture(MODEL, positive=prompt(1)),
        "Ref-UNet Feature Capture: positive ('a photo of a cat') marks no subject word",
        "Subject Prompts",
        "or wire a mask",
    )
    nameless = [[prompt(1)[0][0], {}]]
    refuse(
        lambda: capture(MODEL, positive=nameless),
        "positive ('a CLIP Text Encode') marks no subject word",
    )


def test_an_empty_mask():
    refuse(
        lambda: capture(MODEL, mask=torch.zeros(1, 64, 64)),
        "no subject in picture 1 of 1: the wired mask is empty (all black)",
        "Paint the subject white",
    )
    one_empty = torch.stack((torch.ones(64, 64), torch.zeros(64, 64)))
    refuse(
        lambda: capture(MODEL, photo(pictures=2), mask=one_empty), "no subject in picture 2 of 2"
    )


def test_a_word_that_lights_up_nowhere():
    """A network whose cross-attention is blind: a constant map has no subject (I15)."""
    blind = build_model("tiny")
    for name, p in blind.model.diffusion_model.named_parameters():
        if name.endswith("attn2.to_q.weight"):
            p.data = torch.zeros_like(p)
    with pytest.raises(
        ValueError,
        match="no subject in picture 1 of 1: 'cat' was not found in it. Describe what the photo shows, or wire",
    ):
        capture(blind)


@LAW("count", [2, 3])
def test_a_wrong_number_of_masks(count):
    refuse(
        lambda: capture(MODEL, mask=torch.ones(count, 64, 64)),
        f"{count} masks for 1 reference picture.",
        "one per picture",
    )


def test_a_wrong_number_of_target_masks():
    with pytest.raises(
        ValueError,
        match="Masked Self-Attn Inject: 2 target masks for 3 pictures. Wire one mask, or one per picture",
    ):
        sample(inject(MODEL, bank_of(), target_mask=torch.ones(2, 64, 64)), batch=3)


def test_a_target_mask_beside_hypertile():
    from comfy_extras.nodes_hypertile import HyperTile

    tiled = HyperTile.execute(MODEL, 32, 1, 0, False)[0]
    with pytest.raises(
        ValueError,
        match=r"16 tokens for a grid of 16x16: HyperTile.*Remove that node or the target mask",
    ):
        sample(inject(tiled, bank_of(), target_mask=torch.ones(1, 64, 64)), size=(16, 16))


# the latent --------------------------------------------------------------------------------------------------------------------


def test_neither_or_both():
    refuse(
        lambda: capture(MODEL, inversion=None),
        "neither an inversion nor a latent is wired",
        "exactly one",
    )
    refuse(
        lambda: capture(MODEL, inversion=invert_elsewhere(), latent=photo()),
        "both an inversion and a latent are wired",
        "exactly one",
    )


def invert_elsewhere():
    return invert(random_model("tiny", seed=1))[0]


@LAW("act", [invert, capture])
@LAW("value", [float("nan"), float("inf")])
def test_a_broken_latent(act, value):
    broken = photo()
    broken["samples"][0, 1, 2, 3] = value
    refuse(lambda: act(MODEL, broken), "1 of 256 latent values are NaN or infinite", "--fp32-vae")


@LAW("inverted", [False, True])
def test_a_model_that_overflows(inverted):
    """A pass that ends with what is read of it has no answer; then that is looked at."""
    broken, known = (
        MODEL.clone(),
        {"inversion": invert(MODEL)[0]} if inverted else {"latent": photo()},
    )
    broken.set_model_input_block_patch(lambda h, options: h * float("nan"))
    with pytest.raises(
        ValueError, match="the model gave NaN or infinite values for the photo.*--fp32-unet"
    ):
        capture(broken, **known)


@LAW("act", [invert, capture])
def test_an_empty_latent(act):
    refuse(
        lambda: act(MODEL, {"samples": torch.zeros(1, 4, 8, 8)}),
        "the latent is empty (all zeros)",
        "not Empty Latent Image",
    )


@LAW("act", [invert, capture])
@LAW("shape", [(1, 16, 8, 8), (1, 4, 3, 8, 8), (4, 8, 8)])
def test_a_latent_of_another_kind(act, shape):
    refuse(
        lambda: act(MODEL, {"samples": torch.ones(shape)}),
        f"the latent is {list(shape)}",
        "have 4 channels",
        "VAE Encode",
    )


# the prompts -------------------------------------------------------------------------------------------------------------------


@LAW("act", [invert, capture])
def test_several_prompts_for_one_picture(act):
    """Two combined conditionings, two rows, or one with an area: a reference pass reads one plain prompt."""
    refuse(
        lambda: act(MODEL, positive=coarse() + prompt(6)),
        "positive must be one plain prompt",
        "2 prompts were given",
    )
    rows = [[torch.cat((coarse()[0][0], prompt(6)[0][0])), coarse()[0][1]]]
    refuse(
        lambda: act(MODEL, positive=rows),
        "positive holds 2 prompts for 1 reference picture.",
        "one line per picture",
    )
    for key, value in (
        ("area", (4, 4, 0, 0)),
        ("mask", torch.ones(1, 8, 8)),
        ("start_percent", 0.5),
    ):
        refuse(
            lambda: act(MODEL, positive=[[coarse()[0][0], coarse()[0][1] | {key: value}]]),
            "1 prompts were given with",
            key,
        )
    if act is capture:
        refuse(
            lambda: capture(MODEL, negative=negative() + negative()),
            "negative must be one plain prompt",
        )


# blocks, halves, versions ------------------------------------------------------------------------------------------------------


@LAW(
    "act",
    [
        lambda b: capture(MODEL, blocks=b),
        lambda b: inject(MODEL, bank_of(), blocks=b),
        lambda b: capture(MODEL, mask_blocks=b),
    ],
    ids=["capture", "inject", "mask_blocks"],
)
def test_an_unknown_block(act):
    refuse(
        lambda: act("decoder, up_blocks 3"),
        "no attention block matches 'up_blocks 3'",
        "input 1, input 3, middle 0, output 0",
        "write a preset: all",
    )


def test_a_block_that_was_not_captured():
    decoder, _ = capture(MODEL, blocks="decoder")
    said = refuse(
        lambda: inject(MODEL, decoder, blocks="encoder, output 1"),
        "input 1, input 3 not captured",
        "the reference holds output 0, output 1, output 2, output 3",
        "Choose the same blocks in Ref-UNet Feature Capture",
    )
    assert said.startswith("Masked Self-Attn Inject:")
    assert inject(MODEL, decoder, blocks="all") is not MODEL  # all is all there is


def test_both_halves_without_a_negative():
    refuse(
        lambda: inject(MODEL, bank_of(both=False), halves="both"),
        "halves is 'both', but the reference holds only the cond half",
        "Wire the negative prompt into Ref-UNet Feature Capture, or choose cond only or shared",
    )


@LAW("version", [BANK_VERSION - 1, BANK_VERSION + 1])
def test_a_bank_of_another_version(version):
    refuse(
        lambda: inject(MODEL, replace(bank_of(), version=version)),
        f"the reference is of version {version}",
        f"this Kindred reads version {BANK_VERSION}",
        "Make it again",
    )


@LAW("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_that_is_none(strength):
    refuse(
        lambda: inject(MODEL, bank_of(), strength=strength),
        f"Masked Self-Attn Inject: strength is {strength}.",
        "Give a number from 0",
        "to 1",
    )


@LAW("weight", [-1.0, float("nan")])
def test_a_weight_that_is_none(weight):
    refuse(
        lambda: inject(MODEL, bank_of(), weight),
        f"Masked Self-Attn Inject: full strength (weight) is {weight}",
        "Give 0",
        "or more",
    )


def test_multigpu_work_units():
    model = inject(MODEL, bank_of())
    model.model_options["multigpu_clones"] = {}
    refuse(lambda: sample(model), "MultiGPU Work Units", "Remove that node")


def test_another_step_count_or_size_is_no_error():
    """The issue lists them; the answer is the live way, said once in the log."""
    for bank in (bank_of(steps=STEPS + 2), bank_of(size=(12, 10))):
        assert torch.isfinite(sample(inject(MODEL, bank))).all()
