"""Load Photo fits photo and mask together: a painted mask covers what it was painted on, a cut-out's subject is what is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from kindred.miniature.pack import CHECKPOINT
from kindred.miniature.world import held_out_identity, render
from kindred.nodes.capture import RefUNetCapture
from kindred.nodes.photos import LoadPhoto
from kindred.nodes.prompts import SubjectPrompts
from PIL import Image

import nodes

SIDE = 128  # the miniature's
LAW = pytest.mark.parametrize
FITS = ["crop at the centre", "crop at the subject", "pad"]
PAINTED, CUT_OUT = "clipspace-painted-masked-1.png", "cut_out.png"


def portrait() -> tuple[Image.Image, Image.Image]:
    """A robot from hat to toe on a photo of 800x1200, and where it is."""
    robot = render(held_out_identity(28), "robot", "beach", 28)
    frame = (153, 0, 953, 1200)
    photo = Image.fromarray(robot.image).resize((1200, 1200), Image.Resampling.LANCZOS)
    subject = Image.fromarray(robot.mask).convert("L").resize((1200, 1200))
    return photo.crop(frame), subject.crop(frame)


PHOTO, SUBJECT = portrait()


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder in the host's input folder, gone afterwards."""
    folder = Path(folder_paths.get_input_directory(), "kindred_fitted")
    folder.mkdir()
    yield folder
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def saved(folder: Path, name: str, picture: Image.Image, opaque: Image.Image) -> str:
    """The picture under the mask editor's name or another -> its name in the host's list."""
    made = picture.convert("RGB").copy()
    made.putalpha(opaque)
    made.save(folder / name)
    return f"{folder.name}/{name}"


def inverted(mask: Image.Image) -> Image.Image:
    return Image.eval(mask, lambda value: 255 - value)


def load(name: str, **how) -> tuple[torch.Tensor, torch.Tensor]:
    return LoadPhoto.execute(name, **{"width": SIDE, "height": SIDE} | how).result


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a > 0.5, b > 0.5
    return ((a & b).sum() / (a | b).sum()).item()


def pixels(mask: Image.Image) -> torch.Tensor:
    """[1 y x] in 0..1."""
    return torch.from_numpy(np.array(mask)).float()[None] / 255


def where_it_is(place: Path, **how) -> torch.Tensor:
    """[1 y x]: the subject as a fitted picture itself shows it, in white, whatever its mask says."""
    return load(saved(place, PAINTED, SUBJECT, inverted(SUBJECT)), **how)[0][..., 0]


@LAW("fit", FITS)
@LAW("size", [(128, 128), (96, 160), (512, 512)], ids=str)
def test_a_painted_mask_covers_the_subject_it_was_painted_on(place, fit, size):
    how = {"fit": fit, "width": size[0], "height": size[1]}
    truth = where_it_is(place, **how)
    photo, mask = load(saved(place, PAINTED, PHOTO, inverted(SUBJECT)), **how)
    assert photo.shape == (1, size[1], size[0], 3) and mask.shape == photo.shape[:3]
    assert iou(mask, truth) >= 0.95


def test_the_hosts_own_mask_does_not(place):
    """What Load Image and a crop at the centre make of it, which is why."""
    photo, mask = nodes.LoadImage().load_image(saved(place, PAINTED, SUBJECT, inverted(SUBJECT)))
    cropped = nodes.ImageScale().upscale(photo, "lanczos", SIDE, SIDE, "center")[0][..., 0]
    stretched = torch.nn.functional.interpolate(mask[:, None], (SIDE, SIDE), mode="bilinear")[:, 0]
    assert iou(stretched, cropped) < 0.75


@LAW("fit", ["crop at the subject", "pad"])
def test_nothing_of_the_subject_is_lost(place, fit):
    how = {"fit": fit, "width": 512, "height": 512}
    truth = where_it_is(place, **how)
    assert not truth[:, [0, -1]].any() and not truth[:, :, [0, -1]].any()
    whole, drawn = pixels(SUBJECT) > 0.5, truth > 0.5
    shapes = [(m.any(2).sum() / m.any(1).sum()).item() for m in (whole, drawn)]
    assert shapes[0] == pytest.approx(shapes[1], rel=0.03)  # and nothing is distorted


@LAW("fit", FITS)
def test_of_a_cut_out_the_subject_is_what_is_opaque(place, fit):
    """Black all over, so that the fitted picture itself shows where it is opaque: white stands behind it."""
    black = Image.new("RGB", SUBJECT.size)
    photo, mask = load(saved(place, CUT_OUT, black, SUBJECT), fit=fit, width=512, height=512)
    assert iou(mask, 1 - photo[..., 0]) >= 0.95
    assert iou(mask, where_it_is(place, fit=fit, width=512, height=512)) >= 0.95


def test_a_cut_out_as_it_is_has_the_hosts_picture_and_the_subjects_mask(place):
    name = saved(place, CUT_OUT, PHOTO, SUBJECT)
    photo, mask = load(name)
    theirs = nodes.LoadImage().load_image(name)
    assert torch.equal(photo, theirs[0]) and torch.equal(mask, 1 - theirs[1])


def test_the_editors_name_or_a_word_tells_what_is_transparent(place):
    """The same file: painted by its name, cut out by its edge, and whatever it is told to be."""
    painted, cut = (saved(place, name, PHOTO, SUBJECT) for name in (PAINTED, CUT_OUT))
    subject = pixels(SUBJECT)
    for name, said, is_subject in (
        (painted, "automatic", False),
        (painted, "the background", True),
        (cut, "automatic", True),
        (cut, "the subject", False),
    ):
        mask = load(name, transparent=said)[1]
        assert torch.allclose(mask, subject if is_subject else 1 - subject, atol=1e-6), (name, said)


@LAW("fit", FITS)
def test_a_photo_without_a_mask_has_a_black_one(place, fit):
    PHOTO.save(place / "bare.png")
    photo, mask = load(f"{place.name}/bare.png", fit=fit, transparent="the background")
    assert mask.shape == (1, SIDE, SIDE) and not mask.any()
    assert photo.shape == (1, SIDE, SIDE, 3)


def test_a_size_that_is_none(place):
    name = saved(place, CUT_OUT, PHOTO, SUBJECT)
    with pytest.raises(ValueError, match="Load Photo: .*Give a width and a height"):
        load(name, fit="pad", width=0)


# what is read of it --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    if not CHECKPOINT.exists():
        pytest.skip("no weights: python -m miniature.train pack writes them")
    with torch.inference_mode():
        return nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT.name)


@torch.inference_mode()
def read(loaded, photo: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The subject that Ref-UNet Feature Capture reads, [1 y x]."""
    model, clip, vae = loaded[:3]
    latent = nodes.VAEEncode().encode(vae, photo)[0]
    words = SubjectPrompts.execute(clip, "a photo of a robot", "robot").result[0]
    return RefUNetCapture.execute(model, words, 2, "ddim_uniform", latent=latent, mask=mask).result[
        1
    ]


@LAW("fit", FITS)
@LAW("name", [PAINTED, CUT_OUT])
def test_the_subject_is_what_is_read(loaded, place, fit, name):
    """To the cells of 8 pixels in which the miniature sees."""
    opaque = SUBJECT if name == CUT_OUT else inverted(SUBJECT)
    photo, mask = load(saved(place, name, PHOTO, opaque), fit=fit)
    cells = torch.nn.functional.avg_pool2d(mask[:, None].float(), 8)[:, 0]
    truth = cells.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert iou(read(loaded, photo, mask), truth) >= 0.9
