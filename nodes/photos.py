"""Load Photo: a photo and its subject's mask, fitted to the model's size together, with the example
photos of the shipped workflows in its list.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..models.subject.framing import Fit, fitted, is_cut_out, over_white
from . import host

NODE = "Load Photo"
AUTOMATIC, SUBJECT, BACKGROUND = "automatic", "the subject", "the background"
EXAMPLES = tuple(
    Path(__file__).parent.parent / "miniature" / name
    for name in ("reference.png", "reference_2.png", "dog.png", "silhouette.png")
)
log = logging.getLogger(__name__)


class LoadPhoto(io.ComfyNode):
    """Load Image crops no mask with its photo, takes the background of a cut-out for the mask, and
    flags a picture outside of the input folder as missing.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredLoadPhoto",
            display_name=NODE,
            category="Kindred",
            description="Loads a photo of a subject, and fits it and its mask to the model's size "
            "together: one of the examples, a picture of the input "
            "folder, or one that you upload here. "
            "Paint the subject in the mask editor, or load a cut-out.",
            search_aliases=[
                "load image",
                "upload photo",
                "reference photo",
                "example photo",
                "image loader",
                "prep image",
                "crop to subject",
                "cut-out",
            ],
            inputs=[
                io.Combo.Input(
                    "image",
                    options=[*map(host.example_name, EXAMPLES), *host.input_pictures()],
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    tooltip="The kindred_ pictures are examples of the miniature's world. Upload "
                    "your own, or drop it here.",
                ),
                *fitting(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The photo, fitted: for VAE Encode.",
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="White = the subject: what you painted in the mask editor, or the "
                    "opaque part of a cut-out, fitted with the photo. All black without either.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        image: str,
        fit: str = Fit.AS_IT_IS.value,
        width: int = 512,
        height: int = 512,
        transparent: str = AUTOMATIC,
    ) -> io.NodeOutput:
        pictures, clear = read(image)
        mask, cut_out = subject_in(clear, transparent, host.is_painted(image))
        way = Fit(fit)
        if cut_out and way is not Fit.AS_IT_IS:
            pictures = over_white(pictures, mask)
        try:
            drawn = fitted(pictures, mask, (height, width), way)
        except ValueError as error:
            raise ValueError(f"{NODE}: {error} Give a width and a height of 16 or more.") from error
        said = report(tuple(pictures.shape[1:3]), mask, cut_out, way, *drawn)
        log.info("%s: %s", NODE, said)
        host.tell(cls, said)
        return io.NodeOutput(*drawn)

    @classmethod
    def validate_inputs(cls, image: str | None = None) -> bool | str:
        """Also brings an example back where somebody emptied the temp folder."""
        if image is None:  # wired, or missing, of which the host tells
            return True
        offer_examples([path for path in EXAMPLES if host.example_name(path) == image])
        return (
            host.picture_exists(image)
            or f"{NODE}: there is no picture {image!r:.200}. Choose one of the list, or upload it."
        )

    @classmethod
    def fingerprint_inputs(cls, image: str, **others: object) -> str:
        return host.picture_fingerprint(image)


def fitting() -> list[io.Input]:
    """The inputs that fit photo and mask to the model's size."""
    return [
        io.Combo.Input(
            "fit",
            options=[fit.value for fit in Fit],
            default=Fit.AS_IT_IS.value,
            optional=True,
            tooltip="Fits photo and mask together to width and height. crop at the subject: "
            "close around the mask, padded where the subject does not fit. pad: keeps the whole "
            "photo. as it is: changes neither.",
        ),
        *(
            io.Int.Input(
                side,
                default=512,
                min=16,
                max=16384,
                step=8,
                optional=True,
                tooltip="The size of the new pictures: 512 for SD1.5, 1024 for SDXL and most "
                "newer models, 128 for the miniature. Unused with fit = as it is.",
            )
            for side in ("width", "height")
        ),
        io.Combo.Input(
            "transparent",
            options=[AUTOMATIC, SUBJECT, BACKGROUND],
            default=AUTOMATIC,
            optional=True,
            advanced=True,
            tooltip="What the transparent parts of the file are. automatic: the subject, where you "
            "painted them in the mask editor; the background, where most of the photo's edge is "
            "transparent, as in a cut-out.",
        ),
    ]


def read(image: str) -> tuple[Tensor, Tensor]:
    """A picture's frames [b y x 3], and how transparent they are [b y x]; ValueError for what is
    no picture.
    """
    try:
        return host.load_picture(image)
    except Exception as error:  # the host's readers fail in words of their libraries
        raise ValueError(
            f"{NODE}: {image!r:.80} cannot be read ({type(error).__name__}: "
            f"{str(error).strip():.120}). Upload it again "
            "as a PNG or JPEG of 8 bits a colour."
        ) from error


def subject_in(clear: Tensor, transparent: str, painted: bool) -> tuple[Tensor, bool]:
    """How transparent a photo is [b y x] -> its subject's mask, and whether it is a cut-out.

    painted: it comes from the mask editor, which makes the subject transparent.
    """
    if not clear.any():
        return clear, False
    automatic = transparent == AUTOMATIC and not painted
    cut_out = transparent == BACKGROUND or (automatic and is_cut_out(clear))
    return (1 - clear if cut_out else clear), cut_out


def report(
    size: tuple[int, int], mask: Tensor, cut_out: bool, fit: Fit, drawn: Tensor, shown: Tensor
) -> str:
    """What was made of a photo of `size`: its subject's mask [b y x] before and `shown` after
    fitting, `drawn` [b y x 3].
    """
    subject = "a cut-out, what is opaque is the subject" if cut_out else "painted"
    if not mask.any():
        subject = "no mask; paint the subject in the mask editor if its word does not find it"
    said = [f"{size[1]}x{size[0]}: {subject}."]
    if fit is Fit.SUBJECT and not mask.any():
        said.append("Without a mask it is cropped at the centre.")
    if fit is not Fit.AS_IT_IS:
        said.append(f"Now {drawn.shape[2]}x{drawn.shape[1]} ({fit.value}).")
    if mask.any():
        said.append(f"The subject is {100 * (shown > 0.5).float().mean():.0f} % of the picture.")
    return " ".join(said)


def offer_examples(examples: tuple[Path, ...] | list[Path] = EXAMPLES) -> None:
    """The examples are a courtesy: a full disk is no reason to have no nodes."""
    with suppress(OSError):
        for path in examples:
            host.offer_example(path)
