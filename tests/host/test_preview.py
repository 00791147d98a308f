"""Host laws of Reference Preview: what it draws is what the reference holds, on the pictures it was made from."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from kindred.miniature.autoencoder import psnr
from kindred.miniature.world import held_out_identity, render
from kindred.models.overlay import draw_heat, draw_masks, draw_matches, place_colours
from kindred.models.reference.bank import AnchorFeatures, ReferenceBank
from kindred.nodes.preview import ReferencePreview
from kindred.nodes.prompts import SubjectPrompts
from networks import random_model
from studio import bank_of, capture, coarse, of_bank, photo

import nodes as host_nodes

LAW = pytest.mark.parametrize
SHOWS = ["all", "masks", "heat map", "correspondences"]


@pytest.fixture(scope="module")
def world():
    """The miniature's VAE, and a reference of two wide renderings of one cat."""
    with torch.inference_mode():
        model, clip, vae = host_nodes.CheckpointLoaderSimple().load_checkpoint(
            "kindred_miniature.safetensors"
        )
        cat = held_out_identity(3)
        images = (
            torch.stack(
                [torch.tensor(render(cat, "cat", scene, 7).image) for scene in ("beach", "city")]
            ).float()
            / 255
        )
        images = images[:, 16:112]  # 96 x 128
        positive = SubjectPrompts.execute(clip, "a photo of a cat", "cat").result[0]
        bank = capture(model, {"samples": vae.encode(images)}, positive, 5)[0]
    return SimpleNamespace(vae=vae, bank=bank, images=images)


@torch.inference_mode()
def preview(bank: ReferenceBank, vae, show: str = "all", **more) -> torch.Tensor:
    return ReferencePreview.execute(bank, vae, show, **more).result[0]


def drawn_on(world) -> torch.Tensor:
    with torch.inference_mode():
        return world.vae.decode(world.bank.trajectory.latents[0])


class Flat:
    """A VAE whose pictures are one grey; it keeps what it was asked."""

    latent_channels = 4

    def decode(self, samples):
        self.seen = samples
        return torch.full((len(samples), 8 * samples.shape[2], 8 * samples.shape[3], 3), 0.5)


def anchored(
    bank: ReferenceBank, features: torch.Tensor | None, subject: torch.Tensor | None
) -> ReferenceBank:
    return replace(bank, anchors=AnchorFeatures({}, {}, {}, [], (), features, subject))


