"""A model's key is one in every precision, another for other weights, and says what differs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from kindred.models.identity import (
    FORMATS,
    ModelKey,
    alike,
    cells,
    differences,
    explain,
    held_as,
    parts_of,
    read_key,
    read_parts,
    tell_key,
    tell_parts,
)
from kindred.models.reference.file import load_reference, save_reference
from small_banks import photo_bank
from small_keys import key, weights
from torch import Tensor

LAW = pytest.mark.parametrize
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
PAIRS = [(a, b) for a in PRECISIONS for b in PRECISIONS]


def named(dtypes: object) -> str:
    return str(dtypes).replace("torch.", "")


# the intervals ---------------------------------------------------------------------------------------------------------------


@LAW("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_cell_reaches_halfway_to_both_neighbours(dtype):
    """Of every number of the format; at a power of two the lower half is taken as wide as the upper one."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()].unique()
    values, half = cells(numbers, dtype)
    step, power = numbers.diff() / 2, torch.frexp(numbers).mantissa.abs() == 0.5
    assert torch.equal(values, numbers) and (half[:-1] >= step).all() and (half[1:] >= step).all()
    assert ((half[:-1] == step) | power[:-1]).all() and ((half[1:] == step) | power[1:]).all()


@LAW("dtype", PRECISIONS, ids=named)
def test_whatever_was_rounded_lies_in_its_cell(dtype):
    values = torch.cat([weights(1, spread=10.0**e) for e in range(-7, 2)] + [torch.zeros(1)])
    stored, half = cells(values.to(dtype).float(), dtype)
    assert ((stored - values).abs() <= half).all()


@LAW("pair", [(a, b) for a in PRECISIONS for b in ("scaled", torch.float8_e4m3fn)], ids=named)
def test_weights_in_float8_beside_a_scale_are_those_of_any_other_precision(pair):
    """Their steps lie on nobody's grid; with the same scale they are equal or others."""
    own = weights(2)
    scale = own.abs().max().item() / 448  # the greatest number of float8_e4m3fn

    def stored(values: Tensor, dtype: torch.dtype | str, scale: float) -> Tensor:
        if dtype == "scaled":
            return cells(
                (values / scale).to(torch.float8_e4m3fn).float(), torch.float8_e4m3fn, scale
            )
        return cells(values.to(dtype).float(), dtype)

    a = stored(own, "scaled", scale)
    assert (
        alike(a, stored(own, pair[0], 1.0)).all()
        and alike(stored(own, pair[1], 1.3 * scale), a).all()
    )
    tuned = own * (1 + 1e-3 * torch.randn(own.shape, generator=torch.Generator().manual_seed(0)))
    assert (
        not alike(a, stored(tuned, "scaled", scale)).all()
        and not alike(a, stored(tuned, torch.float32, 1.0)).all()
    )


@LAW("value", [float("nan"), float("inf"), -float("inf")])
def test_what_overflowed_may_have_been_anything(value):
    assert alike(
        cells(torch.tensor([value]), torch.float16), cells(torch.tensor([3e9]), torch.float32)
    ).all()


def test_integers_and_foreign_bytes_stand_for_themselves():
    values = torch.tensor([0.0, 3.0, 255.0])
    own = cells(values, torch.uint8)
    assert torch.equal(own, torch.stack([values, torch.zeros(3)])) and alike(own, own).all()
    assert alike(own, cells(values + torch.tensor([0.0, 0.0, 1.0]), torch.uint8)).tolist() == [
        True,
        True,
        False,
    ]


@LAW("dtype", PRECISIONS, ids=named)
def test_a_file_that_was_loaded_wider_is_of_its_own_precision(dtype):
    values = weights(3, 32).to(dtype).float()
    assert held_as(values, torch.float32) is dtype
    assert held_as(torch.zeros(32), torch.float32) is torch.float32  # nothing to tell by
    assert all(
        FORMATS[held_as(weights(seed, 32).to(torch.float8_e4m3fn).float(), torch.float8_e4m3fn)][0]
        == 3
        for seed in range(99)
    )


# one model -------------------------------------------------------------------------------------------------------------------


@LAW("pair", PAIRS, ids=named)
def test_the_same_weights_are_one_model_in_every_two_precisions(pair):
    """For every size that weights have; and where the second one was made of a float16 file of the float32 one."""
    for spread in (1e-4, 0.003, 0.03, 0.5):
        own = weights(4, spread=spread)
        a, b = (own.to(dtype) for dtype in pair)
        assert differences(key(a), key(b)) == () == differences(key(b, "SD15 another name"), key(a))
        if pair[0] is torch.float32:
            assert differences(key(a), key(own.half().to(pair[1]))) == ()


@LAW("pair", PAIRS, ids=named)
@LAW("seed", range(3))
def test_a_fine_tune_is_another_model(pair, seed):
    """A thousandth of each weight; between two coarse formats, of which each has lost something else, a hundredth."""
    size = 1e-2 if pair[0] is not pair[1] and {*pair} <= {*PRECISIONS[2:]} else 1e-3
    own = weights(10 + seed)
    tuned = own * (1 + size * torch.randn(own.shape, generator=torch.Generator().manual_seed(seed)))
    assert differences(key(own.to(pair[0])), key(tuned.to(pair[1]))) == ("weights",)
    assert differences(key(tuned.to(pair[0])), key(own.to(pair[1]))) == ("weights",)


