"""A photo read by a pass over it: its tokens of every step, and where its subject is (paper A,
arXiv 2403.11284, section 2.2).

Axes: r reference pictures, n tokens, c channels, t steps, y x grid, Y X pixels of a mask.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..copies import sent
from ..network.blocks import BlockId, Grid, block_name
from ..network.call import Half
from ..network.sites import BlockSite, family_of
from ..noise.inversion import (
    Denoiser,
    InversionTrajectory,
    Loop,
    Progress,
    ddim_invert,
    fireflow_invert,
)
from ..noise.path import Noise
from ..subject.masks import Threshold, resize_user_mask, union_of_first
from .bank import ReferenceBank, ReferencePrompt
from .builder import BankBuilder, Keeps, Project
from .recorder import Recorder
from .rows import Layer, thinned

NODE = "Ref-UNet Feature Capture"
log = logging.getLogger(__name__)


# the loops ----------------------------------------------------------------------------------------


def replay_loop(trajectory: InversionTrajectory, keep: Callable[[int], bool]) -> Loop:
    """Ref-UNet pass over stored latents, noisiest first: one call per step, whose answer nobody
    needs, until enough is kept.
    """

    def loop(denoise: Denoiser, device: torch.device, progress: Progress) -> InversionTrajectory:
        last, photo = len(trajectory.sigmas) - 1, trajectory.latents[0].to(device)
        for i in range(last, 0, -1):
            x, sigma = (sent(h[i], device) for h in (trajectory.latents, trajectory.sigmas))
            denoise(x, sigma.expand(x.shape[0]))
            progress(last - i, photo, x)
            if keep(i):
                break
        return trajectory

    return loop


def one_pass_loop(
    z0: Tensor, down: Tensor, prompt: str, key: str, name: str, keep: Callable[[int], bool]
) -> Loop:
    """Inversion and capture in one pass: steps + 1 calls, each at a (latent, sigma) that the
    generation will ask for.
    """

    def loop(denoise: Denoiser, device: torch.device, progress: Progress) -> InversionTrajectory:
        def step(i: int, total: int, x: Tensor, denoised: Tensor) -> None:
            progress(i, denoised, x)
            if i:
                keep(i)

        up = down.flip(0)
        latents = ddim_invert(
            denoise, z0.to(device), up, label="source", evaluate_last=True, on_step=step
        )
        return InversionTrajectory(up, latents.cpu(), "ddim, one pass", prompt, key, name)

    return loop


def flow_loop(z0: Tensor, down: Tensor, noise: Noise) -> Loop:
    """FireFlow's inversion of a transformer's photo; its points are read in a pass of their own."""

    def loop(denoise: Denoiser, device: torch.device, progress: Progress) -> Tensor:
        return fireflow_invert(
            denoise,
            z0.to(device),
            down.flip(0),
            noise=noise,
            on_step=lambda i, total, x, denoised: progress(i, denoised, x),
        ).cpu()

    return loop


# the pass -----------------------------------------------------------------------------------------


@dataclass
class RefUNetPass:
    """The Ref-UNet's pass over a photo: its tokens of every step, the subject's mask from its
    words' maps, and the bank made of both.
    """

    sites: Mapping[BlockId, BlockSite]
    grids: Mapping[BlockId, Grid]  # of the blocks that are kept
    whole: Grid  # [y x] of the latent
    prompts: Mapping[Half, ReferencePrompt]
    steps: int
    recorder: Recorder
    builder: BankBuilder  # with the masks, where they are wired; else they are found
    threshold: Threshold
    mask_steps: int  # tau
    live: bool = False  # no step is held: a sampler will have each of them read anew
    # [r y x] per step, where they were computed; none where the masks are wired
    maps: dict[int, Tensor] = field(default_factory=dict)

    @property
    def transformer(self) -> bool:
        return family_of(self.sites) is not None

    def keep(self, i: int) -> bool:
        """Take what the recorder saw at sigma i of the trajectory, counted from the photo's own, 0
        -> whether that is enough.
        """
        if not self.live:
            if self.transformer and i == self.steps:
                self.announce()
            for half in self.prompts:
                self.builder.add(
                    half, i - 1, self.recorder.of(half), len(self.prompts) * self.steps, self.grids
                )
        if self.builder.masks is None:
            word_map = self.recorder.word_map()
            if word_map is None:
                raise ValueError(f"{NODE}: {self.why_no_map()}")
            self.maps[i] = word_map
        return self.live and (self.builder.masks is not None or len(self.maps) >= self.mask_steps)

    def why_no_map(self) -> str:
        """Why the subject's words were seen in no block, and what to do."""
        blocks = ", ".join(map(block_name, sorted(self.recorder.map_blocks)))
        if (family := family_of(self.sites)) is None:
            return (
                f"another node replaces the cross-attention of {blocks}, so the subject's word "
                f"cannot be followed there. Wire a mask, "
                "or put that node behind this one."
            )
        subject = self.prompts[Half.COND].subject
        words = ", ".join(map(repr, subject.words))
        last = max(p for row in subject.positions for p in row) + 1
        return (
            f"{words} stands in row {last} of the prompt, but {family} was not seen to read it "
            f"there in {blocks}. Wire a mask of the "
            "subject, or remove the node that changes the prompt or computes these blocks by "
            "itself."
        )

    def subject_masks(self, maps: Tensor) -> dict[Grid, Tensor]:
        """Maps [t r y x] of every step, noisiest last -> bool [r y x] per grid: where the subject's
        words light up in the noisiest steps, eq. (4), (5).
        """
        noisiest_first = list(maps.flip(0))
        masks = {
            grid: union_of_first(noisiest_first, self.mask_steps, self.threshold, grid)
            for grid in {*self.grids.values(), self.whole}
        }
        words = ", ".join(map(repr, self.prompts[Half.COND].subject.words))
        check_masks(
            masks[self.whole],
            f"{words} was not found in it. Describe what the photo shows, or wire a mask.",
        )
        return masks

    def finish(self, trajectory: InversionTrajectory, key: str) -> ReferenceBank:
        """The bank, once every step is kept and while the model is still loaded."""
        maps = torch.stack([self.maps[i] for i in sorted(self.maps)]).cpu() if self.maps else None
        masks = self.subject_masks(maps) if self.builder.masks is None else self.builder.masks
        if self.live:
            return self._live_bank(masks, trajectory, key, maps)
        return self.builder.finish(self.grids, masks, trajectory, self.prompts, key, maps)

    def _live_bank(
        self,
        masks: Mapping[Grid, Tensor],
        trajectory: InversionTrajectory,
        key: str,
        maps: Tensor | None,
    ) -> ReferenceBank:
        """A bank without a token: where to read the photo, and what of it."""
        layers = tuple(
            Layer(block, self.grids[block], tokens.shape[-1])
            for block, tokens in self.recorder.of(Half.COND).items()
        )
        return ReferenceBank(
            trajectory,
            self.prompts,
            layers,
            masks,
            dict.fromkeys(self.prompts, ()),
            key,
            maps,
            share=self.builder.share,
        )

    def width(self, block: BlockId) -> int:
        """Channels of a token of a block; of a transformer they are known once the recorder saw
        one.
        """
        module, seen = self.sites[block].module, self.recorder.tokens.get((Half.COND, block))
        if module is not None:
            return module.attn1.to_k.in_features
        return 0 if seen is None else seen.shape[-1]

    def bytes_held(self, pictures: int, dtype: torch.dtype) -> int:
        """Of main memory while the pass runs: of all hidden states, or of what is kept where the
        masks are wired.
        """
        masks, keeps = self.builder.masks, self.builder.keeps
        tokens = {
            grid: pictures * math.prod(grid)
            if masks is None
            else len(thinned(masks[grid].flatten().nonzero().squeeze(1), self.builder.share))
            for grid in self.grids.values()
        }
        step = (
            sum(tokens[grid] * self.width(block) for block, grid in self.grids.items())
            * dtype.itemsize
        )
        held = len(self.prompts) * self.steps * step
        projected = masks is not None and not self.transformer and keeps.projects(held)
        return held * 2 if projected else held

    def announce(self) -> None:
        """Say how much main memory a transformer's keys and values take; their width is known once
        the first were seen.
        """
        first = next(iter(self.recorder.of(Half.COND).values()))
        held = self.bytes_held(first.shape[0], self.builder.precision or first.dtype)
        until = " until the mask is known" if self.builder.masks is None else ""
        log.info("%s: its keys and values take %.1f MB of main memory%s.", NODE, held / 1e6, until)

    def calls(self, one_pass: bool) -> int:
        """Of the network; one_pass: the photo is inverted in it too."""
        if self.live:
            return 1 if self.builder.masks else self.mask_steps
        return self.steps + one_pass