def moved(
    bank: ReferenceBank, grid: tuple[int, int], seed: int = 0
) -> tuple[ReferenceBank, torch.Tensor, torch.Tensor]:
    """Two anchors on `grid` whose subjects (its upper left part) are alike but for the order of their tokens: bank, mask [n], where.

    Behind the first one's subject stands what looks still more like the second's.
    """
    n = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[: grid[0] // 2 + 1, : grid[1] // 2 + 1] = True
    at = mask.flatten().nonzero().squeeze(1)
    source = torch.arange(n)
    source[at] = at[torch.randperm(len(at), generator=generator)]
    first = torch.randn(n, 24, generator=generator)
    second = torch.where(
        mask.view(-1, 1), first[source] + 1e-2, torch.randn(n, 24, generator=generator)
    )
    behind = (~mask.flatten()).nonzero().squeeze(1)[: len(at)]
    first[behind] = second[at[: len(behind)]]
    return (
        anchored(bank, torch.stack([first, second]), torch.cat([at, n + at])),
        mask.flatten(),
        source,
    )


# what is drawn --------------------------------------------------------------------------------------------------------------


def test_the_pictures_beneath_are_those_that_were_captured(world):
    """Where the mask is, the panel is the picture, decoded without the MODEL."""
    out = preview(world.bank, world.vae, "masks")
    inside = world.bank.masks[12, 16].repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert inside.any((1, 2)).all() and not inside.all()
    assert torch.equal(out[inside], drawn_on(world)[inside])
    assert psnr(out[inside].T[None, ..., None], world.images[inside].T[None, ..., None]).mean() > 20
    assert torch.equal(out, draw_masks(drawn_on(world), world.bank.masks[12, 16]))


@LAW(
    "percent, maps",
    [
        (-1.0, lambda m: m.mean(0)),
        (-0.4, lambda m: m.mean(0)),
        (0.0, lambda m: m[-1]),
        (1.0, lambda m: m[0]),
        (0.37, lambda m: m[3]),
        (0.39, lambda m: m[2]),
        (0.8, lambda m: m[1]),
    ],
)
def test_the_heat_map_is_the_mean_or_the_step_asked_for(world, percent, maps):
    """maps[0] belongs to the least noisy step, percent 0 to the noisiest; 5 steps."""
    assert len(world.bank.maps) == 5
    out = preview(world.bank, world.vae, "heat map", step_percent=percent)
    assert torch.equal(out, draw_heat(drawn_on(world), maps(world.bank.maps)))


def test_all_is_the_panels_side_by_side_with_a_white_gap(world):
    bank = moved(world.bank, (6, 8))[0]
    out, panels = preview(bank, world.vae), [preview(bank, world.vae, show) for show in SHOWS[1:]]
    assert (
        out.shape == (2, 96, 3 * 128 + 2 * 2, 3)
        and out.dtype == torch.float32
        and 0 <= out.min() <= out.max() <= 1
    )
    for i, panel in enumerate(panels):
        assert panel.shape == (2, 96, 128, 3) and torch.equal(
            out[:, :, 130 * i : 130 * i + 128], panel
        )
    assert (out[:, :, 128:130] == 1).all() and (out[:, :, 258:260] == 1).all()


@LAW("grid", [(12, 16), (6, 8), (3, 4)])
def test_correspondences_colour_each_token_like_its_like(world, grid):
    """Wherever the features' grid is: the bank's own, or one that only the latent tells."""
    bank, mask, source = moved(world.bank, grid)
    out = preview(bank, world.vae, "correspondences")
    both, own = mask.expand(2, -1), torch.arange(len(mask))
    assert torch.equal(
        out, draw_matches(drawn_on(world), grid, both, torch.stack([own, source]), both)
    )
    wrong = draw_matches(drawn_on(world), grid, both, torch.stack([own, own]), both)
    assert not torch.equal(out[1], wrong[1]) and torch.equal(out[0], wrong[0])


def test_correspondences_without_marked_tokens_take_the_mask(world):
    bank = moved(world.bank, (12, 16))[0]
    held = replace(bank, anchors=replace(bank.anchors, subject=None))
    out = preview(held, Flat8(), "correspondences")
    subject = world.bank.masks[12, 16][0]
    seen = out[0, 4::8, 4::8]
    want = torch.lerp(torch.tensor(0.5), place_colours(subject), 0.7)
    assert torch.allclose(seen[subject], want[subject], atol=1e-6)
    assert torch.allclose(seen[~subject], torch.tensor(0.225), atol=1e-6)


class Flat8(Flat):
    latent_channels = 8


@LAW("family, scale", [("tiny", 0.18215), ("tiny_xl", 0.13025)])
def test_latents_leave_the_scale_of_their_family(family, scale):
    """SD1.5's and SDXL's factor: the VAE reads what VAE Encode gave."""
    vae = Flat()
    preview(bank_of(family), vae, "masks")
    assert torch.allclose(vae.seen, photo()["samples"], atol=1e-5)
    assert torch.allclose(bank_of(family).trajectory.latents[0] / scale, vae.seen, atol=1e-5)


@LAW("size", [(8, 8), (5, 9), (12, 7)])
def test_any_size(size):
    bank = bank_of(size=size, pictures=3)
    assert preview(bank, Flat()).shape == (3, 8 * size[0], 16 * size[1] + 2, 3)


def test_nothing_that_is_wired_changes_and_a_second_look_is_the_same(world):
    bank = moved(world.bank, (6, 8))[0]
    before, states = of_bank(bank), (torch.get_rng_state(), random.getstate())
    features = bank.anchors.features.clone()
    assert torch.equal(preview(bank, world.vae), preview(bank, world.vae))
    assert of_bank(bank) == before and torch.equal(bank.anchors.features, features)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()


def test_the_node_shows_its_picture_on_the_canvas():
    shown = ReferencePreview.execute(bank_of(pictures=2), Flat()).ui.as_dict()["images"]
    assert len(shown) == 2 and all(s["type"] == "temp" for s in shown)
    assert all(
        (Path(folder_paths.get_temp_directory()) / s["subfolder"] / s["filename"]).is_file()
        for s in shown
    )


# what is missing -----------------------------------------------------------------------------------------------------------


def masked() -> ReferenceBank:
    return capture(random_model("tiny"), photo(), coarse(), mask=torch.ones(1, 64, 64))[0]


def test_what_there_is_not_is_left_out_and_said(caplog):
    with caplog.at_level(logging.INFO):
        assert torch.equal(preview(masked(), Flat()), preview(masked(), Flat(), "masks"))
    assert "left out heat map" in caplog.text and "left out correspondences" in caplog.text


@LAW(
    "bank, show, words",
    [
        (masked, "heat map", "mask was wired.*without a mask"),
        (lambda: replace(bank_of(), masks={}), "masks", "no masks.*subject word"),
        (lambda: replace(bank_of(), masks={}, maps=None), "all", "no masks.*subject word"),
        (bank_of, "correspondences", "read from photos.*ConsiStory Anchor Sampler"),
        (
            lambda: anchored(bank_of(pictures=2), None, None),
            "correspondences",
            "without feature injection.*feature_injection above 0",
        ),
        (
            lambda: anchored(bank_of(), torch.rand(1, 16, 4), torch.arange(3)),
            "correspondences",
            "2 pictures.*has 1",
        ),
        (
            lambda: anchored(bank_of(pictures=2), torch.rand(2, 17, 4), torch.arange(3)),
            "correspondences",
            "17 tokens.*8x8 latent",
        ),
        (lambda: replace(bank_of(), model_key="Novel 123"), "all", "kind Novel.*install the pack"),
    ],
)
def test_what_cannot_be_shown_names_why_and_what_to_do(bank, show, words):
    with pytest.raises(ValueError, match="Reference Preview: .*" + words):
        preview(bank(), Flat(), show)


def test_a_vae_that_does_not_fit_is_named(world):
    with pytest.raises(ValueError, match="latents of 4 channels, but the VAE reads 8.*SD15"):
        preview(bank_of(), world.vae)
    broken = SimpleNamespace(decode=lambda samples: torch.full((1, 64, 64, 3), float("nan")))
    with pytest.raises(ValueError, match="NaN.*--fp32-vae"):
        preview(bank_of(), broken)


# the node on the canvas ----------------------------------------------------------------------------------------------------


def test_the_node_explains_itself(node, root):
    schema = node("KindredReferencePreview").GET_SCHEMA()
    assert (
        schema.display_name == "Reference Preview"
        and schema.category == "Kindred"
        and schema.is_output_node
    )
    assert (
        schema.description
        and schema.search_aliases
        and all(told.tooltip for told in (*schema.inputs, *schema.outputs))
    )
    page = (root / "web" / "docs" / "KindredReferencePreview.md").read_text("utf-8")
    assert all(f"**{told.id}**" in page for told in schema.inputs if told.id != "vae") and all(
        show in page for show in SHOWS
    )


def test_latents_are_decoded_at_the_scale_of_the_instance_and_not_of_its_kind():
    """Playground 2.5 is an SDXL whose latents have a mean and a spread of their own."""
    import comfy.latent_formats
    from networks import build_model

    model = build_model("tiny_xl")
    model.model.latent_format = comfy.latent_formats.SDXL_Playground_2_5()
    prompt = coarse("tiny_xl")
    given = photo()
    bank = capture(model, given, prompt, mask=torch.ones(1, 64, 64))[0]
    assert bank.model_key.startswith("SDXL/SDXL_Playground_2_5 ")
    vae = Flat()
    preview(bank, vae, "masks")
    assert torch.allclose(vae.seen, given["samples"], atol=1e-4)
    older = replace(bank, model_key=bank.model_key.replace("/SDXL_Playground_2_5", ""))
    from studio import inject

    assert inject(model, older) is not None  # a reference of an older Kindred reads on
