"""Host laws of Concept Encoder Train, on the miniature: it learns, and what it learned is saved and fed to the injection."""

from __future__ import annotations

import gc
import random
from types import SimpleNamespace

import comfy.clip_vision
import comfy.model_management
import comfy.model_sampling
import numpy as np
import pytest
import torch
from kindred.models.concept import saving
from kindred.models.concept.draws import draw
from kindred.models.concept.file import load_concept_encoder
from kindred.models.concept.settings import TrainSettings
from kindred.models.concept.training import Trainer
from kindred.nodes import host
from kindred.nodes.concept import ConceptEncoderLoad, CrossAttnDetailInject
from kindred.nodes.training import SMALL, Order
from networks import build_model
from studio import TOWER, fingerprint, of_model, sample, without_patcher
from training_steps import at_step

LAW = pytest.mark.parametrize


def prompts(clip) -> dict:
    with torch.inference_mode():
        made = [
            clip.encode_from_tokens_scheduled(clip.tokenize(t))
            for t in ("a photo of a cat on a beach", "")
        ]
    return {
        "positive": made[0],
        "uncond": made[1],
        "latent": torch.zeros(1, 8, 16, 16),
        "scheduler": "normal",
    }


def test_it_trains_saves_and_feeds_the_injection_and_leaves_nothing_behind(
    world, photos, train, seen, folder
):
    asked = prompts(world["clip"])
    plain, before = sample(world["model"], **asked), of_model(world["model"])
    wired = fingerprint([photos])
    dice = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    torn = without_patcher()
    encoder, curve, ui = train()
    assert torch.equal(torch.random.get_rng_state(), dice[0]) and random.getstate() == dice[1]
    assert np.random.get_state()[1].tolist() == dice[2]
    assert (
        of_model(world["model"]) == before
        and fingerprint([photos]) == wired
        and torch.equal(sample(world["model"], **asked), plain)
    )
    assert not comfy.model_management.in_training and not torch.is_inference_mode_enabled()
    gc.collect()
    assert seen.refs and not [r() for r in seen.refs if r() is not None]
    assert without_patcher() <= torn

    assert curve.shape == (1, 432, 768, 3) and 0 <= curve.min() and curve.max() <= 1
    assert ui["images"][0]["type"] == "temp" and len(seen.losses) == 3
    assert host.concept_files() == ["new.safetensors"]  # the state is no encoder
    loaded = ConceptEncoderLoad.execute("new.safetensors").result[0]
    for name, value in loaded.encoder.state_dict().items():
        assert torch.equal(value, encoder.encoder.state_dict()[name].half().float()), name
    facts = loaded.encoder.config.training
    assert (
        facts["steps"] == 3
        and facts["pictures"] == 2
        and facts["base"] == host.model_key(world["model"])
    )
    with torch.inference_mode():
        model = CrossAttnDetailInject.execute(world["model"], encoder, photos[:1]).result[0]
        again = CrossAttnDetailInject.execute(world["model"], loaded, photos[:1]).result[0]
    picture = sample(model, **asked)
    assert torch.isfinite(picture).all() and (picture - plain).abs().max() > 0.05
    assert (sample(again, **asked) - picture).abs().max() < 0.05 * (picture - plain).abs().max()


@LAW("every", [0.0, 1e9])
def test_the_last_preview_is_the_curve_that_comes_out(train, monkeypatch, every):
    """The node goes on showing it beside the result; however seldom previews are sent, they end with the whole training."""
    told = []

    def bar(total):
        return lambda done, picture=None: told.append((done, picture and np.asarray(picture)))

    monkeypatch.setattr(saving, "PREVIEW_EVERY", every)
    monkeypatch.setattr(host, "progress", bar)
    curve = train(steps=4)[1]
    shown = [(done, picture) for done, picture in told if picture is not None]
    assert [done for done, _ in shown] == ([1, 2, 3, 4] if every == 0 else [1, 4])
    assert np.array_equal(shown[-1][1], (curve[0] * 255).round().byte().numpy())


