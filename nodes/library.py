"""Save Reference and Load Reference: a subject, once read or made, for other days and other
machines.
"""

from __future__ import annotations

import logging

from comfy_api.v0_0_2 import io, ui

from ..models.files import remedy
from ..models.reference.bank import ReferenceBank
from ..models.reference.file import load_reference, save_reference
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
            description="Reads a reference that Save Reference wrote. With the same model and "
            "LoRAs it does exactly what the unsaved one did. Put files from other "
            "machines into models/kindred_references.",
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
                )
            ],
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
        return io.NodeOutput(bank)

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Another file under the same name is another reference."""
        stat = host.reference_path(file).stat()
        return f"{stat.st_mtime_ns} {stat.st_size}"
