"""Jobs shared out over ComfyUI hosts: who takes which, and how one is brought to its end through cut lines, restarts and Ctrl-C.

One Runner per host, each in a thread of its own, takes jobs from one Board. A host has one of our jobs at a time, so that what waits can
still go to another host, and so that stopping touches one prompt only.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from changes import Graph, Refusal
from client import Client, HostError, Interrupted, PromptRefused, Unreachable, outcome
from web_socket import WebSocket

Answer = TypeVar("Answer")
POLL = 5.0  # seconds after which the host is asked, however much it tells
SILENCE = 0.5  # seconds that one look at the websocket takes
FIRST, LONGEST = 0.5, 15.0  # seconds between two tries, doubling
FINAL = ("execution_success", "execution_error", "execution_interrupted")


class Stopped(Exception):
    """The user wants no more."""


@dataclass(eq=False)
class Job:
    """One prompt to be run somewhere, and how it fared. state: not run, done, failed, refused or cancelled."""

    number: int  # from 1
    lines: str | None = None  # what --each puts in
    turn: int = 0  # which repetition
    seed: int | None = None
    server: str = ""
    prompt_id: str = ""
    state: str = "not run"
    error: str = ""
    seconds: float = 0.0
    posts: int = 0  # how often it was handed to a host; more than once only where a host forgot it
    files: list[str] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)  # host -> its sentence


class Board:
    """The jobs that nobody has taken yet; safe to be used by several threads."""

    def __init__(self, jobs: Iterable[Job], hosts: Iterable[str]) -> None:
        self.waiting, self.hosts, self.taken = collections.deque(jobs), set(hosts), 0
        self.changed = threading.Condition()
        self.closed = False

    def take(self, host: str) -> Job | None:
        """The next job that this host has not refused; waits while another host may still give one back. None: there is nothing left."""
        with self.changed:
            while not self.closed:
                for job in self.waiting:
                    if host not in job.refusals:
                        self.waiting.remove(job)
                        self.taken += 1
                        return job
                if not self.taken:
                    break
                self.changed.wait()
            return None

    def done(self) -> None:
        with self.changed:
            self.taken -= 1
            self.changed.notify_all()

    def give_back(self, job: Job) -> None:
        """The host that had it cannot do it: the next one to ask gets it."""
        with self.changed:
            self.waiting.appendleft(job)
            self.taken -= 1
            self.changed.notify_all()

    def close(self) -> None:
        """Nothing more is handed out."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class Voice(Protocol):
    """Whoever tells the user: sentences, and how far a job is."""

    def say(self, host: str, sentence: str) -> None: ...

    def on_message(self, host: str, job: Job, kind: str, data: Mapping[str, Any]) -> None: ...

    def ended(self, host: str, job: Job) -> None: ...


