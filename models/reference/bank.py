"""Reference features: what a pass over a picture of the subject leaves behind for other pictures to
attend to.

One type serves inverted photos (paper A, arXiv 2403.11284) and, later, generated anchors (paper B,
arXiv 2402.03286).
Axes: r reference pictures, y x token grid, n = y*x tokens, l kept tokens over all r, c channels, t
steps, w text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..network.blocks import BlockId, Grid
from ..network.call import Half
from ..noise.inversion import InversionTrajectory
from ..subject.words import SubjectTokens
from .rows import Layer, RowReader, kept_of, split_row, thinned

BANK_VERSION = 1
# of one sampler's sigmas through float32; a step of any real schedule is far more
LOG_SIGMA_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class ReferencePrompt:
    """A prompt as the Ref-UNet reads it: cross [1 w c], the host's other plain entries, and its
    subject tokens.
    """

    text: str
    cross: Tensor
    extras: Mapping[str, Tensor | int | float | str] = field(default_factory=dict)
    subject: SubjectTokens | None = None


# per grid, per row of features: flat positions [l] among r*y*x tokens
Kept = Mapping[Grid, Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class AnchorFeatures:
    """What generated anchors leave beside the tokens of their last stage (ConsiStory,
    arXiv 2402.03286, 4.3 and 4.4).

    Their masks run along and dropout is drawn anew at every step, so every row keeps other tokens.
    Rows are those of the bank's features. Empty tensors stand where the first stage did not come,
    or outside of the injection's window; the first stage differs from the second at the sigmas from
    settings["first_from"] down to settings["first_until"].
    """

    kept: Kept
    # [s] per row: tokens of the first stage, where the second differs from it
    first: Mapping[Half, Sequence[Tensor]]
    first_kept: Kept
    # [s] per row: self-attention outputs of the subject's tokens (cond) before injection
    outputs: Sequence[Tensor]
    output_layers: tuple[Layer, ...]
    # [r n c] at the step nearest t = 261, smoothed; None: made without feature injection
    features: Tensor | None
    subject: Tensor | None  # [l] flat positions of the subject among r*n there
    # of the node that made them
    settings: Mapping[str, float | int | str] = field(default_factory=dict)

    def in_first_stage(self, sigma: float) -> bool:
        slack = 1 + LOG_SIGMA_TOLERANCE
        return (
            self.settings.get("first_until", 1.0) / slack
            <= sigma
            <= self.settings.get("first_from", 0.0) * slack
        )


@dataclass(frozen=True, eq=False)
class ReferenceBank:
    """Normed hidden tokens before to_k/to_v for every (layer, sigma, CFG half), or their keys and
    values; in host memory, with masks.

    features[half]: [t s], or t of [s_i] for anchors - row i belongs to trajectory.sigmas[i + 1],
    and holds the kept tokens of every layer of `layers` one after another; masks[grid]: bool
    [r y x]; maps: the subject words' map at every step [t r y x] fp32, None where the user gave the
    mask; anchors: None where the pictures were inverted, not generated; share: of the subject's
    tokens that are kept (the layers' `loudness` makes up for the others).
    """

    trajectory: InversionTrajectory
    prompts: Mapping[Half, ReferencePrompt]
    layers: tuple[Layer, ...]
    masks: Mapping[Grid, Tensor]
    features: Mapping[Half, Tensor | Sequence[Tensor]]
    model_key: str
    maps: Tensor | None = None
    anchors: AnchorFeatures | None = None
    version: int = BANK_VERSION
    share: float = 1.0

    @property
    def pictures(self) -> int:
        return self.trajectory.latents.shape[1]

    @cached_property
    def kept(self) -> dict[Grid, Tensor]:
        """Flat positions [l] of the kept tokens among the r*y*x tokens of each grid."""
        return {
            grid: thinned(mask.flatten().nonzero().squeeze(1), self.share)
            for grid, mask in self.masks.items()
        }

    @cached_property
    def cells(self) -> dict[Grid, Tensor]:
        """Where in its picture each kept token stands, (y, x) [l 2], per grid."""
        return {
            grid: torch.stack((at % (grid[0] * grid[1]) // grid[1], at % grid[1]), -1)
            for grid, at in self.kept.items()
        }

    @cached_property
    def loudness(self) -> dict[Grid, float]:
        """How many tokens of the subject each kept one stands for, per grid: 1 where all
        are kept.
        """
        if self.share == 1:
            return dict.fromkeys(self.grids.values(), 1.0)
        return {
            grid: int(mask.sum()) / max(len(self.kept[grid]), 1)
            for grid, mask in self.masks.items()
        }

    @cached_property
    def most_kept(self) -> dict[Grid, int]:
        """The most tokens [l] of each grid that any step holds."""
        if self.anchors is None:
            return {grid: len(positions) for grid, positions in self.kept.items()}
        return {grid: max(map(len, rows)) for grid, rows in self.anchors.kept.items()}

    @property
    def blocks(self) -> tuple[BlockId, ...]:
        return tuple(layer.block for layer in self.layers)

    @cached_property
    def grids(self) -> dict[BlockId, Grid]:
        return {layer.block: layer.grid for layer in self.layers}

    @property
    def bytes(self) -> int:
        """Bytes held by the features: steps x halves x sum over layers of l * c * itemsize."""
        held = [
            *self.features.values(),
            *((*self.anchors.first.values(), self.anchors.outputs) if self.anchors else ()),
        ]
        return sum(row.numel() * row.element_size() for rows in held for row in rows)

    @property
    def live(self) -> bool:
        """Whether no step is held: of a transformer, whose tokens would fill gigabytes, every step
        is read anew.
        """
        return self.anchors is None and not any(map(len, self.features.values()))

    def step_of(self, sigma: float) -> int | None:
        """The row of `features` captured at this sigma, or None when the Ref-UNet has to run at it
        (live).
        """
        if self.live:
            return None
        step = self.trajectory.nearest(sigma, LOG_SIGMA_TOLERANCE)
        return None if step is None or step == 0 else step - 1

    def kept_at(self, grid: Grid, sigma: float) -> Tensor:
        """Flat positions [l] of the tokens of a grid that are kept at this sigma: as of `kept`, of
        anchors as of their step.
        """
        step = self.step_of(sigma) if self.anchors else None
        return self.kept[grid] if step is None else self.anchors.kept[grid][step]

    def latent_at(self, sigma: float) -> Tensor:
        """The reference's latent [r c y x] at a sigma between or beyond the stored ones, on a
        diffusion or a flow.

        On a deterministic path linear in sigma; beyond its end, and on an edit-friendly path, whose
        levels have noise of their own, the nearest level's noise at this sigma: both noise paths
        are straight from the picture through a level.
        """
        path = self.trajectory
        if path.noise_maps is None and sigma <= path.sigmas[-1]:
            return path.at(max(sigma, 0.0))  # an odd schedule may ask below
        i = 1 + int((path.sigmas[1:] / sigma).log().abs().argmin())
        return path.latents[0] + (path.latents[i] - path.latents[0]) * (sigma / path.sigmas[i])

    def tokens(
        self,
        half: Half,
        step: int,
        device: torch.device,
        dtype: torch.dtype,
        first: bool = False,
        reader: RowReader | None = None,
    ) -> dict[BlockId, Tensor]:
        """Kept tokens [l c] of every layer at one step: one copy to the device, then views. first:
        of the anchors' first stage.
        """
        a = self.anchors
        first = (
            first and a is not None and a.in_first_stage(float(self.trajectory.sigmas[step + 1]))
        )
        kept = (
            {grid: (a.first_kept if first else a.kept)[grid][step] for grid in a.kept}
            if a
            else self.kept
        )
        rows = (a.first if first else self.features)[half]
        row = (reader or RowReader(device))(rows, step).to(dtype)
        return split_row(
            row, self.layers, {grid: len(positions) for grid, positions in kept.items()}
        )

    def keep(
        self, tokens: Mapping[BlockId, Tensor], kept: Mapping[Grid, Tensor] | None = None
    ) -> dict[BlockId, Tensor]:
        """[r n c] per block as a Ref-UNet pass leaves them -> the kept tokens [l c] of those of
        this bank's layers. kept: as of the bank, where the tokens are.
        """
        kept = self.kept if kept is None else kept
        return {
            layer.block: kept_of(layer.block, layer.grid, tokens[layer.block], kept[layer.grid])
            for layer in self.layers
            if layer.block in tokens
        }
