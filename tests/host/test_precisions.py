"""Every inject node on weights in other precisions and with part of them left on the host, and beside a LoRA that the host trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_train import LoraModelLoader, TrainLoraNode
from kindred.miniature.world import CLASSES, SCENES
from kindred.models.story.story import Story
from kindred.nodes.capture import RefUNetCapture
from kindred.nodes.concept import ConceptEncoderLoad, CrossAttnDetailInject
from kindred.nodes.inject import MaskedSelfAttnInject
from kindred.nodes.prompts import SubjectPrompts
from networks import build_model
from ours import FELT, TIGHT, Column, leaving_nothing, seeded
from studio import (
    MOMENTS,
    STEPS,
    capture,
    concept,
    differs,
    inject,
    negative,
    of_model,
    pictures,
    story,
    subject,
)
from torch import Tensor

import nodes

LAW = pytest.mark.parametrize
HALF, BRAIN, EIGHT = torch.float16, torch.bfloat16, torch.float8_e4m3fn
# (weights, what they are computed in): the least likeness of an effect to that of float32, of which 1 is the same
PRECISIONS = {
    (HALF, torch.float32): 0.9999,
    (BRAIN, torch.float32): 0.999,
    (EIGHT, torch.float32): 0.85,
    (EIGHT, BRAIN): 0.85,
    (BRAIN, BRAIN): 0.98,
    (HALF, HALF): 0.999,
}
ALONE_TOO = (
    (HALF, torch.float32),
    (EIGHT, torch.float32),
    (BRAIN, BRAIN),
)  # each injection by itself, and not all of them at once only
COLUMNS = {
    "self cached": Column(lambda m, bank: inject(m, bank, 2.0), read=STEPS),
    "self live": Column(lambda m, bank: inject(m, bank, 2.0), read=STEPS + 2),
    "cross": Column(lambda m, bank: concept(m, 2.0)),
    "all": Column(
        lambda m, bank: story(concept(inject(m, bank, 2.0), 2.0), feature_injection=0.0), read=STEPS
    ),
    "whole story": Column(lambda m, bank: story(m), steps=MOMENTS),
}
ALONE = ("self cached", "self live", "cross", "all")
WHOLE = {
    (HALF, torch.float32): 0.999,
    (BRAIN, BRAIN): 0.93,
}  # of a whole story, two stages long, with float32's matches: 1.0000 and 0.967


@pytest.fixture(autouse=True)
def nothing_is_left():
    with leaving_nothing():
        yield


@cache
def model_in(weights: torch.dtype, computed: torch.dtype) -> ModelPatcher:
    """A tiny model as a file of such weights is loaded: kept as they are, cast where they are used."""
    m = build_model("tiny")
    m.model.diffusion_model.to(weights)
    m.model.diffusion_model.dtype = weights
    m.model.manual_cast_dtype = computed
    return m


@cache
def pair(weights: torch.dtype, computed: torch.dtype, column: str) -> tuple[Tensor, Tensor]:
    """Plain and injected, which leave the same random states and the same plain picture; a reference is made in the same precision."""
    model, ours = model_in(weights, computed), COLUMNS[column]
    (none, left), (out, left_by_us) = (
        seeded(lambda m=m: ours.sampled(m)) for m in (model, ours(model, maker=model))
    )
    assert left == left_by_us and torch.equal(ours.sampled(model), none)
    return none, out


@LAW(
    ("precision", "column"),
    [
        pytest.param(p, column, id="{} in {}, {}".format(*p, column).replace("torch.", ""))
        for p in PRECISIONS
        for column in (ALONE if p in ALONE_TOO else ["all"])
    ],
)
def test_an_effect_in_another_precision_is_the_effect(precision, column):
    (none, out), (exact_none, exact) = (
        pair(*p, column) for p in (precision, (torch.float32, torch.float32))
    )
    assert torch.isfinite(out).all() and differs(out, none) > FELT
    effect, meant = (out - none).flatten(), (exact - exact_none).flatten()
    assert torch.nn.functional.cosine_similarity(effect, meant, 0) > PRECISIONS[precision]


@cache
def whole_story(
    weights: torch.dtype,
    computed: torch.dtype,
    matched_in: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor, dict[int, int]]:
    """The picture, and from which token each matched one is injected; matched_in: with the matches of that precision instead."""
    model, ours, seen, match = model_in(weights, computed), COLUMNS["whole story"], {}, Story._match

    def matched(self: Story) -> None:
        match(self)
        found = self.comparison
        seen.update(zip(found.targets.tolist(), found.sources.tolist()))
        if matched_in:
            given = whole_story(*matched_in)[1]
            found.targets, found.sources = (
                torch.tensor([*t], dtype=torch.long) for t in (given.keys(), given.values())
            )

    with patch.object(Story, "_match", matched):
        return ours.sampled(ours(model)), seen


@LAW("precision", WHOLE, ids=lambda p: "{} in {}".format(*p).replace("torch.", ""))
def test_a_whole_story_in_another_precision_is_the_story(precision):
    """With the same tokens matched it is the same effect. A match is the likest of many tokens: where two are nearly as like, rounding
    chooses another one, and on these small grids one token is much of a picture; so most matches are the same, and not all."""
    exact = torch.float32, torch.float32
    (out, found), (meant, matches), (alike, _) = (
        whole_story(*precision),
        whole_story(*exact),
        whole_story(*precision, matched_in=exact),
    )
    none, exact_none = (COLUMNS["whole story"].sampled(model_in(*p)) for p in (precision, exact))
    assert differs(out, none) > FELT < differs(alike, none)
    effect, same, own = (
        picture.flatten() for picture in (meant - exact_none, alike - none, out - none)
    )
    assert torch.nn.functional.cosine_similarity(same, effect, 0) > WHOLE[precision]
    assert len(found.items() & matches.items()) > 0.75 * len(matches) > 0  # 14 and 13 of 14
    assert torch.nn.functional.cosine_similarity(own, effect, 0) > 0.7  # 0.91 and 0.83


def test_a_whole_story_of_weights_in_eight_bits_is_felt():
    """Which tokens it matches is another question there: the weights are others."""
    model, ours = model_in(EIGHT, torch.float32), COLUMNS["whole story"]
    none = ours.sampled(model)
    assert differs(ours.sampled(ours(model)), none) > 10 * FELT and torch.equal(
        ours.sampled(model), none
    )


@LAW("precision", PRECISIONS)
def test_silence_in_another_precision_is_the_plain_picture_bit_for_bit(precision):
    model = model_in(*precision)
    silent = story(
        concept(inject(model, capture(model, negative=negative())[0], 0.0), 0.0), strength=0.0
    )
    assert torch.equal(pictures(silent, (0, 1), steps=STEPS), pair(*precision, "all")[0])


def test_a_compute_dtype_set_by_another_node():
    m = build_model("tiny")
    low = m.clone()
    low.set_model_compute_dtype(BRAIN)
    ours = COLUMNS["all"]
    out = ours.sampled(ours(low, maker=low))
    assert torch.isfinite(out).all() and differs(out, ours.sampled(low)) > FELT


# a part of the weights left behind ---------------------------------------------------------------------------------------------


@contextmanager
def little_memory() -> Iterator[list[bool]]:
    """As --lowvram does it: half of the weights stay where they are and are cast, LoRA and all, at each use."""
    load, left = ModelPatcher.load, []

    def partly(
        self: ModelPatcher,
        device_to: Any = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        load(self, device_to, self.model_size() // 2, force_patch_weights)
        left.append(self.model.model_lowvram)

    comfy.model_management.unload_all_models()
    ModelPatcher.load = partly
    try:
        yield left
    finally:
        ModelPatcher.load = load
        comfy.model_management.unload_all_models()


def with_lora(model: ModelPatcher) -> ModelPatcher:
    """Every self-attention's keys and values, so that some of them are patched where they lie and some where they are used."""
    m, g = model.clone(), torch.Generator().manual_seed(4)
    weights = {
        k: v
        for k, v in m.model.state_dict().items()
        if k.endswith(("attn1.to_k.weight", "attn1.to_v.weight"))
    }
    m.add_patches(
        {
            k: ("diff", (0.3 * v.std() * torch.randn(v.shape, generator=g),))
            for k, v in weights.items()
        },
        1.0,
    )
    return m


