"""Laws of how tools/workshop/bench.py measures: what rounds say, how cases are chosen, clocks."""

from __future__ import annotations

import re
import runpy
from types import SimpleNamespace

import pytest
import torch
from benching.catalogue import (
    CASES,
    DEFAULT,
    ENOUGH,
    FLOW_DEFAULT,
    GROUPS,
    PLAIN,
    TARGETS,
    chosen,
    left_out,
    name_of,
    refuse_missing,
    target,
    windows,
)
from benching.clocks import CpuClock, CudaClock, Reading, clock_of, forget_peak, peak_of_process
from benching.ground import size
from benching.probes import first_wait, place
from benching.rounds import QUIET, Lap, Pair, Spread, play, row_of, table
from hypothesis import given
from hypothesis import strategies as st
from kindred.models.story.plan import Schedule, StorySettings
from laps import lap, pair, rounds_of

LAW = pytest.mark.parametrize


# rounds ----------------------------------------------------------------------------------------------------------------------


@LAW("rounds", [1, 2, 5])
def test_every_case_runs_between_two_plain_runs_and_the_first_round_is_thrown_away(rounds):
    order, told = [], []

    def job(key):
        return lambda: order.append(key) or lap(len(order))

    one, four = (PLAIN, 1), (PLAIN, 4)
    keys = [one, ("cached", 1), ("live", 1), four, ("shared", 4)]
    played = play({key: job(key) for key in keys}, rounds, lambda *at: told.append(at))
    a_round = [one, ("cached", 1), one, ("live", 1), one, four, ("shared", 4), four]
    assert order == a_round * (rounds + 1) and not played.stopped
    assert told == [(turn, key) for turn in range(rounds + 1) for key in a_round]
    for turn, pairs in enumerate(played.rounds, 1):
        at = {
            key: (case.total, *(plain.total for plain in (before, behind)))
            for key, pair in pairs.items()
            for case, (before, behind) in [(pair.case, pair.plain)]
        }
        assert at == {
            ("cached", 1): (8 * turn + 2, 8 * turn + 1, 8 * turn + 3),
            ("live", 1): (8 * turn + 4, 8 * turn + 3, 8 * turn + 5),
            ("shared", 4): (8 * turn + 7, 8 * turn + 6, 8 * turn + 8),
        }


@LAW(("stop", "finished"), [(1, 0), (3, 0), (4, 0), (5, 0), (6, 1), (8, 1), (9, 2), (11, 2)])
def test_a_stop_leaves_the_finished_rounds(stop, finished):
    """One case in four rounds of three runs, the first of which is thrown away: a round that was begun does not count."""
    count = 0

    def job():
        nonlocal count
        count += 1
        if count > stop:
            raise KeyboardInterrupt
        return lap(1.0)

    played = play({(PLAIN, 1): job, ("cached", 1): job}, 3, lambda *_: None)
    assert played.stopped and len(played.rounds) == finished


def test_other_errors_go_through():
    with pytest.raises(ZeroDivisionError):
        play({(PLAIN, 1): lambda: 1 / 0, ("cached", 1): lap}, 1, lambda *_: None)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9))
