"""One change in one block's attention at a time, and how far each moves the denoised picture.

Bypassed: the block's attention answers nothing (vital blocks: arXiv 2411.14430, which skips whole
blocks). Moved: the picture's keys stand elsewhere in the rotary code (arXiv 2503.16153). Lent: each
picture reads another one's keys and values too, in that block alone, as paper A lends them.
Axes: r pictures, c channels, y x latent cells, b rows of a call, n query tokens, m key tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.parts import References
from ..attention.references import ReferenceTokens
from ..copies import sent
from ..network.backbone import Backbone
from ..network.blocks import BlockId, Grid
from ..network.call import AttnCall, Role
from ..network.rope import Turn, rotated
from ..network.sites import BlockSite
from ..network.watch import Watcher
from ..noise.inversion import Denoiser, Loop, Progress
from ..noise.path import Noise

NODE = "Block Probe"
MOST = 100.0  # a damage that is no number, or more than this, is this
AWAY = 4  # moved keys stand a quarter of the picture's side further along both axes


class Change(str, Enum):
    """What is done to a block's attention."""

    BYPASSED = "bypassed"
    MOVED = "moved"
    LENT = "lent"


@dataclass
class Prober(Watcher):
    """Makes one change in one block of the passes to come; nothing where `change` is None."""

    backbone: Backbone | None = None  # None: a UNet, whose keys hold no position
    change: Change | None = None
    block: BlockId | None = None
    node: ClassVar[str] = NODE
    wants: ClassVar[bool] = False

    def alters(self, block: BlockId) -> bool:
        return block == self.block and self.change in (Change.BYPASSED, Change.MOVED)

    def altered(
        self, call: AttnCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.change is Change.BYPASSED:
            return q, k, torch.zeros_like(v)
        picture, moved = call.joint.picture, k.clone()
        turn = self.backbone.turn_of(call.block)
        moved[:, picture] = rotated(k[:, picture], away(turn, call.grid, k.device), turn.halves)
        return q, moved, v

    def begin_step(self, sigma: float) -> None:
        """Nothing hangs on the step."""

    def concerns(self, call: AttnCall) -> bool:
        return self.change is Change.LENT and call.block == self.block and not call.cross

    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> list[References]:
        """Every picture reads the tokens of the next one of the batch."""
        picture = slice(None) if call.joint is None else call.joint.picture
        k, v = (t[:, picture].roll(-1, 0) for t in (k, v))
        return [References({Role.COND: ReferenceTokens(k, v)})]


def away(turn: Turn, grid: Grid, device: torch.device) -> Tensor:
    """The matrix [d/2 2 2] by which a key comes to stand a quarter of the picture's sides further
    along both axes, at least a token.
    """
    y, x = (min(max(side // AWAY, 1), side - 1) for side in grid)
    places = turn.places(grid, 0)
    further = y * grid[1] + x
    return turn.between(places[:1], places[further : further + 1], device)[0]


def damage(changed: Tensor, plain: Tensor) -> Tensor:
    """How far a denoised picture [r c y x] moved, as a share of what there is to see in the plain
    one: the mean over pictures of rms(changed - plain) / rms(plain - its mean colour).

    0: nothing moved; 1: as much as the picture itself. At most MOST, also for what is no number. A
    number [] where they are.
    """
    changed, plain = changed.double(), plain.double()
    seen = plain - plain.mean((-2, -1), keepdim=True)
    rms = [x.square().flatten(1).mean(1).sqrt() for x in (changed - plain, seen)]
    shares = rms[0] / rms[1].clamp(min=1e-12)
    return torch.nan_to_num(shares, nan=MOST, posinf=MOST).clamp(max=MOST).mean()


def with_reference(latents: Tensor) -> Tensor:
    """Pictures [r c y x] of which each has another one beside it: of a single one, its mirror
    image.
    """
    return latents if len(latents) > 1 else torch.cat([latents, latents.flip(-1)])


@dataclass(frozen=True)
class Plan:
    """What is measured: in which blocks which changes, at which noise levels.

    Per noise level one pass is plain, and one is made for every change of every block.
    """

    blocks: tuple[BlockId, ...]
    movable: frozenset[BlockId]  # whose keys hold positions that are known
    sigmas: tuple[float, ...]

    @property
    def calls(self) -> int:
        """Of the network."""
        return len(self.sigmas) * (1 + sum(1 for _ in self.changes()))

    def changes(self) -> Iterator[tuple[Change, BlockId]]:
        for block in self.blocks:
            yield Change.BYPASSED, block
            if block in self.movable:
                yield Change.MOVED, block
            yield Change.LENT, block


Figures = Mapping[Change, Mapping[BlockId, float]]  # damages, each the mean over the noise levels


def probing(prober: Prober, plan: Plan, x0: Tensor, eps: Tensor, noise: Noise) -> Loop:
    """A loop that measures pictures x0 [r c y x] in noise eps of the same shape -> Figures."""

    def loop(denoise: Denoiser, device: torch.device, progress: Progress) -> Figures:
        sums: dict[Change, dict[BlockId, float]] = {change: {} for change in Change}
        report = _counted(progress)
        for sigma in plan.sigmas:
            x = sent(noise.mix(x0, eps, sigma), device)
            plain, damages = _answer(prober, denoise, x, sigma, None), []
            report(plain, x)
            for what in plan.changes():
                changed = _answer(prober, denoise, x, sigma, what)
                damages.append(damage(changed, plain))
                report(changed, x)
            # one wait for all passes of a noise level
            for (change, block), more in zip(plan.changes(), torch.stack(damages).tolist()):
                sums[change][block] = sums[change].get(block, 0.0) + more / len(plan.sigmas)
        return sums

    return loop


def _answer(
    prober: Prober, denoise: Denoiser, x: Tensor, sigma: float, what: tuple[Change, BlockId] | None
) -> Tensor:
    """One pass with one change in it."""
    prober.change, prober.block = what or (None, None)
    try:
        return denoise(x, torch.tensor([sigma]))
    finally:
        prober.change = prober.block = None


def _counted(progress: Progress) -> Callable[[Tensor, Tensor], None]:
    """A report of the next pass, which knows its number."""
    done = iter(range(1 << 30))

    def report(denoised: Tensor, x: Tensor) -> None:
        progress(next(done), denoised, x)

    return report


def movable_blocks(backbone: Backbone | None, blocks: Sequence[BlockId]) -> frozenset[BlockId]:
    """Those whose keys hold positions that are known."""
    return frozenset(block for block in blocks if backbone and backbone.turn_of(block))
