"""What rounds without a clock tell: operations counted exactly, waits for a CUDA device, a process' peak memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkout import ROOT

WAITS = "synchroniz"  # in what torch says of an operation that waits


def first_wait(job: Callable[[], Any], unet: Any, cuda: Any) -> str | None:
    """Where the job first waits for the device inside of a UNet call, as file:line; None: nowhere.

    unet: the module; cuda: torch.cuda. Other errors go through.
    """

    def strict(*_: Any) -> None:
        cuda.set_sync_debug_mode("error")

    def lenient(*_: Any) -> None:
        cuda.set_sync_debug_mode("default")

    hooks = [
        unet.register_forward_pre_hook(strict),
        unet.register_forward_hook(lenient, always_call=True),
    ]
    try:
        job()
    except RuntimeError as error:
        if WAITS not in str(error):
            raise
        return place(error)
    finally:
        lenient()
        for hook in hooks:
            hook.remove()
    return None


def place(error: BaseException, root: Path = ROOT) -> str:
    """file:line of the pack nearest to where an error was raised, else of whoever raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f
        for f in frames
        if root in Path(f.filename).parents and (root / "tools") not in Path(f.filename).parents
    ]
    frame = (ours or frames)[-1]
    file = Path(frame.filename)
    return f"{file.relative_to(root).as_posix() if ours else file.name}:{frame.lineno}"


def counted(job: Callable[[], Any]) -> dict[str, int]:
    """One run of a job, counted: flops, ops (without views), waits for the device, bytes of the largest allocation."""
    from counting import Counting

    with Counting() as counts:
        job()
    return {
        "flops": counts.flops,
        "ops": counts.ops.total(),
        "waits": counts.syncs.total(),
        "largest": counts.largest,
    }
