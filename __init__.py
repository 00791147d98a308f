"""Kindred: pictures that share a subject. Masked self-attention injection and consistent stories
for ComfyUI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.v0_0_2 import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """What the host calls once: registers the miniature's architecture and names the nodes."""
    from .miniature.registration import register
    from .nodes import KindredExtension

    register()
    return KindredExtension()
