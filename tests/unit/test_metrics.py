"""Laws of the numbers that compare pictures."""

from __future__ import annotations

from math import inf

import pytest
import torch

from kindred.models.metrics import psnr


def test_psnr() -> None:
    a = torch.zeros(1, 4, 4, 3)
    assert psnr(a, a + 0.1, 1.0) == pytest.approx(20.0, abs=1e-5) and psnr(a, a + 0.1, 10.0) == pytest.approx(40.0, abs=1e-5)
    assert psnr(a, a, 1.0) == inf and psnr(a, a + 0.2, 1.0) == psnr(a + 0.2, a, 1.0)


def test_psnr_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 2\] and \[2, 3\]"):
        psnr(torch.zeros(2, 2), torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match="above 0; got 0"):
        psnr(torch.zeros(2), torch.zeros(2), 0)
