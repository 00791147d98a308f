"""ConsiStory on a MODEL: its configuration, asked by the host's sampling, and where a UNet's
features are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

from comfy.model_patcher import ModelPatcher

from ...models.network.backbone import Backbone
from ...models.network.blocks import BlockId, Grid, presets_of
from ...models.network.sites import BlockSite, map_divisor
from ...models.story.inject import StorySetup
from ...models.story.plan import NODE
from ...models.story.readers import PhotoPasses
from ...models.story.sources import Layout
from ...models.story.story import Story
from . import identity
from .model import computes_in, feature_tap, network, self_attentions, token_sizes
from .networks import recognise
from .page import warn
from .ref_unet import reference_tokens, watch_reference
from .run import SamplerRun


class StoryInjection(StorySetup):
    """Configuration of one ConsiStory Shared Attention node."""

    watches: ClassVar[bool] = True

    def check(self, model: ModelPatcher) -> None:
        """Called when a sampler starts: a LoRA may have been added behind this node."""
        if self.bank:
            key = identity.model_key(model)
            identity.require_same_model(NODE, "reference", self.bank.model_key, key)

    def held(self, model: ModelPatcher, shape: Sequence[int]) -> int:
        """Bytes on the device at most."""
        width = computes_in(model).itemsize
        return self.bytes_held(shape[0], sizes_of(model, tuple(shape[-2:])), width)

    def start_run(self, run: SamplerRun) -> Story | None:
        if why := self.alone(run):
            warn(why)
        run.foretell_halves(self.halves)
        passes = PhotoPasses(partial(reference_tokens, run), partial(watch_reference, run))
        story = self.begin(run, passes)
        if story is not None:
            if self.bank:  # anchors of other noise levels are refused
                run.foretell(self.bank, () if self.bank.anchors else run.sigmas)
            held = self.held(run.guider.model_patcher, (run.pictures, 0, *run.latent))
            self.tell_cost(run, story.schedule, held)
        return story


def sizes_of(model: ModelPatcher, latent: Grid) -> Mapping[BlockId, tuple[int, int]]:
    """Tokens of a picture and their channels, per block; a transformer is taken to be as wide as
    what most of its linear layers read.
    """
    backbone = recognise(model)
    if backbone is None:
        return token_sizes(model, latent)
    layers = (getattr(layer, "in_features", None) for layer in network(model).modules())
    width, _ = Counter(filter(None, layers)).most_common(1)[0]
    return dict.fromkeys(backbone.blocks, (math.prod(backbone.grid(latent)), width))


def layout_of(model: ModelPatcher, sites: Mapping[BlockId, BlockSite]) -> Layout:
    """Features at twice the maps' resolution, or where there is self-attention beside the middle
    that is nearest to it; a transformer has one resolution.
    """
    backbone = next((site.backbone for site in sites.values()), None)
    if backbone is not None:
        return _layout_of_transformer(backbone)
    wanted = max(map_divisor(sites) // 2, 1)
    outside = [block for block in self_attentions(sites) if block[0] != "middle"]
    divisor = min(
        (sites[b].divisor for b in outside),
        key=lambda d: (d > wanted, abs(d - wanted)),
        default=wanted,
    )
    return Layout(
        {b: site.divisor for b, site in sites.items()},
        frozenset(b for b in outside if sites[b].divisor == divisor),
        feature_tap(network(model), divisor),
        divisor,
    )


def _layout_of_transformer(backbone: Backbone) -> Layout:
    """Features of the block in the middle, where FLUX's show best what is alike (arXiv 2505.18584);
    injected in the second half.
    """
    blocks = backbone.blocks
    return Layout(
        dict.fromkeys(blocks, backbone.patch),
        frozenset(presets_of(blocks)["decoder"]),
        blocks[len(blocks) // 2],
        backbone.patch,
        transformer=True,
    )
