"""Reference features: what a pass over a picture of the subject leaves behind for other pictures to attend to.

One type serves inverted photos (paper A, arXiv 2403.11284) and, later, generated anchors (paper B, arXiv 2402.03286).
Axes: r reference pictures, y x token grid, n = y*x tokens, l kept tokens over all r, c channels, t steps, w text tokens.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor, nn

from ..noise.inversion import InversionTrajectory

BlockId = tuple[
    str, int, int
]  # ("output", 4, 0): stage, index in the stage, depth inside the block
Grid = tuple[int, int]  # (y, x) tokens
BANK_VERSION = 1
LOG_SIGMA_TOLERANCE = (
    1e-3  # of one sampler's sigmas through float32; a step of any real schedule is far more
)
LARGE = 4e9  # bytes of main memory worth a warning
KEYS_VALUES_UP_TO = (
    1e9  # bytes that an automatic bank takes for keys and values; SD1.5 has 0.58 GB, SDXL 5.2
)
UNET_STAGES = ("input", "middle", "output")
GOLDEN = 0.6180339887498949  # its multiples fall apart from one another as evenly as can be
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


class Keeps(str, Enum):
    """What a bank holds of a token: to project it is 0.4 % of an SD1.5 step for each half."""

    AUTO = "automatic"  # keys and values where they take no more than KEYS_VALUES_UP_TO
    HIDDEN = "hidden states"
    KEYS_VALUES = "keys and values"  # twice the memory

    def projects(self, size: float) -> bool:
        """Whether hidden states of so many bytes are kept as keys and values."""
        return self is Keeps.KEYS_VALUES or self is Keeps.AUTO and 2 * size <= KEYS_VALUES_UP_TO


@dataclass(frozen=True)
class SubjectTokens:
    """Where the subject's words stand in an encoded prompt: one tuple of positions per row of the conditioning."""

    words: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    by_word: tuple[
        tuple[tuple[int, ...], ...], ...
    ] = ()  # the same for each word alone; (): there is but one

    def of_words(self, rows: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Positions per word, per picture; the host repeats the rows of a conditioning to the size of the batch."""
        return tuple(
            tuple(word[i % len(word)] for i in range(rows))
            for word in self.by_word or (self.positions,)
        )


@dataclass(frozen=True, eq=False)
class ReferencePrompt:
    """A prompt as the Ref-UNet reads it: cross [1 w c], the host's other plain entries, and its subject tokens."""

    text: str
    cross: Tensor
    extras: Mapping[str, Tensor | int | float | str] = field(default_factory=dict)
    subject: SubjectTokens | None = None


@dataclass(frozen=True)
class Layer:
    """A self-attention layer whose tokens a bank holds; channels: those of to_k's input, or of keys and values together."""

    block: BlockId
    grid: Grid
    channels: int


def keys_values(attn: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Kept tokens [b l c] of a layer -> k, v [b l (h d)]; a bank may hold them already, side by side in [b l 2*(h d)]."""
    if tokens.shape[-1] == attn.to_k.in_features:
        return attn.to_k(tokens), attn.to_v(tokens)
    k, v = tokens.chunk(2, -1)
    return k, v


def thinned(positions: Tensor, share: float) -> Tensor:
    """About `share` of the positions [l], at least one, spread evenly over them."""
    if share >= 1 or not len(positions):
        return positions
    count = max(round(len(positions) * share), 1)
    order = (torch.arange(len(positions), dtype=torch.float64) * GOLDEN).frac().argsort()
    return positions[order[:count].sort().values]


def block_name(block: BlockId) -> str:
    """("output", 4, 0) -> "output 4"; depth is named only where a block has several: "output 4.1"."""
    return f"{block[0]} {block[1]}" + (f".{block[2]}" if block[2] else "")


def select_blocks(wanted: str, available: Sequence[BlockId], node: str) -> tuple[BlockId, ...]:
    """Resolve "all", "encoder", "middle", "decoder", "masactrl" or a list such as "input 4, output 3-5, middle 0".

    Order is that of `available` (the order in which the network runs). "masactrl" is attention layers 10 and later
    (arXiv 2304.08465). Of a transformer, encoder and decoder are its first and second half, and its kinds of blocks are presets.
    Raises ValueError naming the unknown word and the blocks that exist.
    """
    presets = {
        "all": lambda i, b: True,
        "encoder": lambda i, b: b[0] == "input",
        "middle": lambda i, b: b[0] == "middle",
        "decoder": lambda i, b: b[0] == "output",
        "masactrl": lambda i, b: i >= 10,
    }
    if (
        available and available[0][0] not in UNET_STAGES
    ):  # of a transformer: its first and second half
        half = len(available) // 2
        presets = {
            "all": presets["all"],
            "encoder": lambda i, b: i < half,
            "decoder": lambda i, b: i >= half,
        } | {
            kind: lambda i, b, kind=kind: b[0] == kind
            for kind in dict.fromkeys(b[0] for b in available)
        }
    if not available:
        raise ValueError(
            f"{node}: this model has no block with self-attention, so there is nothing to read. Load an SD1.5, SD2.x or SDXL "
            "checkpoint."
        )
    there = ", ".join(
        name for name, fits in presets.items() if any(fits(i, b) for i, b in enumerate(available))
    )
    chosen: set[BlockId] = set()
    for term in filter(None, (t.strip().lower() for t in wanted.split(","))):
        if term in presets:
            found = {b for i, b in enumerate(available) if presets[term](i, b)}
        elif match := re.fullmatch(r"([a-z]+)\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?(?:\.(\d+))?", term):
            stage, first, last, depth = match[1], int(match[2]), int(match[3] or match[2]), match[4]
            found = {
                b
                for b in available
                if b[0] == stage and first <= b[1] <= last and depth in (None, str(b[2]))
            }
        else:
            found = set()
        if not found:
            raise ValueError(
                f"{node}: no attention block matches {term!r:.200}. Choose from this model's "
                f"{', '.join(dict.fromkeys(f'{b[0]} {b[1]}' for b in available))}, or write a preset: {there}."
            )
        chosen |= found
    if not chosen:
        raise ValueError(
            f"{node}: blocks is empty. Write {there.replace(', ', ' or ')}, or a list such as 'output 3-5, middle 0'."
        )
    return tuple(b for b in available if b in chosen)


Kept = Mapping[
    Grid, Sequence[Tensor]
]  # per grid, per row of features: flat positions [l] among r*y*x tokens


@dataclass(frozen=True, eq=False)
class AnchorFeatures:
    """What generated anchors leave beside the tokens of their last stage (ConsiStory, arXiv 2402.03286, 4.3 and 4.4).

    Their masks run along and dropout is drawn anew at every step, so every row keeps other tokens. Rows are those of the
    bank's features. Empty tensors stand where the first stage did not come, or outside of the injection's window; the first
    stage differs from the second at the sigmas from settings["first_from"] down to settings["first_until"].
    """

    kept: Kept
    first: Mapping[
        Half, Sequence[Tensor]
    ]  # [s] per row: tokens of the first stage, where the second differs from it
    first_kept: Kept
    outputs: Sequence[
        Tensor
    ]  # [s] per row: self-attention outputs of the subject's tokens (cond) before injection
    output_layers: tuple[Layer, ...]
    features: (
        Tensor | None
    )  # [r n c] at the step nearest t = 261, smoothed; None: made without feature injection
    subject: Tensor | None  # [l] flat positions of the subject among r*n there
    settings: Mapping[str, float | int | str] = field(
        default_factory=dict
    )  # of the node that made them

    def in_first_stage(self, sigma: float) -> bool:
        slack = 1 + LOG_SIGMA_TOLERANCE
        return (
            self.settings.get("first_until", 1.0) / slack
            <= sigma
            <= self.settings.get("first_from", 0.0) * slack
        )


@dataclass(frozen=True, eq=False)
class ReferenceBank:
    """Normed hidden tokens before to_k/to_v for every (layer, sigma, CFG half), or their keys and values; in host memory, with masks.

    features[half]: [t s], or t of [s_i] for anchors - row i belongs to trajectory.sigmas[i + 1], and holds the kept tokens of
    every layer of `layers` one after another; masks[grid]: bool [r y x]; maps: the subject words' map at every step [t r y x]
    fp32, None where the user gave the mask; anchors: None where the pictures were inverted, not generated; share: of the
    subject's tokens that are kept (the layers' `loudness` makes up for the others).
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
    def loudness(self) -> dict[Grid, float]:
        """How many tokens of the subject each kept one stands for, per grid: 1 where all are kept."""
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
        """Whether no step is held: of a transformer, whose tokens would fill gigabytes, every step is read anew."""
        return self.anchors is None and not any(map(len, self.features.values()))

    def step_of(self, sigma: float) -> int | None:
        """The row of `features` captured at this sigma, or None when the Ref-UNet has to run at it (live)."""
        if self.live:
            return None
        step = self.trajectory.nearest(sigma, LOG_SIGMA_TOLERANCE)
        return None if step is None or step == 0 else step - 1

    def latent_at(self, sigma: float) -> Tensor:
        """The reference's latent [r c y x] at a sigma between or beyond the stored ones, on a diffusion or a flow.

        On a deterministic path linear in sigma; beyond its end, and on an edit-friendly path, whose levels have noise of their own,
        the nearest level's noise at this sigma: both noise paths are straight from the picture through a level.
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
        """Kept tokens [l c] of every layer at one step: one copy to the device, then views. first: of the anchors' first stage."""
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

    def keep(self, tokens: Mapping[BlockId, Tensor]) -> dict[BlockId, Tensor]:
        """[r n c] per block as a Ref-UNet pass leaves them -> the kept tokens [l c] of those of this bank's layers."""
        return {
            layer.block: kept_of(
                layer.block, layer.grid, tokens[layer.block], self.kept[layer.grid]
            )
            for layer in self.layers
            if layer.block in tokens
        }


def kept_of(block: BlockId, grid: Grid, tokens: Tensor, kept: Tensor) -> Tensor:
    """tokens [r n c] of a block, kept [l] flat positions over r*n -> [l c]; ValueError where n is not that of the grid."""
    (y, x), n = grid, tokens.shape[1]
    if n != y * x:  # on CUDA a wrong index would take the whole server down
        raise ValueError(
            f"Kindred: block {block_name(block)} gave {n} tokens where the reference has {y}x{x}. A node that "
            "changes the grid (Deep Shrink, token merging) is on the model: remove it."
        )
    return gather(tokens, kept.to(tokens.device))


def split_row(
    row: Tensor, layers: Sequence[Layer], lengths: Mapping[Grid, int]
) -> dict[BlockId, Tensor]:
    """A row [s] of kept tokens -> views [l c] per layer."""
    parts = row.split([lengths[layer.grid] * layer.channels for layer in layers])
    return {layer.block: part.view(-1, layer.channels) for layer, part in zip(layers, parts)}


def gather(tokens: Tensor, kept: Tensor) -> Tensor:
    """tokens [r n c], kept [l] flat positions over r*n -> [l c]."""
    return tokens.reshape(-1, tokens.shape[-1]).index_select(0, kept)


class RowReader:
    """Rows of a bank on a device; on CUDA the next one is copied behind the step that computes.

    Samplers go from noise to picture, so the next row is the one before; another one that is asked for is copied then.
    """

    def __init__(self, device: torch.device, pins: bool = True) -> None:
        """pins: rows may be put into pinned memory first; else, or where there is none left, the host waits for each copy."""
        self.device, self.pins = device, pins
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[tuple[int, int], tuple[Tensor, torch.cuda.Event]] = {}

    def __call__(self, rows: Tensor | Sequence[Tensor], step: int) -> Tensor:
        if self._stream is None:
            return rows[step].to(self.device)
        if (id(rows), step) not in self._ahead:
            self._begin(rows, step)
        row, copied = self._ahead.pop((id(rows), step))
        here = torch.cuda.current_stream(self.device)
        here.wait_event(copied)
        row.record_stream(here)
        self._ahead = {
            key: held for key, held in self._ahead.items() if key[0] != id(rows)
        }  # a guess that was wrong
        if step:
            self._begin(rows, step - 1)
        return row

    def _begin(self, rows: Tensor | Sequence[Tensor], step: int) -> None:
        row = rows[step]
        with torch.cuda.stream(self._stream):
            far = self._pinned(row).to(self.device, non_blocking=True)
            self._ahead[id(rows), step] = far, self._stream.record_event()

    def _pinned(self, row: Tensor) -> Tensor:
        if not self.pins or row.is_pinned():
            return row
        try:
            return row.pin_memory()
        except RuntimeError:  # systems bound how much there may be
            self.pins = False
            return row


Project = Callable[
    [BlockId, Tensor], Tensor
]  # tokens [l c] of a block, in host memory -> its keys and values side by side


@dataclass
class BankBuilder:
    """Collects the tokens of a running reference pass; `finish` gathers them once the masks are known.

    masks: of a grid, where they are known before: then nothing else is ever held.
    """

    precision: torch.dtype | None = None  # None keeps the dtype the model computes in
    masks: Mapping[Grid, Tensor] | None = None
    share: float = 1.0
    keeps: Keeps = Keeps.HIDDEN
    _steps: dict[tuple[Half, int], dict[BlockId, Tensor]] = field(default_factory=dict)
    _kept: dict[tuple[Grid, torch.device], Tensor] = field(default_factory=dict)

    def add(
        self,
        half: Half,
        step: int,
        tokens: Mapping[BlockId, Tensor],
        steps: int = 1,
        grids: Mapping[BlockId, Grid] | None = None,
    ) -> None:
        """tokens: [r n c] per block, grids: theirs, where masks are known; copied to host memory.

        steps: how many such calls will come, for the warning of a large bank.
        """
        if self.masks is not None:
            tokens = {
                block: kept_of(block, grids[block], t, self._positions(grids[block], t.device))
                for block, t in tokens.items()
            }
        if (
            not self._steps
            and (total := sum(t.numel() * t.element_size() for t in tokens.values()) * steps)
            > LARGE
        ):
            when, less = (
                ("", "a smaller token_share")
                if self.masks
                else (" until the mask is known", "a wired mask")
            )
            log.warning(
                "Kindred: the reference pass holds up to %.1f GB of main memory%s. Fewer blocks, %s or precision float16 need "
                "less.",
                total / 1e9,
                when,
                less,
            )
        self._steps[half, step] = {
            b: t.to("cpu", self.precision or t.dtype, copy=True) for b, t in tokens.items()
        }

    def _positions(self, grid: Grid, device: torch.device) -> Tensor:
        if (grid, device) not in self._kept:
            self._kept[grid, device] = thinned(
                self.masks[grid].flatten().nonzero().squeeze(1), self.share
            ).to(device)
        return self._kept[grid, device]

    def finish(
        self,
        grids: Mapping[BlockId, Grid],
        masks: Mapping[Grid, Tensor],
        trajectory: InversionTrajectory,
        prompts: Mapping[Half, ReferencePrompt],
        model_key: str,
        maps: Tensor | None,
        project: Project | None = None,
    ) -> ReferenceBank:
        """Gather the masked tokens of every step into one row per step; full tokens are freed as they are read."""
        first = next(iter(self._steps.values()))
        layers = tuple(
            Layer(block, grids[block], tokens.shape[-1]) for block, tokens in first.items()
        )
        bank = ReferenceBank(
            trajectory, prompts, layers, masks, {}, model_key, maps, share=self.share
        )
        size = sum(
            len(bank.kept[layer.grid]) * layer.channels * first[layer.block].element_size()
            for layer in layers
        ) * len(self._steps)
        if not self.keeps.projects(size):
            project = None
        features, widths = {}, {}
        for half in dict.fromkeys(h for h, _ in self._steps):
            steps = sorted(s for h, s in self._steps if h is half)
            for i, step in enumerate(steps):
                full = self._steps.pop((half, step))
                row = {
                    b: t if project is None else project(b, t).to(t)
                    for b, t in (full if self.masks is not None else bank.keep(full)).items()
                }
                widths = {b: t.shape[-1] for b, t in row.items()}
                whole = torch.cat([t.flatten() for t in row.values()])
                if not i:
                    features[half] = whole.new_empty(len(steps), len(whole))
                features[half][i] = whole
        return replace(
            bank,
            layers=tuple(replace(layer, channels=widths[layer.block]) for layer in layers),
            features=features,
        )
