"""Reference features: what a pass over a picture of the subject leaves behind for other pictures to attend to.

One type serves inverted photos (paper A, arXiv 2403.11284) and, later, generated anchors (paper B, arXiv 2402.03286).
Axes: r reference pictures, y x token grid, n = y*x tokens, l kept tokens over all r, c channels, t steps, w text tokens.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from .inversion import InversionTrajectory

BlockId = tuple[str, int, int]  # ("output", 4, 0): stage, index in the stage, depth inside the block
Grid = tuple[int, int]  # (y, x) tokens
BANK_VERSION = 1
LOG_SIGMA_TOLERANCE = 1e-3  # of one sampler's sigmas through float32; a step of any real schedule is far more
LARGE = 4e9  # bytes of main memory worth a warning
log = logging.getLogger(__name__)


class Half(str, Enum):
    """Which half of classifier-free guidance a row belongs to."""
    COND = "cond"
    UNCOND = "uncond"


class Halves(str, Enum):
    """Which halves of the generation read the reference, and which of its features they read (method.md 2.2, CFG)."""
    COND = "cond only"  # guidance amplifies the reference
    BOTH = "both"  # each half reads the features of its own half
    SHARED = "shared"  # both halves read the features of the cond half

    def source(self, half: Half) -> Half | None:
        """The captured half that a generating row of `half` reads, or None when it reads none."""
        if self is Halves.BOTH:
            return half
        return Half.COND if self is Halves.SHARED or half is Half.COND else None


@dataclass(frozen=True)
class SubjectTokens:
    """Where the subject's words stand in an encoded prompt: one tuple of positions per row of the conditioning."""
    words: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    by_word: tuple[tuple[tuple[int, ...], ...], ...] = ()  # the same for each word alone; (): there is but one

    def of_words(self, rows: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Positions per word, per picture; the host repeats the rows of a conditioning to the size of the batch."""
        return tuple(tuple(word[i % len(word)] for i in range(rows)) for word in self.by_word or (self.positions,))


@dataclass(frozen=True, eq=False)
class ReferencePrompt:
    """A prompt as the Ref-UNet reads it: cross [1 w c], the host's other plain entries, and its subject tokens."""
    text: str
    cross: Tensor
    extras: Mapping[str, Tensor | int | float | str] = field(default_factory=dict)
    subject: SubjectTokens | None = None


@dataclass(frozen=True)
class Layer:
    """A self-attention layer whose tokens a bank holds."""
    block: BlockId
    grid: Grid
    channels: int


def block_name(block: BlockId) -> str:
    """("output", 4, 0) -> "output 4"; depth is named only where a block has several: "output 4.1"."""
    return f"{block[0]} {block[1]}" + (f".{block[2]}" if block[2] else "")


def select_blocks(wanted: str, available: Sequence[BlockId], node: str) -> tuple[BlockId, ...]:
    """Resolve "all", "encoder", "middle", "decoder", "masactrl" or a list such as "input 4, output 3-5, middle 0".

    Order is that of `available` (the order in which the UNet runs). "masactrl" is attention layers 10 and later
    (arXiv 2304.08465). Raises ValueError naming the unknown word and the blocks that exist.
    """
    presets = {
        "all": lambda i, b: True, "encoder": lambda i, b: b[0] == "input", "middle": lambda i, b: b[0] == "middle",
        "decoder": lambda i, b: b[0] == "output", "masactrl": lambda i, b: i >= 10,
    }
    chosen: set[BlockId] = set()
    for term in filter(None, (t.strip().lower() for t in wanted.split(","))):
        if term in presets:
            found = {b for i, b in enumerate(available) if presets[term](i, b)}
        elif match := re.fullmatch(r"(input|middle|output)\s*(\d+)(?:\s*-\s*(\d+))?(?:\.(\d+))?", term):
            stage, first, last, depth = match[1], int(match[2]), int(match[3] or match[2]), match[4]
            found = {b for b in available if b[0] == stage and first <= b[1] <= last and depth in (None, str(b[2]))}
        else:
            found = set()
        if not found:
            raise ValueError(f"{node}: no attention block matches {term!r}. This model has "
                             f"{', '.join(dict.fromkeys(f'{b[0]} {b[1]}' for b in available))}; presets are {', '.join(presets)}.")
        chosen |= found
    if not chosen:
        raise ValueError(f"{node}: blocks is empty. Write {' or '.join(presets)}, or a list such as 'output 3-5, middle 0'.")
    return tuple(b for b in available if b in chosen)


Kept = Mapping[Grid, Sequence[Tensor]]  # per grid, per row of features: flat positions [l] among r*y*x tokens


@dataclass(frozen=True, eq=False)
class AnchorFeatures:
    """What generated anchors leave beside the tokens of their last stage (ConsiStory, arXiv 2402.03286, 4.3 and 4.4).

    Their masks run along and dropout is drawn anew at every step, so every row keeps other tokens. Rows are those of the
    bank's features. Empty tensors stand where the first stage did not come, or outside of the injection's window; the first
    stage differs from the second at the sigmas from settings["first_from"] down to settings["first_until"].
    """
    kept: Kept
    first: Mapping[Half, Sequence[Tensor]]  # [s] per row: tokens of the first stage, where the second differs from it
    first_kept: Kept
    outputs: Sequence[Tensor]  # [s] per row: self-attention outputs of the subject's tokens (cond) before injection
    output_layers: tuple[Layer, ...]
    features: Tensor | None  # [r n c] at the step nearest t = 261, smoothed; None: made without feature injection
    subject: Tensor | None  # [l] flat positions of the subject among r*n there
    settings: Mapping[str, float | int | str] = field(default_factory=dict)  # of the node that made them

    def in_first_stage(self, sigma: float) -> bool:
        slack = 1 + LOG_SIGMA_TOLERANCE
        return self.settings.get("first_until", 1.0) / slack <= sigma <= self.settings.get("first_from", 0.0) * slack


@dataclass(frozen=True, eq=False)
class ReferenceBank:
    """Normed hidden tokens before to_k/to_v for every (layer, sigma, CFG half), in host memory, with their masks.

    features[half]: [t s], or t of [s_i] for anchors - row i belongs to trajectory.sigmas[i + 1], and holds the kept tokens of
    every layer of `layers` one after another; masks[grid]: bool [r y x]; maps: the subject words' map at every step [t r y x]
    fp32, None where the user gave the mask; anchors: None where the pictures were inverted, not generated.
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

    @property
    def pictures(self) -> int:
        return self.trajectory.latents.shape[1]

    @cached_property
    def kept(self) -> dict[Grid, Tensor]:
        """Flat positions [l] of the kept tokens among the r*y*x tokens of each grid."""
        return {grid: mask.flatten().nonzero().squeeze(1) for grid, mask in self.masks.items()}

    @property
    def blocks(self) -> tuple[BlockId, ...]:
        return tuple(layer.block for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes held by the features: steps x halves x sum over layers of l * c * itemsize (performance.md 1.3)."""
        held = [*self.features.values(), *((*self.anchors.first.values(), self.anchors.outputs) if self.anchors else ())]
        return sum(row.numel() * row.element_size() for rows in held for row in rows)

    def step_of(self, sigma: float) -> int | None:
        """The row of `features` captured at this sigma, or None when the Ref-UNet has to run at it (live)."""
        step = self.trajectory.nearest(sigma, LOG_SIGMA_TOLERANCE)
        return None if step is None or step == 0 else step - 1

    def latent_at(self, sigma: float) -> Tensor:
        """The reference's latent [r c y x] at a sigma between or beyond the stored ones.

        On a DDIM path linear in sigma; beyond its end, and on an edit-friendly path, whose levels have noise of their own, the
        nearest level's noise at this sigma.
        """
        path = self.trajectory
        if path.noise_maps is None and sigma <= path.sigmas[-1]:
            return path.at(sigma)
        i = 1 + int((path.sigmas[1:] / sigma).log().abs().argmin())
        return path.latents[0] + (path.latents[i] - path.latents[0]) * (sigma / path.sigmas[i])

    def tokens(self, half: Half, step: int, device: torch.device, dtype: torch.dtype, first: bool = False) -> dict[BlockId, Tensor]:
        """Kept tokens [l c] of every layer at one step: one copy to the device, then views. first: of the anchors' first stage."""
        a = self.anchors
        first = first and a is not None and a.in_first_stage(float(self.trajectory.sigmas[step + 1]))
        kept = {grid: (a.first_kept if first else a.kept)[grid][step] for grid in a.kept} if a else self.kept
        row = (a.first if first else self.features)[half][step].to(device=device, dtype=dtype, non_blocking=True)
        return split_row(row, self.layers, {grid: len(positions) for grid, positions in kept.items()})

    def keep(self, tokens: Mapping[BlockId, Tensor]) -> dict[BlockId, Tensor]:
        """[r n c] per block as a Ref-UNet pass leaves them -> the kept tokens [l c] of this bank's layers."""
        for layer in self.layers:
            (y, x), n = layer.grid, tokens[layer.block].shape[1]
            if n != y * x:  # on CUDA a wrong index would take the whole server down
                raise ValueError(f"Kindred: block {block_name(layer.block)} gave {n} tokens where the reference has {y}x{x}. A node that "
                                 "changes the grid (Deep Shrink, token merging) is on the model: remove it.")
        return {layer.block: gather(tokens[layer.block], self.kept[layer.grid].to(tokens[layer.block].device))
                for layer in self.layers}


def split_row(row: Tensor, layers: Sequence[Layer], lengths: Mapping[Grid, int]) -> dict[BlockId, Tensor]:
    """A row [s] of kept tokens -> views [l c] per layer."""
    parts = row.split([lengths[layer.grid] * layer.channels for layer in layers])
    return {layer.block: part.view(-1, layer.channels) for layer, part in zip(layers, parts)}


def gather(tokens: Tensor, kept: Tensor) -> Tensor:
    """tokens [r n c], kept [l] flat positions over r*n -> [l c]."""
    return tokens.reshape(-1, tokens.shape[-1]).index_select(0, kept)


@dataclass
class BankBuilder:
    """Collects the tokens of a running reference pass; `finish` gathers them once the masks are known."""
    precision: torch.dtype | None = None  # None keeps the dtype the model computes in
    _steps: dict[tuple[Half, int], dict[BlockId, Tensor]] = field(default_factory=dict)

    def add(self, half: Half, step: int, tokens: Mapping[BlockId, Tensor], steps: int = 1) -> None:
        """tokens: [r n c] per block; copied to host memory. steps: how many such calls will come, for the warning of a large bank."""
        if not self._steps and (total := sum(t.numel() * t.element_size() for t in tokens.values()) * steps) > LARGE:
            log.warning("Kindred: the reference pass holds up to %.1f GB of main memory until the mask is known. Fewer blocks, a wired "
                        "mask or precision float16 need less.", total / 1e9)
        self._steps[half, step] = {b: t.to("cpu", self.precision or t.dtype, copy=True) for b, t in tokens.items()}

    def finish(self, grids: Mapping[BlockId, Grid], masks: Mapping[Grid, Tensor], trajectory: InversionTrajectory,
               prompts: Mapping[Half, ReferencePrompt], model_key: str, maps: Tensor | None) -> ReferenceBank:
        """Gather the masked tokens of every step into one row per step; full tokens are freed as they are read."""
        first = next(iter(self._steps.values()))
        layers = tuple(Layer(block, grids[block], tokens.shape[-1]) for block, tokens in first.items())
        bank = ReferenceBank(trajectory, prompts, layers, masks, {}, model_key, maps)
        features = {}
        for half in dict.fromkeys(h for h, _ in self._steps):
            steps = sorted(s for h, s in self._steps if h is half)
            rows = (bank.keep(self._steps.pop((half, s))) for s in steps)
            features[half] = torch.stack([torch.cat([t.flatten() for t in row.values()]) for row in rows])
        return ReferenceBank(trajectory, prompts, layers, masks, features, model_key, maps)
