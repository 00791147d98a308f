"""Laws of measuring a story: similarity of two pictures, layout spread, sets, what a row sets at the node."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from evaluation.rows import Row
from evaluation.story import FREEU, Scenes, Story, floor_of, listed, story_set
from hypothesis import given
from hypothesis import strategies as st
from kindred.miniature.reader import (
    HUES,
    Reading,
    consistency,
    identity_similarity,
    layout_spread,
    pairwise_similarity,
    subject_boxes,
)
from kindred.miniature.world import (
    CLASSES,
    HATS,
    PATTERNS,
    PLACES,
    SCENES,
    Identity,
    random_identity,
    render,
)
from miniature_host import Studio

COLOURS = (*HUES, "saturation", "value")


def certain(*identities: Identity, masks: torch.Tensor | None = None) -> Reading:
    """A reading without a doubt."""
    rows = {
        kind: torch.eye(4)[[names.index(getattr(who, kind)) for who in identities]]
        for kind, names in (("pattern", PATTERNS), ("hat", HATS))
    }
    b = len(identities)
    rows |= {"class": torch.eye(5)[:1].expand(b, 5), "scene": torch.eye(8)[:1].expand(b, 8)}
    colours = {name: torch.tensor([getattr(who, name) for who in identities]) for name in COLOURS}
    masks = torch.zeros(b, 16, 16) if masks is None else masks
    return Reading(rows, colours, masks, torch.ones(b))


def unsure(b: int, seed: int, sharpness: float = 1.0) -> Reading:
    g = torch.Generator().manual_seed(seed)
    sizes = {"class": 5, "scene": 8, "pattern": 4, "hat": 4}
    kinds = {
        kind: (sharpness * torch.randn(b, n, generator=g)).softmax(1) for kind, n in sizes.items()
    }
    return Reading(
        kinds,
        {name: torch.rand(b, generator=g) for name in COLOURS},
        torch.rand(b, 16, 16, generator=g),
        torch.rand(b, generator=g),
    )


# similarity ------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_similarity_has_no_direction(seed):
    one, other = unsure(3, seed), unsure(5, seed + 1)
    there, back = pairwise_similarity(one, other), pairwise_similarity(other, one)
    assert there.shape == (3, 5) and torch.allclose(there, back.T, rtol=0, atol=1e-12)
    assert 0 <= float(there.min()) and float(there.max()) <= 1


@given(st.integers(0, 10_000))
def test_a_reading_without_doubt_is_an_identity(seed):
    who, seen = random_identity(seed), unsure(4, seed)
    found = pairwise_similarity(seen, certain(who))[:, 0].tolist()
    assert found == pytest.approx([identity_similarity(seen, who, i) for i in range(4)], abs=1e-6)


def test_a_sure_picture_is_itself_and_an_unsure_one_less():
    people = [random_identity(seed) for seed in range(40)]
    assert pairwise_similarity(
        certain(*people), certain(*people)
    ).diagonal().tolist() == pytest.approx([1.0] * 40)
    for sharpness in (0, 1, 10, 1e6):
        seen = unsure(5, 0, sharpness)
        sure = {kind: seen.probabilities[kind].square().sum(1) for kind in ("pattern", "hat")}
        expected = 0.6 + 0.25 * sure["pattern"] + 0.15 * sure["hat"]
        assert pairwise_similarity(seen, seen).diagonal().tolist() == pytest.approx(
            expected.tolist(), abs=1e-6
        )
    assert expected.tolist() == [1.0] * 5


def test_doubt_is_an_expectation():
    """Half stripes, half spots against stripes: half of the pattern's share; a hat half seen counts half, and by its hue."""
    who = Identity(0.0, 0.9, 0.9, 0.5, "stripes", "cone", 0.25)
    seen = certain(who)
    half = Reading(
        seen.probabilities | {"pattern": torch.tensor([[0, 0.5, 0.5, 0]])},
        seen.colours,
        seen.mask,
        seen.whole,
    )
    assert float(pairwise_similarity(half, seen)) == pytest.approx(1 - 0.25 / 2)
    assert float(pairwise_similarity(half, half)) == pytest.approx(1 - 0.25 / 2)
    torn, elsewhere = {"hat": torch.tensor([[0.5, 0.5, 0, 0]])}, {"hat_hue": torch.tensor([0.375])}
    hat = Reading(seen.probabilities | torn, seen.colours | elsewhere, seen.mask, seen.whole)
    assert float(pairwise_similarity(hat, seen)) == pytest.approx(0.85 + 0.15 * 0.5 * 0.5)
    assert float(pairwise_similarity(hat, hat)) == pytest.approx(0.85 + 0.15 * 0.5)
    bare = certain(Identity(0.0, 0.9, 0.9, 0.5, "stripes", "none", 0.8))
    assert float(pairwise_similarity(hat, bare)) == pytest.approx(
        0.85 + 0.15 * 0.5
    )  # without a hat its hue means nothing


