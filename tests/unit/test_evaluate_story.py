"""Laws of measuring a story: similarity of two pictures, layout spread, a row's inputs, tables of several files, a stop in between."""
from __future__ import annotations

import argparse
import json
import math
import os
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import evaluate_story
import pytest
import torch
from evaluate_story import ROWS, RowResult, SetResult, StoryVariant, draw_sheet, figures_of, read_raw, stoppable, story, story_set, table
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
from kindred.miniature.world import CLASSES, HATS, PATTERNS, PLACES, SCENES, Identity, random_identity, render
from miniature_host import Studio

COLOURS = (*HUES, "saturation", "value")


def certain(*identities: Identity, masks: torch.Tensor | None = None) -> Reading:
    """A reading without a doubt."""
    rows = {kind: torch.eye(4)[[names.index(getattr(who, kind)) for who in identities]]
            for kind, names in (("pattern", PATTERNS), ("hat", HATS))}
    b = len(identities)
    rows |= {"class": torch.eye(5)[:1].expand(b, 5), "scene": torch.eye(8)[:1].expand(b, 8)}
    colours = {name: torch.tensor([getattr(who, name) for who in identities]) for name in COLOURS}
    return Reading(rows, colours, torch.zeros(b, 16, 16) if masks is None else masks)


def unsure(b: int, seed: int, sharpness: float = 1.0) -> Reading:
    g = torch.Generator().manual_seed(seed)
    sizes = {"class": 5, "scene": 8, "pattern": 4, "hat": 4}
    kinds = {kind: (sharpness * torch.randn(b, n, generator=g)).softmax(1) for kind, n in sizes.items()}
    return Reading(kinds, {name: torch.rand(b, generator=g) for name in COLOURS}, torch.rand(b, 16, 16, generator=g))


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
    assert pairwise_similarity(certain(*people), certain(*people)).diagonal().tolist() == pytest.approx([1.0] * 40)
    for sharpness in (0, 1, 10, 1e6):
        seen = unsure(5, 0, sharpness)
        sure = {kind: seen.probabilities[kind].square().sum(1) for kind in ("pattern", "hat")}
        expected = 0.6 + 0.25 * sure["pattern"] + 0.15 * sure["hat"]
        assert pairwise_similarity(seen, seen).diagonal().tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert expected.tolist() == [1.0] * 5


def test_doubt_is_an_expectation():
    """Half stripes, half spots against stripes: half of the pattern's share; a hat half seen counts half, and by its hue."""
    who = Identity(0.0, 0.9, 0.9, 0.5, "stripes", "cone", 0.25)
    seen = certain(who)
    half = Reading(seen.probabilities | {"pattern": torch.tensor([[0, 0.5, 0.5, 0]])}, seen.colours, seen.mask)
    assert float(pairwise_similarity(half, seen)) == pytest.approx(1 - 0.25 / 2)
    assert float(pairwise_similarity(half, half)) == pytest.approx(1 - 0.25 / 2)
    torn, elsewhere = {"hat": torch.tensor([[0.5, 0.5, 0, 0]])}, {"hat_hue": torch.tensor([0.375])}
    hat = Reading(seen.probabilities | torn, seen.colours | elsewhere, seen.mask)
    assert float(pairwise_similarity(hat, seen)) == pytest.approx(0.85 + 0.15 * 0.5 * 0.5)
    assert float(pairwise_similarity(hat, hat)) == pytest.approx(0.85 + 0.15 * 0.5)
    bare = certain(Identity(0.0, 0.9, 0.9, 0.5, "stripes", "none", 0.8))
    assert float(pairwise_similarity(hat, bare)) == pytest.approx(0.85 + 0.15 * 0.5)  # without a hat its hue means nothing


@given(st.integers(0, 10_000), st.permutations(range(4)))
def test_consistency_is_the_mean_of_all_pairs_in_any_order(seed, order):
    people = [random_identity(seed + i) for i in range(4)]
    pairs = [identity_similarity(certain(people[i]), people[j]) for i in range(4) for j in range(i)]
    assert consistency(certain(*people)) == pytest.approx(sum(pairs) / 6, abs=1e-6)
    assert consistency(certain(*(people[i] for i in order))) == pytest.approx(sum(pairs) / 6, abs=1e-6)


def test_one_picture_has_no_consistency():
    with pytest.raises(ValueError, match="at least 2; it got 1"):
        consistency(unsure(1, 0))


# layout ----------------------------------------------------------------------------------------------------------------------


