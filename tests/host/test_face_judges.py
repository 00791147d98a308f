"""Host laws of the judge of faces: with a detector and an embedder of our own, and with FaceNet's where it is installed."""

from __future__ import annotations

import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from evaluation.faces import DLIB, DLIB_NET, FACENET, LEAST_FACE, Faces, load_faces
from evaluation.judges import AestheticHead, Request
from judged import (
    LINES,
    PHOTOS,
    Embedder,
    Finder,
    cosine,
    nan_like,
    noise,
    randomized,
    without_a_face,
)
from kindred.miniature.world import held_out_identity, render
from PIL import Image
from torch import Tensor

LAW, NAN = pytest.mark.parametrize, float("nan")


@torch.inference_mode()
def test_faces_are_compared_where_both_have_one():
    find, embed = Finder(), Embedder()
    images, photos = noise(), (*PHOTOS, without_a_face(PHOTOS[0]))
    images[1] = without_a_face(images[1])
    judge = Faces(find, embed)
    found = judge(images, Request(LINES, photos))
    assert (
        list(found) == [column.name for column in judge.columns]
        and found["face_found"] == [1, 0, 1]
        and embed.seen == 2 + 2
    )
    seen, known = (
        [embed(find(picture)[None]) for picture in batch]
        for batch in ((images[0], images[2]), PHOTOS)
    )
    for i, row in zip((0, 2), seen):
        cosines = [cosine(row, photo) for photo in known]
        distance = sum(math.sqrt(2 - 2 * c) for c in cosines) / 2
        assert found["face_cosine"][i] == pytest.approx(sum(cosines) / 2, abs=1e-6)
        assert found["face_distance"][i] == pytest.approx(distance, abs=1e-6)
        assert found["face_2_minus_d"][i] == pytest.approx(2 - distance, abs=1e-6)
    assert all(
        math.isnan(found[name][1]) for name in ("face_cosine", "face_distance", "face_2_minus_d")
    )
    before = embed.seen
    judge(images, Request(LINES, photos))
    assert embed.seen == before + 2  # the photos' faces are kept


@LAW("photos", [(), (without_a_face(PHOTOS[0]),)])
def test_without_a_face_to_compare_with_only_the_detection_rate_is_told(photos):
    found = Faces(Finder(), Embedder())(noise(), Request(LINES, photos))
    assert found.pop("face_found") == [1, 1, 1] and all(map(nan_like, found.values()))


def test_a_batch_without_a_face_calls_no_embedder():
    found = Faces(Finder(), None)(
        without_a_face(noise()), Request(LINES, (without_a_face(PHOTOS[0]),))
    )
    assert found.pop("face_found") == [0, 0, 0] and all(map(nan_like, found.values()))


def test_an_embedder_that_gives_no_numbers_is_named():
    with pytest.raises(ValueError, match="evaluate: the face embedder gave NaN.*file of weights"):
        Faces(Finder(), lambda faces: torch.full((len(faces), 4), NAN))(
            noise(), Request(LINES, PHOTOS)
        )


def test_a_missing_package_or_file_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "facenet_pytorch", None)
    with pytest.raises(
        ValueError,
        match="evaluate: faces by FaceNet need the package.*pip install --no-deps facenet-pytorch.*leave the face",
    ):
        load_faces(tmp_path / "vggface2.pt")


def test_each_net_has_its_own_distance():
    """FaceNet's vectors are compared at length 1, dlib's as they come; the note names the net's own bound."""
    find, embed, images = Finder(), Embedder(), noise(2)
    by = {net: Faces(find, embed, net) for net in (FACENET, DLIB_NET)}
    found = {net: judge(images, Request(LINES[:2], PHOTOS[:1])) for net, judge in by.items()}
    with torch.inference_mode():
        rows, photo = embed(torch.stack([find(p) for p in images])), embed(find(PHOTOS[0])[None])
    assert found[DLIB_NET]["face_distance"] == pytest.approx((rows - photo).norm(dim=1).tolist())
    unit = torch.nn.functional.normalize
    assert found[FACENET]["face_distance"] == pytest.approx(
        (unit(rows) - unit(photo)).norm(dim=1).tolist(), abs=1e-6
    )
    assert found[FACENET]["face_cosine"] == found[DLIB_NET]["face_cosine"]
    told = {net: judge.columns[1].meaning for net, judge in by.items()}
    assert "FaceNet" in told[FACENET] and "below about 1.1 one person" in told[FACENET]
    assert "dlib" in told[DLIB_NET] and "below about 0.6 one person" in told[DLIB_NET]