@given(st.integers(0, 10_000), st.permutations(range(4)))
def test_consistency_is_the_mean_of_all_pairs_in_any_order(seed, order):
    people = [random_identity(seed + i) for i in range(4)]
    pairs = [identity_similarity(certain(people[i]), people[j]) for i in range(4) for j in range(i)]
    assert consistency(certain(*people)) == pytest.approx(sum(pairs) / 6, abs=1e-6)
    assert consistency(certain(*(people[i] for i in order))) == pytest.approx(
        sum(pairs) / 6, abs=1e-6
    )


def test_one_picture_has_no_consistency():
    with pytest.raises(ValueError, match="at least 2; it got 1"):
        consistency(unsure(1, 0))


# layout ----------------------------------------------------------------------------------------------------------------------


def boxes_of(*boxes: tuple[int, int, int, int]) -> torch.Tensor:
    """(left, top, width, height) in cells -> boxes as read from masks of ones."""
    masks = torch.zeros(len(boxes), 16, 16)
    for mask, (x, y, w, h) in zip(masks, boxes):
        mask[y : y + h, x : x + w] = 1
    return subject_boxes(certain(*[random_identity(0)] * len(boxes), masks=masks))


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 7), st.integers(1, 7))
def test_a_filled_rectangle_is_its_own_box(x, y, w, h):
    assert boxes_of((x, y, w, h))[0].tolist() == pytest.approx(
        [(x + w / 2) / 16, (y + h / 2) / 16, w / 16, h / 16], abs=1e-6
    )


def test_a_faint_background_moves_no_box():
    mask = torch.full((1, 16, 16), 0.4)
    mask[:, 2:6, 3:9] = 1
    assert torch.equal(
        subject_boxes(certain(random_identity(0), masks=mask)), boxes_of((3, 2, 6, 4))
    )


def test_equal_boxes_have_no_spread_and_it_grows():
    assert layout_spread(boxes_of(*[(3, 2, 6, 4)] * 4)) == 0
    spreads = [
        layout_spread(boxes_of((3, 2, 6, 4), (3 + d, 2, 6, 4), (3, 2, 6, 4))) for d in range(5)
    ]
    assert spreads == sorted(spreads) and len(set(spreads)) == 5
    assert layout_spread(boxes_of((0, 0, 4, 4), (2, 2, 4, 4))) == pytest.approx(
        1 / 16 / 2
    )  # two of four numbers, one cell each
    assert layout_spread(boxes_of((4, 4, 4, 4), (3, 3, 6, 6))) == pytest.approx(
        1 / 16 / 2
    )  # sizes count like places


@given(st.permutations(range(4)))
def test_spread_does_not_depend_on_the_order(order):
    boxes = boxes_of((0, 0, 4, 4), (5, 2, 6, 3), (9, 9, 2, 7), (1, 8, 3, 3))
    assert layout_spread(boxes[list(order)]) == pytest.approx(layout_spread(boxes), abs=1e-12)


def test_pictures_without_a_subject_are_left_out():
    two = boxes_of((0, 0, 4, 4), (2, 2, 4, 4))
    with_empty = boxes_of((0, 0, 4, 4), (0, 0, 0, 0), (2, 2, 4, 4))
    assert bool(with_empty[1].isnan().all()) and layout_spread(with_empty) == layout_spread(two)
    assert math.isnan(layout_spread(with_empty[:2])) and math.isnan(layout_spread(with_empty[1:2]))


# sets ------------------------------------------------------------------------------------------------------------------------


def test_sets_are_drawn_by_their_number():
    sets = [story_set(number) for number in range(40)]
    assert sets == [story_set(number) for number in range(40)]
    assert [kind for kind, _ in sets] == [CLASSES[i % 5] for i in range(40)]
    assert all(len(set(scenes)) == 4 and set(scenes) <= set(SCENES) for _, scenes in sets)
    assert len({tuple(scenes) for _, scenes in sets}) > 30
    assert (
        min(sum(scene in scenes for _, scenes in sets) for scene in SCENES) >= 10
    )  # of 20 on the average


def test_the_floor_pairs_plain_pictures_of_different_sets():
    who, other = random_identity(1), random_identity(2)
    readings = [listed(certain(*[one] * 4)) for one in (who, other, other)]
    assert floor_of(readings) == pytest.approx(
        (2 * identity_similarity(certain(who), other) + 1) / 3, abs=1e-6
    )
    assert math.isnan(floor_of(readings[:1]))


# a run ---------------------------------------------------------------------------------------------------------------------


