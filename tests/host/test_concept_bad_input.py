"""Concept Encoder Load and what Cross-Attn Detail Inject refuses: one sentence that names both values and the remedy."""

from __future__ import annotations

import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import comfy.clip_vision
import folder_paths
import pytest
import torch
from kindred.models.concept.encoder import ConceptEncoder
from kindred.models.network.call import Half
from kindred.nodes.concept import ConceptEncoderLoad
from kindred.nodes.host import CONCEPTS, KEY, ManagedEncoder, concept_files
from networks import random_model
from studio import (
    TOWER,
    concept,
    counted,
    differs,
    encoder_of,
    fresh_encoder,
    plain,
    sample,
    subject,
)

MODEL = random_model("tiny")
LAW = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def the_plain_picture_stays():
    yield
    assert torch.equal(sample(MODEL), plain())


@pytest.fixture
def folder():
    """models/concept_encoders of the host; what a test puts there goes with it."""
    place = Path(folder_paths.models_dir) / CONCEPTS
    place.mkdir(parents=True, exist_ok=True)
    before = set(place.iterdir())
    yield place
    for file in set(place.iterdir()) - before:
        file.unlink()


@torch.inference_mode()
def load(name, clip_vision=None):
    return ConceptEncoderLoad.execute(name, clip_vision).result[0]


def refuse(act, *said: str) -> str:
    """`act` raises a ValueError that says all of this, in this order, without one call of the UNet."""
    with (
        counted(MODEL) as rows,
        pytest.raises(ValueError, match=".*".join(map(re.escape, said))) as refused,
    ):
        act()
    assert not rows
    return str(refused.value)


# files -----------------------------------------------------------------------------------------------------------------------


def test_a_saved_encoder_is_loaded_and_draws_the_same(folder):
    fresh_encoder().save(folder / "cats.safetensors", torch.float32)
    assert "cats.safetensors" in concept_files()
    managed = load("cats.safetensors")
    assert managed.name == "cats.safetensors" and not any(
        p.requires_grad for p in managed.encoder.parameters()
    )
    assert torch.equal(sample(concept(MODEL, encoder=managed)), sample(concept(MODEL)))


def test_the_node_offers_what_lies_in_the_folder(folder):
    fresh_encoder().save(folder / "dogs.safetensors")
    (folder / ".dogs.safetensors.1.partial").write_bytes(b"half")
    (folder / "sub").mkdir(exist_ok=True)
    fresh_encoder().save(folder / "sub" / "foxes.safetensors")
    offered = next(i for i in ConceptEncoderLoad.define_schema().inputs if i.id == "file").options
    (folder / "sub" / "foxes.safetensors").unlink()
    (folder / "sub").rmdir()
    assert {"dogs.safetensors", os.path.join("sub", "foxes.safetensors")} <= set(
        offered
    ) and not any("partial" in o for o in offered)


@LAW(
    ("name", "content", "said"),
    [
        ("old.bin", pickle.dumps({"a": 1}), "is a pickle (.bin, .pt, .ckpt)"),
        ("zipped.pt", b"PK\x03\x04" + bytes(60), "is a pickle"),
        ("named.safetensors", pickle.dumps({"a": 1}), "is a pickle"),
        ("empty.safetensors", b"", "is torn or no .safetensors (0 bytes)"),
        ("short.safetensors", b"\x01\x02", "is torn or no .safetensors (2 bytes)"),
        ("text.safetensors", b"<html>not found</html>", "is torn or no .safetensors"),
        ("long.safetensors", b"\xff" * 8 + bytes(90), "is torn or no .safetensors (98 bytes)"),
    ],
)
def test_files_that_are_none(name, content, said, folder):
    (folder / name).write_bytes(content)
    message = refuse(lambda: load(name), "Concept Encoder Load: ", name, said)
    assert message.rstrip().endswith(".")


@LAW("share", [0.1, 0.5, 0.99])
def test_a_torn_file(share, folder):
    fresh_encoder().save(folder / "whole.safetensors")
    whole = (folder / "whole.safetensors").read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[: int(share * len(whole))])
    refuse(
        lambda: load("torn.safetensors"), "Concept Encoder Load: torn.safetensors is torn", "again"
    )


def test_a_pickle_is_never_opened(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    for name in ("trap.bin", "trap.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
        refuse(lambda: load(name), "is a pickle")
    assert not (tmp_path / "sprung").exists()


def test_safetensors_of_something_else(folder):
    from safetensors.torch import save_file

    save_file({"lora.weight": torch.ones(2)}, folder / "lora.safetensors")
    refuse(
        lambda: load("lora.safetensors"),
        "Concept Encoder Load: lora.safetensors is no concept encoder",
        "IP-Adapter full-face",
    )
    save_file({"image_proj.proj.weight": torch.ones(2)}, folder / "plus.safetensors")
    refuse(
        lambda: load("plus.safetensors"),
        "plus.safetensors is IP-Adapter (the plain kind)",
        "full-face",
    )


def test_a_file_that_is_gone(folder):
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        load("gone.safetensors")


def test_a_file_replaced_under_the_same_name_is_another_encoder(folder):
    file = folder / "cats.safetensors"
    fresh_encoder(seed=0).save(file)
    first, mark = load(file.name), ConceptEncoderLoad.fingerprint_inputs(file.name)
    assert ConceptEncoderLoad.fingerprint_inputs(file.name) == mark
    fresh_encoder(seed=1).save(file)
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 10**7))
    assert ConceptEncoderLoad.fingerprint_inputs(file.name) != mark
    assert (
        differs(
            sample(concept(MODEL, encoder=load(file.name))), sample(concept(MODEL, encoder=first))
        )
        > 1e-3
    )