@pytest.mark.parametrize("lacking", ["dlib", "face_recognition_models"])
def test_what_dlib_lacks_is_named_with_the_pip_command(monkeypatch, lacking):
    """Neither is among the packages that the tests need: the other one is made up."""
    for name in ("dlib", "face_recognition_models"):
        made = None if name == lacking else ModuleType(name)
        if made is not None:
            made.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, made)
    package = {"dlib": "dlib-bin", "face_recognition_models": "face-recognition-models"}[lacking]
    with pytest.raises(
        ValueError,
        match=f"evaluate: faces by dlib need the package {package}.*"
        "pip install dlib-bin face-recognition-models. Or leave the face",
    ):
        load_faces(DLIB)


@pytest.fixture(scope="module")
def dlib_judge() -> Faces:
    """dlib's trained net, where its two packages are installed."""
    pytest.importorskip("dlib")
    pytest.importorskip("face_recognition_models")
    return load_faces(DLIB)


def views(photo: Tensor) -> list[Tensor]:
    """A photo [y x 3]: mirrored, darker, and shrunk to two thirds."""
    smaller = torch.nn.functional.interpolate(
        photo.movedim(2, 0)[None], scale_factor=2 / 3, mode="bilinear", antialias=True
    )
    return [photo.flip(1), photo * 0.6, smaller[0].movedim(0, 2)]


def test_dlib_knows_one_person_from_another(dlib_judge):
    data, pictures = pytest.importorskip("skimage.data"), pytest.importorskip("matplotlib.cbook")
    one = torch.tensor(data.astronaut()).float() / 255
    with pictures.get_sample_data("grace_hopper.jpg") as file:
        other = torch.tensor(numpy.asarray(Image.open(file).convert("RGB"))).float() / 255
    for who, stranger in ((one, other), (other, one)):
        for view in views(who):
            found = dlib_judge(view[None], Request(("a woman",), (who,)))
            assert found["face_found"] == [1] and found["face_distance"][0] < 0.6
            found = dlib_judge(view[None], Request(("a woman",), (stranger,)))
            assert found["face_distance"][0] > 0.6


def test_dlib_counts_no_face_as_none(dlib_judge):
    data = pytest.importorskip("skimage.data")
    person = torch.tensor(data.astronaut()).float() / 255
    for thing in (data.chelsea(), data.coffee(), data.rocket()):
        found = dlib_judge(
            torch.tensor(thing)[None].float() / 255, Request(("a thing",), (person,))
        )
        assert found.pop("face_found") == [0] and all(map(nan_like, found.values()))
    found = dlib_judge(person[None], Request(("a woman",), (torch.zeros(9, 9, 3),)))
    assert found.pop("face_found") == [1] and all(map(nan_like, found.values()))


@pytest.fixture(scope="module")
def facenet(tmp_path_factory) -> Path:
    """FaceNet with random weights as its releases hold it: with the names of people, which nobody needs here."""
    package = pytest.importorskip("facenet_pytorch")
    net, file = package.InceptionResnetV1(), tmp_path_factory.mktemp("faces") / "vggface2.pt"
    randomized(net, 5)
    torch.save(
        net.state_dict() | {"logits.weight": torch.ones(7, 512), "logits.bias": torch.ones(7)}, file
    )
    return file


def test_facenet_finds_no_face_where_there_is_none(facenet):
    state = torch.get_rng_state()
    judge = load_faces(facenet)
    assert torch.equal(state, torch.get_rng_state())
    animals = (
        torch.stack(
            [
                torch.tensor(render(held_out_identity(i), "cat", "snow", 7 + i).image)
                for i in range(2)
            ]
        ).float()
        / 255
    )
    found = judge(animals, Request(("a cat",) * 2, (animals[0], noise(1, LEAST_FACE - 1, 40)[0])))
    assert found.pop("face_found") == [0, 0] and all(map(nan_like, found.values()))


def test_facenet_knows_a_photo_of_a_face(facenet):
    data = pytest.importorskip("skimage.data")
    photo = torch.tensor(data.astronaut()).float() / 255
    found = load_faces(facenet)(
        torch.stack([photo, photo.flip(1), torch.zeros_like(photo)]), Request(LINES, (photo,))
    )
    assert found["face_found"] == [1, 1, 0] and found["face_cosine"][0] == pytest.approx(
        1, abs=1e-6
    )
    assert found["face_distance"][0] == pytest.approx(0, abs=1e-3) and found["face_2_minus_d"][
        0
    ] == pytest.approx(2, abs=1e-3)
    assert found["face_cosine"][1] < 1 and math.isnan(found["face_cosine"][2])


def test_facenet_takes_its_own_weights_alone(facenet, tmp_path):
    torch.save(AestheticHead().state_dict(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="faces need a file with FaceNet's weights.*vggface2.pt"):
        load_faces(None)
    with pytest.raises(ValueError, match="there is no file .*nowhere.pt.*vggface2.pt"):
        load_faces(tmp_path / "nowhere.pt")
    with pytest.raises(
        ValueError, match="head.pth are not those of InceptionResnetV1.*vggface2.pt"
    ):
        load_faces(tmp_path / "head.pth")
