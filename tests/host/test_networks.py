"""What nodes/host/networks says of a network, against what the host's own network does: one row per family."""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from typing import Any

import pytest
import torch
from kindred.models.network.backbone import CROSS, Backbone
from kindred.models.network.rope import Positions, rotated, turned
from kindred.models.network.unplaced import placed
from kindred.nodes.host.networks import NETWORKS, recognise, require_network
from kindred.nodes.host.networks.shapes import joined, plain
from listening import (
    REFINING,
    Heard,
    backbone,
    changed,
    count,
    even_picture,
    first_site,
    keys_of,
    listen,
    listening,
    plain_pass,
)
from networks import random_model
from tiny_networks import FLUX, READ, Family, build, denoised, latent, prompt, tiny
from torch import Tensor, nn

TURNING = ("LongCatImage", "Lumina2", "ZImage", "ZImagePixel", "Omnigen2", "Boogu")
UNPLACED = ("ErnieImage",)  # keys are kept before they have positions
# references stand beside the picture
FLUX_LIKE = ("Flux", "FluxSchnell", "Flux2", "LongCatImage", "Krea2")
NATIVE = (*FLUX_LIKE, "QwenImage", "MageFlow", "JoyImage")
# with references the host lacks a pad token for the one, and wants pixels for the other
FAILING = ("Lumina2", "HiDreamO1")
ODD = tuple(name for name, family in READ.items() if family.odd and family.patch > 1)


def test_every_row_names_a_class_of_this_host():
    for name in NETWORKS:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), nn.Module)


