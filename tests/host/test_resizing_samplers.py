"""Samplers that ask the model at another size than the latent's: masks follow, stories name the sampler, tiles stay tiles."""

from __future__ import annotations

import pytest
import strangers
import torch
import torch.nn.functional as F
from kindred.nodes.consistory import ConsiStory
from ours import FELT, MODEL, TIGHT, leaving_nothing
from resizing import EULER, KSAMPLER, RESIZING, drawn, sample_half_size, sample_upper_half
from studio import bank_of, capture, concept, differs, inject, negative, prompt, prompts_of, story

LAW = pytest.mark.parametrize
LEFT = torch.zeros(1, 128, 128)
LEFT[:, 24:, :56] = 1
MASKED = {
    "self": lambda m, mask: inject(m, bank_of(steps=1), 2.0, target_mask=mask),
    "cross": lambda m, mask: concept(m, 2.0, target_mask=mask),
}
HALF = KSAMPLER(sample_half_size)


@pytest.fixture(autouse=True)
def nothing_is_left():
    with leaving_nothing():
        yield


def noise(pictures: int = 1) -> torch.Tensor:
    return torch.randn(pictures, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def doubled(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest-exact")


def in_an_area() -> list:
    """A prompt for a corner beside one for all."""
    ((cross, extras),) = prompt(9)
    return [*prompt(), [cross, {**extras, "area": (6, 6, 2, 0), "strength": 1.0}]]


@LAW("positive", [prompt, in_an_area])
@LAW("node", MASKED)
def test_a_target_mask_is_that_of_the_size_the_sampler_asks_for(node, positive):
    """A sampler that does all of its work at half the size draws what a picture of that size is."""
    ours = MASKED[node](MODEL, LEFT)
    out, meant = (
        drawn(ours, HALF, noise(), positive()),
        doubled(drawn(ours, EULER, noise()[:, :, ::2, ::2], positive())),
    )
    assert differs(out, meant) < TIGHT
    assert (
        differs(out, drawn(MASKED[node](MODEL, None), HALF, noise(), positive()))
        > FELT
        < differs(out, drawn(MODEL, HALF, noise(), positive()))
    )


@LAW("sampler", RESIZING)
@LAW("node", MASKED)
def test_a_target_mask_goes_with_every_sampler_that_resizes(node, sampler):
    """A mask of everything is none; a mask of half is felt, and is not the whole."""
    sampler = RESIZING[sampler][0]
    half, full, none = (
        drawn(MASKED[node](MODEL, mask), sampler, noise())
        for mask in (LEFT, torch.ones(1, 16, 16), None)
    )
    assert differs(full, none) < TIGHT and differs(half, none) > FELT < differs(
        half, drawn(MODEL, sampler, noise())
    )


@LAW("node", MASKED)
def test_a_target_mask_is_refused_where_the_sampler_hands_over_a_part(node):
    with pytest.raises(
        ValueError,
        match="a target mask needs whole pictures, but the sampler upper_half asks the model about 8x16 of a "
        "latent of 16x16.*Choose another sampler, or remove the target mask",
    ):
        drawn(MASKED[node](MODEL, LEFT), KSAMPLER(sample_upper_half), noise())


@LAW("node", MASKED)
def test_beside_a_sampler_that_resizes_tiles_are_still_named_as_tiles(node):
    with pytest.raises(
        ValueError, match="cut them into tiles .4x8 of a latent of 8x8: tiled diffusion"
    ):
        drawn(strangers.tiles(MASKED[node](MODEL, LEFT), []), HALF, noise())


STORIES = {
    "sharing": lambda: story(MODEL, feature_injection=0.0),
    "story": lambda: story(MODEL),
    "masks": lambda: story(MODEL, masks=torch.ones(1, 64, 64)),
    "photos": lambda: story(MODEL, reference=bank_of(steps=1), feature_injection=0.0),
}


@LAW("sampler", RESIZING)
@LAW("told", STORIES)
def test_a_story_names_the_sampler_that_resizes(told, sampler):
    sampler, name, size = RESIZING[sampler]
    with pytest.raises(
        ValueError,
        match=f"ConsiStory Shared Attention: the sampler {name} asks the model for pictures of {size} where the "
        "latent is 16x16.*Choose a sampler that keeps the size, such as euler or ddim",
    ):
        drawn(STORIES[told](), sampler, noise(2), prompts_of((0, 1)))


def test_features_of_another_size_are_not_compared():
    """Nothing is shared here and no word followed: only features are, and they would be of another size."""
    with pytest.raises(
        ValueError, match="the sampler half_size asks the model for pictures of 8x8"
    ):
        drawn(
            story(MODEL, weight=0.0, masks=torch.ones(1, 64, 64)),
            HALF,
            noise(2),
            prompts_of((0, 1)),
        )


def test_a_story_that_is_over_lets_the_sampler_resize():
    """LCM upscaling grows the picture behind the first level; with drawn masks and no sharing nothing of ours is left to do there."""
    sampler, early = (
        RESIZING["LCM upscale"][0],
        {"injection_start_percent": 0.99, "injection_end_percent": 1.0},
    )
    model = ConsiStory.execute(
        MODEL, anchors=2, halves="both", weight=0.0, masks=torch.ones(1, 64, 64), **early
    ).result[0]
    assert torch.equal(
        drawn(model, sampler, noise(2), prompts_of((0, 1))),
        drawn(MODEL, sampler, noise(2), prompts_of((0, 1))),
    )


@LAW("read", ["cached", "live"])
def test_references_without_a_mask_are_read_at_any_size(read):
    bank = (
        capture(MODEL, sigmas=torch.tensor([14.6, 7.0, 3.0, 1.0, 0.0]), negative=negative())[0]
        if read == "cached"
        else bank_of(steps=2)
    )
    ours = inject(MODEL, bank, 2.0)
    assert (
        differs(drawn(ours, HALF, noise()), doubled(drawn(ours, EULER, noise()[:, :, ::2, ::2])))
        < TIGHT
    )
