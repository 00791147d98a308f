"""What a block probe makes of its passes, on a toy whose blocks do planted things, and how a measurement is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from kindred.models.network.backbone import Backbone
from kindred.models.network.blocks import block_name, select_blocks
from kindred.models.network.call import AttnCall, Joint, Part, Role
from kindred.models.network.rope import Turn
from kindred.models.noise.path import DIFFUSION
from kindred.models.probe.file import as_json, load_measurement, save_measurement
from kindred.models.probe.measurement import Measurement
from kindred.models.probe.prober import (
    MOST,
    Change,
    Plan,
    Prober,
    away,
    damage,
    movable_blocks,
    probing,
    with_reference,
)
from kindred.models.probe.published import PUBLISHED, has_published
from small_attention import rand
from small_rope import AXES, rotation
from torch import Tensor

D = sum(AXES)  # channels of a token: one head
GRID = (4, 4)
TEXT = 3
BLOCKS = tuple(("double", index, 0) for index in range(4))
DECISIVE, USELESS, BLIND, PLAIN = BLOCKS
LOUD = {DECISIVE: 4.0, USELESS: 0.0, BLIND: 1.0, PLAIN: 0.5}
TURN = Turn((0.0, 0.0, 0.0), rotation)
BACKBONE = Backbone("Toy", BLOCKS, 1, True, turn=TURN)
LAW = pytest.mark.parametrize


@dataclass
class Toy:
    """A network of four joint attentions over a picture [r D 4 4]: one decisive, one that adds nothing, one that is blind to all keys."""

    prober: Prober
    asked: int = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.asked += 1
        stream = torch.cat([rand(len(x), TEXT, D, seed=9), x.double().flatten(2).mT], 1)
        for block in BLOCKS:
            stream = stream + LOUD[block] * self.attention(block, stream)
        return stream[:, TEXT:].mT.unflatten(2, GRID)

    def attention(self, block: tuple, stream: Tensor) -> Tensor:
        q, k, v = stream, stream, torch.tanh(stream)
        if block == BLIND:
            q = torch.zeros_like(q)
        picture = slice(TEXT, TEXT + 16)
        call = AttnCall(block, GRID, (Part(Role.COND),), GRID, joint=Joint(picture))
        if self.prober.alters(block):
            q, k, v = self.prober.altered(call, q, k, v)
        if self.prober.concerns(call):
            (lent,) = self.prober.references(call, None, q, k, v)
            tokens = lent.by_role[Role.COND]
            k, v = torch.cat([k, tokens.k], 1), torch.cat([v, tokens.v], 1)
        return (q @ k.mT).softmax(-1) @ v


def measured(sigmas: tuple[float, ...] = (0.5,), backbone: Backbone | None = BACKBONE):
    prober = Prober(backbone)
    toy = Toy(prober)
    plan = Plan(BLOCKS, movable_blocks(backbone, BLOCKS), sigmas)
    x0, eps = rand(2, D, *GRID, seed=1), rand(2, D, *GRID, seed=2)
    steps: list[int] = []
    loop = probing(prober, plan, x0, eps, DIFFUSION)
    figures = loop(toy, torch.device("cpu"), lambda step, *_: steps.append(step))
    return figures, plan, toy, steps, prober


def test_a_decisive_block_ranks_first_and_a_useless_one_last():
    figures = measured()[0]
    for change in (Change.BYPASSED, Change.LENT):
        assert figures[change][USELESS] == 0.0
        assert max(figures[change], key=figures[change].get) == DECISIVE
    assert all(figures[Change.BYPASSED][b] > 1e-3 for b in (DECISIVE, BLIND, PLAIN))


def test_a_block_that_is_blind_to_positions_is_told_so():
    moved = measured()[0][Change.MOVED]
    assert moved[BLIND] == 0.0 and moved[USELESS] == 0.0
    assert min(moved[DECISIVE], moved[PLAIN]) > 1e-3


@LAW("backbone", [None, replace(BACKBONE, turn=None)])
def test_without_a_rotary_code_nothing_is_moved(backbone):
    figures, plan, *_ = measured(backbone=backbone)
    assert not figures[Change.MOVED] and plan.calls == 1 + 2 * len(BLOCKS)


@LAW("levels", [1, 3])
def test_as_many_passes_are_made_as_were_said(levels):
    _, plan, toy, steps, _ = measured(tuple(0.2 + 0.1 * n for n in range(levels)))
    assert toy.asked == plan.calls == levels * (1 + 3 * len(BLOCKS))
    assert steps == list(range(plan.calls))


def test_the_figures_are_means_over_the_noise_levels():
    one, other, both = (measured(s)[0] for s in ((0.3,), (1.5,), (0.3, 1.5)))
    for change in Change:
        for block in BLOCKS:
            mean = (one[change][block] + other[change][block]) / 2
            assert both[change][block] == pytest.approx(mean, rel=1e-9)


def test_a_probe_that_fails_changes_nothing_afterwards():
    prober = Prober(BACKBONE)
    toy = Toy(prober)

    def breaks(x: Tensor, sigma: Tensor) -> Tensor:
        if toy.asked == 5:
            raise RuntimeError("stopped")
        return toy(x, sigma)

    plan = Plan(BLOCKS, frozenset(BLOCKS), (0.5,))
    x0 = rand(2, D, *GRID, seed=1)
    with pytest.raises(RuntimeError):
        probing(prober, plan, x0, x0, DIFFUSION)(breaks, torch.device("cpu"), lambda *_: None)
    assert prober.change is None and prober.block is None
    assert not any(map(prober.alters, BLOCKS))


def test_a_picture_that_is_lent_itself_stays_as_it_is():
    """Two equal pictures: keys twice are keys once where a softmax holds the picture alone."""
    keys = rand(1, 5, 6, seed=3).expand(2, -1, -1)
    call = AttnCall(PLAIN, GRID, (Part(Role.COND),), GRID)
    prober = Prober(None, Change.LENT, PLAIN)
    (lent,) = prober.references(call, None, keys, keys, keys)
    tokens = lent.by_role[Role.COND]
    assert torch.equal(tokens.k, keys) and tokens.weight == 1.0 and not tokens.dims_text


def test_each_picture_is_lent_the_next_one():
    keys, values = rand(3, 5, 6, seed=3), rand(3, 5, 6, seed=4)
    call = AttnCall(PLAIN, GRID, (Part(Role.COND),), GRID, joint=Joint(slice(2, 5)))
    (lent,) = Prober(None, Change.LENT, PLAIN).references(call, None, keys, keys, values)
    tokens = lent.by_role[Role.COND]
    for row in range(3):
        assert torch.equal(tokens.k[row], keys[(row + 1) % 3, 2:])
        assert torch.equal(tokens.v[row], values[(row + 1) % 3, 2:])


def test_only_the_pictures_keys_are_moved():
    prober = Prober(BACKBONE, Change.MOVED, PLAIN)
    call = AttnCall(PLAIN, GRID, (Part(Role.COND),), GRID, joint=Joint(slice(TEXT, TEXT + 16)))
    q, k, v = (rand(1, TEXT + 16, D, seed=s) for s in (1, 2, 3))
    same_q, moved, same_v = prober.altered(call, q, k, v)
    assert same_q is q and same_v is v and torch.equal(moved[:, :TEXT], k[:, :TEXT])
    assert not torch.allclose(moved[:, TEXT:], k[:, TEXT:])
    torch.testing.assert_close(moved.norm(dim=-1), k.norm(dim=-1))


def test_keys_are_moved_a_quarter_of_the_picture_along_both_axes():
    here = away(TURN, (8, 12), torch.device("cpu"))
    torch.testing.assert_close(here, rotation(torch.tensor([[0.0, 2.0, 3.0]]))[0])
    centred = replace(TURN, along=lambda side: 2 * (torch.arange(side) - side // 2))
    there = away(centred, (8, 12), torch.device("cpu"))
    torch.testing.assert_close(there, rotation(torch.tensor([[0.0, 4.0, 6.0]]))[0])
    alone = away(TURN, (1, 3), torch.device("cpu"))
    torch.testing.assert_close(alone, rotation(torch.tensor([[0.0, 0.0, 1.0]]))[0])


@LAW("shift", [0.0, 3.0])
def test_damage_is_a_share_of_what_there_is_to_see(shift):
    plain = rand(2, 3, 8, 8, seed=1) + shift
    seen = plain - plain.mean((-2, -1), keepdim=True)
    assert damage(plain, plain) == 0.0
    assert float(damage(plain + 0.5 * seen, plain)) == pytest.approx(0.5)
    assert damage(plain * 7, plain * 7) == 0.0


def test_damage_that_is_no_number_is_the_most_there_is():
    plain = rand(1, 3, 4, 4, seed=1)
    assert damage(plain * float("nan"), plain) == MOST
    assert damage(plain * float("inf"), plain) == MOST
    assert damage(plain, torch.ones_like(plain)) == MOST


def test_a_single_picture_is_lent_its_mirror_image():
    one = rand(1, 3, 4, 6, seed=1)
    assert torch.equal(with_reference(one)[1], one[0].flip(-1))
    two = rand(2, 3, 4, 6, seed=1)
    assert with_reference(two) is two


# what is recommended, and how it is kept ----------------------------------------------------------


def figures(bypassed: list[float], moved: list[float | None], lent: list[float]) -> dict:
    values = zip(Change, (bypassed, moved, lent))
    return {
        change: {b: v for b, v in zip(BLOCKS, many) if v is not None} for change, many in values
    }


def measurement(**other) -> Measurement:
    known = {
        "model_key": "Toy 0123456789ab",
        "blocks": BLOCKS,
        "figures": figures([0.9, 0.1, 0.5, 0.6], [0.8, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]),
        "sigmas": (0.75, 0.25),
        "size": (16, 12),
        "day": "2026-11-29",
    }
    return Measurement(**known | other)


def test_what_is_recommended_is_vital():
    one = measurement()
    assert one.measured == one.vital == (BLOCKS[0], BLOCKS[3])
    assert one.content == (BLOCKS[1], BLOCKS[2]) and one.position == (BLOCKS[0], BLOCKS[3])
    assert one.lent == (BLOCKS[2], BLOCKS[3])
    still = measurement(figures=figures([0.9, 0.1, 0.5, 0.6], [None] * 4, [0.1] * 4))
    assert not still.content and not still.position
    assert set(still.presets) == {"measured", "measured vital", "measured lent"}


def test_a_block_that_does_nothing_is_not_vital():
    dead = figures([0.0, 0.0, 0.0, 0.6], [None] * 4, [0.1] * 4)
    assert measurement(figures=dead).vital == (BLOCKS[3],)
    assert measurement(figures=figures([0.0] * 4, [None] * 4, [0.0] * 4)).measured == BLOCKS


@LAW("missing", [Change.BYPASSED, Change.LENT])
def test_a_measurement_holds_every_block(missing):
    known = measurement().figures
    with pytest.raises(ValueError, match=missing.value):
        measurement(figures={**known, missing: {BLOCKS[0]: 1.0}})


def test_a_measurement_comes_back_from_its_file(tmp_path: Path):
    path = tmp_path / "Toy.json"
    save_measurement(measurement(), path)
    assert load_measurement(path) == measurement()
    assert [p.name for p in tmp_path.iterdir()] == ["Toy.json"]
    assert json.loads(path.read_text())["presets"]["measured vital"] == ["double 0", "double 3"]


def damaged() -> dict[str, object]:
    good = as_json(measurement())
    return {
        "no json": "{",
        "a list": [],
        "another kind": good | {"kind": "kindred bank"},
        "another version": good | {"version": 2},
        "no blocks": good | {"blocks": []},
        "a block without a name": good | {"blocks": [["double", "0", 0]] * 4},
        "blocks that are none": good | {"blocks": 4},
        "too few figures": good | {"figures": good["figures"] | {"lent": [0.1]}},
        "a word for a figure": good | {"figures": good["figures"] | {"lent": [0.1, "x", 0.1, 0.1]}},
        "no number": good | {"figures": good["figures"] | {"lent": [0.1, float("nan"), 0.1, 0.1]}},
        "a figure left out": good
        | {"figures": good["figures"] | {"bypassed": [None, 0.1, 0.1, 0.1]}},
        "no size": {name: value for name, value in good.items() if name != "size"},
        "deep": "[" * 100_000,
    }


@LAW("what", damaged())
def test_a_damaged_file_is_told_in_words(tmp_path: Path, what: str):
    value = damaged()[what]
    path = tmp_path / "Toy.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(ValueError, match="Toy.json"):
        load_measurement(path)


def test_a_huge_file_is_not_read(tmp_path: Path):
    path = tmp_path / "Toy.json"
    path.write_text(" " * 4_000_001)
    with pytest.raises(ValueError, match="too large"):
        load_measurement(path)


def test_the_report_names_every_block_and_preset():
    report = measurement().report()
    for block in BLOCKS:
        assert f"| {block_name(block)} |" in report
    assert "measured vital: double 0, double 3" in report and "2026-11-29" in report


# published presets --------------------------------------------------------------------------------

FLUX1 = tuple(("double", i, 0) for i in range(19)) + tuple(("single", i, 0) for i in range(38))


def test_published_presets_are_blocks_of_flux_1():
    assert has_published(FLUX1) and not has_published(FLUX1[:-1])
    assert not has_published((*FLUX1, ("single", 38, 0)))
    for one in PUBLISHED:
        assert {*one.blocks} <= {*FLUX1} and len({*one.numbers}) == len(one.numbers)
        assert "arXiv" in one.source and one.name == " ".join(one.name.lower().split())


def test_published_numbers_run_through_double_and_single_blocks():
    freecus = next(one for one in PUBLISHED if one.name == "freecus")
    names = "double 0-2, double 17-18, single 6, single 9, single 34-35, single 37"
    assert freecus.blocks == select_blocks(names, FLUX1, "Test")
    characonsist = next(one for one in PUBLISHED if one.name == "characonsist")
    assert characonsist.blocks == FLUX1[19::2]


def test_further_presets_are_chosen_like_the_others():
    more = {"stable flow": FLUX1[:2], "measured": FLUX1[5:6]}
    assert select_blocks(" Stable  Flow , single 3", FLUX1, "Test", more) == (
        FLUX1[0],
        FLUX1[1],
        ("single", 3, 0),
    )
    with pytest.raises(ValueError, match="stable flow"):
        select_blocks("stable flood", FLUX1, "Test", more)
