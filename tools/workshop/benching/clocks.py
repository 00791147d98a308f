"""How long a job takes and how much memory it needs at once: the process' own time on a CPU, the device's events on CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Reading:
    seconds: float
    peak: int | None = None  # bytes held at once, where the clock can tell


class Clock(Protocol):
    """Times one job after another."""

    name: str

    def measure(self, job: Callable[[], Result]) -> tuple[Result, Reading]: ...


class CpuClock:
    """This process' time on the CPU: others that run beside it are not in it, though they do cost it caches and clock rate."""

    name = "process time"

    def measure(self, job: Callable[[], Result]) -> tuple[Result, Reading]:
        start = time.process_time()
        result = job()
        return result, Reading(time.process_time() - start)


class CudaClock:
    """Events on the current stream around the whole job, so that waits of the device for the host count; and the allocator's peak."""

    name = "CUDA events"

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda  # torch.cuda

    def measure(self, job: Callable[[], Result]) -> tuple[Result, Reading]:
        cuda = self.cuda
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        start.record()
        result = job()
        end.record()
        cuda.synchronize()
        return result, Reading(start.elapsed_time(end) / 1000, cuda.max_memory_allocated())


def clock_of(device: str, torch: Any) -> Clock:
    """The clock of --device; RuntimeError where torch sees no CUDA."""
    if device == "cpu":
        return CpuClock()
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"--device cuda, but torch {torch.__version__} sees no CUDA device (it was built for CUDA "
            f"{torch.version.cuda or 'none'}). Give a Python whose torch has CUDA with --host and --python, on a machine "
            "with an NVIDIA GPU, or leave out --device."
        )
    return CudaClock(torch.cuda)


# memory of a process -----------------------------------------------------------------------------------------------------------


def forget_peak(clear: Path = Path("/proc/self/clear_refs")) -> bool:
    """Start the process' peak anew where it is now; False where the system cannot (it is Linux that can).

    What the C library keeps of freed memory goes back to the system first.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        clear.write_text("5")
    except OSError:
        return False
    return True


def peak_of_process(status: Path = Path("/proc/self/status")) -> int:
    """Bytes of main memory this process held at once. RuntimeError where the system does not tell."""
    if status.is_file():
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text("utf-8").splitlines()
            if line.startswith("VmHWM")
        )
    try:
        import resource
    except ImportError as error:
        raise RuntimeError(
            "--memory: this system does not tell a process' peak. Measure on Linux or macOS, or leave it out."
        ) from error
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
