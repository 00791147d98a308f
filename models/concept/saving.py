"""A training that is watched and kept: every step up to the last, what it learned saved as it goes
(Concept Encoder Train).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import remedy
from .pictures import NODE
from .training import Trainer
from .training_state import read_state

WRITABLE = "another folder for concept_encoders (extra_model_paths.yaml)"
PREVIEW_EVERY = 2.0  # seconds
log = logging.getLogger(__name__)


def known_state(path: Path) -> dict[str, Any]:
    """A state to go on from; OSError, in the node's words, where the system does not give it."""
    try:
        return read_state(path)
    except OSError as error:
        raise OSError(
            f"{NODE}: {error}. It stays as it is; look at that folder and its disk, then queue it "
            f"again."
        ) from error


@dataclass
class Saving:
    """Saves a trainer's state and averaged encoder; knows which step the files hold."""

    trainer: Trainer
    path: Path
    state: Path
    made_with: Mapping[str, Any]
    facts: Mapping[str, Any]
    saved: int = 0

    def __post_init__(self) -> None:
        self.saved = self.trainer.step_number if self.path.exists() else 0

    def __call__(self) -> None:
        """OSError says what there still is."""
        if self.trainer.step_number == self.saved:
            return
        try:
            self.trainer.save(self.path, self.state, self.made_with, self.facts)
        except OSError as error:
            kept = (
                f"{self.path.name} of step {self.saved} is whole and stays"
                if self.saved
                else "nothing was saved before"
            )
            raise OSError(
                f"{NODE}: step {self.trainer.step_number} could not be saved ({error}); {kept}. To "
                f"resume, {remedy(error, WRITABLE)} and queue the same again: it resumes at step "
                f"{self.saved}."
            ) from error
        self.saved = self.trainer.step_number
        log.info(
            "%s: step %d of %d saved as %s",
            NODE,
            self.saved,
            self.trainer.settings.steps,
            self.path,
        )


@dataclass
class Watching:
    """Tells how far a training is, with the picture of its losses from time to time."""

    trainer: Trainer
    tell: Callable[[int, Any], None]  # (steps done, picture or None)
    draw: Callable[[Sequence[float], int], Any]  # (every step's loss, all steps to come) -> picture
    shown: float = -math.inf  # when

    def __call__(self) -> None:
        now, done, steps = time.monotonic(), self.trainer.step_number, self.trainer.settings.steps
        # the last one stands on the node until its result does
        due = now - self.shown >= PREVIEW_EVERY or done == steps
        picture = self.draw(self.trainer.losses, steps) if due else None
        self.shown = now if picture else self.shown
        self.tell(done, picture)


def run(save_every: int, save: Saving, watch: Watching, interrupted: type[BaseException]) -> None:
    """Every step up to the last. The host's interrupt, or a loss that is not finite, is raised once
    what was learned is saved.
    """
    trainer = save.trainer
    try:
        watch.tell(trainer.step_number)
        while trainer.step_number < trainer.settings.steps:
            trainer.step()
            watch()
            if trainer.step_number % save_every == 0:
                save()
    except (interrupted, FloatingPointError) as stop:
        try:
            save()
        except OSError as error:
            log.warning("%s", error)
        if isinstance(stop, interrupted):
            log.info(
                "%s: cancelled at step %d; %s holds what was learned",
                NODE,
                trainer.step_number,
                save.path,
            )
        raise
    save()
