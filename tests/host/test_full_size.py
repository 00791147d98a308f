"""The laws that matter most at the real sizes: SD1.5, SD2.1 (v-prediction) and SDXL with random weights and small latents."""

from __future__ import annotations

import gc

import pytest
import torch
from kindred.models.network.call import Half
from kindred.models.reference.bank import ReferenceBank
from kindred.nodes.host import attention_sites
from networks import build_model
from refusals import LONG
from studio import (
    anchors,
    capture,
    coarse,
    counted,
    differs,
    inject,
    negative,
    passes,
    photo,
    pictures,
    prompt,
    sample,
    story,
)

SIZE, STEPS = (16, 24), 2
LATER = pytest.mark.skipif(LONG == 1, reason="half a minute and more: KINDRED_LONG=1 runs it")


@pytest.fixture
def model(request):
    """One at a time, and let go of before the next: SDXL has 2.6 billion parameters."""
    made = build_model(request.param)
    yield made
    import comfy.model_management

    comfy.model_management.unload_all_models()
    del made
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "family", "blocks", "grids"),
    [
        ("sd15", "sd15", 16, {(16, 24), (8, 12), (4, 6), (2, 3)}),
        pytest.param("sd21", "sd21", 16, {(16, 24), (8, 12), (4, 6), (2, 3)}, marks=LATER),
        ("sdxl", "sdxl", 70, {(8, 12), (4, 6)}),
    ],
    indirect=["model"],
    ids=["sd15", "sd21", "sdxl"],
)
def test_capture_and_injection(model, family, blocks, grids, monkeypatch):
    """Counts, calls, a window without steps, cached and live; the prompts of SDXL carry their pooled rows."""
    how = {
        "size": SIZE,
        "steps": STEPS,
        "positive": prompt(5, family),
        "uncond": negative(family),
        "start_step": 0,
        "last_step": 1,
    }
    with counted(model) as rows:
        bank, mask = capture(model, photo(SIZE), coarse(family), STEPS, negative=negative(family))
    assert rows == [2] * (STEPS + 1)
    assert len(bank.layers) == blocks == len(attention_sites(model.model.diffusion_model))
    assert (
        {layer.grid for layer in bank.layers} == grids
        and bank.maps.shape[2:] == (4, 6)
        and mask.shape == (1, 128, 192)
    )
    assert all(torch.isfinite(f).all() for f in bank.features.values()) and set(
        bank.features
    ) == set(Half)

    plain = sample(model, **how)
    assert torch.equal(
        sample(inject(model, bank, start_percent=0.6, end_percent=0.7), **how), plain
    )  # the step is at 0.5
    injected = inject(model, bank, 2.0, halves="both")
    cached = sample(injected, **how)
    assert differs(cached, plain) > 1e-3
    monkeypatch.setattr(ReferenceBank, "step_of", lambda self, sigma: None)
    assert differs(sample(injected, **how), cached) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "family", "blocks", "grids", "at"),
    [
        ("sd15", "sd15", 9, {(8, 12), (4, 6), (2, 3)}, (4, 6)),
        pytest.param(
            "sd21",
            "sd21",
            9,
            {(8, 12), (4, 6), (2, 3)},
            (4, 6),
            marks=LATER,
        ),
        pytest.param("sdxl", "sdxl", 36, {(4, 6), (2, 3)}, (4, 6), marks=LATER),
    ],
    indirect=["model"],
    ids=["sd15", "sd21", "sdxl"],
)
def test_a_story(model, family, blocks, grids, at):
    """Both stages, the blend and injection; I25: the second picture read alone is what it was beside its anchor."""
    how = {"steps": 4, "size": (8, 12), "family": family}
    inputs = {"anchors": 1, "blend_end_percent": 0.6, "injection_end_percent": 0.6}
    if family == "sdxl":  # one half of CFG is half of two minutes
        how, inputs = how | {"cfg": 1.0}, inputs | {"halves": "cond only"}
    with passes(model) as rows:
        both, bank = anchors(story(model, **inputs), (0, 1), **how)
    assert (
        rows == [2 if family == "sdxl" else 4] * 8
    )  # to the features 3, from the first injection 3, one more where each blends
    assert (
        len(bank.layers) == blocks
        and {layer.grid for layer in bank.layers} == grids
        and bank.maps.shape[2:] == (2, 3)
    )
    assert {layer.grid for layer in bank.anchors.output_layers} == {
        at
    } and bank.anchors.features.shape[:2] == (1, at[0] * at[1])
    assert len(bank.anchors.subject) and [len(o) > 0 for o in bank.anchors.outputs] == [
        False,
        False,
        True,
        False,
    ]

    alone = pictures(story(model, reference=bank, **inputs), (1,), **how)
    assert differs(alone, both[1:]) < 1e-3
    assert differs(alone, pictures(model, (1,), **how)) > 1e-3
