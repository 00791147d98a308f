"""The judge of faces, as paper A measures identity: a detector, and an embedder whose distance
tells people apart (method.md 2.5).

Two nets with real weights can be had: FaceNet by its file, dlib's by one pip install. Both are
optional packages, imported where used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .judges import NAME, Column, Kept, Request, filled, pictures_of, weights_in
from .real import DLIB, INSTALL_DLIB

if TYPE_CHECKING:
    from kindred.models.metrics import FaceIdentity

LEAST_FACE = 20  # pixels; MTCNN's own default, and it fails on a picture without room for one
FACE = 160  # pixels of a side that FaceNet reads
CHIP, AROUND = 150, 0.25  # pixels of a side that dlib's net reads, and how much lies about the face
LOOKS = 1  # times that a picture is doubled, so that faces from 40 pixels on are found


@dataclass(frozen=True)
class Net:
    """A face embedder by name, and the distance below which its makers call two faces one person's.

    unit: that distance is of vectors brought to length 1; otherwise of the vectors as they come.
    """

    name: str
    one_person: float
    unit: bool = True


FACENET, DLIB_NET = Net("FaceNet", 1.1), Net("dlib", 0.6, unit=False)


class Faces:
    """Whose face it is. A picture whose face is not found is NaN and leaves the means; face_found,
    1 or 0, is the detection rate.

    detect: picture [Y X 3] in 0..1 -> its face as the embedder reads it [3 s s], or None. embed:
    faces [n 3 s s] -> [n c], of any length.
    """

    def __init__(
        self,
        detect: Callable[[Tensor], Tensor | None],
        embed: Callable[[Tensor], Tensor],
        net: Net = FACENET,
    ) -> None:
        self.detect, self.embed, self.net = detect, embed, net
        self.photos, self.columns = Kept(self.faces), tuple(columns(net))

    def faces(self, pictures: Sequence[Tensor]) -> list[Tensor | None]:
        """The embedding [c] of every picture's face. ValueError where it is not finite."""
        crops = [self.detect(picture) for picture in pictures]
        seen = [crop for crop in crops if crop is not None]
        rows = self.embed(torch.stack(seen)) if seen else ()
        if not all(row.isfinite().all() for row in rows):
            raise ValueError(
                f"{NAME}: the face embedder gave NaN or infinite values. Check its file of weights."
            )
        rows = iter(rows)
        return [None if crop is None else next(rows) for crop in crops]

    def compared(
        self, faces: Sequence[Tensor | None], photos: Sequence[Tensor | None]
    ) -> FaceIdentity:
        """Embeddings that `faces` gave, of pictures and of photos, by this net's distance."""
        from kindred.models.metrics import face_identity

        return face_identity(faces, photos, unit=self.net.unit)

    @torch.inference_mode()
    def __call__(self, images: Tensor, request: Request) -> dict[str, list[float]]:
        """Raises ValueError as Clip does."""
        images, photos = pictures_of(images, request)
        identity = self.compared(self.faces(images), self.photos(photos))
        return {
            "face_cosine": list(identity.cosine),
            "face_distance": list(identity.distance),
            "face_2_minus_d": list(identity.closeness),
            "face_found": [float(seen) for seen in identity.detected],
        }


def columns(net: Net) -> Iterator[Column]:
    """What is measured with a net; the distance and its bound are each net's own."""
    vectors = "vectors of length 1, 0 to 2" if net.unit else "vectors as they come"
    yield Column(
        "face_cosine",
        "face cosine",
        f"mean cosine with the photos' faces, where both have one ({net.name})",
    )
    yield Column(
        "face_distance",
        "face distance",
        f"mean distance d from the photos' faces ({net.name}'s {vectors}); "
        f"below about {net.one_person} one person",
    )
    yield Column(
        "face_2_minus_d",
        "face 2 - d",
        "2 - d: the reading of the paper's identity score that is higher for better",
    )
    yield Column(
        "face_found",
        "faces found",
        "share of pictures with a face; the others are in none of the face scores",
    )