@LAW("column", ["self live", "all", "whole story"])
def test_partly_loaded_weights_draw_the_same(column):
    ours, whole, model = (
        COLUMNS[column],
        with_lora(build_model("tiny")),
        with_lora(build_model("tiny")),
    )
    (none, state), (exact, _) = (
        seeded(lambda m=m: ours.sampled(m)) for m in (whole, ours(whole, maker=whole))
    )
    with little_memory() as left:
        before = ours.sampled(model)
        out, state_after = seeded(lambda: ours.sampled(ours(model, maker=model)))
        assert torch.equal(ours.sampled(model), before)
    assert differs(out, exact) < TIGHT and state_after == state
    assert any(left) and differs(exact, none) > FELT


# a LoRA that the host trained --------------------------------------------------------------------------------------------------


@cache
@torch.inference_mode()
def miniature() -> SimpleNamespace:
    model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(
        "kindred_miniature.safetensors"
    )[:3]
    lines = "\n".join(f"a {CLASSES[0]} in the {scene}" for scene in SCENES[:2])
    return SimpleNamespace(
        model=model,
        positive=SubjectPrompts.execute(clip, lines, CLASSES[0]).result[0],
        coarse=SubjectPrompts.execute(clip, f"a photo of a {CLASSES[0]}", CLASSES[0]).result[0],
        negative=nodes.CLIPTextEncode().encode(clip, "")[0],
        photo={"samples": vae.encode(subject(size=(128, 128)))},
        encoder=ConceptEncoderLoad.execute("kindred_miniature_concept.safetensors").result[0],
    )