def test_a_new_tower_learns_as_fast_as_the_projections():
    given = {
        "model": None,
        "vae": None,
        "clip": None,
        "images": [],
        "prompt": ["x"],
        "save_name": "x",
        "learning_rate": 1e-3,
    }
    assert Order(**given, tower=SMALL).settings.tower_rate is None
    assert Order(**given, tower_rate=1e-6, noise_from=0.5).settings.tower_rate == 1e-6


def test_it_learns_two_pictures_by_heart(train, photos, monkeypatch):
    """Colours the model has never seen: the same noise is guessed better after some dozen steps."""
    errors = []

    @torch.no_grad()
    def measure(trainer):
        clean = TrainSettings(batch=8, drop_text=0.0, drop_image=0.0, drop_both=0.0, seed=9)
        errors.append(
            np.mean([float(trainer.loss(draw(clean, trainer.examples, 1000, i))) for i in range(2)])
        )

    for step in (1, 40):
        at_step(monkeypatch, step, measure)
    train(
        images=[1 - photos],
        steps=40,
        batch=4,
        learning_rate=5e-3,
        drop_text=0.0,
        drop_image=0.0,
        drop_both=0.0,
    )
    assert errors[1] < 0.7 * errors[0], errors


def test_batches_lists_sizes_and_channels(train, seen, folder):
    generator = torch.Generator().manual_seed(3)
    images = [
        torch.rand(*shape, generator=generator)
        for shape in ((2, 90, 130, 3), (1, 40, 33, 1), (1, 128, 128, 4))
    ]
    train(
        images=images,
        steps=1,
        subjects="every batch",
        prompt=["a cat", "a dog", "a fish", "a bird"],
    )
    facts = load_concept_encoder(folder / "new.safetensors").config.training
    assert facts["pictures"] == 4 and facts["subjects"] == 3
    train(images=images, steps=1, save_name="sub/each", prompt="a cat\na dog\na fish\n\na bird")
    assert (
        load_concept_encoder(folder / "sub" / "each.safetensors").config.training["subjects"] == 4
    )


def test_a_lora_is_trained_through_and_stays_out_of_the_input_model(
    world, train, seen, monkeypatch
):
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    with torch.inference_mode():
        model = world["model"].clone()
        weight = model.model.get_submodule(key.rpartition(".")[0]).weight
        model.add_patches({key: ("diff", (torch.ones_like(weight) * 0.1,))}, 0.5)
    found, made = [], host.FrozenUNet.__init__

    def init(self, copy, *more):
        made(self, copy, *more)
        found.append(copy.model.get_submodule(key.rpartition(".")[0]).weight.clone())

    monkeypatch.setattr(host.FrozenUNet, "__init__", init)
    before = of_model(model)
    train(model=model, steps=1)
    assert torch.allclose(found[0], weight + 0.05, atol=1e-6) and of_model(model) == before
    train(steps=1, save_name="plain")
    assert torch.equal(found[1], weight.clone())


def vision(**changes):
    """A CLIP_VISION of the host's own class."""
    with torch.inference_mode():
        made = comfy.clip_vision.ClipVisionModel(
            {**TOWER, "model_type": "clip_vision_model", "hidden_act": "quick_gelu", **changes}
        )
        generator = torch.Generator().manual_seed(0)
        made.load_sd(
            {
                name: torch.randn(value.shape, generator=generator) * 0.2
                for name, value in made.get_sd().items()
                if value.is_floating_point()
            }
        )
    return made


def test_from_clip_vision_with_a_frozen_tower_and_on_from_there(train, folder, photos):
    eye = vision()
    first = train(tower="as wired", clip_vision=eye, tower_rate=0.0, steps=2)[0]
    assert (
        first.encoder.config.tower_width == TOWER["hidden_size"]
        and first.encoder.config.preprocessing.size == TOWER["image_size"]
    )
    with torch.inference_mode():
        own = first.encoder.tower(first.encoder.config.preprocessing(photos))
        theirs = eye.encode_image(photos)["penultimate_hidden_states"]
    assert (own - theirs).abs().max() < 1e-3 * theirs.std()
    second = train(
        tower="as wired",
        concept_encoder=first,
        steps=1,
        save_name="second",
        learning_rate=1e-8,
        tower_rate=0.0,
        average=0.0,
    )[0]
    for name, value in second.encoder.state_dict().items():
        assert torch.allclose(value, first.encoder.state_dict()[name], atol=1e-6), name


