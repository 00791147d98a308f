"""Laws of tools/bench.py without a host: what rounds say, how cases are chosen, clocks, the table, the block of a page, refusals."""
from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import replace
from types import SimpleNamespace

import bench
import pytest
import torch
from benching.catalogue import CASES, DEFAULT, ENOUGH, GROUPS, PLAIN, TARGETS, chosen, left_out, name_of, target, windows
from benching.clocks import CpuClock, CudaClock, Reading, clock_of, forget_peak, peak_of_process
from benching.ground import ATTENTION, Setting, size
from benching.probes import first_wait, place
from benching.report import (
    command_of,
    figures,
    markdown,
    markers,
    report,
    run_of,
    updated,
    write_page,
)
from benching.rounds import LIMIT, Lap, Spread, play, row_of, table
from checkout import ROOT
from hypothesis import given
from hypothesis import strategies as st
from kindred.models.consistory import Schedule, StorySettings

LAW = pytest.mark.parametrize
SETTING = Setting("sd15", 64, 2, "fp32", "cpu", "pytorch", 1, 0.25)
SOFTWARE = {"host": "0.30.0", "torch": "2.11", "python": "3.13", "machine": "a machine"}


def lap(seconds, calls=2, rows=4, **more):
    many = isinstance(seconds, tuple)
    return Lap(seconds if many else (seconds,), calls if isinstance(calls, tuple) else (calls,), rows, **more)


def rounds_of(plain, cached, **more):
    return [{(PLAIN, 1): lap(a), ("cached", 1): lap(b, **more)} for a, b in zip(plain, cached)]


# rounds ----------------------------------------------------------------------------------------------------------------------


@LAW("rounds", [1, 2, 5])
def test_rounds_are_interleaved_and_the_first_is_thrown_away(rounds):
    order, told = [], []

    def job(key):
        return lambda: order.append(key) or lap(len(order))
    keys = [(PLAIN, 1), ("cached", 1), (PLAIN, 4), ("shared", 4)]
    played = play({key: job(key) for key in keys}, rounds, lambda *at: told.append(at))
    assert order == keys * (rounds + 1) and not played.stopped
    assert told == [(turn, key) for turn in range(rounds + 1) for key in keys]
    assert [[laps[key].total for key in keys] for laps in played.rounds] == [[4 * turn + i + 1 for i in range(4)]
                                                                            for turn in range(1, rounds + 1)]


@LAW(("stop", "finished"), [(1, 0), (3, 0), (4, 0), (5, 1), (6, 1), (7, 2)])
def test_a_stop_leaves_the_finished_rounds(stop, finished):
    """Two jobs in three rounds, the first of which is thrown away: a round that was begun does not count."""
    count = 0

    def job():
        nonlocal count
        count += 1
        if count > stop:
            raise KeyboardInterrupt
        return lap(1.0)
    played = play({(PLAIN, 1): job, ("cached", 1): job}, 3, lambda *_: None)
    assert played.stopped and len(played.rounds) == max(finished, (stop - 2) // 2 if stop > 2 else 0)


def test_other_errors_go_through():
    with pytest.raises(ZeroDivisionError):
        play({(PLAIN, 1): lambda: 1 / 0}, 1, lambda *_: None)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9))
