"""Every misuse of a transformer is one sentence before sampling: the node, both values, the remedy; and the plain picture stays plain."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from kindred.models.reference.bank import ReferenceBank
from kindred.nodes import host
from networks import random_model
from studio import bank_of as unet_bank
from studio import capture, counted, inject, invert
from test_transformers import FAMILIES, FELT, HALF, SAME, apart, bank_of, plain
from tiny_networks import READ, REFUSED, build, latent, prompt, sample, tiny
from torch import Tensor
from transformer_stories import anchors, pictures, story

LAW = pytest.mark.parametrize
every_family = LAW("name", FAMILIES)
ONE_OF_EACH = LAW("name", ["Flux", "QwenImage", "SD3.5", "ZImage", "Anima", "PixelDiT"])
UNTOLD = ("ErnieImage",)  # a story there takes no reference at all, and says so first
LOADED = {"steps": 3, "scheduler": "simple", "mask": HALF}


@contextmanager
def staying_plain(name: str) -> Iterator[None]:
    """Afterwards the plain picture is what it was; inside the network is not asked."""
    before = plain(name)
    with counted(tiny(name)) as rows:
        yield
    assert not rows and torch.equal(sample(tiny(name), name), before)


def refuse(name: str, act: Callable[[], Any], *said: str) -> None:
    """`act` raises a ValueError that says all of this, in this order, without one call of the network."""
    match = ".*".join(map(re.escape, said))
    with staying_plain(name), pytest.raises(ValueError, match=match):
        act()


def said_first(
    name: str, caplog: pytest.LogCaptureFixture, act: Callable[[], Any]
) -> tuple[Any, str]:
    """What `act` gives, and what was said before the network was asked."""
    caplog.set_level("INFO")
    caplog.clear()
    before: list[str] = []
    network = tiny(name).model.diffusion_model
    hook = network.register_forward_pre_hook(lambda *args: before.append(caplog.text))
    try:
        out = act()
    finally:
        hook.remove()
    return out, before[0]


# latents of other channels ------------------------------------------------------------------------


@every_family
@LAW("node", [invert, capture])
def test_a_latent_of_other_channels(name: str, node: Callable) -> None:
    """Another autoencoder's latent, and a picture's pixels: SD's, FLUX's, HunyuanImage's, FLUX.2's, RGB."""
    family = READ[name]
    for channels in {4, 16, 64, 128, 3} - {family.channels}:
        shape = (channels, *family.shape(8, 8)[1:])
        wrong = {"samples": torch.ones(1, *shape)}
        said = f"but this model's latents have {family.channels} channels"
        remedy = "Encode the photo with this checkpoint's VAE"
        refuse(
            name,
            lambda: node(tiny(name), wrong, prompt(name), scheduler="simple"),
            f"the latent is {[1, *shape]}",
            said,
            remedy,
        )


# references of other models -----------------------------------------------------------------------


@every_family
def test_a_reference_of_another_family(name: str) -> None:
    """Another transformer's and a UNet's, in both nodes that read one."""
    other = "Flux" if READ[name].config != "Flux" else "Chroma"
    made = {READ[other].config: bank_of(other), "SD15": unet_bank()}
    for family, bank in made.items():
        said = f"the reference was made with model {family} ", "but the model given is "
        said = *said, READ[name].config, "make the reference again"
        refuse(name, lambda: inject(tiny(name), bank), "Masked Self-Attn Inject", *said)
        if name not in UNTOLD:
            refuse(name, lambda: story(name, reference=bank), "Shared Attention", *said)


@ONE_OF_EACH
def test_a_unet_is_given_a_transformers_reference(name: str) -> None:
    bank, unet = bank_of(name), random_model("tiny")
    said = f"the reference was made with model {READ[name].config} .*but the model given is SD15"
    with counted(unet) as rows, pytest.raises(ValueError, match=said):
        inject(unet, bank)
    assert not rows


@cache
def finetuned(name: str) -> Any:
    """Another checkpoint of the same family."""
    model = build(READ[name])
    with torch.no_grad():
        for weights in model.model.diffusion_model.parameters():
            weights.mul_(1.1)
    return model


@ONE_OF_EACH
def test_a_reference_and_an_inversion_of_another_checkpoint(name: str) -> None:
    model, path = finetuned(name), bank_of(name).trajectory
    with counted(model) as rows:
        with pytest.raises(ValueError, match="the reference was made with.*weights differ"):
            inject(model, bank_of(name))
        with pytest.raises(ValueError, match="the inversion was made with.*weights differ"):
            capture(model, None, prompt(name), inversion=path, mask=HALF)
    assert not rows


# halves -------------------------------------------------------------------------------------------


@every_family
def test_a_negative_half_that_nobody_read(name: str) -> None:
    said = "halves is 'both', but the reference holds only the cond half", "Wire the negative"
    bank = bank_of(name)
    refuse(name, lambda: inject(tiny(name), bank, halves="both"), *said)
    if name not in UNTOLD:
        refuse(name, lambda: story(name, reference=bank, halves="both"), *said)


@cache
def of_both(name: str) -> ReferenceBank:
    photo, negative = {"samples": latent(name, seed=21)}, prompt(name, seed=3)
    return capture(tiny(name), photo, prompt(name, seed=4), **LOADED, negative=negative)[0]


@ONE_OF_EACH
@LAW("halves", ["both", "shared"])
def test_a_negative_half_at_guidance_1(
    name: str, halves: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No negative is drawn there: said before the network is asked, and the picture is that of the prompt's half."""
    model, own = inject(tiny(name), of_both(name), halves=halves), inject(tiny(name), of_both(name))
    read, said = said_first(name, caplog, lambda: sample(model, name, cfg=1.0))
    assert f"halves is '{halves}', but no negative is drawn" in said
    assert "Raise the CFG, or choose cond only" in said
    assert apart(read, sample(own, name, cfg=1.0)) < SAME
    for quiet, cfg in ((own, 1.0), (model, 3.0)):
        _, said = said_first(name, caplog, lambda: sample(quiet, name, cfg=cfg))
        assert "no negative is drawn" not in said


