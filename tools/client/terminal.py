"""How every program of the repository runs, so that nothing its surroundings hand down ends its work or falsifies it.

`run_program(main)`: any text on any terminal, output that nobody reads any more, ignored or blocked signals, closed streams.
Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

UNREAD = [errno.EPIPE, errno.EIO] + [errno.EINVAL] * (
    os.name == "nt"
)  # no reader, no terminal; no reader there
LOST = 120  # what Python itself exits with where the last output could not be written
SIGNALS = ("SIGINT", "SIGTERM", "SIGCHLD")  # not SIGHUP: nohup means it


class Outlet(io.RawIOBase):
    """A stream's raw end at which no write fails: what cannot be written is dropped, and so is all that comes later.

    The descriptor then leads nowhere, for children too. `fault`: the system's reason, None where only the reader left.
    """

    def __init__(self, under: io.RawIOBase) -> None:
        self.under = under
        self.fault: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.under.fileno()

    def isatty(self) -> bool:
        return self.under.isatty()

    def write(self, data: bytes | memoryview) -> int:
        """All of it, always: -> its bytes."""
        rest = memoryview(data).cast("B")
        try:
            while rest:
                count = self.under.write(rest)
                if count is None:  # somebody made the pipe non-blocking, and it is full
                    select.select([], [self.under], [])
                rest = rest[count or 0 :]
        except OSError as error:
            self.fault = None if error.errno in UNREAD else error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.under.fileno())
            os.close(nowhere)
        return memoryview(data).nbytes


def restore_signals() -> None:
    """Signals that a parent ignored or blocked work again: nohup, `&` in a script, some CI runners.

    With SIGCHLD ignored the system forgets how children ended (waitpid, POSIX), and subprocess tells 0 for every one.
    """
    numbers = {getattr(signal, name) for name in SIGNALS if hasattr(signal, name)}
    with contextlib.suppress(ValueError):  # not the main thread
        for number in numbers:
            if signal.getsignal(number) is signal.SIG_IGN:
                stops = number == signal.SIGINT  # as Python has it
                signal.signal(number, signal.default_int_handler if stops else signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def open_streams() -> None:
    """Standard streams that were closed lead nowhere; else the next file opened would be one of them to every child."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number


def lasting(stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """The stream with an Outlet for its end; it takes any text. One that is no file of the system's is handed back."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with PYTHONUNBUFFERED there is no buffer between
    if not isinstance(raw, io.RawIOBase) or isinstance(raw, Outlet):
        return stream
    end = Outlet(raw)
    wrapped = io.TextIOWrapper(
        end if raw is buffer else io.BufferedWriter(end),
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    atexit.register(wrapped.flush)  # Python's own is for whatever is sys.stdout then
    return wrapped


def settle() -> None:
    """For the process that calls it: signals as they should be, output that never ends its work."""
    open_streams()
    restore_signals()
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)


def run_program(main: Callable[[], object]) -> NoReturn:
    """Settle, run `main` and exit with its code; with 120 and a sentence where it was 0 but output got lost, as on a full disk."""
    settle()
    code = main()
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    if fault := getattr(getattr(buffer, "raw", buffer), "fault", None):
        print(f"Not everything could be written to stdout: {fault}", file=sys.stderr)
        code = code or LOST
    sys.exit(code)
