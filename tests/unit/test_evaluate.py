"""Laws of the evaluation: rows, processes that share the work, and which jobs there are."""

from __future__ import annotations

import json
import operator
import os
import signal
import time
from functools import partial
from types import SimpleNamespace

import pytest
import workers
from evaluate import alone, fill, jobs_of, measure, strip
from evaluation.catalogue import DEFAULT, PLAIN, TABLES
from evaluation.ground import BOUNDS, SHOWN, Job, Setting
from evaluation.journal import Journal
from evaluation.options import chosen, parse
from evaluation.rows import INPUTS, Row
from evaluation.tables import Table
from hypothesis import given
from hypothesis import strategies as st
from small_measurements import values
from workers import WorkerError, one_thread, pooled, stoppable

# rows ------------------------------------------------------------------------------------------------------------------------


def test_a_row_of_ones_own():
    row = Row.parse(
        "story",
        "mine: weight=2, blocks=output 3-5, middle 0, align_keys=false, anchors=3, mask=none, cfg=6",
    )
    assert dict(row.inputs) == {
        "weight": 2.0,
        "blocks": "output 3-5, middle 0",
        "align_keys": False,
        "anchors": 3,
        "mask": "none",
        "cfg": 6.0,
    }
    assert type(row.get("anchors", 0)) is int and row.of(("weight", "anchors")) == {
        "weight": 2.0,
        "anchors": 3,
    }
    assert (
        Row.parse("story", "as it comes")
        == Row.parse("story", "as it comes:")
        == Row("as it comes")
    )
    assert (
        Row.parse("story", "a: weight=1, anchors=2").inputs
        == Row.parse("story", "b: anchors=2, weight=1.0").inputs
    )


def test_a_personalized_row_names_its_nodes():
    row = Row.parse(
        "personalize",
        "x: weight=2, concept.weight=1, mask_steps=5, mask=true, inverted=yes, self=on",
    )
    assert row.of(("weight", "mask_steps")) == {"weight": 2.0, "mask_steps": 5}
    assert row.of(
        {name for name in INPUTS["personalize"] if name.startswith("concept.")}, "concept."
    ) == {"weight": 1.0}


@pytest.mark.parametrize(
    "task, text, said",
    [
        ("story", "x: wieght=2", "'x' sets wieght; known are strength"),
        ("story", "x: weight=much", "'x' sets weight to 'much', which is not a number"),
        ("story", "x: halves=none", "halves to 'none'; it is one of cond only, both"),
        ("story", "x: weight=nan", "weight to 'nan'"),
        ("story", "x: anchors=2.5", "anchors to '2.5', which is not a whole number"),
        ("story", "x: align_keys=perhaps", "align_keys to 'perhaps', .*true or false"),
        ("story", "x: mask=true", "mask to 'true'; it is one of word, none"),
        ("personalize", "x: self=no", "self to 'no'; it is one of on, off"),
        ("story", "x: weight", "'weight' without a value"),
        ("story", "x: dropout=, weight=1", "dropout to ''"),
        ("story", "x: weight=1, dropout", "weight to '1, dropout'"),
        ("story", ": weight=1", "needs a name"),
        ("personalize", "x: dropout=1", "sets dropout; known are"),
    ],
)
def test_a_wrong_row_names_its_input(task, text, said):
    with pytest.raises(SystemExit, match=said):
        Row.parse(task, text)


def test_every_table_begins_with_plain_and_names_its_rows_once():
    for table in TABLES.values():
        assert table.rows[0] == PLAIN[table.task], table.name
        assert (
            len({row.name for row in table.rows})
            == len(table.rows)
            == len({row.inputs for row in table.rows})
        ), table.name


# processes -------------------------------------------------------------------------------------------------------------------


TWICE = partial(partial, operator.mul, 2)  # what a process makes: a function that doubles


@pytest.mark.parametrize("processes", [1, 2])
def test_every_job_is_done_once_by_any_number_of_processes(processes):
    assert sorted(pooled(range(7), TWICE, processes)) == [(n, 2 * n) for n in range(7)]
    assert list(pooled([], TWICE, processes)) == []


