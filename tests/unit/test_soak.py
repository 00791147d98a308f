"""Laws of tools/workshop/soak.py without a host: what breaks a law, what does not, and that no prompt repeats another."""

from __future__ import annotations

import json
import os
import random
from itertools import pairwise

import pytest
import soak
from soaking.laws import Reading, beside_fresh, judged, memory, slowdown, unlike
from soaking.mix import ENDS, MIX, NEEDS, PICTURES, SAVERS, SIZES, Turn, rounds_of

ROUNDS, KINDS = 20, ("plain", "told", "own")
LAW = pytest.mark.parametrize


def read(
    resident=lambda i: 1e9,
    worked=lambda i: 1.0,
    digest=lambda kind, number: f"{kind} {number}",
    rounds=ROUNDS,
) -> list[Reading]:
    noise = random.Random(0)
    made = []
    for i in range(rounds * len(KINDS)):
        turn, kind = i // len(KINDS), KINDS[i % len(KINDS)]
        number = 0 if turn == rounds - 1 else turn
        made.append(
            Reading(
                kind,
                turn,
                number,
                SIZES[number % 3],
                1.0,
                worked(i) * noise.uniform(0.95, 1.05),
                int(resident(i) + noise.uniform(0, 2e6)),
                digest(kind, number),
            )
        )
    return made


def broken(readings, fresh=None, late=None) -> list[str]:
    fresh = [r for r in readings if r.round == 0] if fresh is None else fresh
    return [
        law.name
        for law in judged(readings, fresh, late or (readings, readings), 0.03, 1.1)
        if not law.kept
    ]


def test_a_server_that_stays_as_it_is_breaks_nothing():
    """Also where single readings peak, and while it warms up."""
    assert not broken(read())
    assert not broken(read(resident=lambda i: 2e9 if i in (9, 30, 59) else 0.7e9 if i < 6 else 1e9))
    assert abs(memory(read()).growth) < 0.001


@LAW(
    "grows",
    [
        lambda i: 1e9 + 1.2e6 * i,
        lambda i: 1e9 + 4e7 * (i > 25),
        lambda i: 1e9 + 4e7 * (20 < i < 45),
    ],
    ids=["a little each time", "once", "for a while"],
)
def test_memory_that_grows_is_seen(grows):
    assert broken(read(resident=grows)) == ["memory is flat"]


def test_the_slope_is_for_a_hundred_prompts():
    held = memory(read(resident=lambda i: 1e9 + 1e6 * i))
    assert (
        held.slope == pytest.approx(1e8, rel=0.05)
        and held.thirds[0] < held.thirds[1] < held.thirds[2]
    )


def test_another_picture_for_the_same_seed_is_seen_and_named():
    other = read()[-1]
    readings = [*read()[:-1], Reading(**{**vars(other), "digest": "another"})]
    assert "the same seeds, the same pictures" in broken(readings) and unlike(readings) == [
        other.kind
    ]
    fresh = [
        Reading(**{**vars(r), "digest": "another"})
        for r in read()
        if r.round == 0 and r.kind == "plain"
    ]
    assert broken(read(), fresh) == ["a fresh server draws the same"]


def test_a_slowdown_is_one_that_a_fresh_server_does_not_have():
    """A busy machine slows both; what a server gathered slows the old one alone."""
    slow = read(worked=lambda i: 1.0 + 0.5 * i / 60)
    assert slowdown(slow)["told"][2] > 1.15
    assert not broken(slow, late=(slow, slow))
    assert broken(slow, late=(slow, read())) == ["nothing gets slower"]
    assert beside_fresh(slow, read())["own"][2] > 1.1


@LAW("kind", MIX)
def test_no_prompt_is_the_one_before_it(kind):
    """Rounds differ in every kind that samples, but for the check, which is the same in all; pictures are saved by one node."""
    saved = {"saves": "a.safetensors", "anchored": "b.safetensors"}
    rounds = [MIX[kind](Turn(n, 4, saved)) for n in range(4)]
    for graph in rounds:
        text = json.dumps(graph)
        assert PICTURES in graph and graph[PICTURES]["class_type"] == "SaveImage"
        links = [
            value
            for node in graph.values()
            for value in node["inputs"].values()
            if isinstance(value, list)
        ]
        assert all(key in graph for key, _ in links), "every link leads somewhere"
        assert ("Kindred" in text) == (kind not in ("plain", "check"))
    assert all((a == b) == (kind == "check") for a, b in pairwise(rounds))
    assert kind not in SAVERS or SAVERS[kind] in rounds[0]


def test_every_kind_comes_before_the_one_that_reads_it():
    order = list(MIX)
    assert all(order.index(a) > order.index(b) for a, b in NEEDS.items()) and set(ENDS) | set(
        SAVERS
    ) <= set(MIX)
    assert rounds_of(300, 15) == 20 and rounds_of(1, 15) == 2 and rounds_of(31, 15) == 3


@LAW(
    ("argv", "words"),
    [
        (["--steps", "3"], "divisor of 1000"),
        (["--prompts", "0"], "--prompts is 0"),
        (["--slower", "0.5"], "--slower is 0.5"),
        (["--kind", "loads"], "reads what saves writes"),
        (["--kind", "plain", "--quick"], "name it too"),
        (["--kind", "nothing"], "invalid choice"),
    ],
)
def test_what_makes_no_sense_is_refused(argv, words, capsys):
    with pytest.raises(SystemExit):
        soak.arguments(["--host", "somewhere", *argv])
    assert words in capsys.readouterr().err


def test_without_a_host_it_says_how_to_run(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("KINDRED_HOST", raising=False)
    with pytest.raises(SystemExit):
        soak.arguments([])
    assert "python3 dev.py soak" in capsys.readouterr().err
    before = dict(os.environ)
    assert (
        soak.main(["--host", str(tmp_path)]) == 2
        and "not a ComfyUI folder" in capsys.readouterr().err
    )
    assert dict(os.environ) == before


def test_a_process_tells_what_it_holds_and_what_it_worked(tmp_path):
    here = os.getpid()
    assert 1e7 < soak.resident(here) < 1e11 and soak.resident(here) == pytest.approx(
        soak.resident(here, str(tmp_path / "{}")), rel=0.1
    )
    worked = soak.work_of(here)
    assert soak.work_of(here, str(tmp_path / "{}")) is None and (worked is None or worked > 0)
