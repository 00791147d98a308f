"""Laws of the numbers that compare pictures."""

from __future__ import annotations

from math import inf, isnan, nan, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kindred.models.metrics import (
    Mean,
    cosine_similarity,
    face_distance,
    face_identity,
    mean_of_pairs,
    mean_with_others,
    paired_cosines,
    psnr,
    share_of_the_way,
)


def test_psnr() -> None:
    a = torch.zeros(1, 4, 4, 3)
    assert psnr(a, a + 0.1, 1.0) == pytest.approx(20.0, abs=1e-5) and psnr(
        a, a + 0.1, 10.0
    ) == pytest.approx(40.0, abs=1e-5)
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
    assert cosine_similarity(a, b).tolist() == [
        pytest.approx([0.6, 0.8, -1.0]),
        pytest.approx([1.0, 0.0, -0.6]),
    ]


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 8))
def test_cosines_are_symmetric_and_know_no_length(seed: int, b: int, width: int) -> None:
    rows = torch.randn(b, width, generator=torch.Generator().manual_seed(seed)) + 1e-3
    own = cosine_similarity(rows, rows)
    assert own.dtype == torch.float64 and own.abs().max() <= 1
    assert torch.allclose(own.diagonal(), torch.ones(b, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(
        own, own.T, rtol=0, atol=1e-15
    )  # some processors sum a product's two halves in another order
    assert torch.allclose(cosine_similarity(7.5 * rows, rows / 3), own, atol=1e-6)


@pytest.mark.parametrize(
    "a, b, said",
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"\[2, 3\] and \[2, 4\]"),
        (torch.ones(3), torch.ones(1, 3), r"\[3\] and \[1, 3\]"),
        (torch.tensor([[1.0], [0.0]]), torch.ones(1, 1), "row 1 of 2"),
        (torch.ones(1, 1), torch.tensor([[float("nan")]]), "row 0 of 1"),
        (torch.tensor([[float("inf")]]), torch.ones(1, 1), "row 0 of 1"),
    ],
)
def test_a_row_without_a_direction_is_named(a, b, said) -> None:
    with pytest.raises(ValueError, match=f"Cosine similarity: .*{said}"):
        cosine_similarity(a, b)


def test_consistency_worked_by_hand() -> None:
    table = torch.tensor(
        [[9.0, 0.5, 0.2], [0.5, 9.0, 0.8], [0.2, 0.8, 9.0]]
    )  # what a picture is to itself does not count
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


@pytest.mark.parametrize(
    "shape, said",
    [((1, 1), "at least 2; it got 1"), ((0, 0), "at least 2; it got 0"), ((2, 3), r"got \[2, 3\]")],
)
def test_one_picture_has_nothing_to_be_compared_with(shape, said) -> None:
    for measure in (mean_of_pairs, mean_with_others):
        with pytest.raises(ValueError, match=f"Consistency.*{said}"):
            measure(torch.ones(shape))


def test_the_text_score_is_each_pictures_raw_cosine_with_its_own_prompt() -> None:
    pictures, texts = (
        torch.tensor([[3.0, 4.0], [1.0, 0.0], [5.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 4.0]]),
    )
    assert paired_cosines(pictures, texts).tolist() == pytest.approx(
        [0.6, 0.0, -0.6]
    )  # not 2.5 times, and not cut off at 0


@pytest.mark.parametrize(
    "texts, said",
    [
        (torch.ones(3, 2), r"got \[2, 2\] and \[3, 2\]"),
        (torch.ones(2, 3), r"and \[2, 3\]"),
        (torch.zeros(2, 2), "row 0 of 2 is zero"),
    ],
)
def test_a_text_score_takes_a_text_per_picture(texts, said) -> None:
    with pytest.raises(ValueError, match=said):
        paired_cosines(torch.ones(2, 2), texts)


# faces -----------------------------------------------------------------------------------------------------------------------


def test_face_identity_worked_by_hand() -> None:
    """Two photos at a right angle; pictures: the first photo's face, one between both, one that is its opposite, none."""
    photos = [torch.tensor([2.0, 0.0]), None, torch.tensor([0.0, 0.5])]
    found = face_identity(
        [torch.tensor([7.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 0.0]), None],
        photos,
    )
    between = sqrt(2 - sqrt(2))
    assert found.cosine == pytest.approx((0.5, sqrt(0.5), -0.5, nan), nan_ok=True)
    assert found.distance == pytest.approx(
        (sqrt(2) / 2, between, (2 + sqrt(2)) / 2, nan), nan_ok=True
    )  # each pair's own, then the mean
    assert found.closeness == pytest.approx(
        (2 - sqrt(2) / 2, 2 - between, 1 - sqrt(2) / 2, nan), nan_ok=True
    )
    assert found.detected == (True, True, True, False)


