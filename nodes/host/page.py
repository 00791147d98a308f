"""Words on a node of the page, beside the results that the API tells."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from comfy_api.v0_0_2 import io
from comfy_execution.utils import ExecutionContext, get_executing_context
from server import PromptServer

log = logging.getLogger(__name__)
EVENT = "kindred.text"
PACK = logging.getLogger(__name__.rsplit(".", 3)[0])  # whose loggers are those of all our modules


@dataclass
class _Shown:
    """What stands under the node that is running: a text sent anew takes the place of the one
    before it.
    """

    running: ExecutionContext | None = None
    texts: list[str] = field(default_factory=list)

    def add(self, text: str, node: str | None = None, warning: bool = False) -> None:
        """Under a node of the page that asked for the run, the running one unless another is named;
        nothing in process or in tests. warning: the page shows it where the node is out of sight.
        """
        server, running = getattr(PromptServer, "instance", None), get_executing_context()
        node = node or (running and running.node_id)
        if server is None or node is None:
            return
        if running is None or running is not self.running:
            self.running, self.texts = running, []
        if text not in self.texts:
            self.texts.append(text)
        shown = "\n".join(self.texts)
        server.send_progress_text(shown, node, server.client_id)
        # web/texts.js keeps it where frontend 1.58 takes that one away at the end of the run
        event = {"node": node, "text": shown, "warning": text if warning else ""}
        server.send_sync(EVENT, event, server.client_id)


_shown = _Shown()


class _Warnings(logging.Handler):
    """Shows each warning of the pack under the node that is running."""

    def emit(self, record: logging.LogRecord) -> None:
        _shown.add(record.getMessage(), warning=True)


def show_warnings() -> None:
    """From now on no warning of the pack stands in the log alone."""
    if not any(isinstance(handler, _Warnings) for handler in PACK.handlers):
        PACK.addHandler(_Warnings(logging.WARNING))


def tell(node: type[io.ComfyNode], text: str) -> None:
    """A line under the node's inputs, in both renderers.

    The node's schema needs `hidden=[io.Hidden.unique_id]`. ui.PreviewText alone reaches the API's
    outputs but no node on the page.
    """
    hidden = getattr(node, "hidden", None)
    if hidden is not None and hidden.unique_id is not None:
        _shown.add(text, hidden.unique_id)


def note(text: str) -> None:
    """What is no fault, but worth knowing before the work: in the log and under the node that is
    running, a sampler for instance.
    """
    log.info("%s", text)
    _shown.add(text)


def warn(text: str) -> None:
    """The same of what is likely to be a mistake."""
    log.warning("%s", text)
