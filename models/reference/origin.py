"""How a reference was made, as far as it tells: what a sampler needs to read each step as it is
held.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..network.call import Half
from .bank import ReferenceBank

EULER = "euler"  # asks at each level of its schedule, on every network


@dataclass(frozen=True)
class Origin:
    """The settings that a reference was made with."""

    subject: str  # its words, separated by commas; "": a mask showed it
    scheduler: str  # "custom": SIGMAS were wired
    sampler: str  # of anchors theirs; a photo is read by any
    steps: int


def origin_of(bank: ReferenceBank) -> Origin:
    """A schedule's name is "scheduler, 50 steps", of anchors "scheduler, sampler, 50 steps"."""
    prompt, schedule = bank.prompts.get(Half.COND), bank.trajectory.schedule
    words = prompt.subject.words if prompt and prompt.subject else ()
    names = [name.strip() for name in schedule.split(",")]
    said = re.fullmatch(r"(\d+) steps", names[-1])
    steps = int(said[1]) if said else len(bank.trajectory.sigmas) - 1
    sampler = names[1] if len(names) > 2 else EULER
    return Origin(", ".join(words), names[0], sampler, steps)
