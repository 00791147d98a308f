"""Laws of the flow miniature's training: noise levels, captions as the host encodes them, who learns, kills that change nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from kindred.miniature import train_flow as trainer
from kindred.miniature.flow import build_flow, captions_encoded, training, velocity
from kindred.miniature.layout import FLOW, FLOW_CHANNELS
from kindred.miniature.training import Run, load

HOST = Path(os.environ["KINDRED_HOST"])
CPU = torch.device("cpu")


def test_noise_levels_are_those_of_the_logit_normal_in_every_batch() -> None:
    levels = torch.cat(
        [trainer.noise_levels(32, torch.Generator().manual_seed(i)) for i in range(200)]
    ).double()
    logits = torch.logit(levels)
    assert ((levels > 0) & (levels < 1)).all()
    assert (
        abs(float(logits.mean()) - trainer.MEAN) < 0.01
        and abs(float(logits.std()) - trainer.DEVIATION) < 0.02
    )


def test_captions_are_what_the_host_encodes(host) -> None:
    with torch.inference_mode():
        _, clip, _ = host.CheckpointLoaderSimple().load_checkpoint("kindred_miniature.safetensors")
        texts = ["", "a photo of a cat on the beach", "a robot"]
        theirs = torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts])
    context, pooled = captions_encoded(HOST, texts)
    assert torch.allclose(
        context, theirs.float(), atol=2e-3
    )  # the host computes in its own precision
    assert torch.equal(pooled[0], context[0, 1]) and pooled.shape == (3, 64)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A work folder with eight made-up latents, and no autoencoder."""
    latents = torch.randn(8, FLOW_CHANNELS, 4, 4, generator=torch.Generator().manual_seed(1)).half()
    labels = np.arange(32).reshape(8, 4) % 5
    monkeypatch.setattr(trainer, "latents_of", lambda run, count, name: latents)
    monkeypatch.setattr(
        trainer, "training_set", lambda folder, count: type("Renderings", (), {"labels": labels})
    )
    monkeypatch.setattr(trainer, "SAVE_EVERY", 2)
    return Run(tmp_path, CPU)


def test_a_killed_training_goes_on_as_if_nothing_had_been(
    small: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, saved = small.folder / f"{FLOW}transformer.pt", []
    trainer.train_flow(small, HOST, 4, batch=4)
    whole = load(path, CPU)
    path.unlink()
    real = trainer.save

    def die(place: Path, state: dict) -> None:
        real(place, state)
        saved.append(state["step"])
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_flow(small, HOST, 4, batch=4)
    trainer.train_flow(small, HOST, 4, batch=4)
    again = load(path, CPU)
    assert saved == [2, 4] and again["step"] == whole["step"] == 4
    assert all(torch.equal(again["model"][name], value) for name, value in whole["model"].items())
    assert all(
        torch.equal(again["average"][name], value) for name, value in whole["average"].items()
    )


def test_it_begins_silent_and_every_weight_learns() -> None:
    """At first the answer is 0; behind it two steps bring a gradient to all of it."""
    torch.manual_seed(0)
    flow = build_flow(HOST)
    x, sigma = torch.randn(2, FLOW_CHANNELS, 4, 4), torch.tensor([0.3, 0.8])
    context, pooled = torch.randn(2, 77, 64), torch.randn(2, 64)
    with torch.no_grad():
        assert not velocity(flow, x, sigma, context, pooled).any()
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    import comfy.model_management

    with training(HOST):
        velocity(flow, x, sigma, context, pooled).square().mean().backward()
    assert not comfy.model_management.in_training
    assert not [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.any()]
