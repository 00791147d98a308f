"""What the weight of a reference does, and what a node's strength says of it."""

from __future__ import annotations

from enum import Enum
from math import log

# Stands for log 0: fits float16, exp() of it is exactly 0 even in float64, and a row of nothing
# else is still no NaN.
LOG_ZERO = -1e4

# Of dial, measured on the miniature: docs/evaluation.md, "The dials"
SELF_ODDS = 2.0
CONCEPT_ODDS = 300.0
STORY_ODDS = 1.0


class WeightMode(str, Enum):
    """What the weight W of a reference does (method table of eq. 3; W = 1 is the plain
    concatenation in every mode).
    """

    # probabilities of the reference times W, then renormalised: rows stay convex
    LOGIT_BIAS = "logit bias"
    # the same without renormalising; done as W * v_ref, which is equal
    POST_SOFTMAX = "post softmax"
    KEY_SCALE = "key scale"  # W * k_ref: a temperature on the reference's logits
    # (1 - W) * attention without the reference + W * attention with it
    OUTPUT_BLEND = "output blend"


def dial(strength: float, node: str, odds: float = 0.0, most: float = 1.0) -> float:
    """A node's `strength` 0..most -> the share of its weight that is heard: 0 -> 0, 1 -> 1, rising,
    so that likeness rises evenly up to 1.

    In a softmax whose weight-1 reference stands to the own tokens as `odds` to 1, a weight W gives
    it the part W odds / (1 + W odds) of the whole; this is that solved for W, as a share of the
    part at weight 1. Odds 0, for what is added or blended, are the straight line. Past 1, where the
    part soon is the whole, it is the strength itself. ValueError for a strength outside 0..most.
    """
    require_strength(strength, node, most)
    return strength / (1 + odds * (1 - strength)) if strength < 1 else strength


def require_strength(strength: float, node: str, most: float = 1.0) -> None:
    """ValueError for a strength that is outside of a node's range."""
    if not 0 <= strength <= most:
        end = "1 (all of the likeness)" if most == 1 else f"{most:g}; 1 is all of the likeness"
        raise ValueError(
            f"{node}: strength is {strength}. Give a number from 0 (the plain picture) to {end}."
        )


def log_of(weight: float) -> float:
    """log W, at least LOG_ZERO."""
    return max(log(weight), LOG_ZERO)
