"""The pooled text beside a prompt: kept where the model reads it, and no part of a reference where it does not.

SD1.5 checkpoints have no text projection, so what the host pools with it is whatever lay in that memory.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kindred.models.reference.bank import Half
from kindred.models.reference.file import load_reference, save_reference
from kindred.nodes.prompts import SubjectPrompts
from kindred.nodes.reference import RefUNetCapture
from networks import random_model
from studio import (
    SCHEDULER,
    STEPS,
    anchors,
    bank_of,
    capture,
    coarse,
    inject,
    invert,
    negative,
    prompts_of,
    sample,
    story,
)

import nodes

LAW = pytest.mark.parametrize


def pooled(conditioning: list, value: float, width: int = 64) -> list:
    """The same prompt, its pooled text another."""
    return [
        [cross, extras | {"pooled_output": torch.full((len(cross), width), value)}]
        for cross, extras in conditioning
    ]


def captured(value: float, family: str = "tiny", width: int = 64):
    return capture(
        random_model(family),
        positive=pooled(coarse(family), value, width),
        negative=pooled(negative(family), value, width),
    )[0]


def inverted(value: float):
    model = random_model("tiny")
    return capture(
        model,
        positive=pooled(coarse(), value),
        inversion=invert(model, positive=pooled(coarse(), value))[0],
    )[0]


def told(value: float):
    return anchors(story(random_model("tiny")), positive=pooled(prompts_of(3), value))[1]


@LAW("made", [captured, inverted, told])
def test_what_a_model_does_not_read_is_not_written(made, tmp_path):
    for name, value in (("a", 0.5), ("b", float("nan"))):
        bank = made(value)
        assert all(
            "pooled_output" not in prompt.extras and "kindred_text" in prompt.extras
            for prompt in bank.prompts.values()
        )
        save_reference(bank, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_a_model_reads_is_kept():
    """SDXL's layout: other pooled texts are other features."""
    one, other = (captured(value, "tiny_xl", 1280) for value in (0.5, -0.5))
    for half in Half:
        assert one.prompts[half].extras["pooled_output"].unique().tolist() == [0.5]
        assert not all(map(torch.equal, one.features[half], other.features[half]))


@LAW("value", [0.5, float("nan")])
def test_a_file_that_holds_it_still_loads_and_draws_the_same(value, tmp_path):
    """As they were saved before; read live, where its prompts are asked."""
    bank = bank_of()
    older = {
        half: replace(p, extras=p.extras | {"pooled_output": torch.full((1, 64), value)})
        for half, p in bank.prompts.items()
    }
    save_reference(replace(bank, prompts=older), tmp_path / "older")
    loaded = load_reference(tmp_path / "older")
    assert all("pooled_output" in prompt.extras for prompt in loaded.prompts.values())
    ours, theirs = (
        sample(inject(random_model("tiny"), b, 2.0), steps=STEPS + 2) for b in (loaded, bank)
    )
    assert torch.equal(ours, theirs)


@torch.inference_mode()
def test_a_loaded_checkpoint_gives_the_same_file_whatever_lay_in_memory(tmp_path):
    """The miniature twice: with zeros where its text projection would be, and with NaN wherever nobody wrote to memory."""
    latent = {"samples": torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(3))}
    for name, filled in (("a", False), ("b", True)):
        torch.use_deterministic_algorithms(filled)
        try:
            model, clip = nodes.CheckpointLoaderSimple().load_checkpoint(
                "kindred_miniature.safetensors"
            )[:2]
        finally:
            torch.use_deterministic_algorithms(False)
        if not filled:  # what lies there by itself may be NaN too
            clip.cond_stage_model.clip_l.transformer.text_projection.weight.zero_()
        words = SubjectPrompts.execute(clip, "a photo of a cat", "cat").result[0]
        assert words[0][1]["pooled_output"].isnan().all() == filled
        save_reference(
            RefUNetCapture.execute(model, words, 1, SCHEDULER, latent=latent).result[0],
            tmp_path / name,
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
