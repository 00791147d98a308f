"""Laws of the numbers that compare pictures."""

from __future__ import annotations

from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kindred.models.metrics import cosine_similarity, mean_of_pairs, mean_with_others, psnr


def test_psnr() -> None:
    a = torch.zeros(1, 4, 4, 3)
    assert psnr(a, a + 0.1, 1.0) == pytest.approx(20.0, abs=1e-5) and psnr(a, a + 0.1, 10.0) == pytest.approx(40.0, abs=1e-5)
    assert psnr(a, a, 1.0) == inf and psnr(a, a + 0.2, 1.0) == psnr(a + 0.2, a, 1.0)


def test_psnr_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 2\] and \[2, 3\]"):
        psnr(torch.zeros(2, 2), torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match="above 0; got 0"):
        psnr(torch.zeros(2), torch.zeros(2), 0)


# how alike pictures are ------------------------------------------------------------------------------------------------------


def test_cosines_worked_by_hand() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, -4.0]])
    assert cosine_similarity(a, b).tolist() == [pytest.approx([0.6, 0.8, -1.0]), pytest.approx([1.0, 0.0, -0.6])]


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 8))
def test_cosines_are_symmetric_and_know_no_length(seed: int, b: int, width: int) -> None:
    rows = torch.randn(b, width, generator=torch.Generator().manual_seed(seed)) + 1e-3
    own = cosine_similarity(rows, rows)
    assert own.dtype == torch.float64 and own.abs().max() <= 1
    assert torch.allclose(own.diagonal(), torch.ones(b, dtype=torch.float64), atol=1e-12) and torch.equal(own, own.T)
    assert torch.allclose(cosine_similarity(7.5 * rows, rows / 3), own, atol=1e-6)


@pytest.mark.parametrize("a, b, said", [
    (torch.ones(2, 3), torch.ones(2, 4), r"\[2, 3\] and \[2, 4\]"), (torch.ones(3), torch.ones(1, 3), r"\[3\] and \[1, 3\]"),
    (torch.tensor([[1.0], [0.0]]), torch.ones(1, 1), "row 1 of 2"), (torch.ones(1, 1), torch.tensor([[float("nan")]]), "row 0 of 1"),
    (torch.tensor([[float("inf")]]), torch.ones(1, 1), "row 0 of 1")])
def test_a_row_without_a_direction_is_named(a, b, said) -> None:
    with pytest.raises(ValueError, match=f"Cosine similarity: .*{said}"):
        cosine_similarity(a, b)


def test_consistency_worked_by_hand() -> None:
    table = torch.tensor([[9.0, 0.5, 0.2], [0.5, 9.0, 0.8], [0.2, 0.8, 9.0]])  # what a picture is to itself does not count
    assert mean_with_others(table).tolist() == pytest.approx([0.35, 0.65, 0.5])
    assert mean_of_pairs(table) == pytest.approx((0.5 + 0.2 + 0.8) / 3)


@given(st.integers(0, 10_000), st.integers(2, 6), st.randoms(use_true_random=False))
def test_consistency_does_not_know_the_order(seed: int, b: int, chance) -> None:
    rows = torch.randn(b, 5, generator=torch.Generator().manual_seed(seed))
    order = list(range(b))
    chance.shuffle(order)
    here, there = (cosine_similarity(x, x) for x in (rows, rows[order]))
    assert mean_of_pairs(there) == pytest.approx(mean_of_pairs(here), abs=1e-12)
    assert torch.allclose(mean_with_others(there), mean_with_others(here)[order], atol=1e-12)


def test_identical_pictures_are_fully_consistent() -> None:
    rows = torch.tensor([[0.3, -2.0, 5.0]]).expand(4, 3)
    assert mean_of_pairs(cosine_similarity(rows, rows)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape, said", [((1, 1), "at least 2; it got 1"), ((0, 0), "at least 2; it got 0"), ((2, 3), r"got \[2, 3\]")])
def test_one_picture_has_nothing_to_be_compared_with(shape, said) -> None:
    for measure in (mean_of_pairs, mean_with_others):
        with pytest.raises(ValueError, match=f"Consistency.*{said}"):
            measure(torch.ones(shape))
