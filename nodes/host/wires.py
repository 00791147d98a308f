"""What the host tells of a node's wires before anything runs."""

from __future__ import annotations

from collections.abc import Mapping

from comfy_api.v0_0_2 import io
from comfy_execution.validation import validate_node_input


def mismatch(node: type[io.ComfyNode], types: Mapping[str, str]) -> str:
    """Which wire carries another type than its input takes, as the host itself would say; it does
    not where a node asks for the types. "" where none does.
    """
    for socket in node.define_schema().inputs:
        kind, carried = socket.get_io_type(), types.get(socket.id)
        if carried is not None and not validate_node_input(carried, kind):
            return f"{socket.id} is wired to {carried}, where {kind} belongs. Wire {kind} into it."
    return ""