class Runner:
    """One host's share of the jobs.

    prepare: brings files to the host and returns what makes a job's graph; called again when the host forgot things.
    keep: fetches a finished job's outputs, then saves them. patience: seconds of silence after which the host is given up.
    posts: how often one job may be handed to this host, when it forgets the job each time.
    """

    def __init__(
        self,
        client: Client,
        board: Board,
        voice: Voice,
        prepare: Callable[[Client], Callable[[Job], Graph]],
        keep: Callable[[Client, Job, Graph, Mapping[str, Any]], None],
        stop: threading.Event,
        patience: float = 120,
        posts: int = 3,
    ) -> None:
        self.client, self.board, self.voice, self.prepare, self.keep, self.stop = (
            client,
            board,
            voice,
            prepare,
            keep,
            stop,
        )
        self.patience, self.posts, self.host = patience, posts, client.url
        self.line: WebSocket | None = None
        self.lost = False  # whether the host was away since it last knew our prompt
        self.state, self.reason = "ready", ""  # or gone, refused
        self.crash: BaseException | None = None
        self.over = (
            threading.Event()
        )  # not Thread.join: a Ctrl-C in there can take a running thread for a finished one

    def __call__(self) -> None:
        try:
            self.build = self.patiently(lambda: self.prepare(self.client))
            while (job := self.board.take(self.host)) is not None:
                self._one(job)
        except Stopped:
            pass
        except (Refusal, PromptRefused) as error:
            self.state, self.reason = "refused", str(error)
            self.voice.say(self.host, str(error))
        except HostError as error:
            self.state, self.reason = "gone", str(error)
            self.voice.say(self.host, f"given up: {error}")
        except BaseException as error:  # a bug here must not look like a host that went away
            self.crash = error
            self.board.close()
        finally:
            self._hang_up()
            self.over.set()

    def _one(self, job: Job) -> None:
        """Run one job; what is wrong with the job stays here, what is wrong with the host is raised."""
        began, job.server = time.monotonic(), self.host
        try:
            graph, history = self._finish(job)
            outputs = outcome(history)
            self.patiently(lambda: self.keep(self.client, job, graph, outputs))
            job.state, job.error = "done", ""
        except (Unreachable, Refusal) as error:  # another host may have it
            job.error = str(error)
            self.board.give_back(job)
            raise
        except PromptRefused as error:
            job.error = job.refusals[self.host] = str(error)
            self.voice.say(self.host, f"job {job.number} was refused: {error}")
            self.board.give_back(job)
            return
        except Stopped:
            job.state = "cancelled"
            self._cancel(job)
            self.board.done()
            raise
        except (HostError, OSError) as error:
            job.state = "failed"
            job.error = (
                "Someone else interrupted it." if isinstance(error, Interrupted) else str(error)
            )
            self.voice.say(self.host, f"job {job.number} failed: {job.error}")
        except BaseException:
            self.board.done()
            raise
        job.seconds = round(time.monotonic() - began, 2)
        self.voice.ended(self.host, job)
        self.board.done()

    def patiently(self, ask: Callable[[], Answer]) -> Answer:
        """The answer, asked for again and again while the host is away: after 0.5 s, 1 s, 2 s ... 15 s, for `patience` seconds in all."""
        pause, end = FIRST, None
        while True:
            if self.stop.is_set():
                raise Stopped
            try:
                answer = ask()
                if end is not None:
                    self.voice.say(self.host, "is back")
                return answer
            except Unreachable as error:
                self.lost, now = True, time.monotonic()
                if end is None:
                    end = now + self.patience
                    self.voice.say(self.host, f"{error}; trying again for {self.patience:.0f} s")
                if now >= end:
                    raise
                self.stop.wait(min(pause, end - now))
                pause = min(2 * pause, LONGEST)

    def _finish(self, job: Job) -> tuple[Graph, Mapping[str, Any]]:
        """Hand the job over and follow it to its end: the graph that ran and what the host keeps of it."""
        job.prompt_id = str(uuid.uuid4())
        for _ in range(self.posts):
            graph = self.build(job)
            self._listen()
            self._submit(job, graph)
            history = self._follow(job)
            if history is not None:
                return graph, history
            self.voice.say(
                self.host, f"forgot job {job.number}, as a restart does; handing it over again"
            )
            self.build = self.patiently(lambda: self.prepare(self.client))
        raise HostError(
            f"{self.host} went away {self.posts} times while it ran; its log may say why."
        )

    def _submit(self, job: Job, graph: Graph) -> None:
        """Post exactly once: where an answer got lost, the host is asked whether it has the prompt before it is posted again."""

        def post() -> None:
            nonlocal unclear
            if unclear and self.client.state(job.prompt_id) != "unknown":
                return
            unclear = True
            self.client.queue(graph, job.prompt_id)

        unclear = False
        self.patiently(post)
        job.posts += 1
        self.lost = False

    def _follow(self, job: Job) -> Mapping[str, Any] | None:
        """What the host keeps of the finished prompt; None if the host forgot it, because it was away."""
        due = time.monotonic() + POLL
        for message in self._messages():
            if self.stop.is_set():
                raise Stopped
            final = False
            if message is not None:
                kind, data = message.get("type", ""), message.get("data") or {}
                if data.get("prompt_id") == job.prompt_id:
                    self.voice.on_message(self.host, job, kind, data)
                    final = kind in FINAL
            if not final and self.line is not None and time.monotonic() < due:
                continue
            state = self.patiently(lambda: self.client.state(job.prompt_id))
            due = time.monotonic() + (
                0.05 if final else POLL
            )  # the history is written just after the final message
            if state in ("completed", "failed", "cancelled"):
                history = self.patiently(lambda: self.client.history(job.prompt_id))
                if history is not None:
                    return history
                state = "unknown"
            if state == "unknown":
                if self.lost or self._was_cut():
                    return None
                raise HostError("Someone else took it out of the queue or cleared the history.")
            self.lost = False

    def _messages(self) -> Iterator[Mapping[str, Any] | None]:
        """The websocket's messages; None in silence, and once a second while there is no line."""
        while True:
            if self.line is None and not self._listen():
                self.stop.wait(2 * SILENCE)
                yield None
                continue
            yield self._receive()

    def _receive(self) -> Mapping[str, Any] | None:
        try:
            return self.line.receive(SILENCE)
        except (OSError, ValueError):
            self.lost = True
            self._hang_up()
            return None

    def _was_cut(self) -> bool:
        """Whether the line turns out to be dead: a host that was back at once answers before we have heard of its end."""
        while self.line is not None and self._receive() is not None:
            pass
        return self.lost

    def _listen(self) -> bool:
        """Whether there is a line, opened before the prompt is posted: else its first messages are lost."""
        if self.line is None:
            with contextlib.suppress(OSError):
                self.line = self.client.websocket()
        return self.line is not None

    def _hang_up(self) -> None:
        if self.line is not None:
            self.line.close()
            self.line = None

    def _cancel(self, job: Job) -> None:
        """Take back our own prompt and nothing else, and say how that went."""
        try:
            before = self.client.state(job.prompt_id)
            after = self.client.cancel(
                job.prompt_id
            )  # even where it is unknown: a post may still be on its way
        except HostError as error:
            self.voice.say(
                self.host, f"job {job.number} ({job.prompt_id}) could not be cancelled: {error}"
            )
            return
        how = {
            "pending": "taken out of the queue",
            "in_progress": "interrupted",
            "unknown": "not queued yet",
        }.get(before, "already over")
        if after in ("pending", "in_progress"):
            how = "told to stop, but it is still running: a step takes long"
        self.voice.say(self.host, f"job {job.number} was {how}; no other prompt was touched")
