"""Anchors made once on every transformer of the host, or taken from photos: further pictures read them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kindred.models.reference.bank import ReferenceBank
from kindred.models.reference.file import load_reference, save_reference
from test_transformer_stories import SEVERAL
from test_transformers import FAMILIES, FELT, apart, bank_of
from tiny_networks import READ, prompt, tiny
from transformer_stories import SHARING, anchors, pictures, plain, story

LAW = pytest.mark.parametrize
UNPLACED = ("ErnieImage",)  # kept keys are not placed again
every_family = LAW("name", [name for name in FAMILIES if name not in UNPLACED])
TOLD = {"dropout": 0.5}


@cache
def made(name: str, *inputs: tuple[str, Any]) -> ReferenceBank:
    """Anchors of pictures 0 and 1."""
    return anchors(name, story(name, **TOLD | dict(inputs)))[1]


@every_family
@LAW("inputs", [(), tuple(SHARING.items())], ids=["whole", "sharing"])
def test_further_pictures_are_what_they_were_beside_the_anchors(
    name: str, inputs: tuple[tuple[str, Any], ...]
) -> None:
    """One at a time and two together, with blending, injection and the anchors' own dropout; and they read them."""
    whole = pictures(story(name, **TOLD | dict(inputs)), name, range(4))
    reads = story(name, reference=made(name, *inputs), **TOLD | dict(inputs))
    for extras in ((3,), (3, 2)):
        assert apart(pictures(reads, name, extras), whole[list(extras)]) < SEVERAL
    assert apart(pictures(reads, name, (3,)), plain(name, (3,))) > FELT


@every_family
def test_the_anchors_themselves_are_those_of_the_batch(name: str) -> None:
    drawn, bank = anchors(name, story(name, **TOLD))
    assert apart(drawn, pictures(story(name, **TOLD), name, (0, 1))) < SEVERAL
    assert bank.pictures == 2 and bank.anchors.features is not None and bank.bytes


@every_family
def test_saved_anchors_draw_the_same_picture(name: str, tmp_path: Path) -> None:
    save_reference(made(name), tmp_path / "saved.safetensors")
    loaded = load_reference(tmp_path / "saved.safetensors")
    assert (
        loaded.layers == made(name).layers
        and loaded.trajectory.noise == made(name).trajectory.noise
    )
    one, other = (story(name, reference=bank, **TOLD) for bank in (made(name), loaded))
    assert torch.equal(pictures(one, name, (2,)), pictures(other, name, (2,)))


@every_family
def test_photos_are_anchors(name: str) -> None:
    """One picture reads a photo that is read live in each step, and injects its features; without the node it is plain."""
    reads = story(name, reference=bank_of(name), halves="cond only", **TOLD)
    shared = story(name, reference=bank_of(name), halves="cond only", **TOLD | SHARING)
    one, alone = pictures(reads, name, (0,)), plain(name, (0,))
    assert one.isfinite().all() and apart(one, alone) > FELT
    assert apart(pictures(shared, name, (0,)), one) > FELT / 10
    assert torch.equal(pictures(tiny(name), name, (0,)), alone)


@LAW("name", ["LongCatImage", "Lumina2", "ZImage", "Omnigen2", "Boogu"])
def test_keys_of_anchors_move_with_the_text(name: str) -> None:
    """A picture of a longer prompt reads anchors of shorter ones."""
    family = READ[name]
    longer = prompt(name, seed=52, words=family.words + family.step)
    reads = story(name, reference=made(name), **TOLD)
    told, alone = (pictures(m, name, (2,), positive=longer) for m in (reads, tiny(name)))
    assert told.isfinite().all() and apart(told, alone) > FELT


@LAW("name", UNPLACED)
def test_where_kept_keys_are_not_placed_again_they_are_refused(name: str) -> None:
    """Before the work, by both nodes; the pictures of one batch share."""
    with pytest.raises(ValueError, match=f"Shared Attention: in {name} a story.*in one batch"):
        story(name, reference=bank_of(name), halves="cond only")
    with pytest.raises(ValueError, match=f"Anchor Sampler: in {name} a story.*in one batch"):
        anchors(name, story(name))
    assert apart(pictures(story(name), name, (0, 1)), plain(name, (0, 1))) > FELT
