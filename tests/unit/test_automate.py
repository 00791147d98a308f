"""tools/client/automate.py against hosts that only pretend.

Faults on the line, restarts, refusals, several hosts, Ctrl-C, and what is saved.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import automate
import jobs
import pytest
from automate import main
from checkout import ROOT
from client import Client, HostError, Unreachable
from fake_host import FakeHost
from jobs import Board, Job
from shelf import Shelf

GRAPH = {
    "1": {"class_type": "Load", "inputs": {"image": "a.png"}, "_meta": {"title": "Photo"}},
    "2": {
        "class_type": "Draw",
        "inputs": {"prompts": "a cat", "seed": 7, "steps": 12},
        "_meta": {"title": "Draw it"},
    },
    "3": {"class_type": "Method", "inputs": {"seed": 0}},
    "4": {
        "class_type": "KindredLoadReference",
        "inputs": {"file": "old.safetensors"},
        "_meta": {"title": "Subject"},
    },
}
FAULTS = ["lose_post", "lose_answer", "bad_gateway", "forget", "cut"]


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    for name, seconds in (("POLL", 0.2), ("SILENCE", 0.02), ("FIRST", 0.02)):
        monkeypatch.setattr(jobs, name, seconds)
    monkeypatch.setattr(
        automate.signal, "signal", lambda *_: None
    )  # main is not the main program here


@pytest.fixture
def host():
    with FakeHost() as running:
        yield running


@pytest.fixture
def automated(tmp_path, capsys):
    """Runs the program: its exit code, its report, what it said."""
    (tmp_path / "w.json").write_text(json.dumps(GRAPH), "utf-8")

    def run(*hosts, words=(), patience=5):
        servers = [
            word
            for host in hosts
            for word in ("--server", host if isinstance(host, str) else host.url)
        ]
        code = main(
            [
                str(tmp_path / "w.json"),
                *servers,
                "--out",
                str(tmp_path / "out"),
                "--patience",
                str(patience),
                "--json",
                *words,
            ]
        )
        out, err = capsys.readouterr()
        report = json.loads(out) if out else None
        assert report is None or report["exit_code"] == code
        return code, report, err

    return run


def test_changed_inputs_uploads_seeds_and_names(host, automated, tmp_path):
    """What is posted is the workflow with what was asked for and nothing else; what comes back is saved under new numbers."""
    (tmp_path / "my photo.png").write_bytes(b"\x89PNG")
    words = [
        "--set",
        "Draw it.steps=3",
        "--image",
        f"Photo={tmp_path / 'my photo.png'}",
        "--repeat",
        "2",
        "--seed",
        "41",
    ]
    code, report, said = automated(host, words=words)
    assert code == 0 and host.uploads == {"my photo.png": b"\x89PNG"} and "2 of 2 jobs done" in said
    for seed, graph in zip((41, 42), host.graphs, strict=True):
        assert graph == GRAPH | {
            "1": GRAPH["1"] | {"inputs": {"image": "my photo.png"}},
            "2": GRAPH["2"] | {"inputs": {"prompts": "a cat", "seed": seed, "steps": 3}},
        }
    assert [job["seed"] for job in report["jobs"]] == [41, 42] and [
        job["posts"] for job in report["jobs"]
    ] == [1, 1]
    assert automated(host)[0] == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"0000{i}_Draw_it_1.png" for i in (1, 2, 3)]
    assert (tmp_path / "out" / names[0]).read_bytes() == b"file p.png"


def test_texts_and_saved_subjects_are_kept_too(host, automated, tmp_path):
    """Every output: pictures, texts, and the file that Save Reference names; booleans beside them are nothing to keep."""
    kept = GRAPH | {
        "5": {"class_type": "KindredSaveReference", "inputs": {}, "_meta": {"title": "Keep"}}
    }
    (tmp_path / "w.json").write_text(json.dumps(kept), "utf-8")
    host.outputs = {
        "2": {"images": [{"filename": "p.png", "type": "temp"}] * 2, "animated": [False]},
        "4": {"text": ["score 0.5"]},
        "5": {"text": ["kindred/dog_00001_.safetensors, 3.1 MB"]},
    }
    assert automated(host)[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        "00001_Draw_it_1.png": b"file p.png",
        "00001_Draw_it_2.png": b"file p.png",
        "00001_Subject_1.txt": b"score 0.5",
        "00001_Keep_1.txt": b"kindred/dog_00001_.safetensors, 3.1 MB",
        "00001_Keep_1.safetensors": b"file dog_00001_.safetensors",
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_the_line_costs_nothing_and_queues_nothing_twice(host, automated, fault):
    """The host complains of a prompt that it has already; only a host that forgot it gets it again, under the same id."""
    setattr(host, fault, 1 if fault == "lose_answer" else 2)
    code, report, said = automated(host)
    assert code == 0, said
    [job] = report["jobs"]
    assert job["posts"] == len(host.posts)
    assert set(host.posts) == {job["prompt_id"]} and job["files"]
    assert len(host.posts) == (3 if fault == "forget" else 1) and getattr(host, fault) == 0


def test_without_a_websocket_it_asks(host, automated):
    host.no_websocket = True
    assert automated(host, words=["--repeat", "2"])[0] == 0 and len(host.posts) == 2


def test_a_host_that_starts_late_is_waited_for(automated, monkeypatch):
    def say(voice, host: str, sentence: str) -> None:
        told(voice, host, sentence)
        if late.away and "trying again" in sentence:  # it was found away
            late.begin()

    told = automate.Teller.say
    monkeypatch.setattr(automate.Teller, "say", say)
    with FakeHost(away=True) as late:
        code, _, said = automated(late, patience=600)
    assert code == 0 and "trying again for 600 s" in said and "is back" in said


def test_no_host_is_an_end(automated):
    with FakeHost(away=True) as never:
        code, report, said = automated(never, patience=0.3)
    assert code == 3 and "given up" in said
    assert [job["state"] for job in report["jobs"]] == ["not run"]


@pytest.mark.parametrize(
    "patience, instants",
    [
        (0, [0]),
        (0.25, [0, 0.25]),
        (10, [0, 0.5, 1.5, 3.5, 7.5, 10]),
        (50, [0, 0.5, 1.5, 3.5, 7.5, 15.5, 30.5, 45.5, 50]),
    ],
)
def test_a_host_that_is_away_is_asked_at_these_instants_and_no_more(
    monkeypatch, patience, instants
):
    """By a clock that only waiting moves."""
    now, asked = [0.0], []
    stop = SimpleNamespace(
        is_set=lambda: False, wait=lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    monkeypatch.setattr(jobs, "FIRST", 0.5)
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def ask() -> None:
        asked.append(now[0])
        raise Unreachable("away")

    runner = jobs.Runner(
        Client("http://away"),
        None,
        SimpleNamespace(say=lambda *_: None),
        None,
        None,
        stop,
        patience,
    )
    with pytest.raises(Unreachable):
        runner.patiently(ask)
    assert asked == instants


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_headers_never_follow_a_redirect_to_another_host(host, automated, monkeypatch, code):
    """Another port is another host: it is not even asked, and the sentence names it. Within one host the way is followed."""
    heard, get = [], FakeHost.get
    target = {}

    def sending_on(self, handler):
        if self is not host:
            return heard.append(dict(handler.headers)) or get(self, handler)
        if handler.path == target["from"]:
            handler.send_response(code)
            handler.send_header("Location", target["to"])
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        if handler.path == "/moved":
            return self.answer(handler, {"token": handler.headers["X-Token"]})
        return get(self, handler)

    monkeypatch.setattr(FakeHost, "get", sending_on)
    client = Client(host.url, {"X-Token": "secret"})
    with FakeHost() as other:
        for there in (
            other.url,
            other.url.replace("127.0.0.1", "localhost"),
            host.url.replace("http:", "https:"),
        ):
            target.update({"from": "/object_info", "to": f"{there}/object_info"})
            with pytest.raises(HostError, match="sends on to " + re.escape(there)) as told:
                client.object_info()
            assert not isinstance(told.value, Unreachable)  # not asked again and again
        assert automated(host, words=["--header", "X-Token: secret"])[0] == 3
    assert not heard
    for there in ("/moved", f"{host.url}/moved"):
        target["to"] = there
        assert client.json("/object_info") == {"token": "secret"}


def test_what_is_no_comfyui_is_a_sentence(host, automated, monkeypatch):
    monkeypatch.setattr(FakeHost, "get", lambda self, handler: self.answer(handler, b"<html>"))
    code, _, said = automated(host)
    assert code == 3 and "not JSON; is it ComfyUI?" in said and "Traceback" not in said


def test_a_host_that_always_forgets_is_an_end(host, automated):
    """A prompt that takes the host down each time is not handed over for ever."""
    host.forget = 99
    code, report, said = automated(host)
    assert (
        code == 1
        and len(host.posts) == report["jobs"][0]["posts"] == 3
        and "went away 3 times" in report["jobs"][0]["error"]
    )


def test_taken_out_of_the_queue_by_someone_is_not_put_back(host, automated, monkeypatch):
    """Just after its state was asked for once."""
    host.hold, get = True, FakeHost.get

    def and_gone(self, handler) -> None:
        get(self, handler)
        if handler.path.startswith("/api/jobs/"):
            self.states.clear()

    monkeypatch.setattr(FakeHost, "get", and_gone)
    code, report, _ = automated(host)
    assert code == 1 and "Someone else" in report["jobs"][0]["error"] and len(host.posts) == 1


def test_a_dead_hosts_jobs_go_to_the_living(host, automated, tmp_path, monkeypatch):
    """The second one takes a job and is gone for good, once the first has done all others: the first, idle, draws it."""
    second, post = FakeHost().__enter__(), FakeHost.post
    second.hold = True

    def one_after_another(self, handler, body: bytes) -> None:
        if self is host:
            with second.changed:
                second.changed.wait_for(lambda: second.posts)  # else the first might take them all
        post(self, handler, body)

    def die() -> None:
        with host.changed:
            host.changed.wait_for(lambda: len(host.posts) == 3)
        second.__exit__()

    monkeypatch.setattr(FakeHost, "post", one_after_another)
    (tmp_path / "lines.txt").write_text("one\n\ntwo\nthree\nfour\n", "utf-8")
    thread = threading.Thread(target=die, daemon=True)
    thread.start()
    code, report, said = automated(
        host, second, words=["--each", f"2.prompts=@{tmp_path / 'lines.txt'}"], patience=0.5
    )
    thread.join()
    assert code == 0 and f"given up: {second.url}" in said
    assert sorted(graph["2"]["inputs"]["prompts"] for graph in host.graphs) == [
        "four",
        "one",
        "three",
        "two",
    ]
    assert {job["server"] for job in report["jobs"]} == {host.url}
    assert len({job["prompt_id"] for job in report["jobs"]}) == 4 and not set(second.posts) & set(
        host.posts
    )
    assert [job["lines"] for job in report["jobs"]] == ["one", "two", "three", "four"]


def test_what_one_host_refuses_another_may_take(host, automated):
    with FakeHost() as picky:
        picky.refuse = 99
        code, report, _ = automated(host, picky, words=["--repeat", "3"])
        assert code == 0 and len(host.posts) == 3 and not picky.posts
    host.refuse = 99
    code, report, said = automated(host)
    assert code == 2 and "no such checkpoint" in report["jobs"][0]["error"] and "refused" in said


def test_lines_in_packs_each_with_every_seed(host, automated):
    words = [
        "--each",
        "2.prompts=a",
        "--each",
        "2.prompts=b",
        "--each",
        "Draw it.prompts=c",
        "--lines-per-job",
        "2",
        "--repeat",
        "2",
    ]
    code, report, _ = automated(host, words=words)
    assert code == 0
    assert [
        (graph["2"]["inputs"]["prompts"], graph["2"]["inputs"]["seed"]) for graph in host.graphs
    ] == [("a\nb", 7), ("a\nb", 8), ("c", 7), ("c", 8)]
    assert all(graph["3"]["inputs"]["seed"] == 0 for graph in host.graphs)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--set", "2.steps=many"], "whole number"),
        (["--set", "2.stepz=3"], "no input 'stepz'"),
        (["--each", "2.seed=one"], "whole number"),
        (["--seed", "-1"], "0 to 18446744073709551615"),
        (["--seed", "soon"], "whole number or random"),
        (["--image", "Photo=none.png"], "not a file"),
        (["--subject", "none.safetensors"], "not a file"),
        (["--each", "2.prompts=a", "--each", "2.steps=3"], "one input"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(host, automated, words, said):
    code, _, told = automated(host, words=words)
    assert code == 2 and said in told and "Traceback" not in told
    assert not host.posts and not host.uploads


def test_a_subject_is_sent_once_under_the_name_of_its_contents(host, automated, tmp_path):
    """The host lists what it was sent; the same contents are not sent again, other ones are; too large a file is a sentence."""
    host.lists_uploads = True
    subject = tmp_path / "dog.safetensors"
    subject.write_bytes(b"a dog" * 1000)
    assert automated(host, words=["--subject", str(subject)])[0] == 0
    [name] = host.uploads
    assert name.startswith("dog-") and host.uploads.pop(name) == subject.read_bytes()
    assert host.graphs[-1]["4"]["inputs"]["file"] == name
    assert automated(host, words=["--subject", f"Subject={subject}"])[0] == 0 and not host.uploads
    subject.write_bytes(b"another dog" * 1000)
    host.limit = 1000
    code, _, said = automated(host, words=["--subject", str(subject)])
    assert code == 2 and "--max-upload-size" in said and "models/kindred_references" in said


def test_a_subject_that_the_host_does_not_list_is_a_sentence(host, automated, tmp_path):
    (tmp_path / "dog.safetensors").write_bytes(b"a dog")
    code, _, said = automated(host, words=["--subject", str(tmp_path / "dog.safetensors")])
    assert code == 2 and "does not list it; it lists old.safetensors" in said and not host.posts


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process there")
@pytest.mark.parametrize("deaf", [0, 2])
def test_ctrl_c_takes_back_its_own_prompt_and_says_so(host, tmp_path, deaf):
    """As a process: SIGINT in mid-run. A host that drops the first interrupts is told again."""
    host.hold, host.deaf = True, deaf
    host.states["another's"] = "in_progress"
    (tmp_path / "w.json").write_text(json.dumps(GRAPH), "utf-8")
    program = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "tools" / "client" / "automate.py"),
            "w.json",
            "--server",
            host.url,
            "--repeat",
            "3",
            "--json",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with host.changed:
            while not host.posts and program.poll() is None:
                host.changed.wait(0.1)
        program.send_signal(signal.SIGINT)
        out, err = program.communicate()
    finally:
        program.kill()
    assert (
        program.returncode == 130
        and "interrupted; no other prompt was touched" in err
        and "Traceback" not in err
    ), err
    assert (
        set(host.cancelled) == set(host.posts)
        and len(host.posts) == 1
        and len(host.cancelled) == deaf + 1
    )
    assert host.states == {"another's": "in_progress", host.posts[0]: "cancelled"}
    assert [job["state"] for job in json.loads(out)["jobs"]] == ["cancelled", "not run", "not run"]


def test_nothing_is_ever_overwritten(tmp_path):
    """Numbers count on; a name that someone took meanwhile is passed over; a write that fails leaves nothing."""
    (tmp_path / "00007_mine_1.png").write_bytes(b"mine")
    shelf = Shelf(tmp_path)
    (tmp_path / "00008_A_title_1.png").write_bytes(b"theirs")
    assert shelf.keep(Job(1), "A title?", 1, ".png", b"new").endswith("00008_A_title_2.png")
    assert (tmp_path / "00008_A_title_1.png").read_bytes() == b"theirs"
    with pytest.raises(OSError, match="could not be written"):
        Shelf(tmp_path / "more").keep(Job(1), "x", 1, "/none/p.png", b"")


def test_a_name_that_another_process_took_at_the_last_moment_is_passed_over(tmp_path, monkeypatch):
    """Between looking and making: theirs stays, and ours gets the next number."""
    shelf, made, taken = Shelf(tmp_path), type(tmp_path).open, tmp_path / "00001_A_title_1.png"

    def late(path, *how, **more):
        if path == taken and not taken.exists():
            with open(taken, "wb") as theirs:
                theirs.write(b"theirs")
        return made(path, *how, **more)

    monkeypatch.setattr(type(tmp_path), "open", late)
    assert shelf.keep(Job(1), "A title", 1, ".png", b"ours").endswith("00001_A_title_2.png")
    assert (
        taken.read_bytes() == b"theirs"
        and (tmp_path / "00001_A_title_2.png").read_bytes() == b"ours"
    )


def test_a_board_gives_every_job_to_exactly_one_host():
    """Many threads, some of which give back half of what they take: each job ends once."""
    board, ended = Board([Job(i) for i in range(300)], "abcd"), []

    def work(host: str) -> None:
        given_back = 0
        while (job := board.take(host)) is not None:
            if host == "d" and given_back < 20:
                given_back += 1
                job.refusals["d"] = "no"
                board.give_back(job)
            else:
                ended.append(job.number)
                board.done()

    threads = [threading.Thread(target=work, args=(host,)) for host in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == list(range(300)) and not board.taken


def test_the_program_needs_nothing_but_python(tmp_path):
    """Without site-packages: --help, and a refusal that is a sentence."""

    def run(*words):
        return subprocess.run(
            [
                sys.executable,
                "-E",
                "-s",
                "-S",
                str(ROOT / "tools" / "client" / "automate.py"),
                *words,
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    assert "Exit code" in run("--help").stdout
    told = run("nowhere.json")
    assert (
        told.returncode == 2
        and "nowhere.json could not be read" in told.stderr
        and "Traceback" not in told.stderr
    )


def test_the_client_needs_two_files_beside_it_and_no_package():
    """Whoever copies it into a program of their own copies these three."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import client;"
        "print(*sorted(n for n, m in sys.modules.items() if (getattr(m, '__file__', 0) or '').startswith(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-E", "-s", "-S", "-c", script, str(ROOT / "tools" / "client")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["client", "redirects", "web_socket"]
