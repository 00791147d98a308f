"""tools/workshop/bench.py as a user starts it, on the tiny model.

Every case, its UNet calls counted exactly, and the JSON that tells them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import isfinite

import pytest
from benching.catalogue import CASES, GROUPS, PLAIN, UNETS_ALONE, chosen
from checkout import ROOT

STEPS, LIMIT = 4, 1200  # seconds: a busy machine is no failure
ONE_STAGE = {
    "pass_through",
    "extra",
    "cached",
    "cached_both",
    "weighted",
    "concept",
    "concept_cond",
    "cached_concept",
    "shared",
    "shared_all",
    "shared_words",
}
# live: a call of the reference beside each; cold: one more than steps; the stories blend in the first step and inject from the second
# on, and diffusion features are read in the third
CALLS = dict.fromkeys(ONE_STAGE, STEPS) | {
    "live": 2 * STEPS,
    "live_half": 2 * STEPS,
    "cold": 2 * STEPS + 1,
    "blended": STEPS + 1,
    "more": STEPS + 1,
    "story": 3 + 3 + 1,
    "more_story": 3 + 3 + 1,
    "story_official": STEPS + 3 + 1,
}
OF_REFERENCE = {"live": STEPS, "live_half": STEPS, "cold": STEPS + 1}  # calls with one row


def bench(*words: str, family: str = "tiny") -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "workshop" / "bench.py"),
            "--host",
            os.environ["KINDRED_HOST"],
            "--family",
            family,
            "--latent",
            "8",
            "--threads",
            "1",
            *words,
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One run of all cases: its words, and its JSON."""
    told = tmp_path_factory.mktemp("bench") / "bench.json"
    done = bench("--steps", str(STEPS), "--rounds", "1", "--case", "all", "--json", str(told))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(told.read_text("utf-8"))


@pytest.mark.slow
def test_every_case_is_there_and_makes_exactly_its_calls(everything):
    _, told = everything
    (run,) = told["runs"]
    cases = {(c["case"], c["pictures"]): c for c in run["cases"]}
    assert list(cases) == chosen(["all"], [], STEPS) and {case for case, _ in cases} == set(
        CALLS
    ) == set(CASES)
    assert {key: c["calls"] for key, c in cases.items()} == {key: CALLS[key[0]] for key in cases}
    for (case, n), c in cases.items():
        of_reference = OF_REFERENCE.get(case, 0)
        assert c["rows"] == (c["calls"] - of_reference) * 2 * n + of_reference, case
        assert (c["plain_calls"], c["plain_rows"]) == (STEPS, STEPS * 2 * n)


@pytest.mark.slow
def test_every_case_is_finite_and_stands_in_the_figures(everything):
    _, told = everything
    cases = told["runs"][0]["cases"]
    assert all(c["finite"] and isfinite(c["at_50"]) for c in cases)
    assert all(0 < c["ratio"]["least"] <= c["ratio"]["median"] <= c["ratio"]["most"] for c in cases)
    names = [f"tiny.{c['case']}_b{c['pictures']}" for c in cases]
    assert set(told["figures"]) == {
        f"{what}.{name}" for what in ("time", "time_at_50", "unet_calls") for name in names
    }
    assert (
        told["command"] == "bench"
        and told["runs"][0]["software"]["host"]
        and not told["runs"][0]["stopped"]
    )


# a flow's inversion makes one call more, and it is read live; its story reads features at a step of its own
FLOW_CALLS = CALLS | {"cold": 3 * STEPS + 2, "story": 2 * STEPS, "more_story": 2 * STEPS}
FLOW_CALLS |= {"story_official": 2 * STEPS}


@pytest.mark.slow
def test_every_case_of_a_transformer_makes_exactly_its_calls(tmp_path):
    told = tmp_path / "bench.json"
    wanted = [word for group in GROUPS[1:] for word in ("--case", group)]
    done = bench(
        *("--steps", str(STEPS), "--rounds", "1", *wanted, "--case", "extra", "--json", str(told)),
        family="tiny_flux",
    )
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(told.read_text("utf-8"))["runs"]
    cases = {(c["case"], c["pictures"]): c for c in run["cases"]}
    assert {case for case, _ in cases} == set(CASES) - UNETS_ALONE
    assert {key: c["calls"] for key, c in cases.items()} == {
        key: FLOW_CALLS[key[0]] for key in cases
    }
    assert all(c["finite"] and c["plain_rows"] == STEPS * n for (_, n), c in cases.items())
    refused = bench("--case", "pass_through", family="tiny_flux")
    assert refused.returncode == 2 and "pass_through_b1 and pass_through_b4" in refused.stderr


@pytest.mark.slow
def test_the_words_on_the_terminal(everything):
    words, told = everything
    assert words.startswith(
        f"python3 dev.py bench --family tiny --latent 8 --threads 1 --steps {STEPS} --rounds 1 --case all\n"
    )
    assert (
        words.count("\n| ") == 2 + len(told["runs"][0]["cases"])
        and "One round has no standard error" in words
    )


@pytest.mark.slow
def test_counts_the_other_attention_and_the_other_dtype(tmp_path):
    """Two steps; the reference's tokens cost what they cost, and a hook that does nothing costs no operation."""
    told = tmp_path / "bench.json"
    done = bench(
        "--rounds",
        "1",
        "--attention",
        "sub-quadratic",
        "--dtype",
        "bf16",
        "--case",
        "pass_through_b1",
        "--case",
        "cached_b1",
        "--counts",
        "--json",
        str(told),
    )
    assert done.returncode == 0, done.stderr
    figures, (run,) = (
        json.loads(told.read_text("utf-8"))["figures"],
        json.loads(told.read_text("utf-8"))["runs"],
    )
    name = "tiny.{}_b1.sub-quadratic".format
    assert (
        figures[f"flops.{name('pass_through')}"] == 1
        and figures[f"ops_per_step.{name('pass_through')}"] == 0
    )
    assert (
        1 < figures[f"flops.{name('cached')}"] < 1.1
        and figures[f"ops_per_step.{name('cached')}"] > 0
    )
    assert run["settings"]["dtype"] == "bf16" and all(c["finite"] for c in run["cases"])


@pytest.mark.slow
def test_a_child_tells_its_peak_memory():
    """The process holds torch and the host, and is no machine."""
    done = bench("--one", f"{PLAIN}_b1")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert 1e8 < told["peak"] < 1e10 and told["without_the_preparations"] is (
        sys.platform == "linux"
    )
