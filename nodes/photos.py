"""Load Photo: the host's Load Image, with the example photos of the shipped workflows in
its list.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from comfy_api.v0_0_2 import io

from . import host

NODE = "Load Photo"
EXAMPLES = tuple(
    Path(__file__).parent.parent / "miniature" / name
    for name in ("reference.png", "reference_2.png", "dog.png", "silhouette.png")
)


class LoadPhoto(io.ComfyNode):
    """Load Image flags a picture outside of the input folder as missing, and nothing of ours
    belongs into a user's input folder.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredLoadPhoto",
            display_name=NODE,
            category="Kindred",
            description="Loads a photo of a subject: one of the examples, a picture of the input "
            "folder, or one that you upload here. "
            "Load Image does the same without the examples.",
            search_aliases=[
                "load image",
                "upload photo",
                "reference photo",
                "example photo",
                "image loader",
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
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The photo as it is; scale it to the model's size before VAE Encode.",
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="Its transparent parts, as painted in the mask editor; else black.",
                ),
            ],
        )

    @classmethod
    def execute(cls, image: str) -> io.NodeOutput:
        try:
            return io.NodeOutput(*host.load_picture(image))
        except Exception as error:  # the host's readers fail in words of their libraries
            raise ValueError(
                f"{NODE}: {image!r:.80} cannot be read ({type(error).__name__}: "
                f"{str(error).strip():.120}). Upload it again "
                "as a PNG or JPEG of 8 bits a colour."
            ) from error

    @classmethod
    def validate_inputs(cls, image: str) -> bool | str:
        """Also brings an example back where somebody emptied the temp folder."""
        offer_examples([path for path in EXAMPLES if host.example_name(path) == image])
        return (
            host.picture_exists(image)
            or f"{NODE}: there is no picture {image!r:.200}. Choose one of the list, or upload it."
        )

    @classmethod
    def fingerprint_inputs(cls, image: str) -> str:
        return host.picture_fingerprint(image)


def offer_examples(examples: tuple[Path, ...] | list[Path] = EXAMPLES) -> None:
    """The examples are a courtesy: a full disk is no reason to have no nodes."""
    with suppress(OSError):
        for path in examples:
            host.offer_example(path)
