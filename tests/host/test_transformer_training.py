"""Concept Encoder Train through flow transformers: it begins as the plain model, learns, and goes on where it stopped."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import numpy as np
import pytest
import torch
from comfy.sd import load_checkpoint_guess_config
from kindred.miniature.pack import FLOW_CHECKPOINT
from kindred.miniature.world import CLASSES, SCENES, random_identity, render
from kindred.models.attention.parts import Merge
from kindred.models.concept.config import ConceptConfig, Preprocessing, tokens_width
from kindred.models.concept.draws import Examples, draw
from kindred.models.concept.encoder import ConceptEncoder
from kindred.models.concept.file import load_concept_encoder
from kindred.models.concept.settings import TrainSettings
from kindred.models.concept.training import Trainer
from kindred.nodes import host, training
from kindred.nodes.concept import CrossAttnDetailInject
from kindred.nodes.training import SMALL, ConceptEncoderTrain
from studio import TOWER
from test_transformers import FELT, apart, flat
from tiny_networks import READ, build, latent, prompt, tiny
from torch import Tensor

# some are asked for pixels or hold frames, some write into what the backward pass needs
LEARNING = ("Flux", "Flux2", "Chroma", "SD3.5", "QwenImage", "Krea2", "HunyuanImage21", "AuraFlow")
ONE_WAY = ("CosmosPredict2", "Anima")
SETTINGS = TrainSettings(
    steps=40, batch=2, rate=5e-3, average=0.0, drop_text=0, drop_image=0, drop_both=0
)
NODE = "Concept Encoder Train"


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Random draws end with the test, and the host is left as it was."""
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        yield
    assert not comfy.model_management.in_training


