"""Every text-to-image UNet of the host, whatever part it lacks or has too, and every UNet of the host that makes no pictures from text."""

from __future__ import annotations

import re

import pytest
import torch
from kindred.models.reference.bank import ReferenceBank
from kindred.nodes.host import ManagedEncoder, cross_layers
from kindred.nodes.preview import ReferencePreview
from networks import ODD, OTHER_WORK, build_model, random_model
from strangers import layered
from studio import (
    MOMENTS,
    anchors,
    bank_of,
    capture,
    coarse,
    concept,
    counted,
    differs,
    encoder_of,
    fresh_encoder,
    inject,
    invert,
    negative,
    pictures,
    prompt,
    sample,
    story,
)

LAW = pytest.mark.parametrize
TIGHT, FELT = 1e-4, 1e-3
FAMILY = LAW("family", [*ODD, "tiny_xl"])


def how(family: str) -> dict:
    return {"positive": prompt(5, family), "uncond": negative(family)}


@FAMILY
def test_a_photo_is_captured_and_read_cached_and_live(family, monkeypatch):
    model, bank = random_model(family), bank_of(family)
    none = sample(model, **how(family))
    assert bank.masks and torch.equal(sample(inject(model, bank, 0.0), **how(family)), none)
    cached = sample(inject(model, bank, 2.0, halves="both"), **how(family))
    assert differs(cached, none) > FELT
    monkeypatch.setattr(ReferenceBank, "step_of", lambda self, sigma: None)
    assert differs(sample(inject(model, bank, 2.0, halves="both"), **how(family)), cached) < TIGHT


@FAMILY
def test_a_photo_is_inverted_and_the_inversion_is_read(family):
    model = random_model(family)
    trajectory, _, report = invert(model, positive=coarse(family))
    assert (
        "round trip" in report
        and capture(model, positive=coarse(family), inversion=trajectory)[0].blocks
        == bank_of(family).blocks
    )


@FAMILY
def test_a_concept_is_read(family):
    model, encoder = random_model(family), ManagedEncoder.of(fresh_encoder(family), family)
    none = sample(model, **how(family))
    assert torch.equal(sample(concept(model, 0.0, encoder=encoder), **how(family)), none)
    assert differs(sample(concept(model, 2.0, encoder=encoder), **how(family)), none) > FELT


@FAMILY
@LAW("inputs", [{}, {"feature_injection": 0.0}], ids=["two stages", "one stage"])
def test_a_story_is_told_kept_and_told_on(family, inputs):
    model = random_model(family)
    everywhere = {"blocks": "all", **inputs}
    told = pictures(story(model, **everywhere), family=family)
    plain = pictures(model, family=family)
    assert differs(told, plain) > FELT
    drawn, bank = anchors(story(model, **everywhere), (0, 1), family=family)
    assert torch.equal(drawn, pictures(story(model, **everywhere), (0, 1), family=family))
    further = pictures(story(model, reference=bank, **everywhere), (2,), family=family)
    assert differs(further, told[2:]) < TIGHT < FELT < differs(further, plain[2:])


@FAMILY
def test_photos_tell_a_story(family):
    model, bank = random_model(family), bank_of(family, steps=MOMENTS)
    told = pictures(story(model, reference=bank, blocks="all"), (0, 1), family=family)
    assert differs(told, pictures(model, (0, 1), family=family)) > FELT


class Eye:
    """A VAE that draws a latent's first three channels."""

    latent_channels = 4

    def decode(self, latents):
        return latents[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2)


@FAMILY
def test_a_reference_is_shown(family):
    made = anchors(story(random_model(family), blocks="all"), family=family)[1]
    for bank in (bank_of(family), made):
        assert torch.isfinite(ReferencePreview.execute(bank, Eye()).result[0]).all()


@LAW("family", ["tiny_koala", "tiny_vega", "tiny_level", "tiny_fine", "tiny_xs"])
def test_a_middle_that_is_not_there_is_said(family):
    model = random_model(family)
    for act in (
        lambda: capture(model, positive=coarse(family), blocks="middle"),
        lambda: inject(model, bank_of(family), blocks="middle"),
        lambda: story(model, blocks="middle"),
        lambda: concept(
            model, encoder=ManagedEncoder.of(fresh_encoder(family), family), blocks="middle"
        ),
    ):
        with pytest.raises(
            ValueError,
            match="no attention block matches 'middle'. Choose from this model's input .*output",
        ):
            act()


# no pictures from text -------------------------------------------------------------------------------------------------------

NODES = {
    "invert": invert,
    "capture": capture,
    "inject": lambda m: inject(m, bank_of()),
    "concept": lambda m: concept(m, encoder=encoder_of()),
    "story": story,
    "training": lambda m: cross_layers(m, "Concept Encoder Train"),
}
WORK = {
    "tiny_svd": "SVD_img2vid (UNetModel, for videos)",
    "tiny_sv3d_u": "SV3D_u (UNetModel, for videos)",
    "tiny_sv3d_p": "SV3D_p (UNetModel, for videos)",
    "tiny_zero123": "Stable_Zero123 (UNetModel, for other views of a picture)",
    "tiny_x4": "SD_X4Upscaler (UNetModel, for upscaling)",
    "tiny_lotus": "LotusD (UNetModel, from picture to picture in one step)",
    "tiny_sdpose": "SD15 (UNetModel, for poses)",
}
SAID = r"needs a UNet that predicts noise or v \(SD1.5, SD2.x, SDXL\), but the model given is {}. Load an SD1.5, SD2.x or SDXL checkpoint."


def refused(act, what: str) -> None:
    with pytest.raises(ValueError, match=SAID.format(re.escape(what))):
        act()


@LAW("act", NODES)
@LAW("family", OTHER_WORK)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # the host's upscaler
def test_a_unet_that_makes_no_pictures_from_text_is_refused_as_a_flow_model_is(family, act):
    bank_of(), encoder_of()
    model = build_model(family, weights=False)
    with counted(model) as rows:
        refused(lambda: NODES[act](model), WORK[family])
    assert not rows


@LAW("act", NODES)
def test_a_unet_without_attention_is_refused(act):
    model = build_model("tiny_level", weights=False)
    for layers in (
        *model.model.diffusion_model.input_blocks,
        *model.model.diffusion_model.output_blocks,
    ):
        for name, layer in layers.named_children():
            setattr(
                layers, name, torch.nn.Identity() if hasattr(layer, "transformer_blocks") else layer
            )
    refused(lambda: NODES[act](model), "SD15 (UNetModel, without attention)")


def test_self_attention_that_reads_the_text_everywhere_is_refused():
    model = build_model("tiny_xs", weights=False)
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "disable_self_attn"):
            module.disable_self_attn = True
    with pytest.raises(
        ValueError,
        match="this model has no block with self-attention, so there is nothing to read. Load an SD1.5",
    ):
        story(model)


def test_a_network_that_becomes_a_videos_behind_our_node_is_refused_when_it_runs():
    model = concept(random_model("tiny"), 2.0)
    model.add_object_patch(
        "diffusion_model", build_model("tiny_svd", weights=False).model.diffusion_model
    )
    with pytest.raises(
        ValueError, match="for videos.*Remove the node that puts a network of its own"
    ):
        sample(model)


def test_layers_that_another_model_put_in_place_are_not_asked_for_their_width():
    """A MODEL's object patches stay in the network from its run until the next."""
    model = random_model("tiny")
    sample(layered(model, "attn2"))
    assert differs(sample(concept(model, 2.0)), sample(model)) > FELT
