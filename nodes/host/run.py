"""A run under one of the host's guiders: its conds, noise levels and injections, translated for
models/run.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.copies import sent
from ...models.network.backbone import Backbone
from ...models.network.blocks import BlockId, Grid
from ...models.network.call import Asker, Half, Halves, Part
from ...models.network.watch import ActiveInjection
from ...models.reference.bank import ReferenceBank
from ...models.reference.forecast import live_reading, other_size
from ...models.reference.rows import RowReader
from ...models.run import Run
from ...models.story.story import Story
from .calls import named_parts, require_room
from .foresight import Foreseen
from .guiders import draws_negative
from .latents import cell
from .model import log, network, pins_memory
from .page import note, warn
from .sites import sites_of
from .stages import Stages


class Injection(Protocol):
    """A frozen node configuration; watches: it needs more of the UNet than its attention calls."""

    watches: bool

    @property
    def halves(self) -> Halves: ...  # which of guidance's read it
    def check(self, model: ModelPatcher) -> None: ...
    def held(
        self, model: ModelPatcher, shape: Sequence[int]
    ) -> int: ...  # bytes on the device; shape [b c y x] of the latents
    def start_run(self, run: SamplerRun) -> ActiveInjection | None: ...


@dataclass
class SamplerRun:
    """A run under one of the host's guiders; calls: what its attentions read."""

    calls: Run
    injections: tuple[Injection, ...] = ()
    stages: Stages | None = None  # of a story that needs two
    guider: Any = None
    model_options: dict[str, Any] = field(default_factory=dict)
    step_tokens: dict[
        tuple[int, float, frozenset[Half]], Mapping[Half, Mapping[BlockId, Tensor]]
    ] = field(default_factory=dict)
    # positions of the banks that are read live, on the device
    kept: dict[int, Mapping[Grid, Tensor]] = field(default_factory=dict)
    sigmas: tuple[float, ...] = ()  # of this sampler run, descending, without the last 0
    steps: int = 0
    story: Story | None = None
    rows: RowReader | None = None  # of the banks that this run reads
    foreseen: Foreseen | None = None
    asker: Asker = Asker()

    def __post_init__(self) -> None:
        self.calls.ways = set()

    @property
    def parts(self) -> Mapping[Any, Part]:
        """Of the prompts, by the names that calls give them."""
        return self.calls.parts

    @property
    def latent(self) -> Grid:
        """Size of the sampled latents."""
        return self.calls.latent

    @property
    def pictures(self) -> int:
        """In the sampled batch."""
        return self.calls.pictures

    @property
    def backbone(self) -> Backbone | None:
        """Of a transformer; None: a UNet."""
        return self.calls.backbone

    def say_unread(self) -> None:
        """Warn, once the run is over, of each injection that should have been read and was in no
        block at no step.
        """
        unread = self.calls.wanted - self.calls.reached
        for node in dict.fromkeys(a.node for a in self.calls.active if id(a) in unread):
            warn(
                f"{node}: it had no effect on these pictures, because no block read it at any "
                f"step. Another node computes the "
                "network's attention by itself, in a copy of its own. Remove that node from the "
                "MODEL; if the warning stays, restart "
                "ComfyUI, because some packs leave their copy in the checkpoint."
            )

    def begin(
        self, guider: Any, model_options: dict[str, Any], shape: Sequence[int], sigmas: Tensor
    ) -> None:
        """Called once the host has loaded the model and processed its conds; shape [b c y x] of the
        sampled latents.
        """
        self.guider, self.model_options = guider, model_options
        self.sigmas = tuple(s for s in sigmas.float().tolist() if 0 < s < math.inf)  # float32
        self.steps = len(sigmas) - 1
        self._begin_calls(guider, shape)
        self.rows = RowReader(self.device_and_dtype[0], pins=pins_memory())
        self._begin_injections()
        self._say_far_size(guider.model_patcher)
        self._say_other_guidance(guider.conds.get("positive", ()))

    def _begin_calls(self, guider: Any, shape: Sequence[int]) -> None:
        calls, patcher = self.calls, guider.model_patcher
        calls.latent, calls.pictures = tuple(shape[-2:]), shape[0]
        calls.handed, calls.part = None, ""
        calls.sites = sites_of(patcher, calls.backbone)
        calls.compiled = calls.compiled or _is_compiled(patcher)
        require_room(guider.conds, calls.pictures)
        calls.expect(named_parts(guider.conds))
        calls.wanted, calls.reached = set(), set()

    def _begin_injections(self) -> None:
        calls = self.calls
        started = (injection.start_run(self) for injection in self.injections)
        calls.active = [active for active in started if active is not None]
        stories = [active for active in calls.active if isinstance(active, Story)]
        calls.watchers = [w for w in calls.watchers if w is not self.story] + stories
        self.story = next(iter(stories), None)
        self.stages = Stages(self.story) if self.story else None

    def _say_far_size(self, patcher: ModelPatcher) -> None:
        """Warn where a small model, whose latents name the one size that it draws, is to draw more
        than twice of it: on the canvas the usual sizes are those of large models.
        """
        size = getattr(patcher.get_model_object("latent_format"), "kindred_size", None)
        y, x = (cells * cell(patcher) for cells in self.latent)
        if size and max(y, x) > 2 * size:
            warn(
                f"Kindred: this model draws {size}x{size} pixels, but the pictures are {x}x{y}, so "
                f"they take long and show several broken subjects. Set every width and height to "
                f"{size}, or load a checkpoint of that size."
            )

    def _say_other_guidance(self, conds: Sequence[Mapping[str, Any]]) -> None:
        """Distilled transformers are told their guidance, and keys and values hang on it: another
        one than the reference's is said.
        """
        banks = (getattr(injection, "bank", None) for injection in self.injections)
        read = {
            bank.prompts[Half.COND].extras.get("guidance") for bank in banks if bank is not None
        }
        drawn = {cond.get("guidance") for cond in conds}
        if self.backbone is None or not read or read == drawn or not (read | drawn) - {None}:
            return
        sides = " and ".join(
            ", ".join(map(str, sorted(map(_number, side)))) for side in (read, drawn)
        )
        log.info(
            "Kindred: the reference is read at another guidance than the pictures are drawn at "
            "(%s), which makes it a little less alike."
            " Wire the same FluxGuidance into Ref-UNet Feature Capture.",
            sides,
        )

    def foretell(self, bank: ReferenceBank, sigmas: Sequence[float]) -> None:
        """Say, before the first step, what reading a bank at these noise levels costs, and where
        it differs from what is drawn; each once in a run.
        """
        size = other_size(bank, self.latent, cell(self.guider.model_patcher))
        for kind, said in (("live", live_reading(bank, sigmas)), ("size", size)):
            if said and kind not in self.calls.ways:
                self.calls.ways.add(kind)
                note(f"Kindred: {said}")

    def foretell_halves(self, halves: Halves) -> None:
        """Say, once in a run, that no negative is drawn that could read."""
        if halves is Halves.COND or draws_negative(self.guider, self.model_options):
            return
        if "one half" not in self.calls.ways:
            self.calls.ways.add("one half")
            note(
                f"Kindred: halves is {halves.value!r}, but no negative is drawn (CFG is 1, or none "
                "is wired), so only the prompt is affected. Raise the CFG, or choose cond only."
            )

    def blocks_read(self, bank: ReferenceBank) -> frozenset[BlockId]:
        """Of a bank, by all injections of this run."""
        return frozenset().union(
            *(i.blocks for i in self.injections if getattr(i, "bank", None) is bank)
        ) & frozenset(bank.blocks)

    def kept_of(self, bank: ReferenceBank) -> Mapping[Grid, Tensor]:
        """Which tokens of each grid the bank keeps, on the device."""
        if id(bank) not in self.kept:
            device = self.device_and_dtype[0]
            self.kept[id(bank)] = {
                grid: sent(positions, device) for grid, positions in bank.kept.items()
            }
        return self.kept[id(bank)]

    def timesteps(self) -> tuple[float, ...]:
        """The model's own timestep, 0 to 999, at each of the run's sigmas; of a transformer the
        noise's share, in thousandths.
        """
        sampling, sigmas = self.guider.inner_model.model_sampling, torch.tensor(self.sigmas)
        if self.backbone is not None:
            share = sigmas if self.backbone.flow else sigmas / (1 + sigmas)
            return tuple((1000 * share).tolist())
        if isinstance(
            sampling, comfy.model_sampling.ModelSamplingContinuousEDM
        ):  # its own timesteps are log sigma / 4
            low, high = (math.log(float(s)) for s in (sampling.sigma_min, sampling.sigma_max))
            return tuple(((sigmas.log() - low) / (high - low) * 999).tolist())
        return tuple(sampling.timestep(sigmas).float().tolist())

    def at(self, *percents: float) -> tuple[float, ...]:
        """Shares of the schedule (0 = all noise) as the sigmas of this run's own: another node may
        have changed it behind ours.
        """
        return tuple(
            float(self.guider.inner_model.model_sampling.percent_to_sigma(p)) for p in percents
        )

    @property
    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where and in what the UNet computes."""
        return self.guider.model_patcher.load_device, self.guider.inner_model.get_dtype_inference()

    def close(self) -> None:
        self.calls.close()
        self.guider, self.model_options, self.step_tokens, self.kept = None, {}, {}, {}
        self.story = self.stages = self.rows = self.foreseen = None


def _is_compiled(patcher: ModelPatcher) -> bool:
    """Whether torch.compile stands somewhere in the network."""
    unet = network(patcher)
    return unet is not patcher.get_model_object("diffusion_model") or any(
        hasattr(module, "_orig_mod") for module in unet.modules()
    )


def _number(guidance: float | None) -> float:
    """What a conditioning says of guidance; the network's own 3.5 where it says nothing."""
    return 3.5 if guidance is None else float(guidance)
