"""A training of Concept Encoder Train on the miniature: its parts, its folder, and what it holds."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import folder_paths
import numpy as np
import pytest
import torch
from kindred.miniature.world import CLASSES, SCENES, random_identity, render
from kindred.models.concept.training import Trainer
from kindred.nodes import host, training
from kindred.nodes.training import SMALL, ConceptEncoderTrain

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
