"""Inputs that several nodes have, of one shape wherever they stand; what they mean is the node's to
say.
"""

from __future__ import annotations

import torch
from comfy_api.v0_0_2 import io

from ..models.attention.joint import TextShare
from ..models.attention.weights import WeightMode
from ..models.network.call import Halves
from ..models.presets import CUSTOM, Presets


def strength(tooltip: str, most: float = 1.0) -> io.Float.Input:
    """0 is the plain picture, 1 all of it; past 1 where that was measured to help."""
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.0,
        max=most,
        step=0.05,
        display_mode=io.NumberDisplay.slider,
        tooltip=tooltip,
    )


def weight(tooltip: str) -> io.Float.Input:
    """What strength 1 stands for."""
    return io.Float.Input(
        "weight",
        display_name="full strength",
        default=1.0,
        min=0.0,
        max=10.0,
        step=0.05,
        advanced=True,
        tooltip=tooltip,
    )


def preset(presets: Presets, tooltip: str) -> io.Combo.Input:
    """Named values of strength and window."""
    return io.Combo.Input(
        "preset", options=[*presets.names], default=CUSTOM, optional=True, tooltip=tooltip
    )


def weight_mode(tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(
        "weight_mode",
        display_name="strength mode",
        options=[mode.value for mode in WeightMode],
        default=WeightMode.LOGIT_BIAS.value,
        advanced=True,
        tooltip=tooltip,
    )


def blocks(tooltip: str, default: str = "all") -> io.String.Input:
    return io.String.Input("blocks", default=default, advanced=True, tooltip=tooltip)


def percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A share of the sampling."""
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=tooltip
    )


def halves(default: Halves, tooltip: str) -> io.Combo.Input:
    """Of classifier-free guidance."""
    return io.Combo.Input(
        "halves",
        options=[half.value for half in Halves],
        default=default.value,
        advanced=True,
        tooltip=tooltip,
    )


AS_COMPUTED, HALF = "as computed", "float16"


def precision(tooltip: str) -> io.Combo.Input:
    """In which features are stored; stored_in says what a choice means."""
    return io.Combo.Input(
        "precision",
        options=[AS_COMPUTED, HALF],
        default=AS_COMPUTED,
        advanced=True,
        tooltip=tooltip,
    )


def stored_in(choice: str) -> torch.dtype | None:
    """None: as they are computed."""
    return torch.float16 if choice == HALF else None


def text_share(tooltip: str) -> io.Combo.Input:
    """Where text and picture share a softmax."""
    return io.Combo.Input(
        "text_share",
        options=[share.value for share in TextShare],
        default=TextShare.KEPT.value,
        optional=True,
        advanced=True,
        tooltip=tooltip,
    )


def target_mask(tooltip: str) -> io.Mask.Input:
    return io.Mask.Input("target_mask", optional=True, tooltip=tooltip)
