"""Cross-Attn Detail Inject on every transformer of the host: laws on tiny random networks, one row per family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import studio
import torch
from kindred.models.attention.parts import Merge
from kindred.models.concept.config import ConceptConfig, Preprocessing
from kindred.models.concept.encoder import ConceptEncoder
from kindred.models.network.backbone import CROSS
from kindred.nodes import host
from kindred.nodes.concept import CrossAttnDetailInject
from kindred.nodes.host import beside, joint
from kindred.nodes.host.networks import recognise
from networks import random_model
from studio import TOWER
from listening import plain_pass
from test_transformers import FELT, SAME, apart, bank_of, inject, plain
from test_transformers_plain import blocks_of
from tiny_networks import READ, denoised, latent, prompt, sample, tiny
from torch import Tensor

UNREAD = (
    "HunyuanDiT",
    "ErnieImage",
)  # their queries are heard with positions that no turn takes off
FAMILIES = tuple(name for name in READ if name not in UNREAD)
HIDDEN = (
    "SD3",
    "SD3.5",
    "AuraFlow",
    "PixArtSigma",
)  # positions are in the hidden states, so queries carry them
WIDTH = 20  # of the concept's tokens


def photo(seed: int = 3, pictures: int = 1) -> Tensor:
    return torch.rand(pictures, 40, 30, 3, generator=torch.Generator().manual_seed(seed))


def config_of(name: str, **facts: Any) -> ConceptConfig:
    family, layers, _ = host.concept_layers(tiny(name), "test")
    told = {"tower": TOWER, "preprocessing": Preprocessing(TOWER["image_size"]), "merge": Merge.ADD}
    return ConceptConfig(family, layers, WIDTH, TOWER["hidden_size"], **told | facts)


@cache
def encoder_of(name: str, silent: bool = False) -> host.ManagedEncoder:
    """An encoder of random weights, loud enough to be heard; silent: as training begins."""
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        encoder = ConceptEncoder(config_of(name))
        for weights in encoder.parameters():
            weights.data += 0.3 * torch.randn_like(weights)
        if silent:
            encoder.start_silent()
    return host.ManagedEncoder.of(encoder, "test.safetensors")


@torch.inference_mode()
def concept(model: Any, name: str, seed: int = 3, silent: bool = False, **more: Any) -> Any:
    """Cross-Attn Detail Inject -> MODEL."""
    image = more.pop("image", photo(seed))
    told = {"start_percent": 0.0} | more
    return CrossAttnDetailInject.execute(model, encoder_of(name, silent), image, **told).result[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("nothing", ["strength", "weight"])
def test_no_strength_is_no_injection(name: str, nothing: str) -> None:
    model = concept(tiny(name), name, **{nothing: 0.0})
    assert host.KEY not in model.model_options["transformer_options"] and not model.wrappers


@pytest.mark.parametrize("name", FAMILIES)
def test_values_of_zero_are_the_plain_picture(name: str) -> None:
    """As an encoder begins its training, bit for bit."""
    assert torch.equal(sample(concept(tiny(name), name, silent=True), name), plain(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_photo_is_felt_and_gone_with_its_node(name: str) -> None:
    one, other = (sample(concept(tiny(name), name, seed), name) for seed in (3, 4))
    assert apart(one, plain(name)) > FELT and apart(one, other) > FELT
    assert torch.equal(sample(tiny(name), name), plain(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_widths_are_those_of_the_calls(name: str) -> None:
    layers = dict(config_of(name).layers)
    found = recognise(tiny(name))
    for call, block in zip(plain_pass(name)[0], found.calls):
        reads = block is not None and (block[0] == CROSS or found.holds_text(block))
        if reads:
            block = ("self", *block[1:]) if block[0] == CROSS else block
            assert layers[block] == call.q.shape[-1]
        elif block is not None and found.joint:
            assert block not in layers


def watched(monkeypatch: pytest.MonkeyPatch, act: Any) -> list[tuple[Any, slice, Tensor, Tensor]]:
    """The calls in which a concept is read, each with its picture and its answer before and after."""
    seen = []

    def noted(call: Any, out: Tensor, *rest: Any) -> Tensor:
        after = beside.added_beside(call, out, *rest)
        cross = call.block[0] == CROSS
        picture = slice(0, out.shape[1]) if cross else call.picture(call.q)
        seen.append((call, picture, out.clone(), after.clone()))
        return after

    monkeypatch.setattr(joint, "added_beside", noted)
    act()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_the_text_stay_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = concept(tiny(name), name)
    seen = watched(monkeypatch, lambda: denoised(model, latent(name), prompt(name)))
    assert seen
    for _, picture, before, after in seen:
        assert apart(after[:, picture], before[:, picture]) > FELT
        assert torch.equal(after[:, : picture.start], before[:, : picture.start])
        assert torch.equal(after[:, picture.stop :], before[:, picture.stop :])


def unpadded(name: str) -> Tensor:
    """A latent beside whose tokens there are no pads, which stand at a place of their own (Z-Image)."""
    padded = recognise(tiny(name)).multiple > 1
    return latent(name, size=(8 * READ[name].patch, 8 * READ[name].patch) if padded else None)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in HIDDEN])
def test_what_is_read_does_not_depend_on_where(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a picture that is the same everywhere, all tokens are given the same in the first block."""
    model, constant = concept(tiny(name), name), torch.full_like(unpadded(name), 0.7)
    _, picture, before, after = watched(
        monkeypatch, lambda: denoised(model, constant, prompt(name))
    )[0]
    given = (after - before)[:, picture]
    assert (given - given[:, :1]).abs().max() < 1e-5 * after.abs().max() < given.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", [{"cfg": 1.0}, {"pictures": 3}, {"sampler": "heun"}], ids=str)
