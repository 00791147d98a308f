"""Save Reference and Load Reference: a subject, once read or made, for other days and other
machines.
"""

from __future__ import annotations

import logging

import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..models.files import remedy
from ..models.overlay import draw_masks
from ..models.reference.bank import ReferenceBank
from ..models.reference.file import load_reference, save_reference
from ..models.reference.origin import Origin, origin_of
from . import host

SAVE, LOAD = "Save Reference", "Load Reference"
WRITABLE = "an output folder that can be written to (--output-directory)"
log = logging.getLogger(__name__)


class SaveReference(io.ComfyNode):
    """A REFERENCE into one .safetensors of the output folder, numbered as SaveImage numbers
    pictures.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredSaveReference",
            display_name=SAVE,
            category="Kindred",
            description="Writes a reference into one file of the output folder, to be read again "
            "by Load Reference, on this machine or "
            "another one. Nothing is ever overwritten.",
            search_aliases=[
                "save subject",
                "save anchors",
                "reusable subject",
                "export reference",
                "subject library",
            ],
            inputs=[
                host.Reference.Input(
                    "reference", tooltip="From Ref-UNet Feature Capture, or anchors of a story."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="kindred/reference",
                    tooltip="Name in the output folder; a number is added. Load Reference "
                    "lists what lies in output/kindred.",
                ),
            ],
            outputs=[],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, reference: ReferenceBank, filename_prefix: str = "kindred/reference"
    ) -> io.NodeOutput:
        try:
            with host.new_reference_path(filename_prefix) as (path, name):
                save_reference(reference, path)
        except ValueError as error:
            raise ValueError(f"{SAVE}: {error}") from error
        except OSError as error:
            todo = remedy(error, WRITABLE)
            raise OSError(
                f"{SAVE}: {error.strerror or error}. Nothing of it is left; {todo} and queue it "
                f"again."
            ) from error
        shown = f"{name}, {path.stat().st_size / 1e6:.1f} MB"
        if not host.is_listed(path):
            shown += (
                f". To load it, move it into models/{host.REFERENCES}: {LOAD} lists that folder "
                f"and "
                "output/kindred"
            )
        log.info("%s: %s", SAVE, shown)
        host.tell(cls, shown)
        return io.NodeOutput(ui=ui.PreviewText(shown))


class LoadReference(io.ComfyNode):
    """A REFERENCE as Save Reference wrote it, bit for bit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredLoadReference",
            display_name=LOAD,
            category="Kindred",
            description="Reads a reference that Save Reference wrote, and shows what it is. With "
            "the same model and LoRAs it does exactly what the unsaved one did. Put files from "
            "other machines into models/kindred_references.",
            search_aliases=[
                "load subject",
                "load anchors",
                "reusable subject",
                "import reference",
                "subject library",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.reference_files(),
                    tooltip="A .safetensors in the output folder's kindred folder, or in "
                    "models/kindred_references.",
                )
            ],
            outputs=[
                host.Reference.Output(
                    display_name="reference",
                    tooltip="The saved reference, unchanged.",
                ),
                *its_settings(),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        try:
            bank = load_reference(host.reference_path(file), host.progress)
        except FileNotFoundError:
            raise
        except ValueError as error:
            raise ValueError(f"{LOAD}: {error}") from error
        except OSError as error:
            raise OSError(
                f"{LOAD}: {error}. Look at that folder and its disk, then queue it again."
            ) from error
        origin, size = origin_of(bank), size_of(bank)
        said = report(bank, origin, size)
        host.tell(cls, said)
        log.info(
            "%s: %s, %d picture%s, %s, made with model %s, %.1f MB",
            LOAD,
            file,
            bank.pictures,
            "s" * (bank.pictures > 1),
            bank.trajectory.schedule,
            bank.model_key,
            bank.bytes / 1e6,
        )
        settings = origin.subject, origin.steps, origin.scheduler, origin.sampler
        levels = bank.trajectory.sigmas.flip(0)
        return io.NodeOutput(bank, *settings, *size, levels, ui=shown(cls, bank))

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Another file under the same name is another reference."""
        stat = host.reference_path(file).stat()
        return f"{stat.st_mtime_ns} {stat.st_size}"


def its_settings() -> list[io.Output]:
    """How a reference was made, for the nodes that have to be set alike."""
    return [
        io.String.Output(
            display_name="subject",
            tooltip="The word that names the subject: for Subject Prompts.",
        ),
        io.Int.Output(display_name="steps", tooltip="Its steps: for the sampler."),
        io.AnyType.Output(
            display_name="scheduler",
            tooltip="Its scheduler: for the sampler. custom: wire sigmas instead.",
        ),
        io.AnyType.Output(
            display_name="sampler_name",
            tooltip="For a story's anchors: the sampler that further pictures need. For a photo: "
            "euler, though any sampler works.",
        ),
        io.Int.Output(display_name="width", tooltip="In pixels: for Empty Latent Image."),
        io.Int.Output(display_name="height", tooltip="In pixels: for Empty Latent Image."),
        io.Sigmas.Output(
            display_name="sigmas",
            tooltip="Its noise levels, the noisiest first: for SamplerCustom.",
        ),
    ]


def size_of(bank: ReferenceBank) -> tuple[int, int]:
    """Width and height of its pictures in pixels."""
    pixels = host.cell_of(bank.model_key)
    height, width = bank.trajectory.latents.shape[-2:]
    return width * pixels, height * pixels


def report(bank: ReferenceBank, origin: Origin, size: tuple[int, int]) -> str:
    """What stands on the node."""
    kind = "anchors of a story" if bank.anchors else "a photo" + "s" * (bank.pictures > 1)
    by = f", {origin.sampler}" if bank.anchors else ""
    said = (
        f"{origin.subject or 'subject by mask'}: {kind}, {size[0]}x{size[1]}, "
        f"{origin.scheduler}{by}, {origin.steps} steps, {bank.bytes / 1e6:.1f} MB, "
        f"{bank.model_key.split(' ')[0]}"
    )
    if origin.scheduler not in host.schedulers():
        said += ". KSampler has no such scheduler: wire sigmas into SamplerCustom"
    return said


def shown(node: type[io.ComfyNode], bank: ReferenceBank) -> ui.SavedImages | None:
    """Its pictures in rough colours under the subject's masks; None for a family without."""
    rough = host.rough_pictures_of(bank.model_key, bank.trajectory.latents[0])
    if rough is None:
        return None
    drawn = thumbnails(rough, bank, host.cell_of(bank.model_key))
    saved = ui.ImageSaveHelper.save_images(
        drawn, "kindred_reference", io.FolderType.temp, node, compress_level=1
    )
    return ui.SavedImages(saved)


def thumbnails(rough: Tensor, bank: ReferenceBank, cell: int) -> Tensor:
    """Rough pictures [r y x 3] at `cell` pixels to a cell, with their masks where it has any."""
    size = [n * cell for n in rough.shape[1:3]]
    wide = torch.nn.functional.interpolate(rough.movedim(-1, 1), size, mode="bilinear")
    masks = bank.masks.get(tuple(rough.shape[1:3]))
    pictures = wide.movedim(1, -1)
    return pictures if masks is None else draw_masks(pictures, masks)
