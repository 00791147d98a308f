"""What reading a reference will cost a sampler run, and where its photo differs: known before the
first step.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..network.blocks import Grid
from .bank import ReferenceBank


def live_reading(bank: ReferenceBank, sigmas: Sequence[float]) -> str:
    """How many of the steps at these noise levels run the network over the photo anew; "" where
    each is held.
    """
    missing = [sigma for sigma in sigmas if bank.step_of(sigma) is None]
    if not missing:
        return ""
    if bank.live:
        return (
            f"the reference is read live, as always with transformers: one extra model pass in "
            f"each of {len(missing)} steps."
        )
    return (
        f"the reference is read live in {len(missing)} of {len(sigmas)} steps (one extra model "
        f"pass in each), because it holds no sigma {missing[0]:.4g} (it was made with "
        f"{bank.trajectory.schedule}). Make it with the steps and the scheduler of this sampler to "
        f"avoid that."
    )


def other_size(bank: ReferenceBank, latent: Grid, cell: int) -> str:
    """That the pictures have another size than what was read, in pixels of `cell` to a latent's
    cell; "" where they have the same.
    """
    read = tuple(bank.trajectory.latents.shape[-2:])
    if read == tuple(latent):
        return ""
    was, now = (f"{x * cell}x{y * cell}" for y, x in (read, latent))
    return (
        f"the reference was read at {was} pixels and the pictures are {now}, so the subject may "
        f"come out smaller or larger, or twice. Make it at the size of the pictures where that "
        f"matters."
    )