def test_a_spread_holds_its_median(values):
    spread = Spread.of(values)
    assert spread.least == min(values) <= spread.median <= max(values) == spread.most
    assert spread.relative == pytest.approx((max(values) - min(values)) / sorted(values)[len(values) // 2]) or len(values) % 2 == 0


def test_ratios_are_within_their_own_round():
    """A machine that gets twice as slow in the middle: the ratio of the medians would be 2.2 or 1.1, each round's is 1.1."""
    (row,) = table(rounds_of([1.0, 2.0, 4.0], [1.1, 2.2, 4.4]))
    assert row.ratio == Spread(pytest.approx(1.1), pytest.approx(1.1), pytest.approx(1.1))
    assert (row.seconds, row.plain_seconds) == (2.2, 2.0)
    (row,) = table(rounds_of([1.0, 1.0, 1.0], [1.3, 1.0, 1.1]))
    assert (row.ratio.median, row.ratio.least, row.ratio.most) == (1.1, 1.0, 1.3)


def test_each_case_is_beside_plain_of_its_own_batch():
    laps = {(PLAIN, 1): lap(1.0), ("cached", 1): lap(1.5), (PLAIN, 4): lap(4.0), ("cached", 4): lap(5.0)}
    assert {(row.pictures, row.ratio.median) for row in table([laps])} == {(1, 1.5), (4, 1.25)}


@LAW(("plain", "rejected"), [([1.0, 1.0, 1.15], False), ([1.0, 1.0, 1.16], True), ([0.9, 1.0, 1.1], True), ([1.0], False)])
def test_plain_that_spreads_rejects_its_rows(plain, rejected):
    (row,) = table(rounds_of(plain, [1.1] * len(plain)))
    assert row.rejected == rejected == (row.plain_spread > LIMIT)


def test_a_case_that_spreads_is_not_rejected_for_it():
    assert not table(rounds_of([1.0, 1.0], [1.0, 9.0]))[0].rejected


def test_no_round_has_no_spread():
    with pytest.raises(ValueError, match="0 rounds"):
        Spread.of([])


@LAW(("case", "seconds", "calls", "at_50"), [
    ("cached", (2.2,), (2,), 1.1),  # one call per step whatever their number
    ("live", (3.0,), (4,), 1.5),
    ("cold", (1.5, 2.1), (3, 2), (0.5 * 51 + 1.05 * 50) / 50),  # one reference call more than steps: 1.80 of two, 1.56 of fifty
    ("blended", (5.0,), (5,), 55 / 50 * 2),  # four steps and a plain pass
    ("story", (7.0,), (7,), 88 / 50 * 2)])
def test_fifty_steps_by_the_calls_of_each_part(case, seconds, calls, at_50):
    """Plain takes a second per step, of two, and half of one in the stories' rows."""
    steps = 2 if len(calls) > 1 or case in ("cached", "live") else 4
    plain = lap(float(steps) if steps == 2 else 2.0, steps)
    row = row_of([{(PLAIN, 1): plain, (case, 1): Lap(seconds, calls)}], (case, 1))
    assert row.at_50 == pytest.approx(at_50) and row.calls == sum(calls) and row.plain_calls == steps


def test_at_fifty_steps_it_is_the_ratio_itself():
    for case in CASES.values():
        seconds = tuple(60.0 + i for i in range(len(case.calls)))
        row = row_of([{(PLAIN, 1): lap(50.0, 50), (case.name, 1): Lap(seconds, case.calls)}], (case.name, 1))
        assert row.at_50 == pytest.approx(row.ratio.median)


# cases -----------------------------------------------------------------------------------------------------------------------


def test_every_case_can_be_chosen_and_every_default_exists():
    everything = chosen(["all"], [], 50)
    assert {case for case, _ in everything} == set(CASES) and {case.group for case in CASES.values()} == set(GROUPS)
    assert set(map(name_of, chosen([], [], 2))) == set(DEFAULT)
    assert not set(CASES) & set(GROUPS) and all(re.fullmatch(r"[a-z_]+", name) for name in CASES)  # no digit: _b4 is what follows
    assert [set(chosen([group], [], 50)) for group in GROUPS] == [{k for k in everything if CASES[k[0]].group == group} for group in GROUPS]


@LAW(("wanted", "pictures", "found"), [
    (["cached"], [], {"cached_b1", "cached_b4"}), (["cached_b4"], [], {"cached_b4"}),
    (["cached", "cached_b4"], [1], {"cached_b1", "cached_b4"}),
    (["cold"], [2], {"cold_b2"}), (["more"], [], {"more_b1"}), (["hooks"], [1], {"pass_through_b1", "extra_b1"}),
    (["cached"], [1, 1], {"cached_b1"}), (["cached_both_b4"], [], {"cached_both_b4"})])
def test_a_choice(wanted, pictures, found):
    keys = chosen(wanted, pictures, 50)
    assert set(map(name_of, keys)) == found and keys == sorted(set(keys), key=lambda k: (k[1], list(CASES).index(k[0])))


@LAW(("wanted", "pictures", "steps", "told"), [
    (["cashed"], [], 2, "cashed.*references.*cached"), (["shared"], [1], 4, "1 pictures.*2 or more.*--pictures 4"),
    (["shared_b1"], [], 4, "shared_b1.*2 or more"), (["story"], [], 3, "story with --steps 3.*--steps 4"),
    (["stories"], [1], 3, "nothing to measure")])
def test_what_does_not_fit_is_told_with_a_remedy(wanted, pictures, steps, told):
    with pytest.raises(ValueError, match=told):
        chosen(wanted, pictures, steps)


def test_few_steps_leave_out_what_they_cannot_show():
    assert left_out(["all"], 2) == [c.name for c in CASES.values() if c.steps > 2] != []
    assert left_out([], 2) == left_out(["all"], 4) == [] and "story" in left_out(["stories"], 3)
    assert not {"story", "blended"} & {case for case, _ in chosen(["all"], [], 2)}


def test_targets_name_cases_that_exist():
    for device, targets in TARGETS.items():
        for kind, key in targets:
            assert chosen([name_of(key)], [], 50) == [key]
            assert target(device, {"sd": "sd15", "sdxl": "sdxl", "*": "sdxl"}[kind], key) == targets[kind, key]
    assert target("cpu", "tiny", ("cached", 1)) is None and target("cpu", "sd15", ("pass_through", 1)) is None
    assert target("cpu", "sd15", ("cold", 1)) == 1.7


@LAW("steps", [4, 5, 8, 10, 20])
def test_few_steps_get_windows_of_the_same_shares(steps):
    """In a schedule whose noise level is its timestep: from the second share on, in as many steps as of fifty, and features after it."""
    times = tuple(range(1, 1000, 1000 // steps))[::-1]
    percent = windows(times)
    at = {name: (1 - p) * 999 for name, p in percent.items()}
    schedule = Schedule(times, times, StorySettings(frozenset(), (), blend_until=at["blend_end_percent"],
                                                    inject=(at["injection_start_percent"], at["injection_end_percent"])))
    blending, injecting = sum(schedule.blend(t) > 0 for t in times), [i for i, t in enumerate(times) if schedule.injects(t)]
    assert len(times) == steps and blending == max(1, round(0.12 * steps)) and injecting[0] == max(1, round(0.1 * steps))
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
        event.elapsed_time = lambda other: self.seen.append(f"elapsed {event.number} {other.number}") or 1500.0
        return event

    def __getattr__(self, name):
        return lambda *args: self.seen.append(name) or 12345

    def set_sync_debug_mode(self, mode):
        self.mode = mode


def test_the_cuda_clock_lies_around_the_job_and_waits_for_its_end():
    cuda = Cuda()
    made, reading = CudaClock(cuda).measure(lambda: cuda.seen.append("job") or "made")
    assert made == "made" and reading == Reading(1.5, 12345)
    assert cuda.seen == ["event 0", "event 1", "synchronize", "reset_peak_memory_stats", "record 0", "job", "record 1", "synchronize",
                         "elapsed 0 1", "max_memory_allocated"]


def test_the_clock_is_the_devices():
    def fake(available):
        return SimpleNamespace(cuda=Cuda(available), __version__="2.11.0", version=SimpleNamespace(cuda=None))
    assert isinstance(clock_of("cpu", fake(True)), CpuClock) and isinstance(clock_of("cuda", fake(True)), CudaClock)
    with pytest.raises(RuntimeError, match=r"--device cuda, but torch 2.11.0 sees no CUDA device .*none.*--python.*leave out --device"):
        clock_of("cuda", fake(False))


def test_the_real_cuda_has_all_that_is_asked_of_it():
    """Names and signatures, on a torch without a device too."""
    for name in ("Event", "synchronize", "reset_peak_memory_stats", "max_memory_allocated", "set_sync_debug_mode", "get_device_name"):
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
    assert re.fullmatch(r"(tests/unit/)?test_bench\.py:\d+", first_wait(lambda: unet(1), unet, cuda)) and cuda.mode == "default"
    assert not unet._forward_hooks and not unet._forward_pre_hooks
    with pytest.raises(RuntimeError, match="out of memory"):
        first_wait(lambda: (_ for _ in ()).throw(RuntimeError("out of memory")), unet, cuda)
    assert cuda.mode == "default"


def test_the_place_of_an_error_is_the_packs(tmp_path):
    files = {"pack/nodes/ours.py": "def run(f):\n    f()\n", "pack/tools/door.py": "def run(f):\n    f()\n",
             "host.py": "def run():\n    1 / 0\n"}
    run = {}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        run[name] = runpy.run_path(str(tmp_path / name))["run"]
    for job, told in ((lambda: run["pack/nodes/ours.py"](run["host.py"]), "nodes/ours.py:2"),
                      (lambda: run["pack/tools/door.py"](run["host.py"]), "host.py:2")):
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


# the table -------------------------------------------------------------------------------------------------------------------


def a_run(plain=(1.0, 1.0), cached=(1.125, 1.125), setting=SETTING, probed=None, stopped=False, **more):
    rounds = rounds_of(plain, cached, **more)
    return run_of(setting, SOFTWARE, len(rounds), "process time", table(rounds), stopped, probed)


def test_the_table_says_what_was_measured():
    assert markdown(a_run()) == """\
sd15, 512 x 512 pixels, 2 steps with CFG, fp32, subject on 25% of the picture, process time, 2 rounds after one that is thrown away. \
a machine, 1 thread; ComfyUI 0.30.0 with pytorch attention, torch 2.11.

| case | pictures | times plain | least | most | at 50 steps | target | UNet calls (plain) | rows (plain) |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| cached | 1 | 1.125 | 1.125 | 1.125 | 1.125 | 1.15 | 2 (2) | 4 (4) |"""


def test_a_rejected_row_is_marked_and_explained():
    told = markdown(a_run(plain=(1.0, 1.3), cached=(1.0, 1.3)))
    assert "| 1.000 (rejected) |" in told and "spread over 26%" in told and "15%" in told and "--rounds" in told
    assert "ejected" not in markdown(a_run())


def test_what_else_a_reader_must_know():
    assert "One round has no spread" in markdown(a_run((1.0,), (1.1,))) and "stopped by hand" in markdown(a_run(stopped=True))
    assert "NaN" in markdown(a_run(finite=False)) and "NaN" not in markdown(a_run())


def test_what_was_probed_stands_beside():
    plain, mine = ({"flops": 1000, "ops": 200, "waits": 4, "largest": 8, "peak": 2 * 10 ** 9, "first_wait": None},
                   {"flops": 1100, "ops": 260, "waits": 4, "largest": 9, "peak": 3 * 10 ** 9, "first_wait": "nodes/host/run.py:9"})
    run = a_run(probed={"plain_b1": plain, "cached_b1": mine})
    told = markdown(run)
    assert "| 1.500 (3.00 GB, +1.00) | 1.100 | +30 | +0.0 | nodes/host/run.py:9 |" in told and "target 1.2" in told
    found = figures([run])
    assert found["memory.sd15.cached_b1"] == 1.5 and found["flops.sd15.cached_b1"] == 1.1 and found["ops_per_step.sd15.cached_b1"] == 30
    assert "plain UNet call waits" in markdown(a_run(probed={"plain_b1": plain | {"first_wait": "a.py:1"}, "cached_b1": mine}))


@LAW(("steps", "counted"), [(2, False), (50, True)])
def test_counts_of_two_parts_stand_for_fifty_steps_alone(steps, counted):
    """In two steps the first part has three calls beside two, in fifty 51 beside fifty."""
    plain, cold = ({"flops": flops, "ops": 200, "waits": 4, "largest": 8} for flops in (1000, 1500))
    laps = {(PLAIN, 1): lap(1.0, steps), ("cold", 1): lap((0.5, 1.0), (steps + 1, steps)), ("cached", 1): lap(1.0, steps)}
    run = run_of(replace(SETTING, steps=steps), SOFTWARE, 1, "process time", table([laps]), probed={
        "plain_b1": plain, "cold_b1": cold, "cached_b1": plain})
    assert ("flops.sd15.cold_b1" in figures([run])) is counted and figures([run])["flops.sd15.cached_b1"] == 1 and markdown(run)


def test_cuda_tells_its_memory_without_being_asked():
    laps = {(PLAIN, 1): lap(1.0, peak=1000), ("cached", 1): lap(1.0, peak=1100)}
    run = run_of(replace(SETTING, device="cuda"), SOFTWARE, 1, "CUDA events", table([laps]))
    assert run["cases"][0]["memory"] == 1.1 and run["cases"][0]["target"] == 1.15


def test_figures_have_the_names_that_other_programs_know():
    runs = [a_run(), a_run(setting=replace(SETTING, attention="sub-quadratic"))]
    told = json.loads(json.dumps(report(runs, "the command")))
    assert {"command", "version", "seed", "figures"} <= set(told) and told["command"] == "bench"
    assert set(told["figures"]) == {f"{what}.sd15.cached_b1{end}" for what in ("time", "time_at_50", "unet_calls")
                                    for end in ("", ".sub-quadratic")}
    assert told["runs"][1]["settings"]["attention"] == "sub-quadratic" and told["figures"]["time.sd15.cached_b1"] == 1.125


@LAW(("argv", "told"), [
    ([], "python3 dev.py bench"), (["--case", "all", "--json", "a b.json", "--rounds", "5"], "python3 dev.py bench --case all --rounds 5"),
    (["--update=docs/x.md", "--block", "b", "--counts"], "python3 dev.py bench --counts"), (["--host", "/x", "--steps", "4"],
                                                                                       "python3 dev.py bench --steps 4"),
    (["--json", "--host", "--steps", "4"], "python3 dev.py bench --steps 4")])
def test_the_command_above_the_table_is_what_measures_it_again(argv, told):
    assert command_of(argv) == told


# a page ----------------------------------------------------------------------------------------------------------------------


def test_one_block_of_a_page_is_rewritten_and_nothing_else(tmp_path):
    (first, last), (other, end) = markers("sd15"), markers("sdxl")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{first}\nold\n{last}\nbetween\n{other}\nkept\n{end}\nafter\n", "utf-8")
    write_page(page, "sd15", "| new |")
    once = page.read_text("utf-8")
    assert once == f"before\n{first}\n\n| new |\n\n{last}\nbetween\n{other}\nkept\n{end}\nafter\n"
    write_page(page, "sd15", "| new |")
    assert page.read_text("utf-8") == once


@LAW("page", ["nothing", "{0}", "{1}\n{0}", "{0}\n{1}\n{0}\n{1}"])
def test_a_page_without_that_block_is_refused_with_its_two_lines(page, tmp_path):
    first, last = markers("sdxl")
    text = page.format(first, last)
    with pytest.raises(ValueError, match="no block 'sdxl'") as refused:
        updated(text, "sdxl", "table")
    assert first in str(refused.value) and last in str(refused.value)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match="--update .*page.md"):
        write_page(tmp_path / "page.md", "sdxl", "table")
    assert (tmp_path / "page.md").read_text() == text


def test_the_shipped_page_has_a_block_for_each_family():
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    for family in ("sd15", "sdxl"):
        assert "| new |" in updated(page, family, "| new |")


# the command line ------------------------------------------------------------------------------------------------------------


@LAW(("argv", "told"), [
    (["--latent", "4"], "--latent is 4; give 8 or more"), (["--steps", "1"], "--steps is 1; give 2"), (["--rounds", "0"], "--rounds is 0"),
    (["--threads", "0"], "--threads is 0"), (["--subject", "25"], "--subject is 25.0.*0.25"), (["--subject", "0"], "--subject is 0.0"),
    (["--pictures", "0"], "--pictures is 0"), (["--case", "nothing"], "--case nothing: there is no such case"),
    (["--case", "story"], "--steps 2.*--steps 4"), (["--syncs"], "--device is cpu.*--device cuda"),
    (["--memory", "--device", "cuda"], "leave it out"), (["--update", "no/page.md"], "no/page.md: there is no such page"),
    (["--attention", "sage"], "sage.*pytorch"), (["--family", "flux"], "flux.*sd15")])
def test_arguments_that_do_not_fit_are_one_sentence_and_code_2(argv, told, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.arguments(["--host", "somewhere", *argv])
    assert ended.value.code == 2 and re.search(told, " ".join(capsys.readouterr().err.split()))


def test_without_a_host_the_front_door_is_named(monkeypatch, capsys):
    monkeypatch.delenv("KINDRED_HOST", raising=False)
    with pytest.raises(SystemExit):
        bench.arguments([])
    assert "python3 dev.py bench" in capsys.readouterr().err


def test_a_folder_that_is_no_host_is_code_2(tmp_path, capsys):
    assert bench.main(["--host", str(tmp_path), "--family", "tiny"]) == 2
    assert "holds no main.py" in capsys.readouterr().err


def test_the_defaults():
    given = bench.arguments(["--host", "somewhere"])
    assert bench.setting_of(given) == Setting("sd15", 32, 2, "fp32", "cpu", "pytorch", given.threads, 0.25)
    there = bench.arguments(["--host", "x", "--device", "cuda"])
    assert (there.dtype, there.steps) == ("fp16", 50)  # where setting up a run is no trifle beside two steps
    assert set(ATTENTION) == {"pytorch", "sub-quadratic"}


class Ground:
    """A ground whose jobs take what they are told to, and whose user presses Ctrl-C in one of them."""
    stop, trouble, torch, unet = 0, None, torch, None

    def __init__(self, host, setting):
        self.done = 0

    def estimate(self, keys):
        return f"{len(keys)} cases"

    def job(self, key, clock):
        def run():
            self.done += 1
            if self.done == self.stop:
                raise KeyboardInterrupt
            return lap(1.0 if key[0] == PLAIN else 1.5)
        return run


@pytest.fixture
def measured(monkeypatch, tmp_path, capsys):
    """measured(argv) -> exit code, what was printed, the JSON or None, whether the page was rewritten."""
    first, last = markers("tiny")
    page, told = tmp_path / "page.md", tmp_path / "told.json"
    page.write_text(f"{first}\n{last}\n")
    monkeypatch.setattr(bench, "Ground", Ground)
    monkeypatch.setattr(bench, "software", lambda *_: SOFTWARE)

    def run(*argv):
        code = bench.main(["--host", "x", "--family", "tiny", "--case", "cached_b1", "--rounds", "2", "--json", str(told),
                           "--update", str(page), *argv])
        said = capsys.readouterr()
        return code, said.out + said.err, json.loads(told.read_text()) if told.exists() else None, "1.500" in page.read_text()
    return run


def test_a_whole_run_prints_keeps_and_rewrites(measured):
    code, said, told, rewritten = measured()
    assert code == 0 and "| cached | 1 | 1.500 |" in said and "1 cases" in said and rewritten
    assert said.index("python3 dev.py bench --family tiny --case cached_b1 --rounds 2\n") < said.index("| cached |")
    assert told["figures"] == {"time.tiny.cached_b1": 1.5, "time_at_50.tiny.cached_b1": 1.5, "unet_calls.tiny.cached_b1": 2}


@LAW(("stop", "rounds"), [(1, 0), (4, 0), (5, 1), (6, 1)])
def test_ctrl_c_prints_the_finished_rounds_and_leaves_the_page(measured, monkeypatch, stop, rounds):
    monkeypatch.setattr(Ground, "stop", stop)
    code, said, told, rewritten = measured()
    assert code == 130 and not rewritten
    assert (told["runs"][0]["rounds"], told["runs"][0]["stopped"]) == (1, True) if rounds else told is None
    assert ("| cached |" in said and "stopped by hand" in said) if rounds else "before the first round was finished" in said


@LAW("trouble", [RuntimeError("out of memory"), bench.Refusal("no memory"), KeyboardInterrupt()], ids=repr)
def test_trouble_after_the_rounds_leaves_their_table(measured, monkeypatch, trouble):
    def counted(job):
        raise trouble
    monkeypatch.setattr(bench, "counted", counted)
    code, said, told, rewritten = measured("--counts")
    assert code == (130 if isinstance(trouble, KeyboardInterrupt) else 2) and "| cached | 1 | 1.500 |" in said and not rewritten
    assert str(trouble) in said and told["figures"]["time.tiny.cached_b1"] == 1.5


@LAW(("ends", "code", "count"), [("0", 0, 2), ("130", 130, 1), ("2", 2, 1)])
def test_two_attention_settings_are_two_children(measured, monkeypatch, ends, code, count):
    def child(given, *more, attention):
        told = json.dumps(report([a_run(setting=replace(SETTING, family="tiny", attention=attention))], "x"))
        return [sys.executable, "-c", f"import sys; open({more[-1]!r}, 'w').write({told!r}); sys.exit({ends})"]
    monkeypatch.setattr(bench, "child", child)
    got, _, told, rewritten = measured("--attention", "both")
    assert got == code and [run["settings"]["attention"] for run in told["runs"]] == list(ATTENTION)[:count]
    assert not rewritten or code == 0


def test_a_child_that_dies_is_told(measured, monkeypatch):
    monkeypatch.setattr(bench, "child", lambda *_, **__: [sys.executable, "-c", "raise SystemExit(9)"])
    code, said, told, _ = measured("--attention", "both")
    assert code == 2 and told is None and "--attention pytorch ended with code 9" in said
    code, said, told, _ = measured("--memory")
    assert code == 2 and "plain_b1 ended with code 9" in said and "| cached |" in said


def test_the_peak_of_a_child_is_its_last_line(measured, monkeypatch):
    monkeypatch.setattr(bench, "child", lambda given, *more: [sys.executable, "-c", f"""
print("noise"); print('{{"peak": %d}}' % ({more[-1]!r} == "cached_b1" and 3 or 2))"""])
    code, said, told, _ = measured("--memory")
    assert code == 0 and told["figures"]["memory.tiny.cached_b1"] == 1.5


def test_a_child_measures_the_same_setting():
    given = bench.arguments(["--host", "somewhere", "--family", "sdxl", "--latent", "48", "--dtype", "bf16", "--subject", "0.5",
                             "--attention", "both", "--threads", "2"])
    again = bench.arguments(bench.child(given, "--case", "cached_b4", attention="sub-quadratic")[2:])
    assert bench.setting_of(again) == replace(bench.setting_of(given), attention="sub-quadratic")
    assert again.keys == [("cached", 4)] and again.host == given.host


def test_sizes_are_readable():
    assert size(3_438_000_000) == "3.44 GB" and size(2_500_000) == "2.5 MB"
