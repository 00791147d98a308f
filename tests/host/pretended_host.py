"""ComfyUI on a pretended CUDA device, and back on the CPU afterwards: what its runs wait for and copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import comfy.samplers
import pytest
from kindred.models.reference.photo import RefUNetPass
from kindred.nodes.host import identity
from kindred.nodes.host.ref_unet import _ReferenceSampler
from pretended_device import CUDA, ROOM, Pretended, pretended


def _runs_there(patch: pytest.MonkeyPatch, free: int) -> None:
    """The host takes it for its device."""

    def room(device: Any = None, torch_free_too: bool = False, **_: Any) -> Any:
        return (free, free) if torch_free_too else free

    patch.setattr(management, "cpu_state", management.CPUState.GPU)
    patch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    patch.setattr(management, "get_torch_device", lambda: CUDA)
    patch.setattr(management, "get_free_memory", room)
    patch.setattr(management, "get_total_memory", lambda *_, **__: 80 << 30)
    patch.setattr(management, "soft_empty_cache", lambda *_, **__: None)
    patch.setattr(management, "current_loaded_models", [])
    # it takes an OnDevice for another pack's tensor
    patch.setattr(identity, "_first", lambda weight: weight.detach().flatten()[:4])


def _tells_steps(patch: pytest.MonkeyPatch) -> None:
    """Each question of a sampler begins a step, and its answer, or the end of a reference's pass, ends the last."""

    def around(owner: Any, name: str, before: bool, after: bool) -> None:
        original = getattr(owner, name)

        def within(*args: Any, **kwargs: Any) -> Any:
            if before:
                Pretended.now.steps.begin()
            try:
                return original(*args, **kwargs)
            finally:
                if after:
                    Pretended.now.steps.end()

        patch.setattr(owner, name, within)

    around(comfy.samplers.CFGGuider, "outer_predict_noise", True, False)
    around(comfy.samplers.KSAMPLER, "sample", False, True)
    around(_ReferenceSampler, "sample", False, True)
    finish = RefUNetPass.finish

    def finished(*args: Any, **kwargs: Any) -> Any:
        Pretended.now.steps.end()
        return finish(*args, **kwargs)

    patch.setattr(RefUNetPass, "finish", finished)


@contextmanager
def host_there(free: int = ROOM) -> Iterator[Pretended]:
    """Inside, the host computes on a device that is not there; afterwards all is as it was. free: bytes that the host may take."""
    with pretended(free) as device, pytest.MonkeyPatch.context() as patch:
        _runs_there(patch, free)
        _tells_steps(patch)
        yield device