def projecting(sites: Mapping[BlockId, BlockSite]) -> Project | None:
    """What makes keys and values of a UNet's tokens; None for a transformer, whose tokens are
    both.
    """
    if family_of(sites) is not None:
        return None

    def project(block: BlockId, tokens: Tensor) -> Tensor:
        return torch.cat(sites[block].keys_values(tokens), -1)

    return project


def is_live(transformer: bool, keeps: Keeps) -> bool:
    """Whether every step will be read anew: of a transformer, unless its keys and values are asked
    for by name.

    ValueError for hidden states of a transformer, which nothing here could make keys of.
    """
    if transformer and keeps is Keeps.HIDDEN:
        raise ValueError(
            f"{NODE}: keeps is {keeps.value!r}, but of a transformer keys and values are taken as "
            f"they come. Choose "
            "automatic (read live, step by step) or keys and values (held for every step)."
        )
    return transformer and keeps is Keeps.AUTO


# the subject --------------------------------------------------------------------------------------


def user_masks(mask: Tensor, r: int, grids: set[Grid]) -> dict[Grid, Tensor]:
    """MASK [1|r Y X] -> bool [r y x] per grid; ValueError when the counts differ or one is
    empty.
    """
    mask = mask.reshape(-1, *mask.shape[-2:]).cpu()
    if mask.shape[0] not in (1, r):
        raise ValueError(
            f"{NODE}: {mask.shape[0]} masks for {r} reference picture{'s' * (r > 1)}. Wire one "
            f"mask, or one per picture."
        )
    masks = {grid: resize_user_mask(mask, grid).expand(r, -1, -1) for grid in grids}
    for resized in masks.values():
        check_masks(resized, "the wired mask is empty (all black). Paint the subject white.")
    return masks


