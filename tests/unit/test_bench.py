"""Laws of tools/workshop/bench.py without a host: the table, the block of a page, the command line, refusals."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import bench
import pytest
import torch
from benching.catalogue import PLAIN
from benching.ground import Setting
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
from benching.rounds import table
from boot import ATTENTION
from checkout import ROOT
from laps import SETTING, SOFTWARE, lap, pair, rounds_of

LAW = pytest.mark.parametrize


# the table -------------------------------------------------------------------------------------------------------------------


def a_run(
    plain=(1.0, 1.0), cached=(1.125, 1.125), setting=SETTING, probed=None, stopped=False, **more
):
    rounds = rounds_of(plain, cached, **more)
    return run_of(
        setting,
        SOFTWARE,
        len(rounds),
        "process time",
        table(rounds, setting.family),
        stopped,
        probed,
    )


def test_the_table_says_what_was_measured():
    assert (
        markdown(a_run())
        == """\
sd15, 512 x 512 pixels, 2 steps with CFG, fp32, subject on 25% of the picture, process time, 2 rounds after one that is thrown away. \
a machine, 1 thread; ComfyUI 0.30.0 with pytorch attention, torch 2.11.

| case | pictures | times plain | standard error | least | most | at 50 steps | target | UNet calls (plain) | rows (plain) |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| cached | 1 | 1.125 | 0.000 | 1.125 | 1.125 | 1.125 | 1.15 | 2 (2) | 4 (4) |"""
    )


def test_a_machine_that_was_not_quiet_is_told_of_and_no_row_is_rejected():
    told = markdown(a_run(plain=(1.0, 1.3), cached=(1.0, 1.3)))
    assert (
        "| cached | 1 | 1.000 | 0.000 |" in told
        and "spread over 26%" in told
        and "15%" in told
        and "--rounds" in told
    )
    assert "something else" not in markdown(a_run())
    assert "| cached | 1 | 1.050 | 0.050 |" in markdown(a_run(cached=(1.0, 1.1)))


def test_what_else_a_reader_must_know():
    assert "One round has no standard error" in markdown(
        a_run((1.0,), (1.1,))
    ) and "stopped by hand" in markdown(a_run(stopped=True))
    assert "NaN" in markdown(a_run(finite=False)) and "NaN" not in markdown(a_run())


def test_what_was_probed_stands_beside():
    plain, mine = (
        {
            "flops": 1000,
            "ops": 200,
            "waits": 4,
            "largest": 8,
            "peak": 2 * 10**9,
            "first_wait": None,
        },
        {
            "flops": 1100,
            "ops": 260,
            "waits": 4,
            "largest": 9,
            "peak": 3 * 10**9,
            "first_wait": "nodes/host/run.py:9",
        },
    )
    run = a_run(probed={"plain_b1": plain, "cached_b1": mine})
    told = markdown(run)
    assert (
        "| 1.500 (3.00 GB, +1.00) | 1.100 | +30 | +0.0 | nodes/host/run.py:9 |" in told
        and "target 1.2" in told
    )
    found = figures([run])
    assert (
        found["memory.sd15.cached_b1"] == 1.5
        and found["flops.sd15.cached_b1"] == 1.1
        and found["ops_per_step.sd15.cached_b1"] == 30
    )
    assert "plain UNet call waits" in markdown(
        a_run(probed={"plain_b1": plain | {"first_wait": "a.py:1"}, "cached_b1": mine})
    )


@LAW(("steps", "counted"), [(2, False), (50, True)])
def test_counts_of_two_parts_stand_for_fifty_steps_alone(steps, counted):
    """In two steps the first part has three calls beside two, in fifty 51 beside fifty."""
    plain, cold = ({"flops": flops, "ops": 200, "waits": 4, "largest": 8} for flops in (1000, 1500))
    beside = lap(1.0, steps)
    pairs = {
        ("cold", 1): pair(lap((0.5, 1.0), (steps + 1, steps)), beside),
        ("cached", 1): pair(lap(1.0, steps), beside),
    }
    run = run_of(
        replace(SETTING, steps=steps),
        SOFTWARE,
        1,
        "process time",
        table([pairs], SETTING.family),
        probed={"plain_b1": plain, "cold_b1": cold, "cached_b1": plain},
    )
    assert (
        ("flops.sd15.cold_b1" in figures([run])) is counted
        and figures([run])["flops.sd15.cached_b1"] == 1
        and markdown(run)
    )


def test_cuda_tells_its_memory_without_being_asked():
    pairs = {("cached", 1): pair(lap(1.0, peak=1100), lap(1.0, peak=1000))}
    run = run_of(
        replace(SETTING, device="cuda"), SOFTWARE, 1, "CUDA events", table([pairs], SETTING.family)
    )
    assert run["cases"][0]["memory"] == 1.1 and run["cases"][0]["target"] == 1.15


def test_figures_have_the_names_that_other_programs_know():
    runs = [a_run(), a_run(setting=replace(SETTING, attention="sub-quadratic"))]
    told = json.loads(json.dumps(report(runs, "the command")))
    assert {"command", "version", "seed", "figures"} <= set(told) and told["command"] == "bench"
    assert set(told["figures"]) == {
        f"{what}.sd15.cached_b1{end}"
        for what in ("time", "time_at_50", "unet_calls")
        for end in ("", ".sub-quadratic")
    }
    assert (
        told["runs"][1]["settings"]["attention"] == "sub-quadratic"
        and told["figures"]["time.sd15.cached_b1"] == 1.125
    )


@LAW(
    ("argv", "told"),
    [
        ([], "python3 dev.py bench"),
        (
            ["--case", "all", "--json", "a b.json", "--rounds", "5"],
            "python3 dev.py bench --case all --rounds 5",
        ),
        (["--update=docs/x.md", "--block", "b", "--counts"], "python3 dev.py bench --counts"),
        (["--host", "/x", "--steps", "4"], "python3 dev.py bench --steps 4"),
        (["--json", "--host", "--steps", "4"], "python3 dev.py bench --steps 4"),
    ],
)
def test_the_command_above_the_table_is_what_measures_it_again(argv, told):
    assert command_of(argv) == told


# a page ----------------------------------------------------------------------------------------------------------------------


def test_one_block_of_a_page_is_rewritten_and_nothing_else(tmp_path):
    (first, last), (other, end) = markers("sd15"), markers("sdxl")
    page = tmp_path / "page.md"
    page.write_text(
        f"before\n{first}\nold\n{last}\nbetween\n{other}\nkept\n{end}\nafter\n", "utf-8"
    )
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


@LAW(
    ("argv", "told"),
    [
        (["--latent", "4"], "--latent is 4; give 8 or more"),
        (["--steps", "1"], "--steps is 1; give 2"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--subject", "25"], "--subject is 25.0.*0.25"),
        (["--subject", "0"], "--subject is 0.0"),
        (["--pictures", "0"], "--pictures is 0"),
        (["--case", "nothing"], "--case nothing: there is no such case"),
        (["--case", "story"], "--steps 2.*--steps 4"),
        (["--syncs"], "--device is cpu.*--device cuda"),
        (["--memory", "--device", "cuda"], "leave it out"),
        (["--update", "no/page.md"], "no/page.md: there is no such page"),
        (["--attention", "sage"], "sage.*pytorch"),
        (["--family", "wan"], "wan.*sd15"),
    ],
)
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
    assert bench.setting_of(given) == Setting(
        "sd15", 32, 2, "fp32", "cpu", "pytorch", given.threads, 0.25
    )
    there = bench.arguments(["--host", "x", "--device", "cuda"])
    assert (there.dtype, there.steps) == (
        "fp16",
        50,
    )  # where setting up a run is no trifle beside two steps
    assert set(ATTENTION) == {"pytorch", "sub-quadratic"}


class Ground:
    """A ground whose jobs take what they are told to, and whose user presses Ctrl-C in one of them."""

    stop, trouble, torch, unet = 0, None, torch, None

    def __init__(self, host, setting, own_weights):
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
        code = bench.main(
            [
                "--host",
                "x",
                "--family",
                "tiny",
                "--case",
                "cached_b1",
                "--rounds",
                "2",
                "--json",
                str(told),
                "--update",
                str(page),
                *argv,
            ]
        )
        said = capsys.readouterr()
        return (
            code,
            said.out + said.err,
            json.loads(told.read_text()) if told.exists() else None,
            "1.500" in page.read_text(),
        )

    return run


def test_a_whole_run_prints_keeps_and_rewrites(measured):
    code, said, told, rewritten = measured()
    assert code == 0 and "| cached | 1 | 1.500 |" in said and "1 cases" in said and rewritten
    assert said.index(
        "python3 dev.py bench --family tiny --case cached_b1 --rounds 2\n"
    ) < said.index("| cached |")
    assert told["figures"] == {
        "time.tiny.cached_b1": 1.5,
        "time_at_50.tiny.cached_b1": 1.5,
        "unet_calls.tiny.cached_b1": 2,
    }


@LAW(("stop", "rounds"), [(1, 0), (6, 0), (7, 1), (9, 1)])
def test_ctrl_c_prints_the_finished_rounds_and_leaves_the_page(measured, monkeypatch, stop, rounds):
    monkeypatch.setattr(Ground, "stop", stop)
    code, said, told, rewritten = measured()
    assert code == 130 and not rewritten
    assert (
        (told["runs"][0]["rounds"], told["runs"][0]["stopped"]) == (1, True)
        if rounds
        else told is None
    )
    assert (
        ("| cached |" in said and "stopped by hand" in said)
        if rounds
        else "before the first round was finished" in said
    )


@LAW(
    "trouble",
    [RuntimeError("out of memory"), bench.Refusal("no memory"), KeyboardInterrupt()],
    ids=repr,
)
def test_trouble_after_the_rounds_leaves_their_table(measured, monkeypatch, trouble):
    def counted(job):
        raise trouble

    monkeypatch.setattr(bench, "counted", counted)
    code, said, told, rewritten = measured("--counts")
    assert (
        code == (130 if isinstance(trouble, KeyboardInterrupt) else 2)
        and "| cached | 1 | 1.500 |" in said
        and not rewritten
    )
    assert str(trouble) in said and told["figures"]["time.tiny.cached_b1"] == 1.5


@LAW(("ends", "code", "count"), [("0", 0, 2), ("130", 130, 1), ("2", 2, 1)])
def test_two_attention_settings_are_two_children(measured, monkeypatch, ends, code, count):
    def child(given, *more, attention):
        told = json.dumps(
            report([a_run(setting=replace(SETTING, family="tiny", attention=attention))], "x")
        )
        return [
            sys.executable,
            "-c",
            f"import sys; open({more[-1]!r}, 'w').write({told!r}); sys.exit({ends})",
        ]

    monkeypatch.setattr(bench, "child", child)
    got, _, told, rewritten = measured("--attention", "both")
    assert (
        got == code
        and [run["settings"]["attention"] for run in told["runs"]] == list(ATTENTION)[:count]
    )
    assert not rewritten or code == 0


def test_a_child_that_dies_is_told(measured, monkeypatch):
    monkeypatch.setattr(
        bench, "child", lambda *_, **__: [sys.executable, "-c", "raise SystemExit(9)"]
    )
    code, said, told, _ = measured("--attention", "both")
    assert code == 2 and told is None and "--attention pytorch ended with code 9" in said
    code, said, told, _ = measured("--memory")
    assert code == 2 and "plain_b1 ended with code 9" in said and "| cached |" in said


def test_the_peak_of_a_child_is_its_last_line(measured, monkeypatch):
    monkeypatch.setattr(
        bench,
        "child",
        lambda given, *more: [
            sys.executable,
            "-c",
            f"""
print("noise"); print('{{"peak": %d}}' % ({more[-1]!r} == "cached_b1" and 3 or 2))""",
        ],
    )
    code, said, told, _ = measured("--memory")
    assert code == 0 and told["figures"]["memory.tiny.cached_b1"] == 1.5


def test_a_child_measures_the_same_setting():
    given = bench.arguments(
        [
            "--host",
            "somewhere",
            "--family",
            "sdxl",
            "--latent",
            "48",
            "--dtype",
            "bf16",
            "--subject",
            "0.5",
            "--attention",
            "both",
            "--threads",
            "2",
        ]
    )
    again = bench.arguments(
        bench.child(given, "--case", "cached_b4", attention="sub-quadratic")[2:]
    )
    assert bench.setting_of(again) == replace(bench.setting_of(given), attention="sub-quadratic")
    assert again.keys == [("cached", 4)] and again.host == given.host
