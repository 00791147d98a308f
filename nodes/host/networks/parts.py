"""What the rows of the table of networks share: names of classes, numbered blocks, the noise, how
keys turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher

from ....models.network.backbone import ALONE, CROSS, Backbone
from ....models.network.blocks import BlockId
from ....models.network.rope import Turn
from ..identity import family

# the host's network and the MODEL around it -> what it is to the methods
Row = Callable[[Any, ModelPatcher], Backbone]
LISTED = (
    "Load an SD1.5, SD2.x, SDXL, SD3.5, FLUX, Chroma, Qwen-Image, Lumina 2 or Z-Image model, "
    "or another that docs/networks.md lists."
)


def kinds(thing: object) -> tuple[str, ...]:
    """The full names of an object's class and of what it derives from, nearest first.

    Names, not classes: a class that this version of the host lacks must not break an import.
    """
    return tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(thing).__mro__)


def blocks(stage: str, layers: Iterable[object]) -> tuple[BlockId, ...]:
    """One block for every layer of a list: ("single", 0, 0), ("single", 1, 0), ..."""
    return tuple((stage, index, 0) for index, _ in enumerate(layers))


def self_and_cross(layers: Iterable[object]) -> tuple[BlockId, ...]:
    """Two calls for every layer: the picture's own, then the text's."""
    return tuple((stage, index, 0) for index, _ in enumerate(layers) for stage in (ALONE, CROSS))


def silent(*lists: Iterable[object]) -> tuple[None, ...]:
    """One call that holds no whole picture for every layer of these lists."""
    return tuple(None for layers in lists for _ in layers)


def side(patch: int | Iterable[int]) -> int:
    """Cells along one side of a token, of a patch said as y, as (y, x) or as (t, y, x)."""
    return patch if isinstance(patch, int) else int(tuple(patch)[-1])


def known(model: ModelPatcher, **facts: Any) -> Backbone:
    """A Backbone with the model's name and noise filled in."""
    sampling = model.get_model_object("model_sampling")
    flow = isinstance(sampling, comfy.model_sampling.CONST)
    # CONST.noise_scaling alone reads it
    scale = float(getattr(sampling, "noise_scale", 1.0)) if flow else 1.0
    return Backbone(family=family(model), flow=flow, noise_scale=scale, **facts)


def refused(model: ModelPatcher, why: str, remedy: str = LISTED) -> Backbone:
    """A network that cannot be read, with the reason in the user's words."""
    return known(model, calls=(), patch=1, unheard=f"{why}. {remedy}")


def turn(
    embedder: Any, axes: tuple[float, ...] = (0.0, 0.0, 0.0), halves: bool = False, **laid: Any
) -> Turn:
    """How positions rotate keys, by one of the host's EmbedND: positions [1 l a] ->
    [1 1 l d/2 2 2], or [1 l 1 d/2 2 2].

    laid: where the picture's tokens stand, where that is not (0, y, x); fields of Turn.
    """

    def rotation(positions: torch.Tensor) -> torch.Tensor:
        return embedder(positions[None])[0].flatten(0, 1)

    return Turn(axes, rotation, halves, **laid)


def by_frequencies(*axes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The rotation of a code that rotates pairs of channels by position times frequency; the
    frequencies [f] of each axis, whose channels stand one axis behind the other.
    """

    def rotation(positions: torch.Tensor) -> torch.Tensor:
        places = positions.cpu().double()  # some devices have no such numbers
        angles = torch.cat([places[:, i, None] * f for i, f in enumerate(axes)], -1)  # [l d/2]
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.stack((cos, -sin, sin, cos), -1)
            .unflatten(-1, (2, 2))
            .float()
            .to(positions.device)
        )

    return rotation


def about_zero(more_below: bool = False) -> Callable[[int], torch.Tensor]:
    """Places of tokens with the middle one at 0; more_below: of an odd number more stand below 0
    than above.
    """

    def along(side: int) -> torch.Tensor:
        return torch.arange(side) - (side + 1 if more_below else side) // 2

    return along


def matrices(code: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[l d/2 2 2] of the code that the host's language models make: cos [1 l d], sin and -sin
    [1 l d/2].
    """
    cos, sin, less_sin = (part[0] for part in code)
    pairs = torch.stack((cos[:, : sin.shape[-1]], less_sin, sin, cos[:, sin.shape[-1] :]), -1)
    return pairs.unflatten(-1, (2, 2)).float()
