"""Anchors as they are generated: what later pictures of the same subject will read (ConsiStory,
arXiv 2402.03286, 4.4).

Axes: r anchors, n tokens of a grid, l kept tokens of all anchors, c channels, y x grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Any

import torch
from torch import Tensor

from ..copies import RowWriter, sent
from ..network.blocks import BlockId, Grid
from ..network.call import Asker, Half
from ..noise.inversion import InversionTrajectory
from ..noise.path import DIFFUSION, Noise
from ..reference.bank import LOG_SIGMA_TOLERANCE, AnchorFeatures, ReferenceBank, ReferencePrompt
from ..reference.rows import Layer

Row = tuple[int, float]  # stage (0 where there is but one, else 1 or 2), sigma
NODE = "ConsiStory Anchor Sampler"


def passes_over(who: Asker, what: str) -> ValueError:
    """Anchors are read at the levels of a schedule: what says that these would lack some."""
    return ValueError(
        f"{NODE}: {who} passes over {what} of its schedule, so no further picture could read "
        f"anchors made with it. "
        + who.choose("asks at every level of its schedule, such as euler, ddim or dpmpp_2m")
    )


@dataclass
class AnchorRecorder:
    """Copies the anchors of a running story to host memory; `finish` makes their REFERENCE."""

    precision: torch.dtype | None = None  # None keeps the dtype the model computes in
    count: int = 0  # r; set when the run begins
    layers: dict[BlockId, Layer] = field(default_factory=dict)
    output_layers: dict[BlockId, Layer] = field(default_factory=dict)
    latents: dict[float, Tensor] = field(default_factory=dict)
    masks: dict[Grid, Tensor] = field(default_factory=dict)  # of the last step, bool [r y x]
    maps: Tensor | None = None  # [t r y x]
    asker: Asker = Asker()
    _levels: tuple[float, ...] = ()  # of the schedule, descending; where it does not fall, none
    _unasked: list[float] = field(default_factory=list)
    _tokens: dict[tuple[Row, Half], dict[BlockId, Tensor]] = field(default_factory=dict)
    _kept: dict[Row, dict[Grid, Tensor]] = field(default_factory=dict)
    _outputs: dict[float, dict[BlockId, Tensor]] = field(default_factory=dict)
    # the call of the model that each came with
    _calls: dict[tuple[Any, ...], int | None] = field(default_factory=dict)
    _features: Tensor | None = None
    _subject: Tensor | None = None
    _subject_there: Tensor | None = None  # where the model computes
    pins: bool = True  # copies may go through pinned memory

    def __post_init__(self) -> None:
        self._copies = RowWriter(self.pins)

    def expect(self, count: int, sigmas: Sequence[float], asker: Asker) -> None:
        """A run of so many anchors begins; sigmas: those of its schedule, without the last 0."""
        levels = tuple(dict.fromkeys(sigmas))
        self.count, self.asker, self._unasked = count, asker, [*levels]
        self._levels = levels if levels == tuple(sorted(levels, reverse=True)) else ()

    def require_levels(self, sigma: float) -> None:
        """ValueError once a level lies behind that was not asked for; the next one may be, as
        samplers look ahead.
        """
        if sigma > 0:
            self._unasked = [s for s in self._unasked if abs(log(s / sigma)) > LOG_SIGMA_TOLERANCE]
        for level, following in zip(self._levels, self._levels[1:]):
            if level in self._unasked and sigma < following * (1 - LOG_SIGMA_TOLERANCE):
                raise passes_over(self.asker, f"noise level {level:.4g}")

    def latent(self, sigma: float, x: Tensor) -> None:
        """x [b c y x] as the model was asked at this noise level; what was kept of the call goes to
        host memory.
        """
        self.require_levels(sigma)
        (self.latents[sigma],) = self._in_host_memory([x[: self.count]], torch.float32)
        tokens = [t for (row, _), t in self._tokens.items() if row[1] == sigma]
        held = [*tokens, self._outputs.get(sigma, {})]
        places = [(one, block) for one in held for block, t in one.items() if not self._is_kept(t)]
        for dtype in {one[block].dtype for one, block in places}:  # after the call, not within it
            here = [(one, block) for one, block in places if one[block].dtype is dtype]
            copies = self._in_host_memory([one[b] for one, b in here], self.precision or dtype)
            for (one, block), copy in zip(here, copies):
                one[block] = copy

    def _is_kept(self, tokens: Tensor) -> bool:
        """Whether they are in host memory as they are kept."""
        return tokens.device.type == "cpu" and tokens.dtype == (self.precision or tokens.dtype)

    def _in_host_memory(self, parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Copies of them, in one for all; they may be read once `finish` began."""
        sizes = [part.numel() for part in parts]
        row = torch.empty(sum(sizes), dtype=dtype)
        self._copies(parts, row)
        return [copy.view(part.shape) for copy, part in zip(row.split(sizes), parts)]

    def begin(self, stage: int, sigma: float) -> None:
        """The model is about to be asked at this noise level: what was kept of it no longer counts.
        Then the first call counts.
        """
        for half in Half:
            self._tokens.pop(((stage, sigma), half), None)
        self._kept.pop((stage, sigma), None)
        self._outputs.pop(sigma, None)

    def tokens(
        self,
        stage: int,
        sigma: float,
        block: BlockId,
        grid: Grid,
        half: Half,
        tokens: Tensor,
        kept: Tensor,
        call: int | None = None,
    ) -> None:
        """Normed tokens [l c] of all anchors at their flat positions [l] among r*n. Of one call of
        the model the last pass counts.
        """
        self.layers.setdefault(block, Layer(block, grid, tokens.shape[-1]))
        self._keep(
            self._tokens.setdefault(((stage, sigma), half), {}),
            block,
            tokens,
            (stage, sigma, half),
            call,
        )
        self._kept.setdefault((stage, sigma), {})[grid] = kept

    def output(
        self, sigma: float, block: BlockId, grid: Grid, x: Tensor, call: int | None = None
    ) -> None:
        """Self-attention outputs [b n c] before injection; the subject's are kept, as of tokens."""
        self.output_layers.setdefault(block, Layer(block, grid, x.shape[-1]))
        if self._subject_there is None:
            self._subject_there = sent(self._subject, x.device)
        rows = x[: self.count].flatten(0, 1).index_select(0, self._subject_there)
        self._keep(self._outputs.setdefault(sigma, {}), block, rows, (sigma,), call)

    def _keep(
        self,
        held: dict[BlockId, Tensor],
        block: BlockId,
        rows: Tensor,
        where: tuple[Any, ...],
        call: int | None,
    ) -> None:
        if block not in held or (call is not None and self._calls.get((block, *where)) == call):
            held[block], self._calls[(block, *where)] = rows, call

    def matched(self, features: Tensor, subject: Tensor) -> None:
        """DIFT features [r n c] and the subject's flat positions [l] among r*n, at the end of the
        first stage.
        """
        dtype = self.precision or features.dtype
        (self._features,), self._subject = self._in_host_memory([features], dtype), subject
        self._subject_there = None

    def finish(
        self,
        final: Tensor,
        prompts: Mapping[Half, ReferencePrompt],
        model_key: str,
        schedule: str,
        settings: Mapping[str, float | int | str],
        noise: Noise = DIFFUSION,
    ) -> ReferenceBank:
        """final: the finished latents [r c y x] in model scale; noise: the model's.

        ValueError where a level of the schedule lacks its anchors.
        """
        self._copies.finish()
        if self._unasked:
            raise passes_over(self.asker, f"noise level {self._unasked[0]:.4g}")
        sigmas = sorted(self.latents)
        path = torch.stack([final.float().cpu(), *(self.latents[s] for s in sigmas)])
        trajectory = InversionTrajectory(
            torch.tensor([0.0, *sigmas]),
            path,
            "generated anchors",
            prompts[Half.COND].text,
            model_key,
            schedule,
            noise=noise,
        )
        last = [self._row(s) for s in sigmas]
        halves = self._halves(last)
        anchors = self._anchor_features(last, halves, settings)
        features = {half: tuple(self._joined(row, half) for row in last) for half in halves}
        return ReferenceBank(
            trajectory,
            prompts,
            tuple(self.layers.values()),
            self.masks,
            features,
            model_key,
            self.maps,
            anchors,
        )

    def _halves(self, last: Sequence[Row]) -> tuple[Half, ...]:
        """Those that every step has; ValueError where cond is not among them."""
        halves = tuple(half for half in Half if all((row, half) in self._tokens for row in last))
        if Half.COND not in halves:
            at = next(row[1] for row in last if (row, Half.COND) not in self._tokens)
            raise ValueError(
                f"{NODE}: at noise level {at:.4g} the positive prompt was not sampled, so the "
                "anchors would lack a step. Remove the timestep range of the positive prompt."
            )
        return halves

    def _anchor_features(
        self,
        last: Sequence[Row],
        halves: Sequence[Half],
        settings: Mapping[str, float | int | str],
    ) -> AnchorFeatures:
        """last: of each step the stage that counts, from little noise to much."""
        first = [(1, s) if stage == 2 and (1, s) in self._kept else None for stage, s in last]
        staged = [row[1] for row in first if row]
        if staged:
            settings = {**settings, "first_from": max(staged), "first_until": min(staged)}
        no_tokens, no_positions = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        grids = {layer.grid for layer in self.layers.values()}
        return AnchorFeatures(
            kept={grid: tuple(self._kept[row][grid] for row in last) for grid in grids},
            first={
                half: tuple(self._joined(row, half) if row else no_tokens for row in first)
                for half in halves
            },
            first_kept={
                grid: tuple(self._kept[row][grid] if row else no_positions for row in first)
                for grid in grids
            },
            outputs=tuple(self._joined_outputs(s) for _, s in last),
            output_layers=tuple(self.output_layers.values()),
            features=self._features,
            subject=self._subject,
            settings=settings,
        )

    def _joined_outputs(self, sigma: float) -> Tensor:
        """[s]; empty where nothing was injected."""
        if sigma not in self._outputs:
            return torch.zeros(0)
        return torch.cat([self._outputs[sigma][block].flatten() for block in self.output_layers])

    def _row(self, sigma: float) -> Row:
        row = next(((stage, sigma) for stage in (2, 1, 0) if (stage, sigma) in self._kept), None)
        if row is None:
            raise ValueError(
                f"{NODE}: at noise level {sigma:.4g} no whole picture passed through the model, so "
                "there is nothing to keep of the anchors. Remove what crops or skips its calls: a "
                "timestep range of the positive prompt, area prompts alone, EasyCache."
            )
        return row

    def _joined(self, row: Row, half: Half) -> Tensor:
        tokens = self._tokens.pop((row, half))
        return torch.cat([tokens[block].flatten() for block in self.layers])
