"""Several processes that each measure with one thread: on small networks two of them do more than two threads of one."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from terminal import settle

Job = TypeVar("Job")
PATIENCE = 20  # seconds that a process has to clear up


class Ended(BaseException):
    """This worker is told to end; no SystemExit, with which jobs refuse."""


class WorkerError(RuntimeError):
    """A job failed or its process ended; the message holds the worker's own traceback."""


def pooled(
    jobs: Iterable[Job], make: Callable[[], Callable[[Job], Any]], processes: int
) -> Iterator[tuple[Job, Any]]:
    """Every job with what `make()(job)` gives, as they get done. With one process everything runs in this one.

    Jobs are begun in their order. `make` is called once per process and, like jobs and results, must be picklable where there are
    several. Leaving the loop early ends the processes at once. Raises WorkerError.
    """
    queue = iter(jobs)
    if processes <= 1:
        work = make()
        for job in queue:
            yield job, work(job)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share the host's threads
    busy: dict[Connection, Job] = {}
    workers: dict[Connection, Any] = {}
    try:
        for job in queue:
            if len(workers) < processes:
                ours, theirs = context.Pipe()
                worker = context.Process(target=serve, args=(theirs, make), daemon=True)
                with one_thread():
                    worker.start()
                theirs.close()
                workers[ours] = worker
            else:
                ours, done = finished(busy, workers)
                yield done
            busy[ours] = job
            try:
                ours.send(job)
            except OSError:  # it died between two jobs: finished() says so
                pass
        while busy:
            _, done = finished(busy, workers)
            yield done
    finally:
        for connection, worker in workers.items():
            connection.close()  # an idle one ends by itself and clears up behind it
            if connection in busy:
                worker.terminate()
        for worker in workers.values():
            worker.join(PATIENCE)
            worker.kill()


@contextmanager
def one_thread() -> Iterator[None]:
    """Children started in this block compute with one thread: torch and MKL read it when they are imported."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def finished(
    busy: dict[Connection, Job], workers: dict[Connection, Any]
) -> tuple[Connection, tuple[Job, Any]]:
    """Wait for the next job to be done -> its worker's connection, and the job with its result."""
    ready = wait(list(busy))[0]
    job = busy.pop(ready)
    try:
        worked, result = ready.recv()
    except (EOFError, OSError):
        workers[ready].join()
        code = workers[ready].exitcode
        why = (
            " It was killed: memory may have run out, so give fewer --processes."
            if code is not None and code < 0
            else ""
        )
        raise WorkerError(
            f"A process that measures ended with code {code} at {job}.{why}"
        ) from None
    if not worked:
        raise WorkerError(f"{job}:\n{result}")
    return ready, (job, result)


def serve(connection: Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """A worker's life: jobs in, results out, until it is ended or the connection closes."""

    def end(*_: object) -> None:
        raise Ended

    settle()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends us
    try:
        signal.signal(signal.SIGTERM, end)
        answer(connection, make)
    except Ended:
        sys.exit(143)  # in order, so that the host's folder is removed


def answer(connection: Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """Jobs in, results out, until the connection closes."""
    work = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            work = work or make()
            connection.send((True, work(job)))
        except SystemExit as refusal:
            connection.send((False, str(refusal)))
        except Exception:  # told to the parent, which raises it
            connection.send((False, traceback.format_exc()))


@contextmanager
def stoppable() -> Iterator[None]:
    """KeyboardInterrupt for Ctrl-C and for a request to end, once: dev.py follows a Ctrl-C with a SIGTERM of its own."""
    last = -math.inf

    def stop(*_: object) -> None:
        nonlocal last
        since, last = time.monotonic() - last, time.monotonic()
        if since > 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if math.isinf(last):  # while a stopped run reports, the handler stays
            for number, handler in before.items():
                signal.signal(number, handler)
