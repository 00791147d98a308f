"""Words on a node of the page, beside the results that the API tells."""

from __future__ import annotations

import logging

from comfy_api.v0_0_2 import io
from comfy_execution.utils import get_executing_context
from server import PromptServer

log = logging.getLogger(__name__)


def tell(node: type[io.ComfyNode], text: str) -> None:
    """A line under the node's inputs, on the page that asked for the run, in both renderers;
    nothing in process or in tests.

    The node's schema needs `hidden=[io.Hidden.unique_id]`. ui.PreviewText alone reaches the API's
    outputs but no node on the page.
    """
    server, hidden = getattr(PromptServer, "instance", None), getattr(node, "hidden", None)
    if server is not None and hidden is not None and hidden.unique_id is not None:
        server.send_progress_text(text, hidden.unique_id, server.client_id)


def warn(text: str) -> None:
    """A warning in the log and under the node that is running, a sampler for instance."""
    log.warning("%s", text)
    server, running = getattr(PromptServer, "instance", None), get_executing_context()
    if server is not None and running is not None:
        server.send_progress_text(text, running.node_id, server.client_id)