# towers ----------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def vision(width: int = TOWER["hidden_size"], weights: dict | None = None):
    """A CLIP_VISION as Load CLIP Vision gives it, small."""
    made = comfy.clip_vision.ClipVisionModel(
        TOWER | {"hidden_size": width, "model_type": "clip_vision_model"}
    )
    generator = torch.Generator().manual_seed(4)
    for p in made.model.parameters():
        p.copy_(
            torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5
            if p.ndim > 1
            else torch.ones_like(p)
        )
    if weights is not None:
        made.load_sd(weights)
    return made


def test_an_encoder_without_a_tower_needs_clip_vision(folder):
    fresh_encoder(tower=False).save(folder / "bare.safetensors")
    refuse(
        lambda: load("bare.safetensors"),
        "Concept Encoder Load: bare.safetensors holds no CLIP tower",
        "width 32",
        "CLIP Vision into clip_vision",
        "Load CLIP Vision",
    )


def test_a_clip_vision_of_another_width(folder):
    fresh_encoder(tower=False).save(folder / "bare.safetensors")
    managed = load("bare.safetensors", vision(width=48))
    refuse(
        lambda: concept(MODEL, encoder=managed),
        "bare.safetensors: the CLIP Vision given has tokens of width 48",
        "this concept encoder reads width 32",
        "Concept Encoder Load",
    )


@torch.inference_mode()
def test_the_hosts_tower_and_our_own_see_the_same(folder):
    """The same weights in the host's CLIP Vision and inside the file: the same keys and values, and the same picture."""
    own = fresh_encoder()
    own.save(folder / "own.safetensors", torch.float32)
    bare = ConceptEncoder(replace(own.config, tower=None))
    bare.load_state_dict({k: v for k, v in own.state_dict().items() if not k.startswith("tower.")})
    bare.save(folder / "bare.safetensors", torch.float32)
    weights = {
        "vision_model." + k.removeprefix("tower.model."): v
        for k, v in own.state_dict().items()
        if k.startswith("tower.")
    }
    wired, whole = load("bare.safetensors", vision(weights=weights)), load("own.safetensors")
    wired.vision.model.float()  # the host keeps it in 16 bits
    wired.vision.load_sd(weights)
    for size in ((24, 24), (30, 48)):
        for empty in (False, True):
            ours, theirs = (e.encode(subject(2, size=size), empty) for e in (whole, wired))
            assert all(differs(theirs[b][i], ours[b][i]) < 1e-5 for b in ours for i in (0, 1))
    assert (
        differs(
            wired.encode(subject())["middle", 0, 0][0],
            whole.encode(subject(seed=8))["middle", 0, 0][0],
        )
        > 0.5
    )
    assert (
        differs(sample(concept(MODEL, encoder=wired)), sample(concept(MODEL, encoder=whole))) < 1e-4
    )


def test_a_clip_vision_that_is_not_needed_is_not_used(folder, caplog):
    caplog.set_level("INFO")
    fresh_encoder().save(folder / "own.safetensors", torch.float32)
    assert (
        load("own.safetensors", vision(width=48)).vision is None
        and "the wired CLIP Vision is not used" in caplog.text
    )


# the wrong model ---------------------------------------------------------------------------------------------------------------


def test_an_encoder_for_another_base():
    small, large = (
        "(7 cross-attention layers, text width 64)",
        "(8 cross-attention layers, text width 64)",
    )
    refuse(
        lambda: concept(random_model("tiny_xl")),
        f"Cross-Attn Detail Inject: the concept encoder was trained for SD15 {small}",
        "but the model given is SDXL (8 layers, text width 64)",
        "Use an encoder trained for SDXL, or a SD15 checkpoint",
    )
    refuse(
        lambda: concept(MODEL, family="tiny_xl"),
        f"trained for SDXL {large}",
        "but the model given is SD15 (7 layers, text width 64)",
        "Use an encoder trained for SD15, or a SDXL checkpoint",
    )


def test_an_encoder_for_the_real_sd15_on_a_smaller_one():
    """The same family by name: the layer that differs is named."""
    other = fresh_encoder()
    layers = tuple((b, 2 * c) for b, c in other.config.layers)
    managed = ManagedEncoder.of(ConceptEncoder(replace(other.config, layers=layers)), "big")
    refuse(
        lambda: concept(MODEL, encoder=managed),
        "trained for SD15 (7",
        "input 1 has 64 channels there and 32 here",
    )


