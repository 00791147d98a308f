"""Host laws of the loss curve that Concept Encoder Train shows."""

from __future__ import annotations

import numpy as np
import pytest
from kindred.nodes import training
from kindred.nodes.training import draw_curve


def test_the_curve_is_readable_for_any_number_of_steps():
    for losses in ([], [0.3], [0.3, 0.1], [0.2] * 50, (1 / np.arange(1, 20_000)).tolist()):
        picture = draw_curve(losses, max(len(losses), 10))
        inked = (np.asarray(picture) < 128).any(-1)
        assert picture.size == (768, 432) and inked.any() and inked.mean() < 0.2
    assert training.ticks(0, 1000, False) == [0, 200, 400, 600, 800, 1000]
    assert training.ticks(0.03, 4, True) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
