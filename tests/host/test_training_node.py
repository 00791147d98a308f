"""Host laws of Concept Encoder Train, on the miniature: it learns, keeps what it learned, and leaves nothing else behind."""

from __future__ import annotations

import gc
import random
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import comfy.clip_vision
import comfy.model_management
import comfy.model_sampling
import folder_paths
import numpy as np
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from kindred.miniature.world import CLASSES, SCENES, random_identity, render
from kindred.models.concept import saving
from kindred.models.concept.draws import draw
from kindred.models.concept.file import load_concept_encoder
from kindred.models.concept.settings import TrainSettings
from kindred.models.concept.training import Trainer
from kindred.nodes import host, training
from kindred.nodes.concept import ConceptEncoderLoad, CrossAttnDetailInject
from kindred.nodes.training import SMALL, ConceptEncoderTrain, Order
from networks import build_model
from studio import TOWER, fingerprint, of_model, sample, without_patcher

import nodes as host_nodes

SMALLER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}
LAW = pytest.mark.parametrize


@pytest.fixture(scope="module")
def world() -> dict:
    """MODEL, CLIP and VAE as the host's own loader gives them: loaded under inference_mode."""
    with torch.inference_mode():
        model, clip, vae = host_nodes.CheckpointLoaderSimple().load_checkpoint(
            "kindred_miniature.safetensors"
        )
    assert next(model.model.parameters()).is_inference()
    return {"model": model, "clip": clip, "vae": vae}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """models/concept_encoders, empty; the new tower is tiny."""
    monkeypatch.setattr(training, "SMALL_TOWER", SMALLER)
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths,
        host.CONCEPTS,
        ([str(tmp_path)], {".safetensors", ".pt"}),
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Two renderings as an IMAGE."""
    pictures = [render(random_identity(n), CLASSES[n], SCENES[n], n).image for n in (0, 1)]
    return torch.from_numpy(np.stack(pictures)).float() / 255


@pytest.fixture
def train(world, photos):
    """train(steps=..., ...) as the executor calls the node: lists, under inference_mode."""

    @torch.inference_mode()
    def call(images=None, prompt="a photo", **more):
        given = {
            **world,
            "save_name": "new",
            "steps": 3,
            "learning_rate": 3e-3,
            "tower_rate": 3e-3,
            "tower": SMALL,
            "average": 0.9,
        } | more
        out = ConceptEncoderTrain.execute(
            images=[photos] if images is None else images,
            prompt=prompt if isinstance(prompt, list) else [prompt],
            **{name: [value] for name, value in given.items()},
        )
        return *out.result, out.ui.as_dict()

    return call


@pytest.fixture
def seen(monkeypatch):
    """Weak references to what a training holds: the copied model, its patcher, the encoder that learns. And the losses it had."""
    held, made, kept = SimpleNamespace(refs=[], losses=[]), Trainer.__init__, Trainer.kept

    def init(self, encoder, denoise, *more):
        held.refs += [
            weakref.ref(o) for o in (encoder, denoise, denoise.patcher, denoise.model, self)
        ]
        made(self, encoder, denoise, *more)

    def keep(self, **facts):
        held.losses = list(self.losses)
        return kept(self, **facts)

    monkeypatch.setattr(Trainer, "__init__", init)
    monkeypatch.setattr(Trainer, "kept", keep)
    return held


def at_step(monkeypatch, number, act):
    """Do something once step `number` is done."""
    step = Trainer.step

    def wrapped(self):
        loss = step(self)
        if self.step_number == number:
            act(self)
        return loss

    monkeypatch.setattr(Trainer, "step", wrapped)


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


def test_a_cancelled_run_keeps_what_it_learned_and_goes_on_as_if_it_had_not_stopped(
    train, seen, folder, monkeypatch
):
    train(save_name="whole", steps=4)
    whole = list(seen.losses)
    with monkeypatch.context() as once:
        at_step(once, 2, lambda trainer: comfy.model_management.interrupt_current_processing())
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(steps=4)
    gc.collect()
    assert (
        not comfy.model_management.in_training
        and not comfy.model_management.processing_interrupted()
    )
    assert not [r() for r in seen.refs if r() is not None]
    assert load_concept_encoder(folder / "new.safetensors").config.training["steps"] == 2
    train(steps=4)
    assert seen.losses == whole
    assert (folder / "new.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()
    train(steps=4)  # nothing is left to do: the encoder comes from the state
    assert seen.losses == whole


@contextmanager
def at_pass(number, act):
    """`act` at the beginning of UNet pass `number` of whatever trains; yields the passes begun."""
    begun, forward = [], UNetModel.forward

    def counted(self, *args, **kwargs):
        begun.append(1)
        if len(begun) == number:
            act()
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNetModel, "forward", counted)
        yield begun


def starve():
    raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory. Tried to allocate 2.00 GiB")


def fail():
    raise NotImplementedError("another pack's patch")


FAULTS = {
    "interrupt": (
        comfy.model_management.interrupt_current_processing,
        comfy.model_management.InterruptProcessingException,
    ),
    "memory": (starve, comfy.model_management.OOM_EXCEPTION),
    "neighbour": (fail, NotImplementedError),
}


@LAW("fault", FAULTS)
def test_stopped_at_any_unet_call_of_any_step_it_goes_on_as_if_it_had_not_been(
    world, train, seen, folder, fault
):
    """Two batches to a step: in the middle of one, nothing of it is learned. An interrupt saves, an error keeps what was."""
    (act, error), how = (
        FAULTS[fault],
        {"steps": 2, "accumulate": 2, "batch": 1, "save_every": 250 if fault == "interrupt" else 1},
    )
    with at_pass(0, None) as begun:
        train(save_name="whole", **how)
    assert len(begun) == 4
    losses, before = list(seen.losses), of_model(world["model"])
    for number in range(1, 5):
        seen.refs.clear()
        with at_pass(number, act), pytest.raises(error):
            train(**how)
        gc.collect()
        assert seen.refs and not [r() for r in seen.refs if r() is not None], number
        assert (
            not comfy.model_management.in_training
            and not comfy.model_management.processing_interrupted()
        )
        done = (number - 1) // 2
        assert sorted(p.name for p in folder.glob("new*")) == [
            "new.safetensors",
            "new.training",
        ] * (done > 0), number
        assert (
            not done
            or load_concept_encoder(folder / "new.safetensors").config.training["steps"] == done
        )
        train(**how)
        assert seen.losses == losses and of_model(world["model"]) == before, number
        assert (folder / "new.safetensors").read_bytes() == (
            folder / "whole.safetensors"
        ).read_bytes(), number
        for name in ("new.safetensors", "new.training"):
            (folder / name).unlink()
    assert len(list(folder.iterdir())) == 2


def test_cancelled_before_the_first_step_nothing_is_saved(train, folder):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train()
    assert not list(folder.iterdir()) and not comfy.model_management.in_training


def test_resume_refuses_another_run_and_spares_what_is_not_its_own(train, folder, photos, seen):
    train(steps=1)
    kept = (folder / "new.safetensors").read_bytes()
    for changes, words in (
        ({"learning_rate": 2e-3}, ["0.003", "0.002", "rate"]),
        ({"batch": 1}, ["batch 2", "batch 1"]),
        ({"images": [photos.flip(1)]}, ["pictures 2"]),
        ({"prompt": "a drawing"}, ["pictures 2"]),
        ({"size": 64}, ["size 128", "size 64"]),
        ({"merge": "add"}, ["merge concat", "merge add"]),
    ):
        with pytest.raises(ValueError) as refused:
            train(**changes)
        assert all(
            word in str(refused.value)
            for word in ["Concept Encoder Train", "same settings", "name", *words]
        ), refused.value
    assert (folder / "new.safetensors").read_bytes() == kept
    (folder / "new.training").write_bytes(b"PK torn")
    with pytest.raises(ValueError, match="new.training is torn"):
        train(steps=2)
    (folder / "new.training").unlink()
    with pytest.raises(ValueError, match="new.safetensors is there already.*resume off"):
        train(steps=2)
    assert (folder / "new.safetensors").read_bytes() == kept
    train(steps=1, resume=False, learning_rate=2e-3)
    assert (folder / "new.safetensors").read_bytes() != kept


def test_a_full_disk_leaves_the_last_good_file_and_says_so(train, folder, monkeypatch):
    limits, save = pytest.importorskip("resource"), Trainer.save
    soft, hard = limits.getrlimit(limits.RLIMIT_FSIZE)

    def short(self, *files):
        limits.setrlimit(limits.RLIMIT_FSIZE, (10_000 if self.step_number == 2 else soft, hard))
        try:
            save(self, *files)
        finally:
            limits.setrlimit(limits.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as once:
        once.setattr(Trainer, "save", short)
        with pytest.raises(OSError) as full:
            train(save_every=1)
    words = [
        "Concept Encoder Train",
        "step 2 could not be saved",
        "new.safetensors of step 1 is whole",
        "make room there",
    ]
    assert all(word in str(full.value) for word in words), full.value
    assert load_concept_encoder(folder / "new.safetensors").config.training["steps"] == 1
    assert sorted(p.name for p in folder.iterdir()) == ["new.safetensors", "new.training"]
    assert not comfy.model_management.in_training
    train(save_every=1)
    assert load_concept_encoder(folder / "new.safetensors").config.training["steps"] == 3


def test_a_loss_that_is_not_finite_ends_with_a_sentence_and_the_last_good_state(
    train, folder, monkeypatch
):
    loss = Trainer.loss
    monkeypatch.setattr(
        Trainer,
        "loss",
        lambda self, *a: loss(self, *a) * (float("nan") if self.step_number == 2 else 1.0),
    )
    with pytest.raises(
        ValueError,
        match="Concept Encoder Train: training: the loss of step 3 is nan.*learning rate",
    ):
        train()
    assert load_concept_encoder(folder / "new.safetensors").config.training["steps"] == 2


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
