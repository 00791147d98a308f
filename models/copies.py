"""Copies between host memory and a device that the host need not wait for: what goes up, several
values that come down in one, and rows behind the step that computes.

Axes: s values of a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

# bytes of a row that may be gathered on the device and pinned in host memory: SDXL's whole hidden
# states of a step take 105 MB, a transformer's keys and values gigabytes
MOST_PINNED = 1 << 29
AHEAD = 1  # rows that may be on their way while the next step computes


def sent(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of host memory on a device; the host goes on while CUDA copies it, elsewhere that is
    not safe.
    """
    there = torch.device(device)
    return tensor.to(there, dtype or tensor.dtype, non_blocking=there.type == "cuda")


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device, each as [n] float32 in host memory: one copy, one wait."""
    flat = torch.cat([t.detach().flatten().float() for t in tensors]).cpu()
    return list(flat.split([t.numel() for t in tensors]))


class RowWriter:
    """Rows that come from a device to host memory; on CUDA through pinned memory, behind the step
    that computes, so that the host waits for none of them.

    Other devices are waited for, and so is CUDA where no memory can be pinned or a row is too long
    for it.
    """

    def __init__(self, pins: bool = True) -> None:
        """pins: rows may go through pinned memory."""
        self.pins = pins
        self._behind: deque[tuple[Tensor, torch.cuda.Event, Tensor]] = deque()

    def __call__(self, parts: Sequence[Tensor], into: Tensor) -> None:
        """parts, of one device, one after another into a row [s] of host memory, in its dtype; it
        may be read once `finish` was called.
        """
        if not len(into):
            return
        staged = self._staged(parts, into)
        if staged is None:
            for part, place in zip(parts, into.split([p.numel() for p in parts])):
                place.view(part.shape).copy_(part)
            return
        here = torch.cuda.current_stream(parts[0].device)
        self._behind.append((staged, here.record_event(), into))
        self._settle(AHEAD)

    def finish(self) -> None:
        """Wait for the rows that are still on their way."""
        self._settle(0)

    def _staged(self, parts: Sequence[Tensor], into: Tensor) -> Tensor | None:
        """The row on its way to pinned memory; None where it has to be waited for."""
        if parts[0].device.type != "cuda" or not self.pins or into.nbytes > MOST_PINNED:
            return None
        row = torch.cat([part.flatten() for part in parts]).to(into.dtype)
        try:
            return row.to("cpu", non_blocking=True)  # torch pins what it copies so
        except RuntimeError:  # systems bound how much there may be
            self.pins = False
            return None

    def _settle(self, left: int) -> None:
        while len(self._behind) > left:
            staged, copied, into = self._behind.popleft()
            copied.synchronize()
            into.copy_(staged)