def boxes_of(*boxes: tuple[int, int, int, int]) -> torch.Tensor:
    """(left, top, width, height) in cells -> boxes as read from masks of ones."""
    masks = torch.zeros(len(boxes), 16, 16)
    for mask, (x, y, w, h) in zip(masks, boxes):
        mask[y:y + h, x:x + w] = 1
    return subject_boxes(certain(*[random_identity(0)] * len(boxes), masks=masks))


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 7), st.integers(1, 7))
def test_a_filled_rectangle_is_its_own_box(x, y, w, h):
    assert boxes_of((x, y, w, h))[0].tolist() == pytest.approx([(x + w / 2) / 16, (y + h / 2) / 16, w / 16, h / 16], abs=1e-6)


def test_a_faint_background_moves_no_box():
    mask = torch.full((1, 16, 16), 0.4)
    mask[:, 2:6, 3:9] = 1
    assert torch.equal(subject_boxes(certain(random_identity(0), masks=mask)), boxes_of((3, 2, 6, 4)))


def test_equal_boxes_have_no_spread_and_it_grows():
    assert layout_spread(boxes_of(*[(3, 2, 6, 4)] * 4)) == 0
    spreads = [layout_spread(boxes_of((3, 2, 6, 4), (3 + d, 2, 6, 4), (3, 2, 6, 4))) for d in range(5)]
    assert spreads == sorted(spreads) and len(set(spreads)) == 5
    assert layout_spread(boxes_of((0, 0, 4, 4), (2, 2, 4, 4))) == pytest.approx(1 / 16 / 2)  # two of four numbers, one cell each
    assert layout_spread(boxes_of((4, 4, 4, 4), (3, 3, 6, 6))) == pytest.approx(1 / 16 / 2)  # sizes count like places


@given(st.permutations(range(4)))
def test_spread_does_not_depend_on_the_order(order):
    boxes = boxes_of((0, 0, 4, 4), (5, 2, 6, 3), (9, 9, 2, 7), (1, 8, 3, 3))
    assert layout_spread(boxes[list(order)]) == pytest.approx(layout_spread(boxes), abs=1e-12)


def test_pictures_without_a_subject_are_left_out():
    two = boxes_of((0, 0, 4, 4), (2, 2, 4, 4))
    with_empty = boxes_of((0, 0, 4, 4), (0, 0, 0, 0), (2, 2, 4, 4))
    assert bool(with_empty[1].isnan().all()) and layout_spread(with_empty) == layout_spread(two)
    assert math.isnan(layout_spread(with_empty[:2])) and math.isnan(layout_spread(with_empty[1:2]))


# rows ------------------------------------------------------------------------------------------------------------------------


def test_a_row_of_ones_own():
    v = StoryVariant.parse("mine: weight=2, blocks=output 3-5, middle 0, align_keys=false, anchors=3, mask=none, cfg=6, seed_offset=9")
    inputs = (("weight", 2.0), ("blocks", "output 3-5, middle 0"), ("align_keys", False), ("anchors", 3))
    assert v == StoryVariant("mine", inputs, masked=False, cfg=6.0, seed_offset=9)
    assert type(dict(v.inputs)["anchors"]) is int
    assert StoryVariant.parse("as it comes") == StoryVariant.parse("as it comes:") == StoryVariant("as it comes")


def test_the_tables_own_rows():
    rows = {name: StoryVariant.parse(name) for name in ROWS}
    assert rows["story"] == StoryVariant("story") and rows["no_mask"] == StoryVariant("no_mask", (), masked=False)
    assert {name: v.inputs for name, v in rows.items()} == {
        "story": (), "no_sharing": (("weight", 0.0),), "no_dropout": (("dropout", 0.0),), "no_blend": (("query_blend", 0.0),),
        "no_injection": (("feature_injection", 0.0),), "no_mask": ()}
    assert StoryVariant.parse("no_mask: weight=2") == StoryVariant("no_mask", (("weight", 2.0),))  # inputs of one's own, whatever the name


@pytest.mark.parametrize("text, said", [
    ("x: wieght=2", "'x' sets wieght; known are strength"), ("x: weight=much", "'x' sets weight to 'much', which is not a number"),
    ("x: anchors=2.5", "anchors to '2.5', which is not a whole number"),
    ("x: align_keys=perhaps", "align_keys to 'perhaps', .*true or false"),
    ("x: mask=true", "mask to 'true'; it is word"), ("x: weight", "'weight' without a value"), ("x: dropout=, weight=1", "dropout to ''"),
    ("x: weight=1, dropout", "weight to '1, dropout'"), (": weight=1", "name of its own"), ("plain: weight=1", "name of its own")])
def test_a_wrong_row_names_its_input(text, said):
    with pytest.raises(SystemExit, match=said):
        StoryVariant.parse(text)