@cache
@torch.inference_mode()
def trained() -> dict[str, Tensor]:
    """The host's Train LoRA on the miniature, two steps of one picture."""
    m = miniature()
    one = {
        "batch_size": 1,
        "steps": 2,
        "grad_accumulation_steps": 1,
        "learning_rate": 3e-4,
        "rank": 2,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }
    lora = TrainLoraNode.execute(
        model=[m.model], latents=[m.photo], positive=[m.coarse], **{k: [v] for k, v in one.items()}
    ).result[0]
    return {k: v.clone() for k, v in lora.items()}


@torch.inference_mode()
def drawn(model: Any) -> Tensor:
    m = miniature()
    return nodes.common_ksampler(
        model,
        3,
        2,
        4.0,
        "euler",
        "ddim_uniform",
        m.positive,
        m.negative,
        {"samples": torch.zeros(2, *m.photo["samples"].shape[1:])},
    )[0]["samples"]


@cache
def plain() -> Tensor:
    """The miniature's own picture."""
    return drawn(miniature().model)


@torch.inference_mode()
def lora(model: Any, bypass: bool = False) -> Any:
    return LoraModelLoader.execute(model, trained(), 1.0, bypass).result[0]


@torch.inference_mode()
def read(model: Any, maker: Any) -> Any:
    m = miniature()
    bank = RefUNetCapture.execute(maker, m.coarse, 2, "ddim_uniform", latent=m.photo).result[0]
    return MaskedSelfAttnInject.execute(model, bank, weight=2.0).result[0]


@torch.inference_mode()
def detailed(model: Any) -> Any:
    return CrossAttnDetailInject.execute(
        model, miniature().encoder, subject(size=(128, 128)), start_percent=0.0
    ).result[0]


@LAW("bypass", [False, True])
def test_a_lora_of_the_hosts_trainer_before_a_reference_and_never_behind_it(bypass):
    """Its keys are another model's: refused at the node where it stands before a plain reference, at the sampler behind one."""
    plain()
    m, patched = miniature(), lora(miniature().model, bypass)
    before = of_model(m.model)
    (none, left), (out, left_by_us) = (
        seeded(lambda n=n: drawn(n)) for n in (patched, read(patched, maker=patched))
    )
    assert left == left_by_us
    assert torch.isfinite(out).all() and differs(out, none) > FELT < differs(
        out, drawn(read(m.model, maker=m.model))
    )
    words = r"was made with model \w+ \w+, but the model given is \w+ \w+: LoRAs \(none there, on \d+ layers here\) differ"
    with pytest.raises(ValueError, match=words):
        read(patched, maker=m.model)
    with pytest.raises(ValueError, match=words):
        drawn(lora(read(m.model, maker=m.model), bypass))
    assert of_model(m.model) == before and torch.equal(drawn(m.model), plain())


@LAW("node", [detailed, story])
def test_a_lora_of_the_hosts_trainer_on_either_side_of_what_reads_no_reference(node):
    m = miniature()
    plain()
    (before, left), (behind, left_behind), (none, left_by_them) = (
        seeded(lambda n=n: drawn(n))
        for n in (node(lora(m.model)), lora(node(m.model)), lora(m.model))
    )
    assert torch.equal(before, behind) and left == left_behind == left_by_them
    assert min(differs(before, other) for other in (none, plain(), drawn(node(m.model)))) > FELT
    assert torch.equal(drawn(m.model), plain())
