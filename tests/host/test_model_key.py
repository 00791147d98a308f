"""One key for one model, whatever precision and place it is loaded in; a refusal names what differs."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import strangers
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_model_merging import ModelMergeSimple
from kindred.miniature import subject
from kindred.models.identity import differences, parts_of
from kindred.models.reference.file import load_reference, save_reference
from kindred.nodes.consistory import ConsiStory
from kindred.nodes.host import model_key, require_same_model
from networks import build_model
from studio import bank_of, capture, differs, inject, invert, sample
from test_bypassed_lora import lora
from test_precisions import little_memory
from torch import Tensor

LAW = pytest.mark.parametrize
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
OLD = "KindredMiniature 1a18598d143e"  # as the first Kindred named the shipped checkpoint, loaded in float32


@cache
def shipped(dtype: torch.dtype) -> Any:
    """The shipped checkpoint as the host loads it with --bf16-unet, --fp8_e4m3fn-unet and so on."""
    path = folder_paths.get_full_path_or_raise("checkpoints", "kindred_miniature.safetensors")
    options = {"dtype": dtype}
    model = comfy.sd.load_checkpoint_guess_config(
        path, output_vae=False, output_clip=False, model_options=options
    )[0]
    assert {w.dtype for k, w in model.model.state_dict().items() if k.endswith("to_k.weight")} == {
        dtype
    }
    return model


def tiny(dtype: torch.dtype = torch.float32, change: Any = None) -> Any:
    """A tiny model that was rounded after its weights were changed."""
    m = build_model("tiny")
    if change:
        with torch.no_grad():
            change(m.model.diffusion_model)
    m.model.diffusion_model.to(dtype)
    m.model.diffusion_model.dtype, m.model.manual_cast_dtype = dtype, torch.float32
    return m


def tuned(size: float, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def change(unet: torch.nn.Module) -> None:
        for weight in unet.parameters():
            weight.mul_(1 + size * torch.randn(weight.shape, generator=generator))

    return change


def differ(a: Any, b: Any) -> tuple[str, ...] | None:
    found = differences(model_key(a), model_key(b))
    assert found == differences(model_key(b), model_key(a))
    return found


def refuse(a: Any, b: Any, *said: str) -> str:
    """A reference of one model on the other: all of this is said, in this order."""
    with pytest.raises(ValueError, match=".*".join(map(re.escape, said))) as error:
        require_same_model("Node", "reference", model_key(a), model_key(b))
    return str(error.value)


# precisions ------------------------------------------------------------------------------------------------------------------


@LAW("dtype", PRECISIONS, ids=str)
def test_the_shipped_subject_is_read_in_every_precision(dtype):
    bank = load_reference(subject.SUBJECT)
    assert ConsiStory.execute(shipped(dtype), reference=bank).result[0] is not None
    assert all(differ(shipped(dtype), shipped(other)) == () for other in PRECISIONS)


@LAW("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_a_reference_goes_from_one_precision_to_another_through_a_file(dtype, tmp_path):
    low, high = tiny(dtype), tiny()
    for maker, reader in ((low, high), (high, low)):
        save_reference(capture(maker)[0], tmp_path / "a.safetensors")
        bank = load_reference(tmp_path / "a.safetensors")
        assert differs(sample(inject(reader, bank, 2.0)), sample(reader)) > 1e-3
    inversion = invert(high)[0]
    assert capture(low, inversion=inversion)


@LAW("dtype", PRECISIONS, ids=str)
def test_other_weights_are_refused_in_every_precision(dtype):
    """A thousandth of each weight, and all weights drawn anew."""
    words = (
        "reference was made with model SD15 ",
        "but the model given is SD15 ",
        ": weights differ. Load the checkpoint",
    )
    for size in (1e-3, 1.0):
        other = tiny(dtype, tuned(size))
        refuse(tiny(dtype), other, *words)
        if size == 1 or dtype is not torch.bfloat16 and dtype.itemsize == 2:
            refuse(tiny(), other, *words)
            refuse(other, tiny(), *words)


def test_an_older_reference_is_compared_by_its_name():
    bank = replace(load_reference(subject.SUBJECT), model_key=OLD)
    assert ConsiStory.execute(shipped(torch.float32), reference=bank).result[0] is not None
    with pytest.raises(
        ValueError,
        match=f"made with model {OLD}, but.*An older Kindred made it.*precision.*make the reference again",
    ):
        ConsiStory.execute(shipped(torch.bfloat16), reference=bank)


def test_a_merge_of_two_checkpoints_is_one_in_every_precision():
    """The weights of the second are patches of the first, in the precision that it was loaded in."""
    merges = [
        ModelMergeSimple.merge(None, tiny(d), tiny(d, tuned(0.1)), 0.5)[0]
        if hasattr(ModelMergeSimple, "merge")
        else ModelMergeSimple.execute(tiny(d), tiny(d, tuned(0.1)), 0.5).result[0]
        for d in PRECISIONS[:4]
    ]
    assert all(differ(a, b) == () for a in merges for b in merges)
    assert differ(merges[0], tiny()) == ("LoRAs",)


# what differs ----------------------------------------------------------------------------------------------------------------


@LAW("bypass", [True, False])
@LAW("dtype", PRECISIONS[:4], ids=str)
def test_a_lora_is_what_differs_in_every_precision(dtype, bypass):
    own, same = (lora(tiny(d), bypass=bypass) for d in (torch.float32, dtype))
    assert differ(own, same) == ()
    for other in (
        lora(tiny(dtype), seed=1, bypass=bypass),
        lora(tiny(dtype), strength=0.31, bypass=bypass),
        tiny(dtype),
    ):
        assert differ(own, other) == ("LoRAs",)
    refuse(
        own,
        tiny(dtype),
        "model given is SD15 ",
        ": LoRAs (on 4 layers there, none here) differ. Wire a MODEL with the same LoRAs",
    )


def sampled_as(model: Any, what: str, zsnr: bool = False) -> Any:
    node = ModelSamplingDiscrete
    return (
        node.patch(node(), model, what, zsnr)[0]
        if hasattr(node, "patch")
        else node.execute(model, what, zsnr).result[0]
    )


def test_a_sampling_node_is_what_differs():
    m = build_model("tiny")
    v, z = sampled_as(m, "v_prediction"), sampled_as(m, "eps", True)
    told = refuse(
        m,
        v,
        ": sampling (",
        "EPS up to sigma 14.61 there,",
        "V_PREDICTION",
        "here) differs. Wire a MODEL with the same sampling node",
    )
    assert "weights" not in told and "LoRA" not in told
    assert differ(m, z) == differ(v, z) == ("sampling",)
    assert differ(m, sampled_as(m, "eps")) == ()  # the checkpoint's own


def test_injected_modules_are_what_differs():
    m = build_model("tiny")
    theirs = strangers.fixture(m)
    refuse(
        m,
        theirs,
        ": injected modules (none there, ",
        " here) differ. Wire a MODEL with the same modules",
    )
    assert differ(lora(theirs), m) == ("LoRAs", "injected modules")
    assert (
        differ(strangers.motion(m, []), m) == ()
    )  # they belong to a wrapper, and no reference pass has them


def test_other_kinds_say_no_more_than_their_names():
    refuse(
        build_model("tiny"),
        build_model("tiny_xl"),
        "made with model SD15 ",
        "but the model given is SDXL ",
        ". Wire a MODEL of that kind",
    )


# where the weights are -------------------------------------------------------------------------------------------------------


@LAW("bypass", [None, True, False])
@LAW("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
@LAW("memory", [nullcontext, little_memory])
def test_it_is_the_same_loaded_and_not(dtype, bypass, memory):
    """A LoRA is patched into the weights where they lie, and rounded with them."""
    comfy.model_management.unload_all_models()
    m = tiny(dtype) if bypass is None else lora(tiny(dtype), bypass=bypass)
    before = model_key(m)
    with memory():
        sample(m)
        during = model_key(m)
        assert m.model.current_weight_patches_uuid is not None
    m.detach()
    for key in (during, model_key(m), model_key(m.clone())):
        assert key == before and differences(key, before) == ()
        assert torch.equal(parts_of(key).weights.values, parts_of(before).weights.values)


def test_no_two_waits_for_one_device(monkeypatch):
    """On CUDA every copy waits: one for the key, one for its name, and two for a LoRA, however many tensors there are."""
    copies: list[int] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(
        Tensor,
        "cpu",
        lambda self, *args, **how: copies.append(self.numel()) or cpu(self, *args, **how),
    )
    model_key(build_model("tiny"))
    assert len(copies) <= 3 and max(copies) <= 64 * 32


# tensors that are no plain tensors -------------------------------------------------------------------------------------------


def quantised(layout: str, seed: float = 0.0) -> Any:
    """The attention's weights as the host loads a checkpoint with comfy_quant beside them: its state tells more than weights."""
    from comfy.ops import QuantizedTensor, mixed_precision_ops

    m = build_model("tiny")
    unet = m.model.diffusion_model
    linear = mixed_precision_ops(compute_dtype=torch.float32).Linear
    with torch.no_grad():
        if seed:
            tuned(seed)(unet)
        for name, module in [*unet.named_modules()]:
            if not isinstance(module, torch.nn.Linear) or "attn" not in name:
                continue
            own = linear(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                device="cpu",
                dtype=torch.float32,
            )
            own.weight = torch.nn.Parameter(
                QuantizedTensor.from_float(module.weight.detach(), layout, scale="recalculate"),
                requires_grad=False,
            )
            own.bias, own.quant_format, own.layout_type = module.bias, "float8_e4m3fn", layout
            parent, _, leaf = name.rpartition(".")
            setattr(unet.get_submodule(parent), leaf, own)
    return m


