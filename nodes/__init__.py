"""The nodes, one family per file; the host looks at them through KindredExtension."""
from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from comfy_api.v0_0_2 import ComfyExtension, io

from .concept import ConceptEncoderLoad, CrossAttnDetailInject
from .host import offer_example, register_folders
from .inversion import DDIMInvert
from .prompts import SubjectPrompts
from .reference import MaskedSelfAttnInject, RefUNetCapture
from .training import ConceptEncoderTrain


class KindredExtension(ComfyExtension):
    """The pack's nodes in the order of the menu."""

    async def on_load(self) -> None:
        """The example photo is a courtesy: a full disk is no reason to have no nodes."""
        miniature = Path(__file__).parent.parent / "miniature"
        register_folders(miniature / "weights" / "concept_encoders")
        with suppress(OSError):
            offer_example(miniature / "reference.png")

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SubjectPrompts, DDIMInvert, RefUNetCapture, MaskedSelfAttnInject, ConceptEncoderLoad, CrossAttnDetailInject,
                ConceptEncoderTrain]
