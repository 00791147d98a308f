"""A model's key knows a LoRA in bypass mode as it knows one that is baked in: by its weights and its strength."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.patcher_extension import PatcherInjection
from comfy_extras.nodes_train import LoraModelLoader
from kindred.nodes.host import model_key
from networks import build_model
from studio import capture, differs, inject, plain, sample
from torch import Tensor

LAW = pytest.mark.parametrize
LAYERS = [
    f"diffusion_model.{stage}.transformer_blocks.0.{layer}"
    for stage in ("middle_block.1", "output_blocks.1.1")
    for layer in ("attn1.to_k", "attn2.to_out.0")
]


def weights(seed: int = 0, layers: list[str] = LAYERS) -> dict[str, Tensor]:
    """A LoRA of rank 2 in full precision, as its file is read anew."""
    g, found = torch.Generator().manual_seed(seed), {}
    own = build_model("tiny", weights=False).model.state_dict()
    for layer in LAYERS:
        out, inner = own[f"{layer}.weight"].shape
        found[f"{layer}.lora_up.weight"] = torch.randn(out, 2, generator=g)
        found[f"{layer}.lora_down.weight"] = torch.randn(2, inner, generator=g)
    return {
        key: value
        for layer in layers
        for key, value in found.items()
        if key.startswith(f"{layer}.")
    }


@torch.inference_mode()
def lora(
    model: Any,
    seed: int = 0,
    strength: float = 0.3,
    bypass: bool = True,
    layers: list[str] = LAYERS,
) -> Any:
    return LoraModelLoader.execute(model, weights(seed, layers), strength, bypass).result[0]


def model_in(dtype: torch.dtype) -> Any:
    m = build_model("tiny")
    m.model.diffusion_model.to(dtype)
    m.model.diffusion_model.dtype, m.model.manual_cast_dtype = dtype, torch.float32
    return m


def test_another_lora_or_strength_is_another_key():
    """Bypassed or baked in: no two of these models are one."""
    m = build_model("tiny")
    models = [
        m,
        *(
            lora(m, bypass=how, **given)
            for how in (True, False)
            for given in (
                {},
                {"seed": 1},
                {"strength": 0.31},
                {"strength": -0.3},
                {"layers": LAYERS[:2]},
                {"layers": LAYERS[2:]},
            )
        ),
    ]
    assert len({model_key(model) for model in models}) == len(models)


@LAW("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_lora_is_the_same_key_before_a_run_and_after_it_and_loaded_again(dtype):
    """The host casts its weights in place where they first run; another process reads file and checkpoint anew."""
    model, again = lora(model_in(dtype)), lora(model_in(dtype), layers=LAYERS[::-1])
    key = model_key(model)
    bank = capture(model)[0]
    assert bank.model_key == key == model_key(model) == model_key(model.clone()) == model_key(again)
    assert differs(sample(inject(again, bank, 2.0)), sample(again)) > 1e-3
    assert differs(sample(again), plain()) > 1e-3


def test_what_another_pack_injects_may_hold_a_name_that_was_never_given():
    def written():
        def act(model):
            return never

        return act
        never = 0

    m = build_model("tiny")
    theirs = m.clone()
    theirs.set_injections("theirs", [PatcherInjection(inject=written(), eject=lambda model: None)])
    assert model_key(theirs) not in (model_key(m), model_key(lora(m)))


def test_a_reference_is_refused_with_another_lora_in_bypass_mode():
    m = build_model("tiny")
    bank = capture(lora(m))[0]
    with pytest.raises(
        ValueError,
        match=r"was made with model SD15 \w+, but the model given is SD15 \w+: LoRAs differ",
    ):
        inject(lora(m, seed=1), bank)
    inject(lora(m), bank)