def test_sets_are_drawn_by_their_number():
    sets = [story_set(number) for number in range(40)]
    assert sets == [story_set(number) for number in range(40)]
    assert [kind for kind, _ in sets] == [CLASSES[i % 5] for i in range(40)]
    assert all(len(set(scenes)) == 4 and set(scenes) <= set(SCENES) for _, scenes in sets)
    assert len({tuple(scenes) for _, scenes in sets}) > 30
    assert min(sum(scene in scenes for _, scenes in sets) for scene in SCENES) >= 10  # of 20 on the average


# tables ----------------------------------------------------------------------------------------------------------------------


def result(number: int, who: Identity, plain: float = 0.2, made: float = 0.6, spread: float = 0.1) -> SetResult:
    rows = {"plain": RowResult(plain, 1.0, 1.0, 0.1, 2.0, 50), "story": RowResult(made, 0.75, 1.0, spread, 5.0 + number, 88)}
    return SetResult(number, 0.8, rows, evaluate_story.listed(certain(*[who] * 4)))


def test_figures_by_hand():
    who, other = random_identity(1), random_identity(2)
    sets = [result(0, who), result(1, other, plain=0.3, made=0.7, spread=0.06), result(2, other)]
    found = figures_of(sets)
    assert found["consistency.plain"] == pytest.approx(0.7 / 3) and found["consistency.story"] == pytest.approx(1.9 / 3)
    assert found["consistency.ceiling"] == pytest.approx(0.8)
    assert found["consistency.floor"] == pytest.approx((2 * identity_similarity(certain(who), other) + 1) / 3, abs=1e-6)
    assert found["scene_accuracy.story"] == 0.75 and found["unet_calls.story"] == 88 and found["count.sets"] == 3
    assert found["seconds.story"] == 6.0 and found["seconds.plain"] == 2.0
    assert found["layout_spread.plain"] == pytest.approx(0.1) and found["layout_spread.story"] == pytest.approx(0.26 / 3)
    plain, made = (line.split(" | ") for line in table(sets)[2:])
    assert plain[0] == "| plain" and plain[3] == "0.00" and plain[6] == "1.00"
    assert made[1:] == ["0.633", "0.033", "0.71", "0.75", "1.00", "0.87", "88", "6.0 |"]


def test_what_was_not_measured_is_absent():
    found = figures_of([result(0, random_identity(1), spread=math.nan)])
    assert "consistency.floor" not in found and "layout_spread.story" not in found and "layout_spread.plain" in found
    assert len(table([result(0, random_identity(1), spread=math.nan)])) == 4
    both = figures_of([result(0, random_identity(1), spread=math.nan), result(1, random_identity(2), spread=0.3)])
    assert both["layout_spread.story"] == pytest.approx(0.3)


def raw(path, sets, steps=50):
    evaluate_story.write_raw(path, steps, 4.0, [StoryVariant("plain", None), StoryVariant("story")], sets)
    return path


def asked(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"merge": None, "variant": None, "raw": None, "sheet": None, "stopped": False} | changes)


def test_two_halves_are_the_whole(tmp_path, capsys):
    sets = [result(i, random_identity(i), plain=0.1 + 0.05 * i, spread=0.1 if i else math.nan) for i in range(5)]
    halves = [raw(tmp_path / "b.json", sets[3:]), raw(tmp_path / "a.json", sets[:3])]
    assert str(read_raw(halves)) == str(sets)  # as text: NaN is not equal to itself
    assert story(asked(merge=halves)) == pytest.approx(figures_of(sets), rel=1e-12)
    assert capsys.readouterr().out.splitlines() == table(sets)


def test_halves_that_do_not_belong_together(tmp_path):
    one = raw(tmp_path / "a.json", [result(0, random_identity(0))])
    with pytest.raises(SystemExit, match="other.json has steps 25, but .*a.json has 50"):
        read_raw([one, raw(tmp_path / "other.json", [result(1, random_identity(1))], steps=25)])
    with pytest.raises(SystemExit, match=r"again.json holds sets \[0\] once more"):
        read_raw([one, raw(tmp_path / "again.json", [result(0, random_identity(0))])])
    for content in ("{", "[]", json.dumps({"sets": [{"number": 1}]})):
        (tmp_path / "torn.json").write_text(content)
        with pytest.raises(SystemExit, match="torn.json is no file of --raw"):
            read_raw([one, tmp_path / "torn.json"])


# a run ---------------------------------------------------------------------------------------------------------------------