@pytest.mark.parametrize("name", READ)
def test_a_pass_makes_the_calls_that_the_backbone_says(name):
    found, (heard, _) = backbone(name), plain_pass(name)
    assert len(heard) == len(found.calls) and found.blocks
    for call, block in zip(heard, found.calls):
        if found.named:
            assert call.block == (block[:2] if block else None)
        if block is None or block[0] == CROSS:
            continue
        text = call.k.shape[1] - -(-count(name) // found.multiple) * found.multiple
        assert (text > 0) == found.holds_text(block) and text >= 0
        assert call.q.shape[2] == call.k.shape[2] == call.v.shape[2]


@pytest.mark.parametrize("name", READ)
def test_one_changed_patch_is_one_changed_token_of_the_picture(name):
    found, family = backbone(name), READ[name]
    noisy, (row, column) = latent(name), (2, 1)
    noisy[
        ...,
        row * family.patch : (row + 1) * family.patch,
        column * family.patch : (column + 1) * family.patch,
    ] += 1.0
    before, after = plain_pass(name)[0], listen(name, noisy)[0]
    n = first_site(found)
    grid = found.grid(tuple(noisy.shape[-2:]))
    tokens = found.picture(before[n].k.shape[1], math.prod(grid))
    assert grid == family.grid and tokens.stop - tokens.start == count(name)
    assert (
        found.picture(before[n].q.shape[1], count(name)).start
        == tokens.start - before[n].k.shape[1] + before[n].q.shape[1]
    )
    token = row * grid[1] + column
    if name in REFINING:  # the picture's own tokens are mixed before they meet the text
        refiner = next(i for i, call in enumerate(before) if changed(call.v, after[i].v))
        assert changed(before[refiner].v, after[refiner].v) == [token]
        assert changed(before[n].v, after[n].v) == list(
            range(tokens.start, before[n].k.shape[1])
        )  # the pads too
    else:
        assert changed(before[n].v, after[n].v) == [tokens.start + token]


# the text's tokens are mixed before they meet the picture
MIXING = (
    "HunyuanImage21",
    "Krea2",
    "Lumina2",
    "ZImage",
    "ZImagePixel",
    "Omnigen2",
    "Boogu",
    "Kandinsky5Image",
)


def rows_of(name: str) -> int:
    """The rows of the CONDITIONING that `prompt` gives."""
    extras = prompt(name)[0][1]
    return extras["text_input_ids"].shape[1] if name == "HiDreamO1" else READ[name].words


def with_row_changed(name: str, row: int) -> list:
    """The same prompt but for one row; what stands beside the rows (pooled texts, other encoders) stays."""
    [[text, extras]] = prompt(name)
    text = text.clone()
    text[:, row] += 1.0
    if name == "HiDreamO1":  # its network reads numbers of tokens
        extras["text_input_ids"] = extras["text_input_ids"].clone()
        extras["text_input_ids"][:, row] += 1
    return [[text, extras]]


def first_reading(found: Backbone) -> int:
    """The number of the first call in which the picture reads the text."""
    return next(
        n for n, b in enumerate(found.calls) if b and (b[0] == CROSS or found.holds_text(b))
    )


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("row", [1, 4])
def test_one_changed_row_of_the_text_is_one_changed_token(name, row):
    found = backbone(name)
    before, after = plain_pass(name)[0], listen(name, positive=with_row_changed(name, row))[0]
    n = first_reading(found)
    text = found.text(before[n].k.shape[1], count(name), rows_of(name))
    assert text.stop - text.start == rows_of(name)
    differ = changed(before[n].k, after[n].k)
    if name not in MIXING:
        assert differ == [text.start + row]
        return
    region = range(text.start, text.start - (-rows_of(name) // found.multiple) * found.multiple)
    assert set(range(text.start, text.stop)) <= set(differ) <= set(region)
    alone = [changed(a.k, b.k) for a, b in zip(before[:n], after[:n]) if a.k.shape[0] == 1]
    assert [row] in alone  # before it is mixed, in the order of the CONDITIONING


@pytest.mark.parametrize("name", ["Flux2"])
def test_a_short_text_of_flux_2_stands_at_the_end_of_its_512_rows(name):
    text = backbone(name).text(512 + count(name), count(name), 9)
    assert (text.start, text.stop) == (512 - 9, 512)


@pytest.mark.parametrize("name", NATIVE)
def test_the_text_stands_beside_picture_and_references(name):
    found, family = backbone(name), READ[name]
    reference = latent(name, 61, (4 * family.patch, 2 * family.patch))
    more = {"reference_latents_method": "index"} if name == "Krea2" else {}
    n = first_reading(found)
    [[text, extras]] = prompt(name, reference_latents=[reference], **more)
    [[other, _]] = with_row_changed(name, 2)
    one, two = (listen(name, positive=[[t, extras]])[0][n] for t in (text, other))
    tokens = found.text(one.k.shape[1], count(name), rows_of(name), one.references)
    differ = changed(one.k, two.k)
    assert (differ == [tokens.start + 2]) or (
        name in MIXING and differ == list(range(tokens.start, tokens.stop))
    )


@pytest.mark.parametrize("name", READ)
def test_rows_that_do_not_fit_stand_nowhere(name):
    found = backbone(name)
    m = plain_pass(name)[0][first_reading(found)].k.shape[1]
    assert found.text(m, count(name), m + 1) is None


@pytest.mark.parametrize("name", READ)
def test_words_are_read_where_text_and_picture_meet(name):
    found = backbone(name)
    assert set(found.locating) <= set(found.reading) <= set(found.blocks) and found.locating
    met = {
        b if found.holds_text(b) else ("self", *b[1:])
        for b in found.calls
        if b and (b[0] == CROSS or found.holds_text(b))
    }
    assert set(found.reading) == met


@pytest.mark.parametrize("name", READ)
def test_the_layout_of_the_methods_changes_no_bit(name):
    assert torch.equal(plain_pass(name)[1], denoised(tiny(name), latent(name), prompt(name)))


@pytest.mark.parametrize("name", READ)
def test_keys_beside_another_text_are_those_that_the_backbone_turns(name):
    found, family = backbone(name), READ[name]
    grid = (
        family.grid if found.multiple == 1 else (8, 8)
    )  # without pads: Z-Image's stay at position 0, whatever the text
    noisy = latent(name, size=(grid[0] * family.patch, grid[1] * family.patch))
    texts = [prompt(name, words=family.words + more) for more in (0, family.step)]
    short, long = (listen(name, noisy, text)[0][first_site(found)] for text in texts)
    of_short, of_long = (
        call.k[:, found.picture(call.k.shape[1], math.prod(grid))] for call in (short, long)
    )
    scale = of_long.abs().max()
    moves = found.turn is not None and any(found.turn.axes)
    assert moves == (name in TURNING)
    assert (found.unplaced is not None) == (name in UNPLACED)
    if found.unplaced is not None:
        cells = torch.cartesian_prod(*map(torch.arange, grid))
        for one, other in ((short, long), (long, short)):
            text = other.k.shape[1] - math.prod(grid)
            own = one.unplaced[:, found.picture(one.k.shape[1], math.prod(grid))]
            there = other.k[:, found.picture(other.k.shape[1], math.prod(grid))]
            assert (there - one.k[:, : there.shape[1]]).abs().max() > 0.1 * scale
            placed_there = placed(own, found.unplaced.places(text, cells))
            assert (placed_there - there).abs().max() <= 1e-6 * scale
        return
    if not moves:
        assert (of_short - of_long).abs().max() <= 1e-6 * scale
        return
    assert (of_short - of_long).abs().max() > 0.1 * scale
    shift = long.k.shape[1] - short.k.shape[1]
    assert (turned(of_short, found.turn, shift) - of_long).abs().max() <= 1e-6 * scale
    assert (turned(of_long, found.turn, -shift) - of_short).abs().max() <= 1e-6 * scale


# positions are in the hidden states, or in a code that no turn undoes
UNTURNED = ("SD3", "SD3.5", "AuraFlow", "PixArtSigma", "HunyuanDiT", "ErnieImage")
ROTARY = tuple(name for name in READ if name not in UNTURNED)


def even_pixels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A PixelDiT whose last blocks are given an even picture: no place in its pixels, no text in its patches."""
    module = importlib.import_module("comfy.ldm.pixeldit.modules")
    monkeypatch.setattr(module, "get_2d_sincos_pos_embed", no_places)
    model = build(READ["PixelDiT"])
    for block in model.model.diffusion_model.patch_blocks:
        block.attn.proj_x.weight.data.zero_()
    return model


def no_places(width: int, y: int, x: int, device: Any = None, dtype: Any = None) -> Tensor:
    return torch.zeros(y * x, width, device=device, dtype=dtype)


@pytest.mark.parametrize("name", UNTURNED)
def test_keys_without_positions_have_no_turn(name):
    assert backbone(name).turn is None and backbone(name).turn_alone is None


@pytest.mark.parametrize("name", ROTARY)
def test_keys_turned_to_another_place_are_those_that_the_host_makes_there(name, monkeypatch):
    """I46 on the host's own keys: tokens of an even picture, turned to where every other stands; and to nowhere."""
    model = even_pixels(monkeypatch) if name == "PixelDiT" else None
    found, noisy = backbone(name), even_picture(name)
    grid = found.grid(tuple(noisy.shape[-2:]))
    calls = [n for n, b in enumerate(found.calls) if b and b[0] != CROSS]
    first = {found.turn_of(found.calls[n]): n for n in reversed(calls)}
    assert len(first) == (2 if name == "PixelDiT" else 1)
    heard = listen(name, noisy, model=model)[0]
    for turn, n in first.items():
        keys = keys_of(found, heard[n], grid)
        places = turn.places(grid, found.text_tokens(rows_of(name)))
        size, device = keys.abs().max(), keys.device
        assert (keys - keys[:, :1]).abs().max() > 0.1 * size
        for token in (0, grid[1] + 1, math.prod(grid) - 1):
            others = turn.between(places[token].expand_as(places), places, device)
            moved = rotated(keys[:, token : token + 1].expand_as(keys), others, turn.halves)
            assert (moved - keys).abs().max() <= 1e-5 * size
        bare = rotated(keys, turn.between(places, None, device), turn.halves)
        assert (bare - bare[:, :1]).abs().max() <= 1e-5 * size
        assert (
            turn.out_of_place(grid, found.text_tokens(rows_of(name)), device)(keys) - bare
        ).abs().max() == 0


def nowhere(found: Backbone, keys: Tensor, grid: tuple[int, int], text: int, number: int) -> Tensor:
    """Keys of the reference `number` that stands apart, without their positions."""
    stands = found.turn.placed(Positions.APART, grid, grid, text, number)
    return rotated(keys, found.turn.between(stands, None, keys.device), found.turn.halves)


@pytest.mark.parametrize("name", NATIVE)
def test_references_apart_stand_where_the_host_puts_its_own(name):
    """Two native references of one picture: without the places of ours that stand apart their keys are equal."""
    found, noisy = backbone(name), even_picture(name)
    grid = found.grid(tuple(noisy.shape[-2:]))
    count, text = math.prod(grid), found.text_tokens(rows_of(name))
    asked = prompt(name, reference_latents=[noisy, noisy], reference_latents_method="index")
    call = listen(name, noisy, asked)[0][first_site(found)]
    start = found.picture(call.k.shape[1], count, 2 * count).stop
    native = [call.k[:, start + n * count : start + (n + 1) * count] for n in (0, 1)]
    bare = [nowhere(found, keys, grid, text, n) for n, keys in enumerate(native)]
    size = native[0].abs().max()
    assert (native[0] - native[1]).abs().max() > 0.1 * size
    assert (bare[0] - bare[0][:, :1]).abs().max() <= 1e-5 * size
    assert (bare[0] - bare[1]).abs().max() <= 1e-5 * size


FILMED = ("CosmosPredict2", "Anima", "Kandinsky5Image")  # the same class makes videos


@pytest.mark.parametrize("name", FILMED)
def test_apart_is_the_next_frame(name):
    found, film = backbone(name), even_picture(name, frames=2)
    grid = found.grid(tuple(film.shape[-2:]))
    call = listen(name, film)[0][first_site(found)]
    first, second = call.k.chunk(2, 1)
    there, here = (found.turn.placed(p, grid, grid, 0) for p in (Positions.OWN, Positions.APART))
    moved = rotated(first, found.turn.between(there, here, first.device), found.turn.halves)
    assert (moved - second).abs().max() <= 1e-5 * second.abs().max()
    assert (first - second).abs().max() > 0.1 * second.abs().max()


@pytest.mark.parametrize("name", ODD)
def test_odd_sizes(name):
    found, family = backbone(name), READ[name]
    size = tuple(side * family.patch - 1 for side in family.grid)
    n = first_site(found)
    one, other = (listen(name, latent(name, seed, size))[0][n] for seed in (1, 11))
    tokens = found.picture(one.k.shape[1], math.prod(found.grid(size)))
    assert found.grid(size) == family.grid
    assert set(range(tokens.start, tokens.stop)) <= set(changed(one.v, other.v))
    if found.multiple == 1:
        assert changed(one.v, other.v) == list(range(tokens.start, tokens.stop))


@pytest.mark.parametrize("name", NATIVE)
def test_native_references_are_no_part_of_the_picture(name):
    found, family = backbone(name), READ[name]
    reference = latent(name, 61, (4 * family.patch, 2 * family.patch))
    more = {"reference_latents_method": "index"} if name == "Krea2" else {}
    asked = prompt(name, reference_latents=[reference], **more)
    heard, _ = listen(name, positive=asked)
    n = first_site(found)
    one, other = heard[n], listen(name, latent(name, 11), asked)[0][n]
    tokens = found.picture(one.k.shape[1], count(name), one.references)
    assert found.references and len(heard) == len(found.calls)
    assert one.k.shape[1] == plain_pass(name)[0][n].k.shape[1] + 8  # tokens of the reference
    assert changed(one.v, other.v) == list(range(tokens.start, tokens.stop))


@pytest.mark.parametrize("name", [name for name in READ if name not in (*NATIVE, *FAILING)])
def test_other_networks_pass_references_over_or_say_that_they_do_not(name):
    found, family = backbone(name), READ[name]
    reference = latent(name, 61, (4 * family.patch, 2 * family.patch))
    heard, _ = listen(name, positive=prompt(name, reference_latents=[reference]))
    without = plain_pass(name)[0]
    same = [call.k.shape for call in heard] == [call.k.shape for call in without]
    assert same == found.references


NORMED = {  # a layer that makes a normed picture's keys, and which of its rows do
    "Flux": ("double_blocks.0.img_attn.qkv", slice(64, 128)),
    "Chroma": ("double_blocks.0.img_attn.qkv", slice(64, 128)),
    "QwenImage": ("transformer_blocks.0.attn.to_k", slice(0, 64)),
    "SD3.5": ("joint_blocks.0.x_block.attn.qkv", slice(192, 384)),
    "CosmosPredict2": ("blocks.0.self_attn.k_proj", slice(0, 64)),
}


@pytest.mark.parametrize("name", NORMED)
def test_a_scale_before_the_norm_is_none(name):
    """I64: what a reference holds are keys behind their norm, where key scale acts."""
    layer, rows = NORMED[name]
    model = build(READ[name])
    made = model.model.diffusion_model.get_submodule(layer)
    with torch.no_grad():
        for weights in (made.weight, *([] if made.bias is None else [made.bias])):
            weights[rows] *= 3.0
    found, n = backbone(name), first_site(backbone(name))
    own, scaled = (plain_pass(name)[0][n], listen(name, model=model)[0][n])
    tokens = found.picture(own.k.shape[1], count(name))
    assert (scaled.k - own.k)[:, tokens].abs().max() <= 1e-5 * own.k.abs().max()
    assert torch.equal(scaled.q, own.q) and torch.equal(scaled.v, own.v)


@pytest.mark.parametrize("name", READ)
def test_noise_is_mixed_as_the_host_mixes_it(name):
    found, sampling = backbone(name), tiny(name).get_model_object("model_sampling")
    clean, noise, sigma = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4), torch.tensor([0.6])
    mixed = sigma * found.noise_scale * noise + ((1 - sigma) if found.flow else 1) * clean
    assert torch.allclose(
        mixed, sampling.noise_scaling(sigma, noise.clone(), clean.clone()), atol=1e-6
    )


@pytest.mark.parametrize("family", ["tiny", "tiny_v", "tiny_xl", "tiny_koala", "tiny_xs"])
def test_a_unet_goes_its_own_way(family):
    assert (
        recognise(random_model(family)) is None
        and require_network(random_model(family), "Node") is None
    )


HIDDEN = ("PixArtSigma", "HunyuanDiT", "ErnieImage")


@pytest.mark.parametrize("name", READ)
def test_the_hidden_ask_no_override(name):
    """Where a newer host hands these on, they are a row like any other."""
    calls: list[Heard] = []
    model = tiny(name).clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = listening(calls)
    denoised(model, latent(name), prompt(name))
    assert bool(calls) is (name not in HIDDEN) and bool(backbone(name).hidden) is (name in HIDDEN)


def test_patched_compiled_and_derived_models_are_what_they_were():
    plain_one = backbone("Flux")
    patched = tiny("Flux").clone()
    patched.add_patches({"diffusion_model.img_in.weight": ("diff", (torch.ones(1),))})
    compiled = tiny("Flux").clone()
    around = (
        nn.Module()
    )  # as torch.compile stands around a module; importing its compiler takes ten seconds
    around._orig_mod = tiny("Flux").model.diffusion_model
    compiled.add_object_patch("diffusion_model", around)
    derived = build(READ["FluxSchnell"])
    derived.model.diffusion_model.__class__ = type(
        "Mine", (type(derived.model.diffusion_model),), {}
    )
    for model in (patched, compiled, derived):
        assert recognise(model).calls == plain_one.calls
    assert recognise(derived).family == "FluxSchnell"


def test_depths_and_patches_are_read_from_the_network():
    found = recognise(
        build(Family("Flux", FLUX | dict(depth=1, depth_single_blocks=5, patch_size=1)))
    )
    assert [block[0] for block in found.calls] == ["double"] + ["single"] * 5 and found.grid(
        (7, 5)
    ) == (7, 5)


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("layout", ["rows", "heads", "mixed"])
def test_joined_takes_every_layout(layout, repeat):
    q, k, v = (
        torch.randn(2, 4, 5, 8),
        torch.randn(2, 4 // repeat, 7, 8),
        torch.randn(2, 4 // repeat, 7, 8),
    )
    rows = [
        t.transpose(1, 2).flatten(2)
        for t in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
    ]
    kwargs: dict[str, Any] = {"enable_gqa": True} if repeat > 1 else {}
    if layout == "heads":
        asked, kwargs = (q, k, v), kwargs | {"skip_reshape": True, "skip_output_reshape": True}
    else:
        flat = partial(torch.flatten, start_dim=2)
        values = v.transpose(1, 2)
        asked = (
            flat(q.transpose(1, 2)),
            flat(k.transpose(1, 2)),
            values if layout == "mixed" else flat(values),
        )
    *tokens, restored = joined(*asked, 4, kwargs)
    assert all(torch.equal(a, b) for a, b in zip(tokens, rows))
    assert torch.equal(restored(rows[0]), q if layout == "heads" else rows[0])
    assert plain(kwargs | {"scale": 2.0}) == {"scale": 2.0}
