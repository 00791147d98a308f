"""ConsiStory's configuration, and how a sampler run of it begins (arXiv 2402.03286).

Axes: b pictures, r anchors, y x grid, Y X pixels of a mask.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..network.blocks import BlockId, block_name
from ..network.call import Halves, Role
from ..reference.bank import AnchorFeatures, ReferenceBank
from .anchors import NODE as SAMPLER
from .anchors import AnchorRecorder
from .plan import NODE, Schedule, StorySettings
from .readers import GeneratedAnchors, PhotoAnchors, PhotoPasses, StoryRun
from .sources import AnchorSource, Layout
from .story import Story

FAST, OFFICIAL = "fast", "official"
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StorySetup:
    """How the pictures of a batch share their subject; `begin` starts it in a run."""

    settings: StorySettings  # without its windows, which are of the schedule that will be sampled
    layout: Layout
    # shares of that schedule: blending's end, injection's start and end
    moments: tuple[float, float, float]
    bank: ReferenceBank | None = None
    masks: Tensor | None = None  # [1|b Y X]
    recorder: AnchorRecorder | None = None

    @property
    def blocks(self) -> frozenset[BlockId]:
        """Those that are read."""
        return self.settings.blocks

    @property
    def halves(self) -> Halves:
        """Which halves of guidance share."""
        return self.settings.halves

    def bytes_held(
        self, pictures: int, sizes: Mapping[BlockId, tuple[int, int]], width: int
    ) -> int:
        """On the device at most: queries of the plain pass, and the longest keys and values of a
        layer that shares.

        sizes: tokens of a picture and their channels, per block; width: bytes of a number.
        """
        s = self.settings
        shared = [sizes[block] for block in s.blocks]
        rows = pictures * (1 if s.halves is Halves.COND else 2)
        others = self.bank.pictures if self.bank else min(s.anchors or pictures, pictures)
        queries = 2 * pictures * sum(n * c for n, c in shared) if s.blend[0] else 0
        return (queries + rows * max(2 * (1 + others) * n * c for n, c in shared)) * width

    def begin(self, run: StoryRun, passes: PhotoPasses) -> Story | None:
        """The story of a run; None where there is nobody to share with. ValueError where it cannot
        be told.
        """
        # SplitSigmas at the first or the last step: the model is not asked at all
        if run.steps < 1 or not run.sigmas:
            return None
        until, *inject = run.at(*self.moments)
        settings = replace(self.settings, blend_until=until, inject=tuple(inject))
        if self.alone(run):
            return None
        self._require_subject(run)
        if settings.anchors > run.pictures and self.bank is None:
            log.warning(
                "%s: %d anchors were asked for, but the batch has %d pictures: each of them is an "
                "anchor.",
                NODE,
                settings.anchors,
                run.pictures,
            )
        ends = self.layout.transformer and run.steps == len(run.sigmas)
        schedule = Schedule(run.sigmas, run.timesteps(), settings, ends)
        self._say_of_subjects(run)
        warn_of_gaps(run, schedule)
        story = Story(
            settings,
            schedule,
            self.layout,
            run.pictures,
            run.latent,
            run.device_and_dtype[0],
            self.source(run, schedule, passes),
            None if self.masks is None else self.masks.cpu(),
            self.recorder,
        )
        if self.recorder:
            self.recorder.expect(story.anchor_count, run.sigmas, run.asker)
        return story

    def alone(self, run: StoryRun) -> str:
        """Why a run's pictures stay plain; "" where one has another to share with."""
        if run.pictures > 1 or self.bank is not None or self.recorder is not None:
            return ""
        return (
            f"{NODE}: one picture has nobody to share with, so it stays plain. Raise the batch "
            "size, or wire a reference."
        )

    def _say_of_subjects(self, run: StoryRun) -> None:
        """Say once where several subjects of a transformer are read by one another."""
        keeps = self.recorder is not None or self.bank is not None
        several = any(p.subject and len(p.subject.words) > 1 for p in run.parts.values())
        if self.layout.transformer and keeps and several and self.masks is None:
            log.info(
                "%s: kept anchors do not tell several subjects apart, so each is read by all. To "
                "keep the subjects apart, sample the pictures in one batch.",
                NODE,
            )

    def _require_subject(self, run: StoryRun) -> None:
        """ValueError where nothing tells in time where the subject of each picture is."""
        if self.masks is None:
            if not any(p.role is Role.COND and p.subject for p in run.parts.values()):
                raise ValueError(
                    f"{NODE}: the positive prompt marks no subject word, and no masks are wired. "
                    f"Encode the prompts with "
                    "Subject Prompts and write the subject there, or wire masks of the subject."
                )
            if self.recorder and run.steps == 1:
                raise ValueError(
                    f"{SAMPLER}: only one step is sampled, but the subject is located from the "
                    f"step before, so there is "
                    "nothing to keep of it. Sample 2 steps or more, or wire masks into ConsiStory "
                    "Shared Attention."
                )
        elif self.masks.shape[0] not in (1, run.pictures):
            raise ValueError(
                f"{NODE}: {self.masks.shape[0]} masks for {run.pictures} pictures. Wire one mask, "
                f"or one per picture."
            )

    def tell_cost(self, run: StoryRun, schedule: Schedule, held: int) -> None:
        """Log what the story asks of the model; held: bytes on the device."""
        known = self.masks is not None or self.bank is not None
        plain, calls = run.steps, schedule.calls(known, run.steps)
        log.info(
            "%s: %d pictures in %d calls of the model where the plain run has %d (%.2f times; of "
            "samplers that ask once a step); up to "
            "%.1f MB beside it.",
            NODE,
            run.pictures,
            calls,
            plain,
            calls / plain,
            held / 1e6,
        )

    def source(self, run: StoryRun, schedule: Schedule, passes: PhotoPasses) -> AnchorSource | None:
        """Who reads the wired reference; ValueError where its anchors do not have what this run
        will ask for.
        """
        if self.bank is None:
            return None
        halves = tuple(h for h in self.bank.features if self.settings.halves.source(h))
        if self.bank.anchors is None:
            if self.layout.transformer and self.settings.align_keys:
                log.info(
                    "%s: align_keys is without effect in a transformer, whose keys are normed "
                    "already and hold positions.",
                    NODE,
                )
            return PhotoAnchors(self.bank, run, halves, self.layout, schedule, passes)
        source = GeneratedAnchors(self.bank, run, halves)
        rows = {sigma: source.row(sigma) for sigma in run.sigmas}
        if schedule.first_injection:
            self._require_features(self.bank.anchors)
            require_outputs(self.bank.anchors, schedule, rows)
        return source

    def _require_features(self, anchors: AnchorFeatures) -> None:
        """ValueError where anchors were made otherwise than features are to be injected."""
        order = str(anchors.settings.get("order"))[:40]
        if anchors.features is None:
            raise ValueError(
                f"{NODE}: feature_injection is {self.settings.injection}, but the anchors of the "
                f"reference were made "
                "with 0. Set it to 0 here, or make the anchors with feature injection."
            )
        if order != (wanted := OFFICIAL if self.settings.official else FAST):
            raise ValueError(
                f"{NODE}: order is {wanted!r}, but the reference's anchors were made with "
                f"{order!r}. Choose the same."
            )
        stored = {layer.block for layer in anchors.output_layers}
        lacking = [block_name(b) for b in sorted(self.layout.output_blocks - stored)]
        if stored and lacking:
            raise ValueError(
                f"{NODE}: features are to be injected in {', '.join(lacking)}, of which the "
                f"reference's anchors hold "
                f"nothing (they do of {', '.join(map(block_name, sorted(stored)))}). Make the "
                f"anchors again."
            )


