"""How a concept encoder's file is refused: in a sentence, at once, without taking memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effort import at_most
from kindred.models.concept.file import load_concept_encoder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REMEDY = ("Copy", "Use", "Update", "Choose")
HUGE = 10**9


class OnPaper(TorchDispatchMode):
    """Nothing larger than a MiB may be made outside of the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if (
                isinstance(made, torch.Tensor)
                and made.device.type != "meta"
                and made.untyped_storage().nbytes() > 1 << 20
            ):
                raise AssertionError(f"{func} made {list(made.shape)}")
        return out


def refused(path: Path, *words: str) -> str:
    """The sentence: it names the file, what is wrong and what to do, and comes at once without taking memory."""
    with OnPaper(), at_most(500_000), pytest.raises(ValueError) as caught:
        load_concept_encoder(path)
    said = str(caught.value)
    assert path.name in said and any(r in said for r in REMEDY) and all(w in said for w in words), (
        said
    )
    assert len(said) < 600 and "\n" not in said
    return said