def test_vectors_as_they_are_have_a_distance_of_their_own() -> None:
    """A triangle of 3, 4 and 5: the cosine minds no length, the distance does."""
    known = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 8.0])]
    found = face_identity([torch.tensor([0.0, 4.0]), None], known, unit=False)
    assert found.cosine == pytest.approx((0.5, nan), nan_ok=True)
    assert found.distance == pytest.approx(((5 + 4) / 2, nan), nan_ok=True)
    assert found.closeness == pytest.approx((2 - 4.5, nan), nan_ok=True)


def test_a_missing_face_is_no_zero_and_the_detection_rate_tells_of_it() -> None:
    face = torch.tensor([1.0, 0.0])
    found = face_identity([face, None, face], [face])
    assert (
        Mean.over(zip(found.cosine)) == Mean(1.0, 0.0, 2)
        and Mean.over(zip(found.distance)).mean == 0
    )
    assert Mean.over(zip(found.detected)).mean == pytest.approx(2 / 3)
    for pictures, photos in (([face, None], [None]), ([face, None], []), ([None, None], [face])):
        missing = face_identity(pictures, photos)
        assert all(
            map(isnan, missing.cosine + missing.distance + missing.closeness)
        ) and missing.detected == (pictures[0] is face, False)
    assert face_identity([], [face]).cosine == ()


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_the_distance_is_that_of_unit_vectors(seed: int, width: int) -> None:
    a, b = torch.randn(
        2, 5, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    units = [rows / rows.norm(dim=1, keepdim=True) for rows in (a, b)]
    assert torch.allclose(
        face_distance(paired_cosines(a, b)), (units[0] - units[1]).norm(dim=1), atol=1e-7
    )
    assert face_distance(torch.tensor([1.0, 1 + 1e-7, 0.5, -1.0])).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "face, said",
    [
        (torch.ones(3), r"\[1, 2\] and \[1, 3\]"),
        (torch.zeros(2), "row 0 of 1"),
        (torch.tensor([1.0, nan]), "row 0 of 1"),
    ],
)
def test_a_face_without_a_direction_is_refused(face, said) -> None:
    with pytest.raises(ValueError, match=said):
        face_identity([torch.ones(2)], [face])


# what is said of many --------------------------------------------------------------------------------------------------------


def test_means_and_errors_worked_by_hand() -> None:
    """Three identities of 2, 1 and 3 pictures: their means are 2, 5 and 8, whatever their counts."""
    found = Mean.over([[1.0, 3.0], [5.0], [8.0, 10.0, 6.0]])
    assert (found.mean, found.count) == (5, 3) and found.error == pytest.approx(
        sqrt(((2 - 5) ** 2 + 0 + (8 - 5) ** 2) / 2 / 3)
    )


def test_what_could_not_be_measured_counts_nowhere() -> None:
    assert (
        Mean.over([[1.0, nan, 3.0], [nan], [], [4.0]])
        == Mean.over([[1.0, 3.0], [4.0]])
        == Mean(3.0, 1.0, 2)
    )
    one, none = Mean.over([[0.5, 0.7]]), Mean.over([[nan], []])
    assert (one.mean, one.count) == (0.6, 1) and isnan(one.error)
    assert isnan(none.mean) and isnan(none.error) and none.count == 0


def test_pictures_of_one_identity_are_no_independent_tries() -> None:
    """Showing each picture ten times makes nothing surer, as it would if every picture counted."""
    identities = [[0.2, 0.4], [0.9], [0.5, 0.7]]
    often = Mean.over([10 * pictures for pictures in identities])
    assert often.error == pytest.approx(Mean.over(identities).error) and often.count == 3
    assert (
        Mean.over([value] for pictures in identities for value in 10 * pictures).error
        < often.error / 2
    )


def test_the_share_of_the_way_worked_by_hand() -> None:
    assert [share_of_the_way(x, 0.2, 0.7) for x in (0.2, 0.7, 0.6, 0.1, 0.8)] == pytest.approx(
        [0, 1, 0.8, -0.2, 1.2]
    )
    assert share_of_the_way(1.2, 1.6, 0.8) == pytest.approx(0.5)  # where less is better, too
    assert (
        isnan(share_of_the_way(0.5, 0.3, 0.3))
        and isnan(share_of_the_way(nan, 0, 1))
        and isnan(share_of_the_way(0.5, nan, 1))
    )