class Pretender:
    """A studio that draws instead of sampling: the node makes the pictures of a set one subject's, plain ones are anybody's."""

    def __init__(self, host, steps, cfg) -> None:
        self.torch, self.model, self.runs, self.cfg = torch, "plain", [], cfg

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

    def picture(self, image):
        return torch.tensor(image).float().div(255)[None]

    def autoencode(self, images):
        return images

    def sample(self, model, positive, count, seed, cfg):
        self.runs.append((model, count, seed, cfg))
        lines, kind = positive
        scenes = [next(scene for scene, place in PLACES.items() if line.endswith(place)) for line in lines]
        who = [random_identity(900 * seed + (i if model == "plain" else 0)) for i in range(count)]
        return torch.cat([self.picture(render(w, kind, scene, 70 * seed + i).image) for i, (w, scene) in enumerate(zip(who, scenes))])


def test_a_true_story_is_measured_as_one(monkeypatch, tmp_path, capsys):
    studios = []
    monkeypatch.setattr(evaluate_story, "Studio", lambda *how: studios.append(Pretender(*how)) or studios[0])
    rows = ["story", "no_mask", "mine: weight=2, cfg=6, seed_offset=100, seed=3"]
    wanted = asked(variant=rows, first=20, count=4, steps=50, cfg=4.0, host=None, raw=tmp_path / "raw.json", sheet=tmp_path / "sheet.png")
    figures = story(wanted)
    plain, made, ceiling = (figures[f"consistency.{name}"] for name in ("plain", "story", "ceiling"))
    assert (made - plain) / (ceiling - plain) == pytest.approx(1, abs=0.15) and ceiling > 0.8
    assert figures["consistency.plain"] < 0.4 and figures["consistency.floor"] < 0.4
    assert figures["scene_accuracy.plain"] == figures["scene_accuracy.story"] == figures["class_accuracy.story"] == 1
    assert figures["layout_spread.story"] == pytest.approx(figures["layout_spread.plain"], rel=0.2) and figures["unet_calls.story"] == 7
    runs = studios[0].runs[:7]
    assert runs[0] == ("plain", 4, 20, None) and runs[1] == {"seed": 20} and runs[2] == ("story", 4, 20, None)
    assert runs[3]["masks"].shape == (4, 128, 128) and bool((runs[3]["masks"] == 1).all())
    assert runs[5:] == [{"seed": 3, "weight": 2.0}, ("story", 4, 120, 6.0)]
    assert (tmp_path / "sheet.png").exists() and not wanted.stopped
    again = story(asked(merge=[tmp_path / "raw.json"]))
    assert again == pytest.approx({name: value for name, value in figures.items() if name != "seconds.total"})
    one, two = capsys.readouterr().out.splitlines()[:6], table(read_raw([tmp_path / "raw.json"]))
    assert one == two


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


# a stop ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_prints_the_sets_that_are_done(handlers, monkeypatch, capsys, first):
    """dev.py sends SIGTERM right after a Ctrl-C: while the table is being made that must not end the process."""
    done = [result(i, random_identity(i)) for i in range(2)]

    def measure(given, variants, sets, sheet):
        sets += done
        os.kill(os.getpid(), first)

    def slow(sets):
        os.kill(os.getpid(), signal.SIGTERM)
        return figures_of(sets)
    monkeypatch.setattr(evaluate_story, "measure", measure)
    monkeypatch.setattr(evaluate_story, "figures_of", slow)
    wanted = asked()
    assert evaluate_story.story(wanted)["count.sets"] == 2 and wanted.stopped
    assert "story" in capsys.readouterr().out


def test_a_run_that_ends_gives_the_signals_back(handlers):
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_stop_before_the_first_set(handlers, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_story, "measure", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        story(asked())
    assert ended.value.code == 130 and "before the first set" in capsys.readouterr().err


def test_rows_have_different_names(monkeypatch):
    with pytest.raises(SystemExit, match="two variants are called story"):
        story(asked(variant=["story", "story: weight=2"]))


# the sheet -------------------------------------------------------------------------------------------------------------------


def test_a_sheet_has_every_picture_in_its_place():
    tones = torch.linspace(0.1, 0.9, 8)
    rows = {name: tones[4 * i:4 * i + 4, None, None, None].expand(4, 128, 128, 3) for i, name in enumerate(("plain", "story"))}
    page = draw_sheet([("set 0: cat", SCENES[:4], rows), ("set 1: dog", SCENES[4:], rows)])
    seen = {colour for _, colour in page.getcolors(1 << 16)}
    assert {(round(255 * float(t)),) * 3 for t in tones} <= seen
    lefts = [page.getpixel((110 + i * 132 + 60, 22 + 60)) for i in range(4)]
    assert lefts == [(round(255 * float(t)),) * 3 for t in tones[:4]]
    assert page.height == 2 * (22 + 2 * 132 + 4)
