"""Laws of ConsiStory's schedule, dropout, share matrix and subject masks (method.md 3.2; I15, I20-I24, I32, I37, I40, I45)."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from kindred.models.story.plan import (
    Schedule,
    StorySettings,
    SubjectMaps,
    dropped,
    positions_of,
    shared_groups,
    subject_masks,
)
from kindred.models.subject.masks import binarise
from torch import Tensor

BETAS = (
    torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
)  # of SD1.x, 2.x and SDXL
LOG_SIGMAS = ((1 / torch.cumprod(1 - BETAS, 0)) - 1).log() / 2
A, B = ("middle", 0, 0), ("output", 3, 1)  # blocks


def sigma(t: float) -> float:
    """At a timestep, as the host has it: linear in log sigma between two, float32."""
    low = min(int(t), 998)
    return float(torch.lerp(LOG_SIGMAS[low], LOG_SIGMAS[low + 1], t - low).exp().float())


def timesteps(steps: int) -> list[int]:
    """The host's ddim_uniform, without the end."""
    return list(range(1, 1000, 1000 // steps))[::-1]


def schedule(times: list[int], **changed) -> Schedule:
    """The nodes' defaults: windows of 12 % and of 10 % to 32 % of the sampling."""
    given = {
        "blend_until": sigma(0.88 * 999),
        "inject": (sigma(0.9 * 999), sigma(0.68 * 999)),
        **changed,
    }
    return Schedule(
        tuple(map(sigma, times)), tuple(map(float, times)), StorySettings(frozenset(), (), **given)
    )


def blends(s: Schedule) -> dict[int, float]:
    """Timestep -> nu, where a plain pass is needed."""
    return {int(t): nu for t, sigma in zip(s.timesteps, s.sigmas) if (nu := s.blend(sigma))}


def injected(s: Schedule) -> list[int]:
    return [int(t) for t, sigma in zip(s.timesteps, s.sigmas) if s.injects(sigma)]


def rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# the schedule --------------------------------------------------------------------------------------------------------------


def test_fifty_steps_blend_as_the_paper_says() -> None:
    """Steps 0 to 5 (method.md 3.2: .8837 .8673 .8510 .8347 .8184 after .9), nothing afterwards."""
    found = blends(schedule(timesteps(50)))
    assert list(found) == [981, 961, 941, 921, 901, 881]
    assert list(found.values()) == pytest.approx(
        torch.linspace(0.9, 0.818, 6, dtype=torch.float64).tolist(), abs=1e-12
    )
    assert list(found.values()) == pytest.approx(
        [0.9, 0.8837, 0.8673, 0.8510, 0.8347, 0.8184], abs=5e-4
    )


def test_fifty_steps_inject_at_680_to_900() -> None:
    s = schedule(timesteps(50))
    assert (
        injected(s) == [t for t in timesteps(50) if 680 <= t <= 900] == list(range(881, 680, -20))
    )
    assert (
        s.features_at == sigma(261)
        and s.step(s.features_at) == 36
        and s.first_injection == sigma(881)
    )


@pytest.mark.parametrize(
    "steps, blended, first, last, features",
    [
        (8, [], 876, 751, 251),
        (20, [951, 901], 851, 701, 251),
        (100, list(range(991, 880, -10)), 891, 681, 261),
        (1, [], None, None, 1),
        (2, [], None, None, 501),
    ],
)
def test_other_step_counts(steps, blended, first, last, features) -> None:
    s = schedule(timesteps(steps))
    assert list(blends(s)) == blended and s.features_at == sigma(features)
    assert injected(s) == [t for t in timesteps(steps) if first and last <= t <= first]
    assert s.first_injection == (None if first is None else sigma(first))
    if blended:
        assert list(blends(s).values()) == pytest.approx(
            torch.linspace(0.9, 0.818, len(blended), dtype=torch.float64).tolist()
        )


@pytest.mark.parametrize(
    "start, blended, first",
    [
        (901, [901, 881], 881),
        (881, [881], 881),
        (861, [], 861),
        (681, [], 681),
        (661, [], None),
        (241, [], None),
    ],
)
def test_a_run_that_starts_later(start, blended, first) -> None:
    """Image to image: the windows are noise levels, and nu runs over the steps that this run has in its window."""
    s = schedule([t for t in timesteps(50) if t <= start])
    nus = {1: [0.9], 2: [0.9, 0.818]}.get(len(blended), [])
    assert list(blends(s)) == blended and list(blends(s).values()) == pytest.approx(nus)
    assert s.first_injection == (first and sigma(first)) and s.features_at == sigma(min(start, 261))
    assert s.step(s.sigmas[0]) == 0 and s.step(s.sigmas[-1]) == len(s.sigmas) - 1


@pytest.mark.parametrize(
    "end, features, first",
    [(501, 501, None), (281, 281, 881), (861, 861, None), (881, 881, None), (901, 901, None)],
)
def test_a_run_that_stops_early(end, features, first) -> None:
    """One stage where nothing comes after the first injection to compare the pictures by."""
    s = schedule([t for t in timesteps(50) if t >= end])
    assert s.features_at == sigma(features) and s.first_injection == (first and sigma(first))


@pytest.mark.parametrize(
    "nothing",
    [
        {"injection": 0.0},
        {"inject": (0.0, 0.0)},
        {"inject": (sigma(680), sigma(900))},
        {"inject": (sigma(880), sigma(862))},
        {"inject": (1e9, 1e8)},
        {"inject": (sigma(261), 0.0)},
    ],
)
def test_an_empty_window_needs_no_second_stage(nothing) -> None:
    """Nor one that opens where the features are read, too late for the first stage to be cut there."""
    s = schedule(timesteps(50), **nothing)
    assert s.first_injection is None
    assert bool(injected(s)) == (
        nothing.get("inject", (0, 1))[1] == 0 < nothing.get("inject", (0, 1))[0]
    )


def test_windows_hold_both_their_ends() -> None:
    """To what a sigma loses between a schedule in float64 and a sampler in float32."""
    for change in (1.0, 1 - 1e-6, 1 + 1e-6):
        s = schedule(
            timesteps(50),
            blend_until=sigma(881) * change,
            inject=(sigma(881) * change, sigma(681) * change),
        )
        assert list(blends(s)) == [981, 961, 941, 921, 901, 881] and injected(s) == list(
            range(881, 680, -20)
        )
        assert blends(s)[881] == pytest.approx(0.818)
        asked = sigma(881) / change
        assert s.blend(asked) == pytest.approx(0.818) and s.injects(asked) and s.step(asked) == 5


def test_sigmas_between_two_steps_belong_to_the_step_they_lie_in() -> None:
    s = schedule(timesteps(50))
    for i, (above, below) in enumerate(zip(s.sigmas, s.sigmas[1:])):
        between = (above * below) ** 0.5
        assert s.step(between) == s.step(above) == s.step(above * (1 - 1e-6)) == i
        if i < 5:
            assert s.blend(between) == s.blend(above)
    assert s.step(s.sigmas[0] * 2) == 0 and s.step(s.sigmas[-1] / 2) == 49
    assert (
        s.blend(sigma(870)) == 0 and s.blend(s.sigmas[0] * 2) == 0.9
    )  # below the window's end; above the run
    assert (
        s.injects(sigma(890))
        and s.injects(sigma(680))
        and not s.injects(sigma(903))
        and not s.injects(sigma(670))
    )


def test_a_blend_of_nothing_needs_no_plain_pass() -> None:
    assert not blends(schedule(timesteps(50), blend=(0.0, 0.5))) and not blends(
        schedule(timesteps(50), blend_until=1e9)
    )
    assert list(blends(schedule(timesteps(50), blend=(1.0, 1.0))).values()) == [1.0] * 6
    assert list(blends(schedule(timesteps(50), blend=(0.5, 0.0)))) == [
        981,
        961,
        941,
        921,
        901,
    ]  # and none where it has come to 0


# dropout -------------------------------------------------------------------------------------------------------------------


def test_dropout_is_a_function_of_its_arguments_alone() -> None:
    """I45, and the global random state is left alone."""
    first, state = dropped(3, 1, 2, (5, 7), 0.5), torch.get_rng_state()
    for other in [(3, 0, 2, (5, 7), 0.5), (9, 1, 2, (8, 8), 0.1)]:
        dropped(*other)
        torch.manual_seed(11)
        assert torch.equal(dropped(3, 1, 2, (5, 7), 0.5), first)
        assert torch.equal(
            dropped(3, 1, 2, torch.Size((5, 7)), 0.5), first
        )  # whatever the grid comes as
        torch.set_rng_state(state)
    dropped(3, 1, 2, (5, 7), 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_the_same_in_every_version() -> None:
    """A story's seed makes the same pictures next year, and beside anchors that were saved today."""
    assert "".join("01"[d] for d in dropped(0, 1, 2, (3, 4), 0.5)) == "010011111111"


@pytest.mark.parametrize("p", [0.15, 0.5, 0.7])
def test_the_kept_fraction(p) -> None:
    """I20: to four standard errors of 4 x 4032 draws; and it does not depend on where a token lies."""
    draws = torch.stack([dropped(5, i, 2 * i, (72, 56), p) for i in range(4)]).double()
    error = 4 * (p * (1 - p) / draws.numel()) ** 0.5
    assert draws.mean().item() == pytest.approx(p, abs=error)
    for half in draws.flatten(1).chunk(2, 1):
        assert half.mean().item() == pytest.approx(p, abs=error * 2**0.5)


def test_dropout_of_none_and_of_all() -> None:
    for i in range(8):
        assert not dropped(0, i, 1, (9, 5), 0.0).any() and dropped(0, i, 1, (9, 5), 1.0).all()
    assert (
        dropped(0, 0, 0, (3, 5), 0.5).shape == (15,)
        and dropped(0, 0, 0, (3, 5), 0.5).dtype == torch.bool
    )


def test_everything_in_the_key_changes_the_draw() -> None:
    """Pictures, steps, seeds, and grids with as many tokens; exchanging two of them is another draw too."""
    keys = [
        (s, i, t, g)
        for s in (0, 1, 2**64 - 1)
        for i in (0, 1, 11)
        for t in (0, 1, 11)
        for g in ((4, 12), (12, 4), (6, 8))
    ]
    draws = [tuple(dropped(*key, 0.5).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    overlaps = torch.tensor(draws).double().corrcoef().triu(1)
    assert overlaps.abs().max() < 0.75  # 48 draws each: independent ones stay below


# who reads whom ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [1, 2, 3, 6])
@pytest.mark.parametrize("anchors", [0, 1, 2, 3, 6, 9])
def test_pictures_read_the_anchors_but_themselves(pictures, anchors) -> None:
    """I22 to I24: anchors one another, the others all anchors, nobody the others; every picture in one group, in order."""
    groups = shared_groups(pictures, anchors)
    count = pictures if anchors in (0, *range(pictures, 10)) else anchors
    reads = {i: set(read) for (first, last), read in groups for i in range(first, last)}
    assert reads == {i: set(range(count)) - {i} for i in range(pictures)}
    assert [i for (first, last), _ in groups for i in range(first, last)] == list(range(pictures))
    assert all(len(read) == len(set(read)) for _, read in groups)
    assert len(groups) == count + (pictures > count)  # the others share one call


# maps ----------------------------------------------------------------------------------------------------------------------


def story(levels: int) -> tuple[SubjectMaps, list[float], list[Tensor]]:
    maps, sigmas, given = SubjectMaps(), [float(levels - i) for i in range(levels)], []
    for i, s in enumerate(sigmas):
        given.append(rand(2, 1, 3, 4, seed=i))
        maps.add(s, A, 0, given[-1])
    return maps, sigmas, given


@pytest.mark.parametrize("levels", [1, 5, 20, 30])
def test_the_mean_runs_over_the_last_twenty_levels_above(levels) -> None:
    maps, sigmas, given = story(levels)
    for i, s in enumerate(sigmas):
        if i == 0:
            assert maps.mean(s) is None
        else:
            torch.testing.assert_close(maps.mean(s), torch.stack(given[max(0, i - 20) : i]).mean(0))
        torch.testing.assert_close(
            maps.mean(s, inclusive=True), torch.stack(given[max(0, i - 19) : i + 1]).mean(0)
        )
    torch.testing.assert_close(maps.mean(-1.0), torch.stack(given[-20:]).mean(0))
    assert maps.sigmas == sigmas


@pytest.mark.parametrize("read", [True, False])
def test_a_level_asked_twice_counts_once(read) -> None:
    """I37: whether its mean was taken in between or not; the later evaluation stands, and in it what came first."""
    maps, sigmas, given = story(4)
    if read:
        maps.mean(-1.0)
    maps.begin(sigmas[1])
    assert maps.sigmas == [sigmas[0], *sigmas[2:]]
    other = rand(2, 1, 3, 4, seed=99)
    for late in (other, given[1]):
        maps.add(sigmas[1], A, 0, late)
    torch.testing.assert_close(maps.mean(-1.0), torch.stack([given[0], other, *given[2:]]).mean(0))
    assert maps.sigmas == sigmas
    maps.begin(99.0)  # a level that was never asked at
    assert maps.sigmas == sigmas


@pytest.mark.parametrize("read", [True, False])
def test_forgetting_drops_a_level_and_all_below(read) -> None:
    maps, sigmas, given = story(5)
    if read:
        maps.mean(-1.0)
    maps.forget(sigmas[2])
    assert maps.sigmas == sigmas[:2]
    torch.testing.assert_close(maps.mean(-1.0), torch.stack(given[:2]).mean(0))
    maps.forget(1e9)
    assert maps.mean(-1.0) is None and maps.sigmas == []


def test_blocks_and_parts_weigh_the_same_at_the_finest_grid() -> None:
    """I40: on pictures that are not square; a spot that both grids see stays where it is."""
    maps, coarse, fine = SubjectMaps(), torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4, 6)
    coarse[0, 0, 1, 2] = fine[0, 0, 3, 5] = 1
    maps.add(1.0, A, 0, coarse)
    maps.add(1.0, B, 0, fine)
    maps.add(1.0, B, 1, 3 * fine)
    found = maps.at(1.0)
    assert found.shape == (1, 1, 4, 6) and int(found.argmax()) == 3 * 6 + 5
    assert found[0, 0, 3, 5] == pytest.approx((1 + 1 + 3) / 3)
    for s, other in ((0.5, coarse), (0.25, coarse)):  # and so do levels of unlike grids
        maps.add(s, A, 0, other)
    assert maps.mean(-1.0).shape == (1, 1, 4, 6) and int(maps.mean(-1.0).argmax()) == 3 * 6 + 5
    assert maps.mean(-1.0)[0, 0, 3, 5] == pytest.approx((5 / 3 + 1 + 1) / 3)


def test_parts_and_levels_with_fewer_words_take_nothing_from_the_others() -> None:
    """Two prompts of one batch, or of one story, may mark unlike many subjects: each word is where its own maps are."""
    one, two = rand(2, 1, 3, 4, seed=1), rand(2, 2, 3, 4, seed=2)
    for first, second in permutations((one, two)):
        maps = SubjectMaps()
        maps.add(1.0, A, 0, first)
        maps.add(1.0, A, 1, second)
        found = subject_masks(maps.mean(-1.0), (3, 4))
        assert torch.equal(
            found, subject_masks(torch.stack((one[:, 0] + two[:, 0], two[:, 1]), 1), (3, 4))
        )
        maps = SubjectMaps()
        maps.add(2.0, A, 0, first)
        maps.add(1.0, A, 0, second)
        assert torch.equal(subject_masks(maps.mean(-1.0), (3, 4)), found)


# masks ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 4), (6, 8), (2, 2)])
def test_several_subjects_are_united_whatever_their_order(grid) -> None:
    """I32: each word has a threshold of its own."""
    soft = rand(2, 3, 3, 4, seed=1) * torch.tensor([1.0, 1e-3, 30.0])[:, None, None]
    each = torch.stack([subject_masks(soft[:, [i]], grid) for i in range(3)])
    assert torch.equal(subject_masks(soft, grid), each.any(0))
    for order in permutations(range(3)):
        assert torch.equal(subject_masks(soft[:, list(order)], grid), each.any(0))
    assert (each.any(0) != each[0]).any()


@pytest.mark.parametrize("threshold", ["otsu", 0.3])
def test_a_constant_map_is_an_empty_mask(threshold) -> None:
    """I15: a word that lights up nowhere; beside another it changes nothing."""
    flat, spots = torch.full((2, 1, 3, 4), 0.7), rand(2, 1, 3, 4, seed=3)
    for grid in ((3, 4), (6, 8), (2, 3)):
        assert not subject_masks(flat, grid, threshold).any()
        assert torch.equal(
            subject_masks(torch.cat((spots, flat), 1), grid, threshold),
            subject_masks(spots, grid, threshold),
        )


def test_the_threshold_is_handed_on() -> None:
    soft = rand(2, 1, 6, 8, seed=4)
    for threshold in ("otsu", 0.2, 0.9):
        assert torch.equal(subject_masks(soft, (6, 8), threshold), binarise(soft[:, 0], threshold))


@pytest.mark.parametrize("spot", [(0, 0), (1, 2), (2, 4), (3, 5), (0, 5), (3, 0)])
def test_a_spot_lands_on_the_same_place_in_every_grid(spot) -> None:
    """I40: the cells of every grid that share area with the spot's cell, and none far from it; each picture its own."""
    y, x = spot
    soft = torch.zeros(2, 1, 4, 6)
    soft[0, 0, y, x] = soft[1, 0, 3 - y, 5 - x] = 1
    for scale in (0.5, 1, 2, 4):
        grid = int(4 * scale), int(6 * scale)
        mask = subject_masks(soft, grid)
        at = mask[0].nonzero().double()
        centre = (at.mean(0) + 0.5) / scale
        assert (centre - torch.tensor([y + 0.5, x + 0.5])).abs().max() < 0.51 + 0.5 * (scale < 1)
        assert mask[0, int((y + 0.5) * scale), int((x + 0.5) * scale)]
        assert ((at + 0.5) / scale - torch.tensor([y + 0.5, x + 0.5])).abs().max() < 2
        assert torch.equal(mask[1], mask[0].flip((0, 1)))


def test_positions_count_over_all_pictures() -> None:
    masks = rand(3, 3, 4, seed=5) > 0.6
    masks[1] = False
    found = positions_of(masks, (2, 1, 0))
    assert [len(p) for p in found] == [int(masks[2].sum()), 0, int(masks[0].sum())]
    for picture, positions in zip((2, 1, 0), found):
        assert positions.dtype == torch.int64
        assert positions.tolist() == [
            picture * 12 + y * 4 + x for y in range(3) for x in range(4) if masks[picture, y, x]
        ]
    assert positions_of(masks, ()) == []