def test_a_failure_in_a_process_is_told_with_its_job():
    with pytest.raises(WorkerError, match="(?s)^0:.*ZeroDivisionError"):
        list(pooled([1, 0], partial(partial, operator.truediv, 1), 2))


def test_a_process_that_dies_is_told_with_its_job():
    with pytest.raises(WorkerError, match="ended with code 9 at 9"):
        list(pooled([9, 9], partial(partial, os._exit), 2))


class Refuses:
    """What a process cannot make, and says so."""

    def __init__(self) -> None:
        raise SystemExit("evaluate: there is no such file")


def test_a_refusal_in_a_process_is_told_in_its_words():
    with pytest.raises(WorkerError, match=r"(?s)^[01]:\nevaluate: there is no such file$"):
        list(
            pooled([0, 1], partial(exec, "raise SystemExit('evaluate: there is no such file')"), 2)
        )


def test_nothing_to_do_makes_nothing():
    assert list(pooled([], Refuses, 2)) == []


def test_leaving_early_ends_the_processes(monkeypatch, capfd):
    """The idle one by itself, the other one, which would sleep for an hour, because it is told to, and without a word."""
    monkeypatch.setattr(workers, "PATIENCE", None)
    found = pooled([0.0, 3600.0, 3600.0], partial(partial, time.sleep), 2)
    next(found)
    children = workers.multiprocessing.active_children()
    found.close()
    assert (
        len(children) == 2
        and not workers.multiprocessing.active_children()
        and capfd.readouterr().err == ""
    )
    assert sorted(child.exitcode for child in children) in ([0, 143], [-signal.SIGTERM, 0]), (
        "143: it had begun to listen"
    )


def test_children_have_one_thread_and_we_keep_ours(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with one_thread():
        assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("1", "1")
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_heard_once(handlers, first, monkeypatch):
    """dev.py sends SIGTERM right after a Ctrl-C: while the tables are being made that must not end the process. A later one is meant."""
    now = [0.0]
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with pytest.raises(KeyboardInterrupt), stoppable():
        signal.raise_signal(first)
    now[0] = 1.9
    signal.raise_signal(signal.SIGTERM)
    now[0] = 4.0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_run_that_ends_gives_the_signals_back(handlers):
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in handlers} == handlers


# a run -----------------------------------------------------------------------------------------------------------------------


def asked(tmp_path, *words):
    return parse([*words, "--host", "nowhere", "--out", str(tmp_path)])


def test_without_arguments_it_measures_the_papers_tables(tmp_path):
    assert [table.name for table in chosen(asked(tmp_path))] == list(DEFAULT)
    assert {table.task for table in chosen(asked(tmp_path, "--task", "story"))} == {"story"}
    tables = chosen(asked(tmp_path, "--table", "table_2", "--count", "3", "--first", "7"))
    assert [(t.name, t.count, t.first) for t in tables] == [("table_2", 3, 7)]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--variant", "x: weight=1"], "--variant needs --task"),
        (
            ["--task", "story", "--variant", "a: weight=1", "--variant", "a: weight=2"],
            "two rows are called a",
        ),
        (["--task", "story", "--variant", "plain: weight=1"], "two rows are called plain"),
    ],
)
def test_rows_that_do_not_fit_together(tmp_path, words, said):
    with pytest.raises(SystemExit, match=said):
        chosen(asked(tmp_path, *words))


@pytest.mark.parametrize(
    "words, said",
    [
        (["--task", "story", "--table", "pareto"], "--table does nothing here: --task"),
        (
            ["--task", "story", "--table", "pareto", "--variant", "a: weight=1"],
            "--table does nothing here: --variant",
        ),
        (["--task", "miniature", "--variant", "a: weight=1"], "--variant does nothing here"),
    ],
)
def test_words_that_would_do_nothing(tmp_path, words, said, capsys):
    with pytest.raises(SystemExit):
        asked(tmp_path, *words)
    assert said in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(tmp_path):
    with (
        alone(tmp_path),
        pytest.raises(SystemExit, match="another run measures into"),
        alone(tmp_path),
    ):
        pass
    with alone(tmp_path):
        pass


