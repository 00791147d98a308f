"""Laws of the flow miniature's training: noise levels, captions as the host encodes them, who learns, kills that change nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from kindred.miniature import train_flow as trainer
from kindred.miniature.flow import build_flow, captions_encoded, class_rows
from kindred.miniature.flow_forward import MAP_DOUBLE, MAP_SINGLE, Forward
from kindred.miniature.layout import FLOW, FLOW_CHANNELS
from kindred.miniature.training import Run, load
from kindred.models.subject.masks import token_map
from torch import Tensor, nn

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
    masks = np.zeros((8, 128, 128), bool)
    masks[:, 32:96, 32:96] = True
    renderings = type("Renderings", (), {"labels": labels, "masks": masks})
    monkeypatch.setattr(trainer, "latents_of", lambda run, count, name: latents)
    monkeypatch.setattr(trainer, "training_set", lambda folder, count: renderings)
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


def shaken() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network of which every weight has moved, and what it is asked."""
    torch.manual_seed(0)
    flow = build_flow(HOST)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    x, sigma = torch.randn(2, FLOW_CHANNELS, 4, 6), torch.tensor([0.3, 0.8])
    return flow, (x, sigma, torch.randn(2, 77, 64), torch.randn(2, 64))


def test_it_begins_silent() -> None:
    flow = build_flow(HOST)
    x, sigma = torch.randn(2, FLOW_CHANNELS, 4, 4), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        assert not flow(x, sigma, torch.randn(2, 77, 64), torch.randn(2, 64)).any()


def test_training_runs_what_the_host_runs() -> None:
    flow, asked = shaken()
    with torch.no_grad():
        ours, _ = Forward(flow)(*asked, torch.tensor([3, 0]))
        assert torch.allclose(ours, flow(*asked), atol=2e-6, rtol=1e-5)


def test_every_weight_learns() -> None:
    flow, asked = shaken()
    Forward(flow)(*asked, torch.tensor([3, 0]))[0].square().mean().backward()
    assert not [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_words_maps_are_those_that_the_nodes_read() -> None:
    """As a recorder of the host's attention sees them in the block that locates, and beyond."""
    flow, asked = shaken()
    seen = []

    def watch(func, q, k, v, heads, mask=None, **rest):  # noqa: ANN001, ANN202
        own, text = q[:, :, 77:].transpose(1, 2).flatten(2), k[:, :, :77].transpose(1, 2).flatten(2)
        seen.append(token_map(own, text, [[3], [5]], heads))
        return func(q, k, v, heads, mask=mask, **rest)

    with torch.no_grad():
        options = {"optimized_attention_override": watch}
        flow(*asked, transformer_options=options)
        maps = Forward(flow)(*asked, torch.tensor([3, 5]))[1]
    calls = [*MAP_DOUBLE, *(len(flow.double_blocks) + i for i in MAP_SINGLE)]
    assert all(
        torch.allclose(ours, seen[call], atol=1e-6) for ours, call in zip(maps, calls, strict=True)
    )


def test_a_caption_says_where_its_class_stands() -> None:
    texts = ["", "a photo of a cat on the beach", "a robot"]
    assert class_rows(HOST, texts).tolist() == [0, 5, 2]


def test_masks_are_shares_of_a_token() -> None:
    masks = np.zeros((3, 128, 128), bool)
    masks[1, :8, :12] = True
    assert trainer.covered(masks, 16)[1, :3].tolist() == [1.0, 0.5, 0.0]
    assert float(trainer.covered(masks, 16).sum()) == 1.5