def test_it_is_felt_however_one_samples(name: str, how: dict[str, Any]) -> None:
    with_it, without = (sample(m, name, **how) for m in (concept(tiny(name), name), tiny(name)))
    assert with_it.isfinite().all() and apart(with_it, without) > FELT


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("halves", ["both", "cond only"])
def test_halves_in_two_calls_are_halves_in_one(
    name: str, halves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nearly as the plain network is itself in two calls: guidance multiplies the rounding of both."""
    model = concept(tiny(name), name, halves=halves)
    together, alone = sample(model, name), plain(name)
    monkeypatch.setattr(tiny(name).model, "memory_required", lambda *args, **kwargs: 1e30)
    assert apart(sample(model, name), together) < max(
        SAME, 2 * apart(sample(tiny(name), name), alone)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_outside_of_its_window_nothing_is_touched(name: str) -> None:
    model = concept(tiny(name), name, start_percent=0.98, end_percent=0.99)
    assert torch.equal(sample(model, name), plain(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_that_fails_leaves_nothing(name: str) -> None:
    """Inside of the network, behind a block in which the concept was read."""
    network, count = tiny(name).model.diffusion_model, iter(range(1, 1000))
    model = concept(tiny(name), name)

    def fail(*args: Any) -> None:
        if next(count) == 3:
            raise RuntimeError("no memory")

    hooks = [block.register_forward_pre_hook(fail) for block in blocks_of(network)]
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            sample(model, name)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(sample(tiny(name), name), plain(name))
    fresh = sample(concept(tiny(name), name), name)
    assert torch.equal(sample(model, name), fresh) and apart(fresh, plain(name)) > FELT


@pytest.mark.parametrize("name", FAMILIES)
def test_both_injections_in_either_order(name: str) -> None:
    first = inject(concept(tiny(name), name), bank_of(name))
    second = concept(inject(tiny(name), bank_of(name)), name)
    one, other = (sample(model, name) for model in (first, second))
    alone = [
        sample(concept(tiny(name), name), name),
        sample(inject(tiny(name), bank_of(name)), name),
    ]
    assert apart(one, other) < SAME and all(apart(one, single) > FELT for single in alone)


@pytest.mark.parametrize("name", ["Flux", "SD3.5", "Anima"])
def test_two_nodes_of_half_the_weight_are_one(name: str) -> None:
    half = concept(concept(tiny(name), name, weight=0.5), name, weight=0.5)
    assert apart(sample(half, name), sample(concept(tiny(name), name), name)) < SAME


@pytest.mark.parametrize("name", ["Flux", "SD3.5", "Anima"])
def test_equal_pictures_are_one_picture(name: str) -> None:
    twice = concept(tiny(name), name, image=photo().repeat(2, 1, 1, 1))
    assert apart(sample(twice, name), sample(concept(tiny(name), name), name)) < SAME


@pytest.mark.parametrize("name", ["Flux", "QwenImage", "Anima"])
def test_where_the_mask_is_black_nothing_is_given(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, x = latent(name).shape[-2:]
    mask = torch.cat([torch.ones(1, y, x // 2), torch.zeros(1, y, x - x // 2)], 2)
    model = concept(tiny(name), name, target_mask=mask)
    seen = watched(monkeypatch, lambda: denoised(model, latent(name), prompt(name)))
    _, picture, before, after = seen[0]
    given = (after - before)[0, picture].abs().amax(-1).unflatten(0, READ[name].grid)
    half = READ[name].grid[1] // 2
    assert given[:, :half].min() > 0 and given[:, half:].max() == 0


@pytest.mark.parametrize("name", ["Flux", "SD3.5"])
def test_blocks_are_where_it_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = concept(tiny(name), name, blocks="double 1")
    seen = watched(monkeypatch, lambda: denoised(model, latent(name), prompt(name)))
    assert {call.block for call, *_ in seen} == {("double", 1, 0)}


@pytest.mark.parametrize("name", UNREAD)
def test_a_family_whose_queries_keep_their_positions_says_so(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"{READ[name].config} cannot read concept encoders: its attention"
    ):
        concept(tiny(name), "Flux")


@pytest.mark.parametrize(
    "other, said",
    [
        ("Chroma", "trained for Flux .4 blocks.*the model given is Chroma"),
        ("QwenImage", "trained for Flux .4 blocks.*the model given is QwenImage .3 blocks"),
    ],
)
def test_an_encoder_of_another_family_is_refused(other: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        concept(tiny(other), "Flux")


def test_an_encoder_for_dev_is_read_by_schnell() -> None:
    model = concept(tiny("FluxSchnell"), "Flux")
    assert apart(sample(model, "FluxSchnell"), plain("FluxSchnell")) > FELT


def test_one_softmax_is_refused_where_text_and_picture_share_it() -> None:
    with pytest.raises(ValueError, match="merge is concat, but in Flux .*Set merge to add"):
        concept(tiny("Flux"), "Flux", merge="concat")


def test_encoders_of_unets_and_of_transformers_are_not_exchanged() -> None:
    unet = random_model("tiny")
    with pytest.raises(
        ValueError, match="trained for Flux .4 blocks., but the model given is SD15 .7 layers"
    ):
        concept(unet, "Flux")
    with pytest.raises(
        ValueError, match="trained for SD15 .7 cross.*but the model given is Flux .4 blocks."
    ):
        studio.concept(tiny("Flux"))
