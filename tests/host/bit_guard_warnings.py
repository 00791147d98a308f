"""What the bit guard compares beside pictures: what a tree warns of."""

from __future__ import annotations

import logging
from pathlib import Path

# of sentences that came or changed since the baseline
SAID_SINCE = (
    "is stretched over it",
    "marks all four corners",
    "the reference is never read",
    "the target mask is black",
)


class Warnings(logging.Handler):
    """Collects what the files of one tree warn of."""

    def __init__(self, tree: Path) -> None:
        super().__init__(logging.WARNING)
        self.tree, self.texts = str(tree), []

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if record.pathname.startswith(self.tree) and not any(new in said for new in SAID_SINCE):
            self.texts.append(said)
