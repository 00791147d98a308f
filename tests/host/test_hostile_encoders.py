"""Damaged and lying concept encoders, states of a training and files of other kinds: refused in words, or as good as whole ones."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from kindred.models.concept.config import FORMAT, ConceptConfig, Preprocessing
from kindred.models.concept.draws import Examples
from kindred.models.concept.encoder import ConceptEncoder
from kindred.models.concept.full_face import SD_STAGES
from kindred.models.concept.settings import TrainSettings
from kindred.models.concept.training import Trainer
from kindred.models.concept.training_state import read_state
from kindred.models.noise.path import DIFFUSION
from kindred.nodes.concept import ConceptEncoderLoad
from kindred.nodes.host import CONCEPTS, REFERENCES
from kindred.nodes.library import LoadReference
from mutations import Mutator
from networks import random_model
from refusals import LONG, faults_of, resident
from remedy import REMEDY
from safetensors.torch import save_file
from strange_files import Trap, changed, strangers, torn
from studio import concept, fresh_encoder, sample

MODEL = random_model("tiny")
LAW = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("nothing_else_changes")
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "hidden_act": "gelu",
    "num_channels": 3,
}


@torch.inference_mode()
def load_encoder(name: str) -> Any:
    return ConceptEncoderLoad.execute(name).result[0]


def full_face() -> dict[str, torch.Tensor]:
    """IP-Adapter full-face weights of SD1.5 in small."""
    layers = sum(map(len, SD_STAGES.values()))
    made = {
        f"ip_adapter.{2 * n + 1}.to_{half}_ip.weight": torch.ones(2, 768)
        for n in range(layers)
        for half in "kv"
    }
    sizes = {
        "0.weight": (8, 8),
        "0.bias": (8,),
        "2.weight": (768, 8),
        "2.bias": (768,),
        "3.weight": (768,),
        "3.bias": (768,),
    }
    return made | {f"image_proj.proj.{name}": torch.ones(size) for name, size in sizes.items()}


@torch.inference_mode()
def test_a_damaged_encoder_is_refused_or_draws(place):
    folder = place(CONCEPTS)
    fresh_encoder().save(folder / "whole.safetensors", torch.float32)
    fates, faults, before = Counter(), [], resident()
    for mutant, words in Mutator(
        (folder / "whole.safetensors").read_bytes(), FORMAT, seed="encoder "
    ).mutants(360 * LONG):
        (folder / "cat.safetensors").write_bytes(mutant)
        encoder, fault = faults_of(lambda: load_encoder("cat.safetensors"), "cat.safetensors")
        faults += [f"{words}: {fault}"] * bool(fault)
        fates["refused" if encoder is None else "loaded"] += 1
        if encoder is not None and (LONG > 1 or fates["loaded"] % 4 == 0):
            picture, fault = faults_of(
                lambda: sample(concept(MODEL, encoder=encoder), steps=1, cfg=1.0)
            )
            fault = fault or "NaN or infinite" * (
                picture is not None and not torch.isfinite(picture).all()
            )
            faults += [f"drawn, {words}: {fault}"] * bool(fault)
            fates["not drawn" if picture is None else "drawn"] += 1
    print(dict(fates))
    assert not faults, "\n".join(faults)
    assert (
        fates["refused"] > 150 * LONG and fates["loaded"] > 20 * LONG and fates["drawn"] > 5 * LONG
    )
    assert resident() - before < 200


@torch.inference_mode()
def test_damaged_full_face_weights_are_refused_or_ask_for_their_tower(place):
    """A whole one asks for CLIP Vision, which is the last thing that Concept Encoder Load looks at."""
    folder = place(CONCEPTS)
    save_file(full_face(), folder / "whole.safetensors")
    fates, faults, before = Counter(), [], resident()
    for mutant, words in Mutator(
        (folder / "whole.safetensors").read_bytes(), FORMAT, seed="face "
    ).mutants(90 * LONG):
        (folder / "face.safetensors").write_bytes(mutant)
        encoder, fault = faults_of(lambda: load_encoder("face.safetensors"), "face.safetensors")
        faults += [f"{words}: {fault or 'loaded without a tower'}"] * (
            fault != "" or encoder is not None
        )
        fates["refused"] += 1
    assert not faults, "\n".join(faults)
    assert resident() - before < 100


# the state of a training -------------------------------------------------------------------------------------------------------


class Denoise:
    """Draws the mean of what it reads: enough to learn from."""

    sigmas, velocity, noise = torch.linspace(0.1, 10, 8), False, DIFFUSION
    learning = staticmethod(nullcontext)

    def __call__(self, x, sigma, prompts, keys_values, weight):
        return 0.1 * x + weight * sum(k.mean() + v.mean() for k, v in keys_values.values())


def trainer(steps: int = 0) -> Trainer:
    layers = ((("input", 1, 0), 4), (("middle", 0, 0), 6))
    torch.manual_seed(0)
    encoder = ConceptEncoder(
        ConceptConfig(
            "SD15", layers, 8, SMALL["hidden_size"], SMALL, Preprocessing(SMALL["image_size"])
        )
    )
    examples = Examples(
        torch.ones(2, 4, 2, 2), torch.zeros(2, 16, 16, 3, dtype=torch.uint8), ["a", "b"], [0, 1]
    )
    made = Trainer(encoder, Denoise(), examples, TrainSettings(steps=9, rate=1e-3, average=0.9))
    for _ in range(steps):
        made.step()
    return made


@pytest.fixture(scope="module")
def state() -> bytes:
    file = io.BytesIO()
    torch.save(trainer(2).state(base="SD15 1"), file)
    return file.getvalue()


def resumed(path: Path, one: Trainer) -> bool:
    one.resume(read_state(path), base="SD15 1")
    return True


def test_a_damaged_state_is_refused_or_goes_on(state, tmp_path):
    """Torn as a file, or whole with other things in it. Where it is refused, the trainer is as it was."""
    told = torch.load(io.BytesIO(state), weights_only=True)
    path, fates, faults, before, one = (
        tmp_path / "cat.training",
        Counter(),
        [],
        resident(),
        trainer(),
    )
    fresh = {name: value.clone() for name, value in one.encoder.state_dict().items()}
    for number in range(480 * LONG):
        rng = random.Random(f"state {number}")
        if number % 2:
            mutant, words = torn(state, rng)
        else:
            tree, words = changed(copy.deepcopy(told), rng)
            file = io.BytesIO()
            torch.save(tree, file)
            mutant = file.getvalue()
        path.write_bytes(mutant)
        went, fault = faults_of(lambda: resumed(path, one), path.name)
        if went:
            try:
                fault = "" if math.isfinite(one.step()) else "NaN"
            except FloatingPointError as error:  # the loop's own word for it
                fault = "" if REMEDY.search(str(error)) else str(error)
            one = trainer()
        faults += [f"{number} {words}: {fault}"] * bool(fault)
        fates["refused" if went is None else "went on"] += 1
        assert (
            went
            or one.step_number == 0
            and all(torch.equal(v, fresh[k]) for k, v in one.encoder.state_dict().items())
        ), words
    print(dict(fates))
    assert not faults, "\n".join(faults)
    assert fates["refused"] > 250 * LONG and fates["went on"] > 10 * LONG
    assert resident() - before < 200


# files of other kinds ------------------------------------------------------------------------------------------------------------


@LAW("kind", [*strangers("")])
@torch.inference_mode()
def test_files_of_other_kinds_are_refused_everywhere_and_never_unpickled(kind, place, tmp_path):
    content, sprung = strangers(str(tmp_path / "sprung"))[kind], tmp_path / "sprung"
    for folder, load in (
        (place(REFERENCES), lambda name: LoadReference.execute(name)),
        (place(CONCEPTS), load_encoder),
        (tmp_path, lambda name: trainer().resume(read_state(tmp_path / name))),
    ):
        (folder / "stranger.safetensors").write_bytes(content)
        made, fault = faults_of(lambda: load("stranger.safetensors"), "stranger.safetensors")
        assert made is None and not fault, fault
        assert not sprung.exists()


@LAW("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_state_that_would_run_a_program_is_not_run(protocol, tmp_path):
    for made in (
        Trap(str(tmp_path / "sprung")),
        {"encoder": Trap(str(tmp_path / "sprung")), "step": 1},
    ):
        path = tmp_path / "cat.training"
        path.write_bytes(pickle.dumps(made, protocol))
        assert faults_of(lambda: read_state(path), path.name) == (None, "")
        torch.save(made, path, pickle_protocol=max(protocol, 2))
        assert faults_of(lambda: read_state(path), path.name) == (None, "")
    assert not (tmp_path / "sprung").exists()