class Pretender:
    """A studio that draws instead of sampling: the node makes the pictures of a set one subject's, plain ones are anybody's."""

    def __init__(self, host, steps, cfg) -> None:
        self.torch, self.model, self.runs, self.cfg, self.size = torch, "plain", [], cfg, 128

    @contextmanager
    def counted(self):
        yield [None] * 7

    def prompts(self, lines, subject):
        assert all(subject in line.split() for line in lines)
        return tuple(lines), subject

    def run(self, node, model, **inputs):
        assert (node, model) == ("KindredConsiStory", "plain")
        self.runs.append(inputs)
        return ["story"]

    def freeu(self, model, **scales):
        assert model == "plain"
        self.runs.append(scales)
        return model

    def picture(self, image):
        return torch.tensor(image).float().div(255)[None]

    def autoencode(self, images):
        return images

    def sample(self, model, positive, count, seed, cfg):
        self.runs.append((model, count, seed, cfg))
        lines, kind = positive
        scenes = [
            next(scene for scene, place in PLACES.items() if line.endswith(place)) for line in lines
        ]
        who = [random_identity(900 * seed + (i if model == "plain" else 0)) for i in range(count)]
        return torch.cat(
            [
                self.picture(render(w, kind, scene, 70 * seed + i).image)
                for i, (w, scene) in enumerate(zip(who, scenes))
            ]
        )


@pytest.fixture(scope="module")
def told():
    """A studio's runs, and what four sets gave, by row."""
    studio = Pretender(None, 50, 4.0)
    rows = {
        name: Row.parse("story", f"{name}: {inputs}")
        for name, inputs in {
            "plain": "node=off",
            "story": "",
            "no_mask": "mask=none",
            "mine": "weight=2, cfg=6, seed=3",
        }.items()
    }
    found = {
        name: [Story(studio, Scenes(studio)).measure(row, number, 0)[0] for number in range(20, 24)]
        for name, row in rows.items()
    }
    return (
        studio.runs,
        found,
        [Scenes(studio).bounds(number)[0]["ceiling"] for number in range(20, 24)],
    )


def mean(values, key):
    return sum(v[key] for v in values) / len(values)


def test_a_true_story_is_measured_as_one(told):
    _, found, ceilings = told
    plain, made, ceiling = (
        mean(found["plain"], "consistency"),
        mean(found["story"], "consistency"),
        sum(ceilings) / 4,
    )
    assert (made - plain) / (ceiling - plain) == pytest.approx(1, abs=0.15) and ceiling > 0.8
    assert plain < 0.4 and floor_of([values["reading"] for values in found["plain"]]) < 0.4
    for values in (*found["plain"], *found["story"]):
        assert values["scene"] == values["class"] == [1.0] * 4 and values["unet_calls"] == 7
    assert mean(found["story"], "layout_spread") == pytest.approx(
        mean(found["plain"], "layout_spread"), rel=0.2
    )


def test_rows_set_the_nodes_inputs(told):
    runs, _, _ = told
    assert runs[0] == ("plain", 4, 20, None)
    assert runs[4:6] == [{"seed": 20}, ("story", 4, 20, None)]
    assert runs[12]["masks"].shape == (4, 128, 128) and bool((runs[12]["masks"] == 1).all())
    assert runs[20:22] == [{"seed": 3, "weight": 2.0}, ("story", 4, 20, 6.0)]


def test_freeu_is_put_before_the_node_and_before_nobody():
    """With the paper's numbers; a row without it has none."""
    studio = Pretender(None, 50, 4.0)
    for text in ("a: freeu=yes", "b: freeu=yes, node=off", "c: freeu=no"):
        Story(studio, Scenes(studio)).measure(Row.parse("story", text), 20, 0)
    assert FREEU == {"b1": 1.1, "b2": 1.2, "s1": 0.6, "s2": 0.4}
    assert (
        studio.runs[:4] == [FREEU, {"seed": 20}, ("story", 4, 20, None), FREEU]
        and FREEU not in studio.runs[4:]
    )


def test_another_seed_is_another_noise_and_no_other_sets():
    studio = Pretender(None, 50, 4.0)
    for number, seed in ((3, 0), (3, 1), (4, 0)):
        Story(studio, Scenes(studio)).measure(Row("plain", (("node", "off"),)), number, seed)
    noises = [run[2] for run in studio.runs]
    assert noises[0] == 3 and noises[2] == 4 and noises[1] > 1000


def test_every_evaluation_of_the_unet_is_counted():
    net = torch.nn.Module()
    net.time_embed = torch.nn.Identity()
    studio = object.__new__(Studio)
    studio.model = SimpleNamespace(model=SimpleNamespace(diffusion_model=net))
    with pytest.raises(KeyError), studio.counted() as calls:
        net.time_embed(torch.zeros(1))
        net.time_embed(torch.zeros(4))
        assert len(calls) == 2
        raise KeyError
    net.time_embed(torch.zeros(1))
    assert len(calls) == 2
