"""The nodes, one family per file; the host looks at them through KindredExtension."""

from __future__ import annotations

from pathlib import Path

from comfy_api.v0_0_2 import ComfyExtension, io

from .anchors import AnchorSampler
from .capture import RefUNetCapture
from .comparison import ComparisonGrid
from .concept import ConceptEncoderLoad, CrossAttnDetailInject
from .consistory import ConsiStory
from .evaluation import ConsistencyScore
from .host import register_folders, register_references, show_warnings
from .inject import MaskedSelfAttnInject
from .inversion import DDIMInvert
from .library import LoadReference, SaveReference
from .photos import LoadPhoto, offer_examples
from .preview import ReferencePreview
from .probe import BlockProbe
from .prompts import SubjectPrompts
from .sockets import guarded
from .training import ConceptEncoderTrain


class KindredExtension(ComfyExtension):
    """The pack's nodes in the order of the menu."""

    async def on_load(self) -> None:
        show_warnings()
        miniature = Path(__file__).parent.parent / "miniature"
        register_folders(miniature / "weights" / "concept_encoders")
        register_references(miniature / "weights" / "references")
        offer_examples()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes = (
            LoadPhoto,
            SubjectPrompts,
            DDIMInvert,
            RefUNetCapture,
            MaskedSelfAttnInject,
            ConceptEncoderLoad,
            CrossAttnDetailInject,
            ConceptEncoderTrain,
            ConsiStory,
            AnchorSampler,
            SaveReference,
            LoadReference,
            ReferencePreview,
            ConsistencyScore,
            ComparisonGrid,
            BlockProbe,
        )
        return [guarded(node) for node in nodes]
