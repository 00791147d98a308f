"""Laws of the masks: method invariants I13-I16, I32 (union part), I40, against scikit-image where it is the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kindred.models.subject.masks import (
    binarise,
    iou,
    mask_for_grid,
    otsu_threshold,
    resize_soft,
    resize_user_mask,
    token_map,
    token_weights,
    union,
    union_of_first,
)
from torch import Tensor

H, D = 3, 5
GRIDS = [(64, 64), (64, 96), (13, 9), (61, 88)]  # latent grids: square, not square, odd


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps(count: int, seed: int) -> list[np.ndarray]:
    """Maps of many kinds: uniform, two-peaked, nearly flat, few levels, peaked, non-square."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        shape = tuple(rng.integers(2, 33, 2))
        x = rng.random(shape)
        kind = i % 5
        if kind == 1:
            x = np.where(x > 0.8, rng.normal(0.7, 0.1, shape), rng.normal(0.1, 0.05, shape))
        elif kind == 2:
            x = 0.3 + 1e-6 * x
        elif kind == 3:
            x = np.round(x * 4) / 4
        elif kind == 4:
            x = x**8 * 1e-3
        made.append(x)
    return made


# token maps: eq. 4, I13 ---------------------------------------------------------------------------------------------------


def test_token_map_is_the_mean_summed_probability() -> None:
    q, k = randn(2, 6, H * D, seed=1), randn(2, 7, H * D, seed=2)
    at = [[1, 4], [2]]
    out = token_map(q, k, at, H)
    for b in range(2):
        seen = torch.zeros(6, dtype=torch.float64)
        for h in range(H):
            s = slice(h * D, (h + 1) * D)
            p = torch.softmax(q[b, :, s].double() @ k[b, :, s].double().T / math.sqrt(D), -1)
            seen += p[:, at[b]].sum(-1) / H
        torch.testing.assert_close(out[b].double(), seen, rtol=0, atol=1e-6)
    assert out.shape == (2, 6) and out.dtype == torch.float32


def test_token_map_of_all_positions_is_one() -> None:
    q, k = randn(2, 6, H * D, seed=1), randn(2, 7, H * D, seed=2)
    torch.testing.assert_close(token_map(q, k, [range(7)], H), torch.ones(2, 6))


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_text_sums_to_the_same_map(repeats) -> None:
    q, k = randn(2, 6, H * D, seed=1), randn(2, 7, H * D, seed=2)
    everywhere = [p + 7 * i for i in range(repeats) for p in (1, 4)]
    once = token_map(q, k, [[1, 4]], H)
    torch.testing.assert_close(token_map(q, k.repeat(1, repeats, 1), [everywhere], H), once)
    assert not torch.allclose(token_map(q, k.repeat(1, repeats, 1), [[1, 4]], H), once)


def test_one_sequence_serves_every_row_and_weights_serve_for_positions() -> None:
    q, k = randn(2, 6, H * D, seed=1), randn(2, 7, H * D, seed=2)
    assert torch.equal(token_map(q, k, [[3]], H), token_map(q, k, [[3], [3]], H))
    assert torch.equal(
        token_map(q, k, token_weights([[3, 3], [5]], 7), H), token_map(q, k, [[3], [5]], H)
    )


def test_a_row_without_the_word_maps_to_nothing() -> None:
    q, k = randn(2, 6, H * D, seed=1), randn(2, 7, H * D, seed=2)
    out = token_map(q, k, [[2], []], H)
    assert out[0].min() > 0 and torch.equal(out[1], torch.zeros(6))


def test_keys_that_the_network_hides_take_no_share() -> None:
    """I62: a bias of log 0 is leaving keys out; one of each row is that row's own."""
    q, k = randn(2, 6, H * D, seed=1), randn(2, 7, H * D, seed=2)
    bias = torch.zeros(2, 1, 1, 7)
    bias[0, ..., 5:], bias[1, ..., 0] = -1e4, -1e4
    found = token_map(q, k, [[1, 4]], H, bias)
    torch.testing.assert_close(found[:1], token_map(q[:1], k[:1, :5], [[1, 4]], H))
    torch.testing.assert_close(found[1:], token_map(q[1:], k[1:, 1:], [[0, 3]], H))
    assert not torch.allclose(found, token_map(q, k, [[1, 4]], H))
    whole = bias.expand(-1, H, 6, -1)
    torch.testing.assert_close(token_map(q, k, [[1, 4]], H, whole), found)


def test_half_precision_logits_do_not_overflow() -> None:
    q, k = 300 * randn(1, 6, H * D, seed=1).half(), 300 * randn(1, 7, H * D, seed=2).half()
    out = token_map(q, k, [[2]], H)
    assert out.dtype == torch.float32 and out.isfinite().all()