def test_a_weight_of_zero_does_not_hide_the_wrong_encoder():
    refuse(lambda: concept(MODEL, 0.0, family="tiny_xl"), "trained for SDXL")


# values ------------------------------------------------------------------------------------------------------------------------


@LAW("strength", [-0.1, 2.01, float("nan")])
def test_a_strength_that_is_none(strength):
    refuse(
        lambda: concept(MODEL, strength=strength),
        f"Cross-Attn Detail Inject: strength is {strength}.",
        "Give a number from 0",
        "to 2; 1 is all of the likeness",
    )


@LAW("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none(weight):
    refuse(
        lambda: concept(MODEL, weight),
        f"Cross-Attn Detail Inject: full strength (weight) is {weight}",
        "Give 0",
        "or more",
    )


@LAW("value", [float("nan"), float("inf")])
def test_a_broken_picture(value):
    image = subject()
    image[0, 1, 2, 0] = value
    refuse(
        lambda: concept(MODEL, image=image),
        "Cross-Attn Detail Inject: the image is [1, 48, 40, 3] and holds NaN or infinite values",
        "Load Image",
    )


@LAW(
    "image",
    [
        torch.ones(48, 40, 3),
        torch.ones(0, 48, 40, 3),
        torch.ones(1, 0, 40, 3),
        torch.ones(1, 48, 40, 5),
    ],
)
def test_no_picture(image):
    refuse(
        lambda: concept(MODEL, image=image),
        f"Cross-Attn Detail Inject: the image is {list(image.shape)}",
        "Wire Load Image into it",
    )


@LAW("blocks", ["up_blocks 3", "input 2", "middle 1", ""])
def test_an_unknown_block(blocks):
    refuse(
        lambda: concept(MODEL, blocks=blocks),
        "Cross-Attn Detail Inject:",
        "middle" if blocks else "blocks is empty",
    )


def test_a_wrong_number_of_target_masks():
    model = concept(MODEL, target_mask=torch.ones(2, 64, 64))
    with pytest.raises(
        ValueError,
        match="Cross-Attn Detail Inject: 2 target masks for 3 pictures. Wire one mask, or one per picture",
    ):
        sample(model, batch=3)


def test_multigpu_work_units():
    model = concept(MODEL)
    model.model_options["multigpu_clones"] = {}
    refuse(lambda: sample(model), "MultiGPU Work Units", "Remove that node")


# pictures of any kind ----------------------------------------------------------------------------------------------------------


def tokens(image, encoder=None):
    """What the node makes of a picture, as one tensor of the middle block."""
    (injection,) = concept(MODEL, image=image, encoder=encoder).model_options[
        "transformer_options"
    ][KEY]
    return torch.cat(injection.keys_values[Half.COND]["middle", 0, 0])


@LAW("size", [(1, 1), (3000, 2), (2, 3000), (1, 20000), (24, 24), (25, 23), (700, 500)])
@LAW("channels", [1, 3, 4])
def test_pictures_of_any_size_and_mode(size, channels):
    found = tokens(subject(size=size, channels=channels))
    assert found.shape == (2, 10, 64) and torch.isfinite(found).all()


def test_of_a_strip_the_middle_is_seen(monkeypatch):
    """Nothing is made of the whole strip: enlarged for a tower of 224 pixels it would take gigabytes."""
    strip = torch.zeros(1, 2, 30000, 3)
    strip[:, :, 14999:15001] = subject(size=(2, 2))
    middle = strip[:, :, 15000 - 16 : 15000 + 16]
    assert (
        torch.equal(tokens(strip), tokens(middle))
        and differs(tokens(strip), tokens(torch.zeros(1, 2, 32, 3))) > 1e-3
    )
    seen, own = [], ManagedEncoder.encode
    monkeypatch.setattr(
        ManagedEncoder,
        "encode",
        lambda self, images: seen.append(tuple(images.shape)) or own(self, images),
    )
    tokens(strip)
    assert seen == [(1, 2, 32, 3)]


def test_grey_is_its_own_colour_and_alpha_lies_over_white(folder):
    """In our own tower and in the host's."""
    fresh_encoder(tower=False).save(folder / "bare.safetensors", torch.float32)
    for encoder in (encoder_of(), load("bare.safetensors", vision())):
        grey, colour = subject(channels=1), subject()
        alpha = (subject(seed=3, channels=1) > 0.5).float()
        over = colour * alpha + 1 - alpha
        for given, meant in (
            (grey, grey.expand(-1, -1, -1, 3)),
            (torch.cat((colour, alpha), -1), over),
            (torch.cat((colour, torch.ones_like(alpha)), -1), colour),
        ):
            assert torch.allclose(tokens(given, encoder), tokens(meant, encoder), atol=1e-5)
        assert differs(tokens(colour, encoder), tokens(over, encoder)) > 1e-2


def test_half_precision_pictures():
    """--fp16-intermediates hands pictures over in float16."""
    assert differs(tokens(subject().half()), tokens(subject())) < 1e-1
    assert differs(sample(concept(MODEL, image=subject().half())), sample(concept(MODEL))) < 1e-2
