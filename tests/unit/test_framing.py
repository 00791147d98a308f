"""A photo and its mask through one window: laws of cropping, padding and what a cut-out is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kindred.models.subject.framing import (
    Fit,
    Window,
    bounds,
    fitted,
    is_cut_out,
    over_white,
    window_of,
)

SIDE = st.integers(1, 400)
SIZE = st.tuples(SIDE, SIDE)
CROPS = (Fit.CENTRE, Fit.SUBJECT, Fit.PAD)


def oval(size, centre, radii) -> torch.Tensor:
    """A mask [1 y x] in 0..1."""
    rows, columns = (torch.arange(n).float() for n in size)
    away = ((rows - centre[0]) / radii[0])[:, None] ** 2 + ((columns - centre[1]) / radii[1]) ** 2
    return (away <= 1).float()[None]


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a > 0.5, b > 0.5
    return ((a & b).sum() / (a | b).sum()).item()


@pytest.mark.parametrize("fit", CROPS)
@pytest.mark.parametrize("size", [(1200, 800), (800, 1200), (300, 300), (90, 500)], ids=str)
@pytest.mark.parametrize("target", [(512, 512), (768, 512), (64, 96)], ids=str)
def test_a_mask_covers_what_it_was_painted_on(fit, size, target):
    """A photo that is its own mask: whatever happens to one happens to the other."""
    mask = oval(size, (size[0] * 0.5, size[1] * 0.45), (size[0] * 0.4, size[1] * 0.3))
    picture, fitted_mask = fitted(mask[..., None].expand(-1, -1, -1, 3), mask, target, fit)
    assert picture.shape == (1, *target, 3) and fitted_mask.shape == (1, *target)
    assert iou(picture[..., 0], fitted_mask) >= 0.97


def test_a_mask_that_stays_behind_does_not():
    """What is mended: the photo cropped at its centre, the mask stretched over it."""
    mask = oval((1200, 800), (600, 400), (480, 200))
    picture, _ = fitted(mask[..., None].expand(-1, -1, -1, 3), mask, (512, 512), Fit.CENTRE)
    stretched = torch.nn.functional.interpolate(mask[:, None], (512, 512))[:, 0]
    assert iou(picture[..., 0], stretched) < 0.75


@given(SIZE, SIZE)
def test_a_crop_at_the_centre_is_the_hosts(size, target):
    """The largest part of the target's shape, to the pixel, in the middle."""
    window = window_of(size, target, Fit.CENTRE)
    assert 0 <= window.top and window.top + window.height <= size[0]
    assert 0 <= window.left and window.left + window.width <= size[1]
    assert window.height == size[0] or window.width == size[1]
    assert abs(2 * window.top + window.height - size[0]) <= 1
    assert abs(2 * window.left + window.width - size[1]) <= 1


@given(SIZE, SIZE)
def test_padding_loses_nothing(size, target):
    window = window_of(size, target, Fit.PAD)
    assert window.top <= 0 and window.top + window.height >= size[0]
    assert window.left <= 0 and window.left + window.width >= size[1]
    assert window.height == size[0] or window.width == size[1]


@given(SIZE, SIZE, st.tuples(*[st.floats(0, 1)] * 4))
def test_a_crop_at_the_subject_holds_all_of_it(size, target, where):
    edges = [
        sorted(int(share * n) for share in pair) for pair, n in zip((where[:2], where[2:]), size)
    ]
    (top, bottom), (left, right) = edges
    subject = Window(top, left, max(bottom - top, 1), max(right - left, 1))
    window = window_of(size, target, Fit.SUBJECT, subject)
    slack = 1  # extents are whole pixels
    assert window.top <= subject.top + slack and window.left <= subject.left + slack
    assert window.top + window.height >= min(subject.top + subject.height, size[0]) - slack
    assert window.left + window.width >= min(subject.left + subject.width, size[1]) - slack


def test_a_crop_at_the_subject_is_close_but_enlarges_nothing():
    small = Window(2000, 3000, 100, 80)
    assert window_of((4000, 6000), (512, 512), Fit.SUBJECT, small).height == 512
    large = Window(1000, 3000, 1600, 800)
    assert window_of((4000, 6000), (512, 512), Fit.SUBJECT, large).height == 2000
    assert window_of((100, 200), (512, 512), Fit.SUBJECT, Window(0, 0, 9, 9)).height == 100


def test_a_crop_at_no_subject_is_one_at_the_centre():
    assert window_of((900, 500), (64, 64), Fit.SUBJECT) == window_of(
        (900, 500), (64, 64), Fit.CENTRE
    )
    assert bounds(torch.zeros(2, 5, 6)) is None


def test_the_bounds_are_those_of_all_frames():
    mask = torch.zeros(2, 10, 12)
    mask[0, 2:4, 3] = 1
    mask[1, 7, 8:11] = 1
    assert bounds(mask) == Window(2, 3, 6, 8)


def test_what_fits_is_left_alone():
    picture, mask = torch.rand(1, 24, 16, 3), torch.rand(1, 24, 16)
    for fit in Fit:
        a, b = fitted(picture, mask, (24, 16), Fit.AS_IT_IS if fit is Fit.SUBJECT else fit)
        assert torch.equal(a, picture) and torch.equal(b, mask)


def test_padding_is_as_the_edge_is_and_no_subject():
    picture, mask = torch.rand(1, 4, 8, 3), torch.ones(1, 4, 8)
    drawn, shown = fitted(picture, mask, (8, 8), Fit.PAD)
    assert torch.equal(drawn[:, 2:6], picture) and torch.equal(drawn[:, 0], picture[:, 0])
    assert shown[:, 2:6].all() and not shown[:, :2].any() and not shown[:, 6:].any()


@pytest.mark.parametrize("target", [(0, 5), (5, -1)])
def test_a_size_that_is_none(target):
    with pytest.raises(ValueError, match="cannot fill a picture"):
        window_of((10, 10), target, Fit.PAD)


def test_what_is_cut_away_is_most_of_the_edge():
    away = 1 - oval((120, 80), (60, 40), (50, 30))
    assert is_cut_out(away)  # a subject in the middle
    bust = torch.ones(1, 120, 80)
    bust[:, 30:, 15:65] = 0
    assert is_cut_out(bust)  # one that the lower edge cuts
    assert not is_cut_out(1 - away) and not is_cut_out(1 - bust)  # the same, painted
    assert not is_cut_out(torch.full((1, 9, 9), 0.498))  # a veil
    assert not is_cut_out(torch.ones(1, 9, 9))  # nothing there


def test_white_stands_behind_a_cut_out():
    picture = torch.rand(1, 3, 3, 3)
    opaque = torch.tensor([[[1.0, 0.0, 0.5]] * 3])
    laid = over_white(picture, opaque)
    assert torch.equal(laid[:, :, 0], picture[:, :, 0]) and (laid[:, :, 1] == 1).all()
    assert torch.allclose(laid[:, :, 2], (picture[:, :, 2] + 1) / 2)