def test_one_value_of_another_weight_is_enough():
    own = weights(5)
    other = own.clone()
    other[1000] *= 1.01
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert (
            differences(key(own), key(other.to(dtype)))
            == ("weights",)
            == differences(key(other.to(dtype)), key(own))
        )


def test_other_shapes_are_other_weights():
    own = key(weights(6))
    other = ModelKey(
        own, replace(parts_of(own), weights=replace(own.parts.weights, digest="others"))
    )
    assert differences(own, other) == ("weights",) == differences(own, key(weights(6, 1024)))


# what differs ----------------------------------------------------------------------------------------------------------------


def test_each_part_is_named_by_itself_and_all_together():
    plain, lora = key(weights(7)), key(weights(7), lora=weights(8, 64))
    assert differences(plain, lora) == ("LoRAs",) == differences(lora, plain)
    assert explain(plain, lora, ("LoRAs",)) == "LoRAs (none there, on 3 layers here)"
    assert differences(lora, key(weights(7), lora=weights(9, 64))) == ("LoRAs",)
    assert (
        differences(lora, key(weights(7), lora=weights(8, 64).bfloat16())) == ()
    )  # a bypassed one is cast where it runs
    assert explain(lora, lora, ("LoRAs",)) == "LoRAs"
    v = key(weights(7), sampling="V")
    assert (
        differences(plain, v) == ("sampling",)
        and explain(plain, v, ("sampling",)) == "sampling (EPS there, V here)"
    )
    theirs = key(weights(7), modules=("motion",))
    assert differences(plain, theirs) == ("injected modules",)
    assert (
        explain(theirs, plain, ("injected modules",))
        == "injected modules (motion there, none here)"
    )
    other = key(weights(8), lora=weights(8, 64), sampling="V", modules=("motion",))
    assert differences(plain, other) == ("weights", "LoRAs", "sampling", "injected modules")
    assert differences(plain, key(weights(7), "SDXL 0a")) == ("kind",)


def test_a_storage_that_nobody_can_read_is_named():
    own = key(weights(7))
    other = ModelKey(
        "SD15 1b",
        replace(
            own.parts, weights=replace(own.parts.weights, digest="x", stored="GGMLTensor of uint8")
        ),
    )
    assert (
        explain(own, other, differences(own, other))
        == "weights (plain numbers there, GGMLTensor of uint8 here)"
    )


@LAW("old", ["SD15 0a", "SD15/SDXL_Playground_2_5 0a"])
def test_a_name_alone_is_compared_to_the_letter(old):
    """References of older versions; the name of the latents came later still."""
    assert (
        differences(old, key(weights()))
        == ()
        == differences(key(weights()), old)
        == differences(old, "SD15 0a")
    )
    assert (
        differences(old, key(weights(), "SD15 0b")) is None and differences(old, "SD15 0b") is None
    )
    assert differences(old, key(weights(), "SDXL 0a")) == ("kind",)


# files -----------------------------------------------------------------------------------------------------------------------


def test_a_key_comes_back_from_every_text(tmp_path):
    own = key(weights(7), lora=weights(8, 64), modules=("motion", "more"))
    path = tmp_path / "a.safetensors"
    bank = replace(
        photo_bank(), model_key=own, trajectory=replace(photo_bank().trajectory, model_key=own)
    )
    save_reference(bank, path)
    loaded = load_reference(path)
    for back in (
        read_key(tell_key(own)),
        loaded.model_key,
        loaded.trajectory.model_key,
        copy.deepcopy(own),
    ):
        assert back == own == "SD15 0a" and differences(own, back) == ()
        assert torch.equal(parts_of(back).weights.values, own.parts.weights.values) and tell_key(
            back
        ) == tell_key(own)
    save_reference(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    assert f"{own}" == str(own) == "SD15 0a" and type(str(own)) is str


def test_an_older_file_has_a_name_alone(tmp_path):
    save_reference(photo_bank(), tmp_path / "a.safetensors")
    loaded = load_reference(tmp_path / "a.safetensors")
    assert parts_of(loaded.model_key) is None and loaded.model_key == "SD15 0a"
    assert read_key("SD15 0a") == tell_key("SD15 0a") == "SD15 0a" and tell_parts("SD15 0a") is None
    assert read_key("12") == "12" and read_key(None) == "None"


@LAW(
    "damage",
    [
        lambda told: told["weights"].update(values="AAA"),
        lambda told: told["weights"].update(values="AAAA"),
        lambda told: told["weights"].update(values="A" * (16 << 17)),
        lambda told: told["weights"].update(values=3),
        lambda told: told["weights"].update(digest=None),
        lambda told: told["patches"].update(layers="3"),
        lambda told: told["patches"].update(layers=True),
        lambda told: told.pop("sampling"),
        lambda told: told.update(modules=[1]),
        lambda told: told.update(modules=None),
        lambda told: told.update(weights=[]),
        lambda told: told.update(sampling=1),
        lambda told: told["weights"].update(values="AADAfwAAwH8="),  # NaN
        lambda told: told["weights"].update(values="AAAAAAAAgL8="),  # a precision below 0
    ],
)
def test_a_damaged_key_is_refused(damage):
    told = json.loads(json.dumps(tell_parts(key(weights(7)))))
    damage(told)
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_parts("SD15 0a", told)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '{"name": 3}', 7])
def test_a_key_that_is_none_is_the_text_that_it_is(text: object) -> None:
    assert read_key(text) == str(text)