def test_a_spread_holds_its_median(values):
    spread = Spread.of(values)
    assert spread.least == min(values) <= spread.median <= max(values) == spread.most
    assert (
        spread.relative
        == pytest.approx((max(values) - min(values)) / sorted(values)[len(values) // 2])
        or len(values) % 2 == 0
    )


def test_the_standard_error_is_that_of_the_mean():
    assert Spread.of([1.0]).error is None
    assert Spread.of([1.1, 1.1]).error == 0
    assert Spread.of([1.0, 1.2, 1.4, 1.6]).error == pytest.approx((0.2 / 3) ** 0.5 / 2)


def test_ratios_are_within_their_own_pair():
    """A machine that gets twice as slow in the middle: the ratio of the medians would be 2.2 or 1.1, each pair's is 1.1."""
    (row,) = table(rounds_of([1.0, 2.0, 4.0], [1.1, 2.2, 4.4]), "sd15")
    assert row.ratio == Spread(*[pytest.approx(1.1)] * 3, pytest.approx(0, abs=1e-12))
    assert (row.seconds, row.plain_seconds) == (2.2, 2.0)
    (row,) = table(rounds_of([1.0, 1.0, 1.0], [1.3, 1.0, 1.1]), "sd15")
    assert (row.ratio.median, row.ratio.least, row.ratio.most) == (1.1, 1.0, 1.3)


@given(st.floats(0.5, 2), st.floats(-0.2, 0.2))
def test_a_machine_that_drifts_evenly_changes_no_ratio(start, drift):
    """Plain takes start, then the case 1.1 times what plain would take by now, then plain again."""
    plain = [start * (1 + drift * turn) for turn in range(3)]
    laps = Pair(lap(1.1 * plain[1]), (lap(plain[0]), lap(plain[2])))
    assert table([{("cached", 1): laps}], "sd15")[0].ratio.median == pytest.approx(1.1)


def test_each_case_is_beside_plain_of_its_own_batch():
    pairs = {("cached", 1): pair(lap(1.5), lap(1.0)), ("cached", 4): pair(lap(5.0), lap(4.0))}
    assert {(row.pictures, row.ratio.median) for row in table([pairs], "sd15")} == {
        (1, 1.5),
        (4, 1.25),
    }


@LAW(
    ("plain", "quiet"),
    [([1.0, 1.0, 1.15], True), ([1.0, 1.0, 1.16], False), ([0.9, 1.0, 1.1], False), ([1.0], True)],
)
def test_plain_that_spreads_is_no_quiet_machine(plain, quiet):
    (row,) = table(rounds_of(plain, [1.1] * len(plain)), "sd15")
    assert row.quiet == quiet == (row.plain_spread <= QUIET)


def test_a_case_that_spreads_may_do_so_on_a_quiet_machine():
    (row,) = table(rounds_of([1.0, 1.0], [1.0, 9.0]), "sd15")
    assert row.quiet and row.ratio.error == pytest.approx(4)


def test_no_round_has_no_spread():
    with pytest.raises(ValueError, match="0 rounds"):
        Spread.of([])


@LAW(
    ("case", "seconds", "calls", "at_50"),
    [
        ("cached", (2.2,), (2,), 1.1),  # one call per step whatever their number
        ("live", (3.0,), (4,), 1.5),
        (
            "cold",
            (1.5, 2.1),
            (3, 2),
            (0.5 * 51 + 1.05 * 50) / 50,
        ),  # one reference call more than steps: 1.80 of two, 1.56 of fifty
        ("blended", (5.0,), (5,), 55 / 50 * 2),  # four steps and a plain pass
        ("story", (7.0,), (7,), 88 / 50 * 2),
    ],
)
def test_fifty_steps_by_the_calls_of_each_part(case, seconds, calls, at_50):
    """Plain takes a second per step, of two, and half of one in the stories' rows."""
    steps = 2 if len(calls) > 1 or case in ("cached", "live") else 4
    plain = lap(float(steps) if steps == 2 else 2.0, steps)
    row = row_of((case, 1), [pair(Lap(seconds, calls), plain)], "sd15")
    assert (
        row.at_50 == pytest.approx(at_50) and row.calls == sum(calls) and row.plain_calls == steps
    )


@LAW("family", ["sd15", "flux"])
def test_at_fifty_steps_it_is_the_ratio_itself(family):
    for case in CASES.values():
        calls = case.calls_on(family)
        seconds = tuple(60.0 + i for i in range(len(calls)))
        row = row_of((case.name, 1), [pair(Lap(seconds, calls), lap(50.0, 50))], family)
        assert row.at_50 == pytest.approx(row.ratio.median)


def test_a_transformers_story_makes_calls_of_its_own():
    """Four steps, eight calls; of fifty steps it makes a hundred, a UNet's 88."""
    laps = [pair(Lap((8.0,), (8,)), lap(4.0, 4))]
    at_50 = {family: row_of(("story", 4), laps, family).at_50 for family in ("flux", "sd15")}
    assert at_50 == {"flux": pytest.approx(2.0), "sd15": pytest.approx(88 / 50)}


# cases -----------------------------------------------------------------------------------------------------------------------


def test_every_case_can_be_chosen_and_every_default_exists():
    everything = chosen(["all"], [], 50)
    assert {case for case, _ in everything} == set(CASES) and {
        case.group for case in CASES.values()
    } == set(GROUPS)
    assert set(map(name_of, chosen([], [], 2))) == set(DEFAULT)
    assert not set(CASES) & set(GROUPS) and all(
        re.fullmatch(r"[a-z_]+", name) for name in CASES
    )  # no digit: _b4 is what follows
    assert [set(chosen([group], [], 50)) for group in GROUPS] == [
        {k for k in everything if CASES[k[0]].group == group} for group in GROUPS
    ]


@LAW(
    ("wanted", "pictures", "found"),
    [
        (["cached"], [], {"cached_b1", "cached_b4"}),
        (["cached_b4"], [], {"cached_b4"}),
        (["cached", "cached_b4"], [1], {"cached_b1", "cached_b4"}),
        (["cold"], [2], {"cold_b2"}),
        (["more"], [], {"more_b1"}),
        (["hooks"], [1], {"pass_through_b1", "extra_b1"}),
        (["cached"], [1, 1], {"cached_b1"}),
        (["cached_both_b4"], [], {"cached_both_b4"}),
    ],
)
def test_a_choice(wanted, pictures, found):
    keys = chosen(wanted, pictures, 50)
    assert set(map(name_of, keys)) == found and keys == sorted(
        set(keys), key=lambda k: (k[1], list(CASES).index(k[0]))
    )


@LAW(
    ("wanted", "pictures", "steps", "told"),
    [
        (["cashed"], [], 2, "cashed.*references.*cached"),
        (["shared"], [1], 4, "1 pictures.*2 or more.*--pictures 4"),
        (["shared_b1"], [], 4, "shared_b1.*2 or more"),
        (["story"], [], 3, "story with --steps 3.*--steps 4"),
        (["stories"], [1], 3, "nothing to measure"),
    ],
)
def test_what_does_not_fit_is_told_with_a_remedy(wanted, pictures, steps, told):
    with pytest.raises(ValueError, match=told):
        chosen(wanted, pictures, steps)


@LAW(("family", "case", "told"), [("flux", "pass_through_b1", "pass_through_b1 cannot.*--case")])
def test_what_a_transformer_lacks_is_told_with_a_remedy(family, case, told):
    with pytest.raises(ValueError, match=told):
        refuse_missing(family, chosen([case], [], 2))
    refuse_missing("sd15", chosen([case], [], 2))
    refuse_missing(family, chosen([], [], 2, FLOW_DEFAULT))


def test_few_steps_leave_out_what_they_cannot_show():
    assert left_out(["all"], 2) == [c.name for c in CASES.values() if c.steps > 2] != []
    assert left_out([], 2) == left_out(["all"], 4) == [] and "story" in left_out(["stories"], 3)
    assert not {"story", "blended"} & {case for case, _ in chosen(["all"], [], 2)}


def test_targets_name_cases_that_exist():
    for device, targets in TARGETS.items():
        for kind, key in targets:
            assert chosen([name_of(key)], [], 50) == [key]
            assert (
                target(
                    device, {"sd": "sd15", "sdxl": "sdxl", "flow": "flux", "*": "sdxl"}[kind], key
                )
                == targets[kind, key]
            )
    assert (
        target("cpu", "tiny", ("cached", 1)) is None
        and target("cpu", "sd15", ("pass_through", 1)) is None
    )
    assert target("cpu", "sd15", ("cold", 1)) == 1.7


@LAW("steps", [4, 5, 8, 10, 20])
def test_few_steps_get_windows_of_the_same_shares(steps):
    """In a schedule whose noise level is its timestep: from the second share on, in as many steps as of fifty, and features after it."""
    times = tuple(range(1, 1000, 1000 // steps))[::-1]
    percent = windows(times)
    at = {name: (1 - p) * 999 for name, p in percent.items()}
    schedule = Schedule(
        times,
        times,
        StorySettings(
            frozenset(),
            (),
            blend_until=at["blend_end_percent"],
            inject=(at["injection_start_percent"], at["injection_end_percent"]),
        ),
    )
    blending, injecting = (
        sum(schedule.blend(t) > 0 for t in times),
        [i for i, t in enumerate(times) if schedule.injects(t)],
    )
    assert (
        len(times) == steps
        and blending == max(1, round(0.12 * steps))
        and injecting[0] == max(1, round(0.1 * steps))
    )
    assert injecting == list(range(injecting[0], injecting[0] + max(1, round(0.22 * steps))))
    assert schedule.first_injection == times[injecting[0]]
    calls = schedule.step(schedule.features_at) + 1 + steps - injecting[0] + blending  # 88 of fifty
    assert calls / steps == pytest.approx(88 / 50, rel=0.06)


def test_many_steps_have_the_nodes_own_windows():
    assert windows(range(ENOUGH, 0, -1)) == {} != windows(range(ENOUGH - 1, 0, -1))


# clocks ----------------------------------------------------------------------------------------------------------------------


def test_the_cpus_clock_counts_work_and_not_sleep(monkeypatch):
    now = iter([5.0, 7.5])
    monkeypatch.setattr("benching.clocks.time", SimpleNamespace(process_time=lambda: next(now)))
    assert CpuClock().measure(lambda: "made") == ("made", Reading(2.5))


class Cuda:
    """torch.cuda as far as the clock and the probe know it: what was asked, in its order."""

    def __init__(self, available=True):
        self.seen, self.available, self.mode = [], available, "default"

    def is_available(self):
        return self.available

    def Event(self, enable_timing=False):
        assert enable_timing
        event = SimpleNamespace(number=sum(s.startswith("event") for s in self.seen))
        self.seen.append(f"event {event.number}")
        event.record = lambda: self.seen.append(f"record {event.number}")
        event.elapsed_time = lambda other: (
            self.seen.append(f"elapsed {event.number} {other.number}") or 1500.0
        )
        return event

    def __getattr__(self, name):
        return lambda *args: self.seen.append(name) or 12345

    def set_sync_debug_mode(self, mode):
        self.mode = mode


def test_the_cuda_clock_lies_around_the_job_and_waits_for_its_end():
    cuda = Cuda()
    made, reading = CudaClock(cuda).measure(lambda: cuda.seen.append("job") or "made")
    assert made == "made" and reading == Reading(1.5, 12345)
    assert cuda.seen == [
        "event 0",
        "event 1",
        "synchronize",
        "reset_peak_memory_stats",
        "record 0",
        "job",
        "record 1",
        "synchronize",
        "elapsed 0 1",
        "max_memory_allocated",
    ]


def test_the_clock_is_the_devices():
    def fake(available):
        return SimpleNamespace(
            cuda=Cuda(available), __version__="2.11.0", version=SimpleNamespace(cuda=None)
        )

    assert isinstance(clock_of("cpu", fake(True)), CpuClock) and isinstance(
        clock_of("cuda", fake(True)), CudaClock
    )
    with pytest.raises(
        RuntimeError,
        match=r"--device cuda, but torch 2.11.0 sees no CUDA device .*none.*--python.*leave out --device",
    ):
        clock_of("cuda", fake(False))


def test_the_real_cuda_has_all_that_is_asked_of_it():
    """Names and signatures, on a torch without a device too."""
    for name in (
        "Event",
        "synchronize",
        "reset_peak_memory_stats",
        "max_memory_allocated",
        "set_sync_debug_mode",
        "get_device_name",
    ):
        assert callable(getattr(torch.cuda, name))
    assert all(hasattr(torch.cuda.Event, name) for name in ("record", "elapsed_time"))


def test_a_wait_inside_of_the_unet_is_found_and_its_place_told():
    cuda = Cuda()

    class Unet(torch.nn.Module):
        waits = False

        def forward(self, x):
            assert cuda.mode == "error"
            if self.waits:
                raise RuntimeError("called a synchronizing CUDA operation")
            return x

    unet = Unet()
    assert first_wait(lambda: (unet(1), unet(2)), unet, cuda) is None and cuda.mode == "default"
    unet.waits = True
    assert (
        re.fullmatch(
            r"(tests/unit/)?test_bench_measuring\.py:\d+", first_wait(lambda: unet(1), unet, cuda)
        )
        and cuda.mode == "default"
    )
    assert not unet._forward_hooks and not unet._forward_pre_hooks
    with pytest.raises(RuntimeError, match="out of memory"):
        first_wait(lambda: (_ for _ in ()).throw(RuntimeError("out of memory")), unet, cuda)
    assert cuda.mode == "default"


def test_the_place_of_an_error_is_the_packs(tmp_path):
    files = {
        "pack/nodes/ours.py": "def run(f):\n    f()\n",
        "pack/tools/door.py": "def run(f):\n    f()\n",
        "host.py": "def run():\n    1 / 0\n",
    }
    run = {}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        run[name] = runpy.run_path(str(tmp_path / name))["run"]
    for job, told in (
        (lambda: run["pack/nodes/ours.py"](run["host.py"]), "nodes/ours.py:2"),
        (lambda: run["pack/tools/door.py"](run["host.py"]), "host.py:2"),
    ):
        with pytest.raises(ZeroDivisionError) as caught:
            job()
        assert place(caught.value, tmp_path / "pack") == told


def test_the_peak_of_a_process(tmp_path):
    assert peak_of_process() > 1e7
    status = tmp_path / "status"
    status.write_text("VmPeak:\t 900 kB\nVmHWM:\t    2048 kB\n")
    assert peak_of_process(status) == 2048 * 1024
    assert not forget_peak(tmp_path / "no" / "clear_refs") and forget_peak(tmp_path / "clear_refs")
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_sizes_are_readable():
    assert size(3_438_000_000) == "3.44 GB" and size(2_500_000) == "2.5 MB"