def test_checkpointing_changes_no_loss(train, seen):
    train(steps=2)
    plain = list(seen.losses)
    train(steps=2, save_name="again", gradient_checkpointing=True)
    assert seen.losses == plain


@LAW(
    ("changes", "words"),
    [
        ({"images": [torch.zeros(0, 8, 8, 3)]}, ["no pictures", "Load Image"]),
        ({"images": [torch.zeros(8, 8, 3)]}, ["batch 1", "[8, 8, 3]"]),
        ({"images": [torch.full((1, 8, 8, 3), float("nan"))]}, ["batch 1", "192 values", "NaN"]),
        ({"prompt": "a\nb\nc"}, ["3 prompts", "2 pictures"]),
        ({"steps": 0}, ["steps is 0", "1 or more"]),
        ({"learning_rate": 0.0}, ["rate is 0.0", "1e-5"]),
        ({"batch": 0}, ["batch is 0", "1 or more"]),
        ({"drop_text": 0.9, "drop_image": 0.2}, ["drop_text is 0.9", "below 1"]),
        ({"tower": "as wired"}, ["nothing wired", "clip_vision", "concept_encoder", "new, small"]),
        ({"clip_vision": SimpleNamespace()}, ["'new, small' and clip_vision wired"]),
        (
            {"tower": "as wired", "clip_vision": SimpleNamespace(model_type="siglip_vision_model")},
            ["siglip_vision_model", "ViT-L"],
        ),
        ({"save_name": ""}, ["save_name is ''", "my_subject"]),
        ({"save_name": "../out"}, ["'../out'"]),
        ({"save_name": "a:b"}, ["'a:b'"]),
        (
            {"vae": SimpleNamespace(encode=lambda x: torch.ones(1, 4, 16, 16))},
            ["[1, 4, 16, 16]", "8 channels", "VAE"],
        ),
        (
            {"vae": SimpleNamespace(encode=lambda x: torch.full((1, 8, 16, 16), float("nan")))},
            ["2048 of 2048", "NaN", "--fp32-vae"],
        ),
        (
            {
                "clip": SimpleNamespace(
                    tokenize=str,
                    encode_from_tokens_scheduled=lambda t: [[torch.ones(1, 77, 768), {}]],
                )
            },
            ["width 768", "width 64", "same checkpoint"],
        ),
    ],
)
def test_bad_input_is_a_sentence_before_any_step(train, folder, changes, words, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("it began to work"))
    with pytest.raises(ValueError) as refused:
        train(**changes)
    assert str(refused.value).startswith("Concept Encoder Train: ") and all(
        word in str(refused.value) for word in words
    ), refused.value
    assert not list(folder.iterdir()) and not comfy.model_management.in_training


def test_a_model_that_cannot_be_read_again_or_is_of_another_kind(train, world):
    with pytest.raises(ValueError, match="cannot read its weights again.*Load Checkpoint"):
        train(model=build_model("tiny"))
    bypassed = world["model"].clone()
    bypassed.set_injections("bypass_lora", [])
    with pytest.raises(ValueError, match="bypass mode.*Load LoRA"):
        train(model=bypassed)
    flow = world["model"].clone()
    kinds = (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST)
    flow.add_object_patch("model_sampling", type("Flow", kinds, {})())
    with pytest.raises(
        ValueError, match="Concept Encoder Train: needs a UNet that predicts noise or v"
    ):
        train(model=flow)
    other = SimpleNamespace(
        encoder=SimpleNamespace(
            config=SimpleNamespace(
                layers=((("input", 1, 0), 320),), width=768, family="SD15", decoupled=False
            )
        )
    )
    with pytest.raises(ValueError, match="trained for SD15"):
        train(tower="as wired", concept_encoder=other)