@pytest.mark.parametrize(
    "words",
    [["--count", "1"], ["--seeds", "0"], ["--steps", "0"], ["--processes", "0"], ["--first", "-1"]],
)
def test_numbers_that_make_no_run(tmp_path, words, capsys):
    with pytest.raises(SystemExit):
        asked(tmp_path, *words)
    assert f"{words[0]} is {words[1]}, but takes" in capsys.readouterr().err


@given(st.integers(2, 5), st.integers(1, 3), st.sets(st.sampled_from(sorted(TABLES)), min_size=1))
def test_every_measurement_is_one_job(count, seeds, names):
    from pathlib import Path

    tables = [
        Table(t.name, t.title, t.task, t.rows, count, 4) for t in (TABLES[name] for name in names)
    ]
    setting = Setting("host", 50, 4.0, "")
    jobs = list(jobs_of(tables, seeds, setting, Path("p")))
    keys = [Journal.key(setting.of(job)) for job in jobs]
    assert len(set(keys)) == len(keys)
    wanted = {
        Journal.key(setting.of(Job(t.task, row, case, seed)))
        for t in tables
        for row in (*t.rows, BOUNDS)
        for case in range(4, 4 + count)
        for seed in range(seeds)
    }
    assert set(keys) == wanted
    for task in ("personalize", "story"):  # a case is not met again once it is left
        met = [job.case for job in jobs if job.task == task]
        assert met == sorted(met)
    assert {job.case for job in jobs if job.pictures} == set(range(4, 4 + min(SHOWN, count)))
    assert len({job.pictures for job in jobs if job.pictures}) == sum(
        bool(job.pictures) for job in jobs
    )


def test_pictures_of_other_settings_have_another_name():
    rows = [(t.task, row) for t in TABLES.values() for row in t.rows]
    settings = [Setting("host", steps, cfg, "") for steps in (10, 25) for cfg in (4.0, 5.0)]
    names = {strip(setting.of(Job(task, row, 0, 0))) for task, row in rows for setting in settings}
    assert len(names) == 4 * len({(task, row.inputs) for task, row in rows})


class Pretended:
    """A ground that knows the answer at once, and is stopped by its third job if it is told so."""

    done: list[Job] = []
    stop_at = 99

    def __init__(self, setting) -> None:
        pass

    def __call__(self, job):
        if len(self.done) == self.stop_at:
            signal.raise_signal(signal.SIGINT)
        self.done.append(job)
        return {"ceiling": 1.0, "floor": 0.0} if job.row == BOUNDS else values([job.case / 10] * 2)


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch, handlers):
    import evaluate

    monkeypatch.setattr(evaluate, "Miniature", Pretended)
    monkeypatch.setattr(Pretended, "done", [])
    monkeypatch.setattr(Pretended, "stop_at", 3)
    words = asked(
        tmp_path, "--table", "table_2", "--count", "2", "--seeds", "1", "--processes", "1"
    )
    tables, setting, journal = (
        chosen(words),
        Setting("nowhere", 50, 4.0, "x"),
        Journal(tmp_path / "journal.jsonl"),
    )
    assert not measure(words, tables, journal, setting) and len(Pretended.done) == 3
    (partly,) = fill(tables, 1, journal, setting)
    assert list(partly.measurements) == ["plain", "cross"] and partly.ceiling == 1.0
    monkeypatch.setattr(Pretended, "stop_at", 99)
    journal = Journal(tmp_path / "journal.jsonl")
    assert measure(words, tables, journal, setting) and len(Pretended.done) == 12
    (whole,) = fill(tables, 1, journal, setting)
    assert {len(seeds) for seeds in whole.measurements.values()} == {2} and whole.scores["full"][
        "identity"
    ].mean == pytest.approx(0.05)
    assert (
        measure(words, tables, Journal(tmp_path / "journal.jsonl"), setting)
        and len(Pretended.done) == 12
    )
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 12
    assert (
        json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])["of"]["task"]
        == "personalize"
    )