def require_outputs(anchors: AnchorFeatures, schedule: Schedule, rows: Mapping[float, int]) -> None:
    """ValueError where anchors hold no outputs at a sigma that features are injected at; rows: of
    the bank, by sigma.
    """
    missing = [
        s
        for s in schedule.sigmas
        if schedule.injects(s) and not len(anchors.outputs[rows[s]]) and len(anchors.subject)
    ]
    if missing:
        held = [s for s, row in rows.items() if len(anchors.outputs[row])]
        where = f" (it has them from {max(held):.4g} to {min(held):.4g})" if held else ""
        raise ValueError(
            f"{NODE}: features are to be injected at {len(missing)} noise levels, from "
            f"{missing[0]:.4g} on, where the reference holds none{where}. Use the "
            "injection_start_percent and injection_end_percent that the reference was made with."
        )


def warn_of_gaps(run: StoryRun, schedule: Schedule) -> None:
    """Say which part of a story this run leaves out."""
    # where sigmas do not fall, the story's end says why nothing is shared
    falls = sorted(set(run.sigmas), reverse=True) == list(dict.fromkeys(run.sigmas))
    injection = schedule.settings.injection
    if injection and schedule.first_injection is None and falls and len(run.sigmas) > 1:
        why = (
            "ends before the pictures can be compared"
            if any(map(schedule.injects, run.sigmas))
            else "has no step between injection_start_percent and injection_end_percent"
        )
        log.warning("%s: this sampler run %s, so no features are injected.", NODE, why)
    if not any(p.role is Role.COND and p.area is None for p in run.parts.values()):
        log.warning(
            "%s: every positive prompt has an area of its own, so no whole picture can share. Add "
            "one prompt without an area.",
            NODE,
        )
