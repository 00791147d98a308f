"""The host's own reference latents beside a reference of ours, on tiny random transformers."""

from __future__ import annotations

import pytest
import torch
from kindred.models.network.blocks import block_name
from kindred.nodes.host.sites import require_backbone
from studio import capture, inject
from test_networks import NATIVE
from test_transformers import FELT, SAME, WHITE, apart, bank_of, way_of
from tiny_networks import latent, prompt, sample, tiny


def test_reference_latents_are_refused_where_they_move_the_picture() -> None:
    model, native = inject(tiny("Omnigen2"), bank_of("Omnigen2")), [latent("Omnigen2", seed=8)]
    with pytest.raises(ValueError, match="in Omnigen2 they move.*Remove ReferenceLatent"):
        sample(model, "Omnigen2", positive=prompt("Omnigen2", reference_latents=native))


def test_native_references_stand_beside_ours_where_they_may() -> None:
    with_both = prompt("Flux", reference_latents=[latent("Flux", seed=8)])
    model = inject(tiny("Flux"), bank_of("Flux"))
    pictures = [sample(m, "Flux", positive=with_both) for m in (model, tiny("Flux"))]
    assert apart(*pictures) > FELT


@pytest.mark.parametrize("name", NATIVE)
def test_native_references_are_the_texts_side_of_the_kept_share(name: str) -> None:
    """I63: beside one a picture that reads itself where nothing was mixed yet, in the first block, stays as it is."""
    more = {"reference_latents_method": "index"} if name == "Krea2" else {}
    beside = prompt(name, reference_latents=[latent(name, seed=8)], **more)
    alone, path = way_of(name, cfg=1.0, positive=beside)
    bank = capture(tiny(name), None, prompt(name), inversion=path, mask=WHITE)[0]
    first = block_name(require_backbone(tiny(name), "test").blocks[0])
    kept, dimmed = (
        sample(inject(tiny(name), bank, 3.0, blocks=first, text_share=share), name, cfg=1.0, positive=beside)
        for share in ("kept", "plain")
    )  # fmt: skip
    assert apart(kept, alone) < SAME < FELT / 10 < apart(dimmed, alone)
    assert apart(alone, sample(tiny(name), name, cfg=1.0)) > FELT


def test_references_by_pixels_are_refused_where_they_stand_behind_the_picture() -> None:
    """HiDream-O1 takes native references as pictures, and sets them behind its own."""
    native = [torch.rand(1, 128, 96, 3)]
    model = inject(tiny("HiDreamO1"), bank_of("HiDreamO1"))
    with pytest.raises(ValueError, match="in HiDreamO1 they move.*Remove ReferenceLatent"):
        sample(model, "HiDreamO1", positive=prompt("HiDreamO1", reference_latents=native))