def doubts_of(mask: Tensor, whole: Grid) -> list[str]:
    """Why a wired MASK [1|r Y X] may not be the subject of a photo whose latent is `whole`
    cells (y, x).
    """
    mask = mask.reshape(-1, *mask.shape[-2:])
    said, (height, width) = [], mask.shape[-2:]
    corners = mask[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    if (corners > 0.5).all() and not (mask > 0.5).all():
        said.append(
            f"the wired mask marks all four corners of the photo and "
            f"{100 * (mask > 0.5).float().mean():.0f} % of it, as a background does. If it is one, "
            "put InvertMask between. Take a cut-out's mask from Load Photo: it gives the subject."
        )
    stretch = (height / whole[0]) / (width / whole[1])
    # encoders cut what fills no cell
    if max(stretch, 1 / stretch) > 1.02 + 1 / whole[0] + 1 / whole[1]:
        said.append(
            f"the wired mask is {width}x{height} and the photo {whole[1]}:{whole[0]}, so the mask "
            "is stretched over it: right if the photo was stretched too, and beside the subject "
            "if it was cropped or padded. Take both from Load Photo, which fits them together."
        )
    return said


def check_masks(masks: Tensor, why: str) -> None:
    """Refuse a reference without a subject, masks bool [r y x]: ValueError names the picture and
    what to do.
    """
    for i, picture in enumerate(masks, 1):
        if not picture.any():
            raise ValueError(f"{NODE}: no subject in picture {i} of {len(masks)}: {why}")