def examples(name: str) -> Examples:
    latents = torch.cat([flat(latent(name, seed=seed)) for seed in (31, 32)])
    pixels = torch.randint(
        0,
        256,
        (2, TOWER["image_size"], TOWER["image_size"], 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(2),
    )
    return Examples(latents, pixels, ["one", "two"], [0, 1])


def trainer(name: str, settings: TrainSettings = SETTINGS, model: Any = None) -> Trainer:
    model = build(READ[name]) if model is None else model
    family, layers, width = host.concept_layers(model, NODE)
    config = ConceptConfig(
        family, layers, tokens_width(layers, width), TOWER["hidden_size"], TOWER, Preprocessing(TOWER["image_size"]), Merge.ADD
    )  # fmt: skip
    torch.manual_seed(3)
    encoder = ConceptEncoder(config)
    encoder.start_silent()
    texts = {"one": prompt(name, seed=2), "two": prompt(name, seed=4), "": prompt(name, seed=5)}
    denoise = host.frozen(model, Merge.ADD, texts, False, NODE)
    return Trainer(encoder, denoise, examples(name), settings)


def draws(of: Trainer, count: int = 4) -> list[Any]:
    levels = len(of.denoise.sigmas)
    return [draw(replace(of.settings, seed=99), of.examples, levels, i) for i in range(count)]


@torch.no_grad()
def error(of: Trainer) -> float:
    """The loss on the same draws each time."""
    return sum(float(of.loss(d)) for d in draws(of))


@pytest.mark.parametrize("name", LEARNING)
def test_it_begins_as_the_plain_model(name: str) -> None:
    one, d = trainer(name), None
    d = draws(one)[0]
    with torch.no_grad():
        assert float(one.loss(d)) == float(one.loss(d, weight=0.0))


@pytest.mark.parametrize("name", LEARNING)
def test_the_loss_is_of_the_flows_velocity(name: str) -> None:
    """Mean of (v - (scale eps - x0))^2, of the same call."""
    one = trainer(name)
    d, denoise, asked = draws(one)[0], one.denoise, []

    def heard(x: Tensor, sigma: Tensor, *rest: Any) -> Tensor:
        answer = denoise(x, sigma, *rest)
        asked.append(((x - answer) / sigma[:, None, None, None], sigma))
        return answer

    heard.sigmas, heard.velocity, heard.noise = denoise.sigmas, denoise.velocity, denoise.noise
    one.denoise = heard
    with torch.no_grad():
        loss = float(one.loss(d))
    velocity, sigma = asked[0]
    target = denoise.noise.scale * d.noise - one.examples.latents[d.index]
    assert loss == pytest.approx(float((velocity - target).square().mean()), rel=1e-3)
    assert torch.equal(sigma, denoise.sigmas[d.level]) and sigma.max() <= 1


@pytest.mark.parametrize("name", LEARNING)
def test_every_weight_learns_and_the_network_stays(name: str) -> None:
    one = trainer(name)
    network = one.denoise.model.diffusion_model
    frozen = {k: v.clone() for k, v in network.state_dict().items()}
    before = {k: p.detach().clone() for k, p in one.encoder.named_parameters()}
    for _ in range(3):  # keys learn once values are not 0
        one.step()
    still = [k for k, p in one.encoder.named_parameters() if torch.equal(p, before[k])]
    assert not still
    assert all(torch.equal(v, frozen[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", ["Flux", "SD3.5", "QwenImage"])
def test_the_loss_falls(name: str) -> None:
    one = trainer(name)
    before = error(one)
    for _ in range(SETTINGS.steps):
        one.step()
    assert error(one) < 0.9 * before


def test_a_stopped_run_goes_on_as_if_it_had_not_been() -> None:
    whole, first = trainer("Flux"), trainer("Flux")
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    file = io.BytesIO()
    torch.save(first.state(base="x"), file)
    file.seek(0)
    second = trainer("Flux")
    second.resume(torch.load(file, weights_only=True), base="x")
    for _ in range(2):
        second.step()
    ours, theirs = (t.encoder.state_dict() for t in (second, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert second.losses == whole.losses


def test_texts_of_unequal_length_are_passes_of_their_own() -> None:
    one = trainer("Flux")
    one.denoise.prompts["two"] = prompt("Flux", seed=4, words=9)
    one.denoise.encoded.clear()
    d = draws(one)[0]
    d.index[:], d.partner[:] = [0, 1], [0, 1]
    with torch.no_grad():
        both = float(one.loss(d))
        alone = [
            float(one.loss(replace(d, index=[i], partner=[i], level=d.level[i : i + 1], noise=d.noise[i : i + 1],
                                   no_text=[False], no_image=d.no_image[i : i + 1])))
            for i in (0, 1)
        ]  # fmt: skip
    assert both == pytest.approx(sum(alone) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_network_without_a_way_back_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"{NODE}: {READ[name].config} cannot be trained through"):
        host.frozen(tiny(name), Merge.ADD, {}, False, NODE)


def test_what_is_for_unets_alone_is_said() -> None:
    with pytest.raises(ValueError, match="gradient checkpointing works on UNets only"):
        host.frozen(tiny("Flux"), Merge.ADD, {}, True, NODE)
    with pytest.raises(ValueError, match="this model is a flow.*Set weighting to plain"):
        trainer("Flux", replace(SETTINGS, weighting="velocity"))


# the node, on the flow miniature ------------------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The node with a tiny new tower, in an empty folder -> encoder, curve."""
    monkeypatch.setattr(training, "SMALL_TOWER", TOWER)
    known = ([str(tmp_path)], {".safetensors", ".training"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, host.CONCEPTS, known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    pictures = [render(random_identity(n), CLASSES[n], SCENES[n], n).image for n in (0, 1)]
    photos = torch.from_numpy(np.stack(pictures)).float() / 255
    with torch.inference_mode():
        model, clip, vae, _ = load_checkpoint_guess_config(str(FLOW_CHECKPOINT))

    @torch.inference_mode()
    def call(**more: Any) -> Any:
        given = {"model": model, "clip": clip, "vae": vae, "save_name": "new", "steps": 2, "learning_rate": 3e-3,
                 "tower_rate": 3e-3, "tower": SMALL, "average": 0.0, "size": 64} | more  # fmt: skip
        return ConceptEncoderTrain.execute(
            images=[photos], prompt=["a photo"], **{name: [value] for name, value in given.items()}
        ).result

    return call, model, photos, tmp_path


def test_the_node_trains_saves_goes_on_and_is_read(node: Any) -> None:
    train, model, photos, folder = node
    train()
    encoder, _ = train(steps=4)
    config = load_concept_encoder(folder / "new.safetensors").config
    assert config.training["steps"] == 4 and config.merge is Merge.ADD and config.decoupled
    assert (
        config.family == "KindredFlowMiniature" and encoder.encoder.config.layers == config.layers
    )
    with torch.inference_mode():
        injected = CrossAttnDetailInject.execute(
            model, encoder, photos[:1], weight=3.0, start_percent=0.0
        ).result[0]
        empty, negative = (
            [[torch.zeros(1, 77, 64), {"pooled_output": torch.zeros(1, 64)}]] for _ in "ab"
        )
        pictures = [
            host.sample(
                m,
                1,
                2,
                3.0,
                "euler",
                "simple",
                empty,
                negative,
                {"samples": torch.zeros(1, 16, 8, 8)},
                1.0,
            )["samples"]
            for m in (injected, model)
        ]
    assert apart(*pictures) > FELT / 10
