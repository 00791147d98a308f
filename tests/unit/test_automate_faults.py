"""tools/client/automate.py against hosts that fail: faults on the line, restarts, refusals, redirects, several hosts."""

from __future__ import annotations

import re
import threading
from types import SimpleNamespace

import automate
import jobs
import pytest
from client import Client, HostError, Unreachable
from fake_host import FakeHost

FAULTS = ["lose_post", "lose_answer", "bad_gateway", "forget", "cut"]
pytestmark = pytest.mark.usefixtures("hurried")


@pytest.fixture
def host():
    with FakeHost() as running:
        yield running


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