def test_a_checkpoint_in_float8_with_scales_is_the_one_in_full_precision():
    layout = "TensorCoreFP8E4M3Layout"
    m = quantised(layout)
    assert any(key.endswith("comfy_quant") for key in m.model.state_dict())
    for dtype in PRECISIONS[:4]:
        assert differ(m, tiny(dtype)) == ()
    assert differ(m, quantised(layout)) == () and differ(m, quantised(layout, 1e-2)) == ("weights",)
    assert differ(m, tiny(change=tuned(1e-2))) == ("weights",)
    assert inject(m, bank_of()) is not None


class Packed(torch.Tensor):
    """As a pack for GGUF files keeps its weights: bytes that say they have another shape, and refuse most of what is done to them."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.own_shape)

    def detach(self) -> Packed:
        return self

    def clone(self, *args: Any, **how: Any) -> Packed:
        return self

    def float(self) -> Tensor:
        raise NotImplementedError("dequantise me first")


def packed() -> Any:
    """A tiny model of such weights."""
    m = build_model("tiny")
    for name, module in m.model.diffusion_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            raw = module.weight.detach().half().view(torch.uint8).clone().as_subclass(Packed)
            raw.own_shape = tuple(module.weight.shape)
            del module.weight
            module.weight = raw
            module._parameters["weight"] = raw
    return m


def test_weights_that_nobody_here_can_read_are_those_of_the_same_file():
    m = packed()
    assert differ(m, packed()) == () == differ(m, m.clone())
    refuse(build_model("tiny"), m, ": weights (plain numbers there, Packed of uint8 here) differ")


def test_a_tensor_that_refuses_everything_ends_nothing(monkeypatch):
    m, other = packed(), packed()

    def never(*args: Any, **how: Any) -> Any:
        raise RuntimeError("not by you")

    monkeypatch.setattr(Packed, "as_subclass", never)
    assert differ(m, other) == () and differ(m, build_model("tiny")) == ("weights",)
