"""Exact counters of FLUX.1 at its own size, 1024 pixels, beside the plain sampler (docs/performance.md)."""

from __future__ import annotations

from functools import cache

import pytest
from counting import Counting
from flow_paper import (
    CELLS,
    WIDTH,
    first_step,
    paper_bank,
    paper_flux,
    sharing,
    with_concept,
    with_reference,
)

LAW = pytest.mark.parametrize
DOUBLE, SINGLE, WORDS = 19, 38, 256
TOKENS = CELLS**2 + WORDS
FUSED = "_scaled_dot_product_flash_attention_for_cpu"


@cache
def plain(batch: int = 1) -> Counting:
    return first_step(paper_flux(), batch)


@cache
def cached(blocks: str, **how: object) -> Counting:
    return first_step(with_reference(blocks, **how))


def more(spent: Counting, beside: Counting) -> int:
    """Operations on the device beside the plain step's."""
    return spent.places["meta"] - beside.places["meta"]


def test_the_plain_step_is_flux_at_its_own_size():
    """Of a block 12 width^2 weights a token and one attention; the modulations, per picture, and what stands
    before and behind the blocks are the few per cent that are missing.
    """
    blocks = (DOUBLE + SINGLE) * (2 * TOKENS * 12 * WIDTH**2 + 4 * TOKENS**2 * WIDTH)
    spent = plain()
    assert blocks < spent.flops < 1.02 * blocks
    assert spent.unet_calls == 1 and spent.attention == {FUSED: DOUBLE + SINGLE}


@LAW(
    ("blocks", "count", "bound", "each"),
    [("single", SINGLE, 1.03, 16), ("double", DOUBLE, 1.015, 19)],
)
def test_a_quarter_of_the_photo_costs_its_keys_alone(blocks, count, bound, each):
    """What is added is one attention of the picture's queries to the kept tokens, in the blocks that are read."""
    spent, beside = cached(blocks), plain()
    kept = CELLS**2 // 4
    assert spent.flops - beside.flops == 4 * CELLS**2 * kept * WIDTH * count
    assert spent.flops / beside.flops <= bound and spent.unet_calls == 1
    assert more(spent, beside) <= each * count + 1


def test_ten_blocks_cost_less_than_a_hundredth():
    a_block = (cached("single").flops - plain().flops) / SINGLE
    assert 10 * a_block / plain().flops < 0.01


@LAW("how", [{}, {"weight": 2.0}, {"weight": 0.5, "weight_mode": "output blend"}], ids=str)
def test_a_cached_step_waits_for_nothing_and_makes_no_mask_of_all_queries(how):
    spent, beside = cached("single", **how), plain()
    assert spent.waits == beside.waits and spent.largest == beside.largest
    assert set(spent.attention) == {FUSED}
    assert not {s for s in spent.shapes - beside.shapes if len(s) > 1 and min(s[-2:]) >= 4096}


def test_a_reference_is_as_large_as_the_formula():
    """Keys and values of the kept tokens, a step; in float32 here, half of it in bfloat16."""
    a_step = SINGLE * CELLS**2 // 4 * 2 * WIDTH * 4
    assert paper_bank("single").bytes == 2 * a_step and a_step == pytest.approx(0.956e9, rel=1e-3)


def test_a_step_with_a_concept():
    spent, beside = first_step(with_concept()), plain()
    assert 1 < spent.flops / beside.flops <= 1.001 and spent.unet_calls == 1
    assert more(spent, beside) <= 9 * (DOUBLE + SINGLE)
    assert spent.waits == beside.waits and spent.largest == beside.largest


@LAW(("how", "bound", "each"), [({}, 1.035, 25), ({"anchors": 0}, 1.065, 32)], ids=str)
def test_four_pictures_share(how, bound, each):
    """In one pass; the pictures that are read are two of four, or all of them."""
    spent, beside = first_step(sharing(**how), 4), plain(4)
    assert 1.02 < spent.flops / beside.flops <= bound and spent.unet_calls == 1
    assert spent.waits == beside.waits and spent.largest == beside.largest
    assert set(spent.attention) == {FUSED}
    assert more(spent, beside) <= each * (DOUBLE + SINGLE)


def test_blending_takes_a_second_pass():
    """While queries are blended, each step asks the plain pictures' first."""
    spent, beside = first_step(sharing(query_blend=0.9), 4), plain(4)
    assert spent.unet_calls == 2 and 2 < spent.flops / beside.flops < 2.05