def load_faces(of: Path | str | None, device: str = "cpu") -> Faces:
    """dlib's judge for the word "dlib", FaceNet's for a file. ValueError: a package or the file is
    missing, or is something else.
    """
    return dlib_faces() if of == DLIB else facenet_faces(of, device)


def dlib_faces() -> Faces:
    """dlib's detector, five landmarks and ResNet; face-recognition-models holds their trained
    weights.

    The largest face is turned upright by its landmarks and cut to 150 pixels. ValueError: a package
    is missing.
    """
    try:
        import dlib
    except ImportError as error:
        raise lacks_dlib(f"dlib-bin, which cannot be imported ({error})") from error
    marks = dlib_file("shape_predictor_5_face_landmarks.dat")
    weights = dlib_file("dlib_face_recognition_resnet_model_v1.dat")
    landmarks = dlib.shape_predictor(str(marks))
    net = dlib.face_recognition_model_v1(str(weights))
    finder = dlib.get_frontal_face_detector()

    def detect(picture: Tensor) -> Tensor | None:
        pixels = picture.mul(255).round().byte().contiguous().numpy()
        boxes = finder(pixels, LOOKS)
        if not boxes:
            return None
        largest = max(boxes, key=lambda box: box.area())
        chip = dlib.get_face_chip(pixels, landmarks(pixels, largest), size=CHIP, padding=AROUND)
        return torch.from_numpy(chip).movedim(2, 0)

    def embed(chips: Tensor) -> Tensor:
        crops = (chip.movedim(0, 2).contiguous().numpy() for chip in chips)
        return torch.tensor([[*net.compute_face_descriptor(crop)] for crop in crops])

    return Faces(detect, embed, DLIB_NET)


def dlib_file(name: str) -> Path:
    """A file of face-recognition-models, found without importing it: it needs a pkg_resources that
    new setuptools have not.
    """
    package = importlib.util.find_spec("face_recognition_models")
    for folder in (package and package.submodule_search_locations) or ():
        if (path := Path(folder) / "models" / name).is_file():
            return path
    raise lacks_dlib(f"face-recognition-models with its {name}, which is not there")


def lacks_dlib(what: str) -> ValueError:
    return ValueError(
        f"{NAME}: faces by dlib need the package {what}. Install both beside ComfyUI: "
        f"{INSTALL_DLIB}. Or leave the face scores out."
    )


def facenet_faces(weights: Path | str | None, device: str = "cpu") -> Faces:
    """MTCNN and FaceNet of facenet-pytorch; the detector's weights come with the package, FaceNet's
    in the file `weights`.

    The package cuts the box about the largest face to 160 pixels and does not turn it upright. It
    names an older torch than it needs: install it without its dependencies. ValueError: the package
    or the file is missing, or the file is something else.
    """
    install = "pip install --no-deps facenet-pytorch"
    try:
        from facenet_pytorch import MTCNN, InceptionResnetV1
    except ImportError as error:
        raise ValueError(
            f"{NAME}: faces by FaceNet need the package facenet-pytorch, which cannot be imported "
            f"({error}). Install it beside ComfyUI: {install}. Or give --faces {DLIB}, or leave "
            "the face scores out."
        ) from error
    remedy = "Give a FaceNet of facenet-pytorch's releases, such as 20180402-114759-vggface2.pt."
    if weights is None:
        raise ValueError(
            f"{NAME}: faces need a file with FaceNet's weights. {remedy} Or leave the face scores "
            "out."
        )
    state = {
        name: value
        for name, value in weights_in(weights, remedy).items()
        if not name.startswith("logits.")
    }  # names of people
    with torch.random.fork_rng(devices=[]):
        finder, net = (
            MTCNN(image_size=FACE, min_face_size=LEAST_FACE, device=torch.device(device)),
            InceptionResnetV1(),
        )
    net = filled(net, state, weights, remedy).eval().to(device)

    def detect(picture: Tensor) -> Tensor | None:
        from PIL import Image

        if min(picture.shape[:2]) < LEAST_FACE:
            return None
        return finder(Image.fromarray(picture.mul(255).round().byte().numpy()))

    return Faces(detect, lambda faces: net(faces.to(device)).cpu())
