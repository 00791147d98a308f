"""Laws of the correspondence: method invariants I28-I30, against double loops and float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kindred.models.subject import correspondence
from kindred.models.subject.correspondence import adain, correspond, inject, smooth
from kindred.models.subject.masks import otsu_threshold
from small_tokens import all_of, everywhere, order, randn, some
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GRIDS = [(4, 6), (7, 3), (5, 5)]


def distances(targets: Tensor, sources: Tensor) -> Tensor:
    """Cosine distance of every target token to every source token, [b n (s n')] float64, pair by pair from the definition."""
    rows, columns = targets.double().flatten(0, 1), sources.double().flatten(0, 1)
    out = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for p, u in enumerate(rows):
        for q, v in enumerate(columns):
            out[p, q] = 1 - (u @ v) / math.sqrt((u @ u) * (v @ v))
    return out.unflatten(0, targets.shape[:2])


class Watch(TorchDispatchMode):
    """Records the sizes of all tensors made, and refuses whatever would make a device wait for its host or shape a result by data."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique_dim",
            "_unique2",
            "equal",
        ), name
        if name.startswith(("index", "_index")):
            flat = [i for a in args[1:] for i in (a if isinstance(a, (list, tuple)) else [a])]
            assert not any(
                isinstance(i, Tensor) and i.dtype == torch.bool for i in flat[:-1] or flat
            ), f"{name} with a mask"
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


# smoothing: I30 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_smoothing_is_the_gaussian_written_out(grid) -> None:
    y, x = grid
    features = randn(2, 3, y, x, seed=1)
    weight = {(i, j): math.exp(-(i * i + j * j) / 2) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    total = sum(weight.values())
    want = torch.zeros(2, 3, y, x, dtype=torch.float64)
    for at_y in range(y):
        for at_x in range(x):
            for (i, j), w in weight.items():
                if 0 <= at_y + i < y and 0 <= at_x + j < x:
                    want[..., at_y, at_x] += features[..., at_y + i, at_x + j].double() * w / total
    torch.testing.assert_close(smooth(features).double(), want, rtol=0, atol=1e-6)


def test_the_kernel_sums_to_one_and_stays_in_its_channel() -> None:
    one = torch.zeros(1, 2, 5, 7)
    one[0, 1, 2, 3] = 1
    out = smooth(one)
    assert abs(out[0, 1].double().sum() - 1) < 1e-6
    assert torch.equal(out[0, 0], torch.zeros(5, 7)) and torch.equal(
        out[0, 1, 1:4, 2:5].T, out[0, 1, 1:4, 2:5]
    )
    assert (out[0, 1] > 0).sum() == 9


def test_smoothing_leaves_the_interior_of_a_constant_and_darkens_its_border() -> None:
    flat = torch.full((1, 2, 6, 9), -3.5)
    out = smooth(flat)
    torch.testing.assert_close(out[..., 1:-1, 1:-1], flat[..., 1:-1, 1:-1], rtol=0, atol=1e-6)
    border = out.abs() < 3.5 - 0.5
    assert (
        border[..., [0, -1], :].all()
        and border[..., [0, -1]].all()
        and not border[..., 1:-1, 1:-1].any()
    )
    features = randn(5, seed=2)[None, :, None, None].expand(1, 5, 4, 6)
    cosine = F.cosine_similarity(
        smooth(features), features, dim=1
    )  # darker, and yet in the same direction
    torch.testing.assert_close(cosine, torch.ones(1, 4, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_smoothing_is_done_in_single_precision_and_given_back_as_it_came(dtype) -> None:
    features = randn(1, 3, 4, 5, seed=3, dtype=dtype)
    before = features.clone()
    out = smooth(features)
    assert out.dtype == dtype and out.shape == features.shape and torch.equal(features, before)
    assert torch.equal(out, smooth(features.float()).to(dtype))


# matching: I29, eq. 5, 8, 9 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_every_match_is_the_best_of_all_sources(grid) -> None:
    n = grid[0] * grid[1]
    targets, sources = randn(2, n, 8, seed=1), randn(3, n + 5, 8, seed=2)
    kept = [some(3 * (n + 5), seed=s, share=0.4).nonzero().flatten() for s in (3, 4)]
    out = correspond(targets, everywhere(2, n), sources, kept)
    brute = distances(targets, sources)
    assert (
        out.source.dtype == torch.int64
        and out.distance.dtype == torch.float32
        and out.keep.dtype == torch.bool
    )
    for b in range(2):
        best, at = brute[b][:, kept[b]].min(-1)
        assert torch.equal(out.source[b], kept[b][at])
        torch.testing.assert_close(out.distance[b].double(), best, rtol=0, atol=1e-6)


def test_a_picture_matches_only_what_it_may() -> None:
    """The best token of all stands outside `kept`: the best within is taken. A source's place in `kept` is of no matter."""
    targets = randn(1, 6, 8, seed=1)
    sources = torch.cat([targets, randn(2, 6, 8, seed=2)])
    kept = torch.tensor([17, 7, 9])
    out = correspond(targets, everywhere(1, 6), sources, [kept])
    assert torch.isin(out.source, kept).all() and (out.distance > 0.01).all()
    again = correspond(targets, everywhere(1, 6), sources, [kept.flip(0)])
    assert torch.equal(out.source, again.source) and torch.equal(out.distance, again.distance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_picture_corresponds_to_itself(dtype) -> None:
    features = randn(1, 24, 8, seed=1, dtype=dtype)
    out = correspond(features, everywhere(1, 24), features, [all_of(features)])
    assert torch.equal(out.source[0], torch.arange(24)) and torch.equal(
        out.distance, torch.zeros(1, 24)
    )
    assert not out.keep.any()  # a constant map of distances


def test_a_permuted_copy_corresponds_by_that_permutation() -> None:
    features, to = randn(2, 24, 8, seed=1), order(24, seed=2)
    out = correspond(features[:1], everywhere(1, 24), features[:, to], [torch.arange(24)])
    assert torch.equal(to[out.source[0]], torch.arange(24)) and torch.equal(
        out.distance, torch.zeros(1, 24)
    )
    out = correspond(features[1:], everywhere(1, 24), features[:, to], [all_of(features)])
    assert torch.equal(out.source[0], 24 + to.argsort())


def test_a_shifted_window_corresponds_by_that_shift() -> None:
    """Windows of different sizes on one field, smoothed apart: token (y, x) finds (y + 2, x - 1) wherever no border is near."""
    field = randn(1, 6, 12, 14, seed=1)
    (y, x), (p, q) = (6, 9), (9, 11)
    target, source = (
        smooth(field[..., 3 : 3 + y, 1 : 1 + x]),
        smooth(field[..., 1 : 1 + p, 2 : 2 + q]),
    )
    tokens = [f.flatten(2).transpose(1, 2) for f in (target, source)]
    found = correspond(
        tokens[0], everywhere(1, y * x), tokens[1], [torch.arange(p * q)]
    ).source.view(y, x)
    at_y, at_x = torch.meshgrid(torch.arange(y), torch.arange(x), indexing="ij")
    want = (at_y + 2) * q + at_x - 1
    assert torch.equal(found[1:-1, 2:-1], want[1:-1, 2:-1])


def test_similarity_is_symmetric() -> None:
    a, b = randn(1, 6, 8, seed=1), randn(1, 9, 8, seed=2)
    there = torch.stack(
        [correspond(a, everywhere(1, 6), b, [torch.tensor([q])]).distance[0] for q in range(9)], 1
    )
    back = torch.stack(
        [correspond(b, everywhere(1, 9), a, [torch.tensor([p])]).distance[0] for p in range(6)], 1
    )
    assert torch.equal(there, back.T)
    torch.testing.assert_close(there.double(), distances(a, b)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("reach", [1, 20])
def test_lengths_are_of_no_matter(reach) -> None:
    targets, sources = randn(2, 20, 8, seed=1), randn(2, 15, 8, seed=2)
    kept = [all_of(sources), torch.arange(3, 25)]
    once = correspond(targets, everywhere(2, 20), sources, kept)
    longer, shorter = (10 ** (reach * (2 * torch.rand(2, n, 1) - 1)) for n in (20, 15))
    out = correspond(targets * longer, everywhere(2, 20), sources * shorter, kept)
    assert torch.equal(out.source, once.source) and torch.equal(out.keep, once.keep)
    torch.testing.assert_close(out.distance, once.distance, rtol=0, atol=1e-6)
    mirrored = correspond(-targets, everywhere(2, 20), sources, kept)  # only positive factors
    assert not torch.equal(mirrored.source, once.source)


def test_distances_end_at_nothing_and_at_two() -> None:
    a = randn(1, 50, 7, seed=1)
    same, opposite = (
        torch.stack(
            [
                correspond(a[:, [p]], everywhere(1, 1), sign * 3 * a, [torch.tensor([p])]).distance[
                    0, 0
                ]
                for p in range(50)
            ]
        )
        for sign in (1, -1)
    )
    torch.testing.assert_close(same, torch.zeros(50), rtol=0, atol=1e-6)
    torch.testing.assert_close(opposite, torch.full((50,), 2.0), rtol=0, atol=1e-6)
    assert same.min() >= 0 and opposite.max() <= 2


def test_a_token_without_direction_is_at_distance_one() -> None:
    a, b = randn(1, 5, 8, seed=1), randn(1, 6, 8, seed=2)
    a[0, 2], b[0, 0] = 0, 0
    out = correspond(a, everywhere(1, 5), b, [torch.arange(6)])
    assert out.distance[0, 2] == 1 and out.distance.isfinite().all()
    assert torch.equal(
        correspond(a, everywhere(1, 5), b, [torch.tensor([0])]).distance, torch.ones(1, 5)
    )


def test_matches_nearer_than_half_precision_tells_apart() -> None:
    """Pictures of one subject are all alike to a thousandth (quirk Q5)."""
    alike = randn(1, 1, 8, seed=1)
    targets, sources = (alike + 0.02 * randn(1, 40, 8, seed=s) for s in (2, 3))
    out = correspond(targets, everywhere(1, 40), sources, [torch.arange(40)])
    brute = distances(targets, sources)[0]
    assert brute.max() < 5e-3
    lost = brute.gather(1, out.source[0][:, None])[:, 0] - brute.min(1).values
    assert lost.max() < 5e-7


@pytest.mark.parametrize("chunk", [1, 3, 24, 1000])
def test_chunks_of_any_size_give_the_same(chunk, monkeypatch) -> None:
    targets, sources = randn(2, 25, 8, seed=1), randn(3, 30, 8, seed=2)
    kept = [all_of(sources), torch.arange(40, 75)]
    masks = some(2, 25, seed=3)
    once = correspond(targets, masks, sources, kept)
    monkeypatch.setattr(correspondence, "CHUNK", chunk)
    out = correspond(targets, masks, sources, kept)
    assert torch.equal(out.source, once.source) and torch.equal(out.keep, once.keep)
    assert torch.equal(
        out.distance, once.distance
    )  # bit for bit: a pair's distance is not the product's rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_matched_in_single(dtype) -> None:
    targets, sources = (
        100 * randn(2, 25, 40, seed=1, dtype=dtype),
        100 * randn(2, 30, 40, seed=2, dtype=dtype),
    )
    masks, kept = some(2, 25, seed=3), [all_of(sources), torch.arange(20)]
    out, want = (
        correspond(targets, masks, sources, kept),
        correspond(targets.float(), masks, sources.float(), kept),
    )
    assert torch.equal(out.source, want.source) and torch.equal(out.keep, want.keep)
    assert out.distance.dtype == torch.float32 and torch.equal(out.distance, want.distance)


def test_matching_waits_for_no_device_and_holds_one_chunk(monkeypatch) -> None:
    monkeypatch.setattr(correspondence, "CHUNK", 4)
    targets, sources = randn(2, 60, 3, seed=1), randn(2, 50, 3, seed=2)
    kept = [torch.arange(80), torch.arange(7, 77)]
    with Watch() as watch:
        correspond(targets, everywhere(2, 60), sources, kept)
    histograms = 2 * 257  # Otsu's own
    assert watch.largest <= max(4 * 80, 80 * 3, histograms)
    with Watch():
        x = randn(2, 60, 3, seed=3)
        inject(x, x.flatten(0, 1), torch.arange(4), torch.arange(9, 13), 0.8)
        adain(randn(1, 20, 6, seed=4), randn(2, 30, 6, seed=5))
        smooth(randn(1, 3, 4, 6, seed=6))


# the gate: I28 ------------------------------------------------------------------------------------------------------------


def test_the_gate_is_otsu_over_every_token_of_the_picture() -> None:
    """Not over the subject's tokens, not over the batch, and strictly below."""
    features = randn(1, 60, 8, seed=1)
    noise = torch.linspace(0.02, 4, 60)[None, :, None] * randn(2, 60, 8, seed=2)
    targets, masks = features + noise * torch.tensor([1.0, 0.2])[:, None, None], some(2, 60, seed=3)
    out = correspond(targets, masks, features, [all_of(features)] * 2)
    for b in range(2):
        near = out.distance[b].double() < otsu_threshold(out.distance[b], axes=1)
        assert torch.equal(out.keep[b], near & masks[b])
        alone = correspond(targets[b : b + 1], masks[b : b + 1], features, [all_of(features)])
        assert torch.equal(alone.keep[0], out.keep[b]) and torch.equal(
            alone.distance[0], out.distance[b]
        )
        assert 0 < out.keep[b].sum() < masks[b].sum()  # the gate turns some of the subject away
        within = out.distance[b][masks[b]].double()
        assert (within < otsu_threshold(within, axes=1)).sum() != out.keep[b].sum()
    pooled = out.distance.double() < otsu_threshold(out.distance)
    assert not torch.equal(pooled & masks, out.keep)


def test_two_distances_part_at_the_nearer() -> None:
    """Ten tokens that match and ten that do not: the ten, not their complement."""
    axes = torch.eye(3)
    targets = torch.cat([axes[0].expand(10, 3), (axes[0] + axes[1]).expand(10, 3)])[None]
    out = correspond(targets, everywhere(1, 20), axes[None, :1], [torch.tensor([0])])
    assert torch.equal(out.keep[0], torch.arange(20) < 10)


def test_the_gate_tells_apart_what_half_precision_does_not() -> None:
    lean, axes = torch.cat([torch.full((20,), 2e-4), torch.linspace(0, 1e-4, 20)]), torch.eye(3)
    targets = (lean[:, None] * axes[0] + axes[1])[None]
    out = correspond(targets, everywhere(1, 40), axes[None, :1], [torch.tensor([0])])
    assert out.distance.half().unique().numel() == 1
    assert torch.equal(out.keep[0], torch.arange(40) < 20)


@pytest.mark.parametrize("source", [0, 1, 2])
def test_equal_distances_keep_nothing(source) -> None:
    axes = torch.eye(3)
    out = correspond(
        axes[:1].expand(1, 7, 3), everywhere(1, 7), axes[None], [torch.tensor([source])]
    )
    assert not out.keep.any()


def test_nothing_to_match_keeps_nothing() -> None:
    targets, sources = randn(2, 12, 8, seed=1), randn(2, 10, 8, seed=2)
    out = correspond(targets, everywhere(2, 12), sources, [torch.arange(0), torch.arange(20)])
    assert torch.equal(out.distance[0], torch.full((12,), 2.0)) and torch.equal(
        out.source[0], torch.zeros(12, dtype=torch.int64)
    )
    assert not out.keep[0].any() and out.keep[1].any()
    alone = correspond(
        targets[1:], everywhere(1, 12), sources, [torch.arange(20)]
    )  # the empty one changes no neighbour
    assert torch.equal(alone.source[0], out.source[1]) and torch.equal(alone.keep[0], out.keep[1])


def test_no_subject_keeps_nothing() -> None:
    targets = randn(1, 12, 8, seed=1)
    out = correspond(targets, ~everywhere(1, 12), randn(1, 9, 8, seed=2), [torch.arange(9)])
    assert not out.keep.any() and (out.distance < 2).all()


@pytest.mark.parametrize("pictures", [1, 3])
def test_one_list_of_sources_per_picture(pictures) -> None:
    with pytest.raises(ValueError, match=f"2 pictures.*{pictures}"):
        correspond(
            randn(2, 4, 3, seed=1),
            everywhere(2, 4),
            randn(1, 4, 3, seed=2),
            [torch.arange(4)] * pictures,
        )