def test_a_position_outside_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match="7 tokens; there is none at position 9"):
        token_weights([[1, 9]], 7)


# Otsu: I15, I16 -----------------------------------------------------------------------------------------------------------


def test_otsu_equals_scikit_image_exactly() -> None:
    filters = pytest.importorskip("skimage.filters")
    for x in maps(400, seed=0):
        assert otsu_threshold(torch.from_numpy(x)).item() == filters.threshold_otsu(x)


def test_otsu_of_a_stack_is_otsu_of_each() -> None:
    stack = rand(3, 4, 8, 6, seed=3) ** 3
    out = otsu_threshold(stack)
    assert out.shape == (3, 4) and out.dtype == torch.float64
    for i in range(3):
        for j in range(4):
            assert out[i, j] == otsu_threshold(stack[i, j]) == otsu_threshold(stack[i, j].flatten())
    assert torch.equal(otsu_threshold(stack.flatten(2), axes=1), out)


@pytest.mark.parametrize("threshold", ["otsu", 0.3, 0.95])
def test_a_map_with_contrast_is_neither_empty_nor_full(threshold) -> None:
    for x in maps(200, seed=1):
        inside = binarise(torch.from_numpy(x)[None], threshold).sum()
        assert 0 < inside < x.size


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0, 1e-30])
@pytest.mark.parametrize("threshold", ["otsu", 0.0, 0.3])
def test_a_constant_map_is_empty(value, threshold) -> None:
    flat = torch.full((2, 5, 7), value)
    assert otsu_threshold(flat).isfinite().all() and not binarise(flat, threshold).any()


@pytest.mark.parametrize("value", [1e-30, 0.3, -2.0, 7e4])
@pytest.mark.parametrize("threshold", ["otsu", 0.0, 0.3])
def test_a_map_that_is_constant_but_for_rounding_is_empty(value, threshold) -> None:
    """What a softmax or a resize leaves of a constant is a matter of the processor; ten times that is contrast."""
    last_bits = 1 + 6e-7 * (rand(2, 5, 7, seed=6, dtype=torch.float64) - 0.5)
    assert not binarise(value * last_bits, threshold).any()
    inside = binarise(value * (1 + 10 * (last_bits - 1)), threshold).sum((1, 2))
    assert ((0 < inside) & (inside < 35)).all()


@pytest.mark.parametrize("scale, shift", [(2.0, 0.0), (0.25, 3.0), (1024.0, -7.0)])
def test_masks_ignore_an_affine_change(scale, shift) -> None:
    x = (
        rand(4, 16, 12, seed=5, dtype=torch.float64) * 2**20
    ).round() / 2**20  # so that a * x + b is exact
    for threshold in ("otsu", 0.3):
        assert torch.equal(binarise(scale * x + shift, threshold), binarise(x, threshold))


def test_the_comparison_is_strict() -> None:
    x = torch.tensor([[[0.0, 0.25, 0.5, 1.0]]])
    assert binarise(x, 0.5).flatten().tolist() == [False, False, False, True]
    assert not binarise(x, 1.0).any() and binarise(x, 0.0).sum() == 3


@pytest.mark.parametrize("threshold", [1.5, -0.1, "mean", math.nan])
def test_a_foreign_threshold_is_refused(threshold) -> None:
    with pytest.raises(ValueError, match="from 0 to 1; got"):
        binarise(torch.rand(1, 2, 2, generator=torch.Generator().manual_seed(0)), threshold)


# grids: I40 ---------------------------------------------------------------------------------------------------------------


