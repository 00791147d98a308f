"""Presets by intent: named values of an inject node's own inputs, chosen by the parts of identity
(docs/evaluation.md, "Presets").
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from .attention.weights import require_strength
from .concept.inject import NODE as CROSS
from .reference.inject import NODE as MASKED_SELF

log = logging.getLogger(__name__)
CUSTOM = "custom"  # the inputs as they stand
IDENTITY, BESIDE, GENTLE, STRONG = "identity", "beside an encoder", "gentle", "strong"
Window = tuple[float, float]  # start_percent, end_percent


@dataclass(frozen=True)
class Preset:
    """What strength 1 stands for, and the window; the node's strength turns it down from there."""

    strength: float
    window: Window


@dataclass(frozen=True)
class Presets:
    """The presets of one node, and what its inputs are without one."""

    node: str
    window: Window  # of the sampling, by default
    most: float  # that its strength can be
    named: Mapping[str, Preset]

    @property
    def names(self) -> tuple[str, ...]:
        """What the input offers."""
        return CUSTOM, *self.named

    def chosen(self, name: str, strength: float, window: Window) -> tuple[float, Window]:
        """Strength and window by the preset of this name; as they are given for custom.

        A window that was typed by hand is said in the log where the preset has another. Raises
        ValueError for a preset or a strength that there is not.
        """
        require_strength(strength, self.node, self.most)
        if name == CUSTOM:
            return strength, window
        if name not in self.named:
            raise ValueError(
                f"{self.node}: preset is {name!r:.200}. Choose from {', '.join(self.names)}."
            )
        preset = self.named[name]
        if window not in (self.window, preset.window):
            log.warning(
                "%s: start_percent %s and end_percent %s are not used, because preset is %s. "
                "Choose %s to use them.",
                self.node,
                *window,
                name,
                CUSTOM,
            )
        return min(strength * preset.strength, self.most), preset.window


# measured: docs/evaluation.md, "Presets" and "The defaults". An encoder's photo that is read from
# the first step on is less alike, and guidance bends scenes
ALL, LATE, BEHIND_LAYOUT = (0.0, 1.0), (0.4, 1.0), (0.2, 1.0)
SELF = Presets(
    MASKED_SELF,
    ALL,
    1.0,
    {IDENTITY: Preset(1.0, ALL), BESIDE: Preset(1.0, LATE), GENTLE: Preset(0.5, ALL)},
)
CONCEPT = Presets(
    CROSS,
    BEHIND_LAYOUT,
    2.0,
    {
        IDENTITY: Preset(1.0, BEHIND_LAYOUT),
        GENTLE: Preset(0.5, BEHIND_LAYOUT),
        STRONG: Preset(2.0, BEHIND_LAYOUT),
    },
)
