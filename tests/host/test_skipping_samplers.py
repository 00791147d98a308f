"""Anchors that are made can be read: a sampler that passes over a level of its schedule is refused while they are made."""

from __future__ import annotations

import comfy.k_diffusion.sampling
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_easycache import LazyCacheNode
from ours import leaving_nothing
from resizing import ODD, sample_leaping, sample_louder
from stories import FELT, MODEL, SHARING, TIGHT, plain
from studio import anchors, counted, differs, pictures, story

LAW = pytest.mark.parametrize
# What they ask a level for the second time is kept, or they draw numbers for a whole batch: a part of it is another picture.
LOOSE = ("heun", "ancestral", "sde", "ddpm", "lcm", "seeds", "sa_solver")
READABLE = (
    "Choose a sampler that asks at every level of its schedule, such as euler, ddim or dpmpp_2m"
)


@pytest.fixture
def packs_samplers(monkeypatch):
    """As packs bring their own: a function in the host's module and its name in the host's list."""
    for function in ODD:
        monkeypatch.setattr(comfy.k_diffusion.sampling, function.__name__, function, raising=False)
    monkeypatch.setattr(
        comfy.samplers.KSampler,
        "SAMPLERS",
        [*comfy.samplers.SAMPLER_NAMES, *(f.__name__[7:] for f in ODD)],
    )


@LAW("sampler", comfy.samplers.SAMPLER_NAMES)
def test_the_anchors_of_every_sampler_are_refused_or_can_be_read_by_it(sampler):
    how = {"sampler": sampler, "steps": 4}
    try:
        whole, bank = anchors(story(MODEL, **SHARING), **how)
    except ValueError as error:
        assert (
            sampler in str(error)
            and READABLE in str(error)
            and sampler in ("dpm_fast", "dpm_adaptive")
        )
        return
    further = pictures(story(MODEL, reference=bank, **SHARING), [2], **how)
    if any(kind in sampler for kind in LOOSE):
        assert torch.isfinite(further).all()
    else:
        assert differs(further, whole[2:]) < TIGHT


@LAW(
    "how",
    [{}, SHARING, {"masks": torch.ones(1, 64, 64)}, {"order": "official"}],
    ids=["story", "sharing", "masks", "official"],
)
@LAW("sampler", [sample_louder, sample_leaping])
def test_anchors_of_a_sampler_that_passes_over_a_level_are_refused(sampler, how, packs_samplers):
    name = sampler.__name__[7:]
    with pytest.raises(
        ValueError,
        match=f"ConsiStory Anchor Sampler: the sampler {name} passes over noise level .* of its schedule.*{READABLE}",
    ):
        anchors(story(MODEL, **how), (0, 1), sampler=name)
    assert (
        differs(pictures(story(MODEL, **how), (0, 1), sampler=name), plain((0, 1), sampler=name))
        > FELT
    )  # a story needs no level twice


def test_it_is_refused_before_the_rest_is_sampled(packs_samplers):
    """As soon as the sampler has left a level behind, not at the end of the run."""
    with (
        leaving_nothing(),
        counted(MODEL) as rows,
        pytest.raises(ValueError, match="passes over noise level"),
    ):
        anchors(story(MODEL), (0, 1), steps=20, sampler="louder")
    assert len(rows) < 8


@LAW("sampler", ["dpm_fast", "dpm_adaptive"])
def test_the_hosts_own_are_refused_before_any_work(sampler):
    with (
        counted(MODEL) as rows,
        pytest.raises(
            ValueError,
            match=f"the sampler {sampler} passes over levels of its schedule.*{READABLE}",
        ),
    ):
        anchors(story(MODEL), (0, 1), sampler=sampler)
    assert not rows


def test_who_looks_ahead_and_comes_back_has_passed_over_nothing(packs_samplers):
    bank = anchors(story(MODEL, **SHARING), (0, 1), sampler="ahead")[1]
    assert torch.isfinite(
        pictures(story(MODEL, reference=bank, **SHARING), [2], sampler="ahead")
    ).all()


def test_where_another_node_answered_it_is_named_too():
    """LazyCache stands where the sampler's question would have come to us."""
    cached = LazyCacheNode.execute(story(MODEL), 3.0, 0.0, 1.0, False)[0]
    with pytest.raises(
        ValueError,
        match="the sampler euler, or a node between it and the model .*, passes over noise level .*or remove that node",
    ):
        anchors(cached, (0, 1))