@LAW("name", ["Flux", "SD3.5", "Anima"])
def test_anchors_of_guidance_1_are_no_anchors_of_both_halves(name: str) -> None:
    bank = anchors(name, story(name, halves="both"), cfg=1.0)[1]
    refuse(
        name,
        lambda: story(name, reference=bank, halves="both"),
        "halves is 'both', but the reference holds only the cond half",
        "Make the anchors with halves 'both' and a CFG above 1, or choose 'cond only'",
    )


# masks --------------------------------------------------------------------------------------------


@every_family
def test_a_mask_of_another_shape_than_the_photo(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Said before the work; the mask is stretched over the photo."""
    tall, photo = torch.zeros(1, 96, 32), {"samples": latent(name, seed=21)}
    tall[:, 32:64, 8:24] = 1
    given = LOADED | {"mask": tall}
    bank, said = said_first(
        name, caplog, lambda: capture(tiny(name), photo, prompt(name), **given)[0]
    )
    assert "the wired mask is 32x96 and the photo" in said and "Load Photo" in said
    kept = bank.masks[READ[name].grid][0].float()
    assert 0 < kept.mean() < 0.5 and torch.equal(sample(tiny(name), name), plain(name))


@every_family
def test_masks_that_are_too_many_or_black(name: str) -> None:
    photo, positive = {"samples": latent(name, seed=21)}, prompt(name)

    def read(mask: Tensor) -> None:
        capture(tiny(name), photo, positive, **LOADED | {"mask": mask})

    refuse(name, lambda: read(torch.ones(2, 8, 8)), "2 masks for 1 reference picture", "one per")
    refuse(name, lambda: read(torch.zeros(1, 8, 8)), "no subject in picture 1 of 1", "Paint")


@ONE_OF_EACH
def test_masks_of_another_number_than_the_pictures(name: str) -> None:
    two = torch.ones(2, 8, 8)
    with pytest.raises(ValueError, match="2 target masks for 3 pictures. Wire one mask, or one"):
        sample(inject(tiny(name), bank_of(name), target_mask=two), name, pictures=3)
    refuse(name, lambda: pictures(story(name, masks=two), name), "2 masks for 3 pictures", "Wire")
    assert torch.equal(sample(tiny(name), name), plain(name))


# families that are refused, and foreign networks --------------------------------------------------

NODES: dict[str, Callable[[Any, str], Any]] = {
    "Ref-UNet Feature Capture": lambda m, name: capture(m, {"samples": latent(name)}, prompt(name)),
    "Masked Self-Attn Inject": lambda m, name: inject(m, bank_of("Flux")),
    "ConsiStory Shared Attention": lambda m, name: story(name, m),
    "Concept Encoder Train": lambda m, name: host.concept_layers(m, "Concept Encoder Train"),
}


@LAW("name", REFUSED)
@LAW("node", NODES)
def test_a_refused_family_says_which_and_why_in_every_node(name: str, node: str) -> None:
    model = tiny(name)
    said = f"{node}: {REFUSED[name].config} cannot be read: it "
    with counted(model) as rows, pytest.raises(ValueError, match=said):
        NODES[node](model, name)
    assert not rows


def foreign(name: str) -> Any:
    """A family's network as a pack with kernels of its own has it: an heir of the host's class that asks no other node."""

    def forward(self: Any, *args: Any, transformer_options: Any = None, **kwargs: Any) -> Tensor:
        return super(heir, self).forward(*args, transformer_options={}, **kwargs)

    model = build(READ[name])
    network = model.model.diffusion_model
    kind = type(network)
    heir = type("QuantizedTransformer", (kind,), {"forward": forward, "__module__": "their_pack"})
    network.__class__ = heir
    return model


@LAW("name", ["Flux", "QwenImage", "SD3.5", "ZImage"])
def test_a_foreign_network_is_named_in_its_first_pass(name: str) -> None:
    """By the pass that captures, and by one that is sampled; its plain picture is what it was."""
    model, photo = foreign(name), {"samples": latent(name, seed=21)}
    before = sample(model, name)
    assert apart(before, plain(name)) < FELT
    said = r"cannot be read: it runs in their_pack\.QuantizedTransformer, .*bf16, fp8 or GGUF"
    held = capture(tiny(name), photo, prompt(name), **LOADED, keeps="keys and values")[0]
    with counted(model) as rows:
        with pytest.raises(ValueError, match=said):
            capture(model, photo, prompt(name), **LOADED)
        captured = len(rows)
        with pytest.raises(ValueError, match=said):
            sample(inject(model, held), name)
    assert captured == 1 + 3 + 1 and len(rows) == captured + 1
    with pytest.raises(ValueError, match=said):
        pictures(story(name, model), name)
    assert torch.equal(sample(model, name), before)