def halves(grid: tuple[int, int], times: int) -> tuple[int, int]:
    for _ in range(times):
        grid = (-(-grid[0] // 2), -(-grid[1] // 2))
    return grid


def home(at: int, size: int, coarse: int) -> int:
    """The coarse row or column that the decoder's nearest upsampling reads at `at`."""
    return at * coarse // size


@pytest.mark.parametrize("latent", GRIDS)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_planted_token_lands_at_its_place_in_every_layer(latent, level) -> None:
    source, grid = halves(latent, 2), halves(latent, level)
    for y, x in {
        (0, 0),
        (source[0] - 1, source[1] - 1),
        (source[0] // 2, source[1] // 3),
        (0, source[1] - 1),
    }:
        planted = torch.zeros(1, *source)
        planted[0, y, x] = 1.0
        out = resize_soft(planted, grid)
        assert out.shape == (1, *grid)
        peak_y, peak_x = divmod(out.flatten().argmax().item(), grid[1])
        if level <= 2:  # finer or equal: the peak lies within the planted cell
            assert (home(peak_y, grid[0], source[0]), home(peak_x, grid[1], source[1])) == (y, x)
        else:
            assert (peak_y, peak_x) == (home(y, source[0], grid[0]), home(x, source[1], grid[1]))


def test_rows_do_not_become_columns() -> None:
    soft = torch.zeros(1, 4, 6)
    soft[0, 1] = 1.0
    out = resize_soft(soft, (8, 12))[0]
    assert (out == out[:, :1]).all() and out.mean(1).argmax() in (2, 3)


def test_resizing_is_exact_where_nothing_changes() -> None:
    soft = rand(2, 5, 7, seed=8)
    assert torch.equal(resize_soft(soft, (5, 7)), soft)
    torch.testing.assert_close(
        resize_soft(torch.full((1, 13, 9), 0.37), (7, 5)), torch.full((1, 7, 5), 0.37)
    )
    torch.testing.assert_close(
        resize_soft(torch.full((1, 7, 5), 0.37), (13, 9)), torch.full((1, 13, 9), 0.37)
    )


def test_shrinking_weighs_every_cell() -> None:
    for at in range(8):  # plain bilinear at a ratio of 4 would miss half of the columns
        soft = torch.zeros(1, 8, 8)
        soft[0, :, at] = 1.0
        assert resize_soft(soft, (2, 2)).amax() > 0.05


def test_masks_are_cut_at_the_layers_own_size() -> None:
    soft = rand(3, 6, 9, seed=9) ** 2
    for grid in ((12, 18), (11, 17), (6, 9), (3, 5)):
        assert torch.equal(mask_for_grid(soft, grid), binarise(resize_soft(soft, grid)))


# drawn masks --------------------------------------------------------------------------------------------------------------


def test_a_drawn_mask_is_the_majority_of_each_cell() -> None:
    drawn = torch.zeros(1, 16, 24)
    drawn[0, :8, :11] = 1.0
    expected = torch.zeros(1, 2, 3, dtype=torch.bool)
    expected[0, 0, 0] = True  # the second cell holds 3 of 8 columns
    assert torch.equal(resize_user_mask(drawn, (2, 3)), expected)
    assert (
        resize_user_mask(torch.ones(2, 13, 9), (4, 3)).all()
        and not resize_user_mask(torch.zeros(2, 13, 9), (4, 3)).any()
    )


def test_half_a_cell_is_outside() -> None:
    drawn = torch.zeros(1, 8, 8)
    drawn[0, :, :2] = 1.0
    drawn[0, :4, 4:] = 1.0
    assert resize_user_mask(drawn, (2, 2)).tolist() == [[[False, True], [False, False]]]


def test_a_thin_subject_is_never_lost() -> None:
    drawn = torch.zeros(3, 32, 32)
    drawn[0, 5, 20:23] = 1.0
    drawn[1, 0:16, 0:16] = 1.0
    out = resize_user_mask(drawn, (4, 4))
    assert out.sum((1, 2)).tolist() == [1, 4, 0] and out[0, 0, 2]


# unions: I14, I32 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", ["otsu", 0.6])
@pytest.mark.parametrize("tau", [1, 2, 3])
def test_the_union_grows_until_tau_and_then_stays(tau, threshold) -> None:
    steps = [rand(2, 8, 6, seed=20 + i) ** 2 for i in range(5)]
    seen = [union_of_first(steps[: i + 1], tau, threshold, (16, 12)) for i in range(5)]
    for before, after in zip(seen, seen[1:], strict=False):
        assert (after | ~before).all()
    assert torch.equal(seen[0], mask_for_grid(steps[0], (16, 12), threshold))
    assert all(torch.equal(mask, seen[tau - 1]) for mask in seen[tau - 1 :])
    if tau > 1:
        assert seen[1].sum() > seen[0].sum()


def test_the_order_of_a_union_is_irrelevant() -> None:
    masks = [rand(2, 4, 5, seed=i) > 0.7 for i in range(3)]
    assert torch.equal(union(masks), union(masks[::-1])) and torch.equal(
        union(torch.stack(masks)), union(masks)
    )
    assert torch.equal(union(masks), masks[0] | masks[1] | masks[2])


def test_an_empty_union_is_refused() -> None:
    with pytest.raises(ValueError, match="0 masks"):
        union([])
    with pytest.raises(ValueError, match="got 0 maps and tau = 2"):
        union_of_first([], 2, "otsu", (4, 4))
    with pytest.raises(ValueError, match="got 1 maps and tau = 0"):
        union_of_first([torch.zeros(1, 4, 4)], 0, "otsu", (4, 4))


def test_iou() -> None:
    a, b = torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(3, 4, 4, dtype=torch.bool)
    a[0, :2], b[0, 1:3] = True, True
    a[1, 0, 0] = True
    assert iou(a, b).tolist() == pytest.approx([1 / 3, 0.0, 1.0]) and torch.equal(
        iou(a, b), iou(b, a)
    )


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    binarise(rand(1, 8, 8, seed=0))
    assert torch.equal(before, torch.get_rng_state())
