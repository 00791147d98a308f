"""Whatever takes long shows how far it is, shows what it sees where there is a picture, and stops when asked."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from kindred.models.overlay import draw_masks
from kindred.models.reference.file import save_reference
from kindred.nodes.host import ManagedEncoder, reference_path, rough_pictures
from kindred.nodes.inversion import DDIMInvert
from kindred.nodes.library import LoadReference
from kindred.nodes.reference import RefUNetCapture
from networks import random_model
from PIL import Image
from studio import (
    SIZE,
    STEPS,
    anchors,
    bank_of,
    capture,
    coarse,
    concept,
    counted,
    fresh_encoder,
    invert,
    photo,
    sample,
    story,
    subject,
)

MODEL = random_model("tiny")
LAW = pytest.mark.parametrize
Interrupted = comfy.model_management.InterruptProcessingException


@pytest.fixture
def bar(monkeypatch):
    """What the host's page is told: (done, total, picture or None); every update comes through."""
    told = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda done, total, picture, node_id=None: told.append((done, total, picture)),
    )
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update_absolute",
        lambda self, done, total=None, preview=None: self.hook(done, total or self.total, preview),
    )
    return told


@pytest.fixture
def cancel(monkeypatch):
    """The button, pressed before the work begins: main.py's own hook raises at the bar's first news."""

    def hook(*told, **more):
        comfy.model_management.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    comfy.model_management.interrupt_current_processing()
    yield
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture
def saved():
    """A reference that Load Reference lists."""
    folder = reference_path("kindred_story.safetensors").parent
    path = folder / "test_progress.safetensors"
    save_reference(bank_of(), path)
    yield path.name
    path.unlink()


def encoded(pictures=3, **how):
    return concept(
        MODEL, image=subject(pictures), encoder=ManagedEncoder.of(fresh_encoder(), "fresh"), **how
    )


PASSES = {
    "inversion": (lambda: invert(MODEL), 2 * STEPS),
    "inversion without its check": (lambda: invert(MODEL, check=False), STEPS),
    "edit-friendly": (lambda: invert(MODEL, method="edit-friendly ddpm"), 2 * STEPS),
    "capture": (lambda: capture(MODEL), STEPS + 1),
    "capture of an inversion": (
        lambda: capture(MODEL, inversion=invert(MODEL, check=False)[0]),
        STEPS,
    ),
    "anchors": (lambda: anchors(story(MODEL, feature_injection=0.0)), 5),
    "sampling": (lambda: sample(MODEL), STEPS),
}


@LAW("name", PASSES)
def test_a_pass_of_the_unet_shows_each_step_with_a_picture(name, bar):
    """As KSampler does: one bar, from the first step to the last, a preview at each."""
    work, total = PASSES[name]
    work()
    bar[:] = bar[-total:]  # of an inversion that came before
    assert [done for done, _, _ in bar] == list(range(1, total + 1)) and {
        told for _, told, _ in bar
    } == {total}
    for _, _, (kind, picture, _) in bar:
        assert kind == "JPEG" and picture.size == (8, 8)


@LAW("name", PASSES)
def test_a_pass_of_the_unet_stops_when_asked(name, cancel):
    with counted(MODEL) as rows, pytest.raises(Interrupted):
        PASSES[name][0]()
    assert len(rows) <= 1


def test_reading_photos_and_files_shows_how_far_it_is(bar, saved):
    bar.clear()
    encoded()
    assert [done for done, _, _ in bar] == [0, 1, 2, 3, 4, 5, 6] and {
        total for _, total, _ in bar
    } == {6}
    bar.clear()
    LoadReference.execute(saved)
    done = [done for done, _, _ in bar]
    assert (
        done == sorted(done)
        and done[0] == 0
        and len(set(done)) > 3
        and {total for _, total, _ in bar} == {done[-1]}
    )


def test_reading_photos_and_files_stops_when_asked(cancel, saved):
    for work in (encoded, lambda: encoded(halves="both"), lambda: LoadReference.execute(saved)):
        comfy.model_management.interrupt_current_processing()
        with pytest.raises(Interrupted):
            work()


# what a node shows when it is done -------------------------------------------------------------------------------------------


@torch.inference_mode()
def shown(model, pictures=1, **how):
    """The bank, the mask and what Ref-UNet Feature Capture shows, as pixels [r Y X 3]."""
    out = RefUNetCapture.execute(
        model, coarse(), STEPS, "ddim_uniform", latent=photo(SIZE, pictures), **how
    )
    files = out.ui.as_dict()["images"]
    assert {f["type"] for f in files} == {"temp"}
    folder = folder_paths.get_temp_directory()
    return *out.result, np.stack(
        [np.asarray(Image.open(f"{folder}/{f['subfolder']}/{f['filename']}")) for f in files]
    )


def pixels(images):
    return (images * 255).clamp(0, 255).numpy().astype(np.uint8)


@LAW("how", [{}, {"mask": torch.ones(1, 16, 16)}], ids=["word", "painted"])
def test_the_capture_shows_the_subject_of_every_picture(how):
    with counted(MODEL) as rows:
        bank, mask, seen = shown(MODEL, 2, **how)
    assert len(rows) == STEPS + 1
    large = torch.nn.functional.interpolate(
        rough_pictures(MODEL, bank.trajectory.latents[0]).movedim(-1, 1), (64, 64), mode="bilinear"
    )
    assert np.array_equal(seen, pixels(draw_masks(large.movedim(1, -1), bank.masks[8, 8])))
    assert mask.shape == (2, 64, 64) and RefUNetCapture.define_schema().has_intermediate_output


def test_without_the_familys_colours_it_shows_the_mask_alone(monkeypatch):
    monkeypatch.setattr(MODEL.get_model_object("latent_format"), "latent_rgb_factors", None)
    _, mask, seen = shown(MODEL)
    assert rough_pictures(MODEL, torch.zeros(1, 4, 8, 8)) is None
    assert np.array_equal(seen, pixels(mask[..., None].expand(-1, -1, -1, 3)))


@LAW("family", ["tiny", "tiny_xl"])
def test_rough_pictures_are_the_hosts_own_previews(family):
    model, latents = (
        random_model(family),
        torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1)),
    )
    form = model.get_model_object("latent_format")
    previewer = latent_preview.Latent2RGBPreviewer(
        form.latent_rgb_factors, form.latent_rgb_factors_bias
    )
    for i, rough in enumerate(rough_pictures(model, latents)):
        assert (
            np.abs(
                np.asarray(previewer.decode_latent_to_preview(latents[i : i + 1]), np.int16)
                - pixels(rough)
            ).max()
            <= 1
        )


def test_the_inversion_says_how_well_the_photo_comes_back():
    out = DDIMInvert.execute(MODEL, photo(), coarse(), STEPS, "ddim_uniform")
    assert (
        "dB in latent space" in out.ui.as_dict()["text"][0]
        and DDIMInvert.define_schema().has_intermediate_output
    )
