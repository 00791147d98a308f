"""Exact counters at full size, beside the plain sampler of the same process, with gates (docs/performance.md)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from counting import MATH, Counting, comes_home
from kindred.models.attention.attend import WeightMode
from kindred.models.injection import Merge
from kindred.models.reference.bank import Half, Halves, Keeps
from kindred.nodes import host
from kindred.nodes.concept import ConceptInjection
from networks import random_model
from paper import META, drawn, first_step, on_paper, paper_bank, paper_model
from studio import STEPS, bank_of, capture, concept, inject, photo, pictures, sample, story

LAW = pytest.mark.parametrize
LAYERS = {"sd15": 16, "sdxl": 70}
SHARED = {"sd15": 9, "sdxl": 36}  # of the decoder
FUSED = "_scaled_dot_product_flash_attention_for_cpu"


# that the counters count ------------------------------------------------------------------------------------------------------


@LAW(
    ("read", "made", "waits"),
    [
        ("cuda:0", "cpu", True),
        ("cpu", "cpu", False),
        ("cpu", "cuda:0", False),
        ("cuda:0", "cuda:0", False),
        ("meta", "cpu", False),
    ],
)
def test_a_copy_to_host_memory_waits(read, made, waits):
    there, here = (SimpleNamespace(device=torch.device(name)) for name in (read, made))
    assert comes_home(there, here) is waits


@torch.inference_mode()
def test_every_counter_sees_what_it_should():
    x, mask = torch.rand(1, 2, 8, 3), torch.zeros(2, 8, 8)
    with Counting() as spent:
        x[0].transpose(0, 1)[:4].unflatten(0, (2, 2))
    assert not spent.ops and not spent.flops and not spent.largest
    with Counting() as spent:
        torch.nn.functional.linear(x, torch.rand(6, 3))
    assert (
        spent.flops == 2 * 2 * 8 * 3 * 6 and spent.ops["mm"] == 1 and spent.largest >= 2 * 8 * 6 * 4
    )
    for attended, kernel in ((None, FUSED), (mask[None], FUSED), (mask, MATH)):
        for device in ("cpu", "meta"):
            there, among = x.to(device), None if attended is None else attended.to(device)
            with Counting() as spent:
                torch.nn.functional.scaled_dot_product_attention(there, there, there, among)
            assert dict(spent.attention) == {kernel: 1} and spent.flops == 4 * 2 * 8 * 8 * 3
            assert (spent.largest >= mask.nbytes) == (kernel == MATH)  # the logits
    for wait in (
        lambda: x[x > 0],
        lambda: x.clone().index_put_((x > 0,), torch.tensor(0.0)),
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x.nonzero(),
        lambda: x.masked_select(x > 0),
    ):
        with Counting() as spent:
            wait()
        assert spent.syncs.total() == 1
    with Counting() as spent:
        x[:, torch.tensor([0, 1])]
    assert not spent.syncs and spent.ops["index"] == 1
    linear = torch.nn.Linear(3, 4)
    with Counting(linear) as spent:
        linear(x)
    linear(x)
    assert spent.unet_calls == 1


@cache
def plain(family: str, batch: int = 1) -> Counting:
    return first_step(paper_model(family), family, batch)


def added(spent: Counting, beside: Counting) -> int:
    return spent.ops.total() - beside.ops.total()


@LAW(("family", "u"), [("sd15", 0.803e12), ("sdxl", 6.761e12)])
def test_the_plain_step_is_what_the_limits_say(family, u):
    """Two rows of U each in one call, and no sync but at the run's beginning."""
    spent = plain(family)
    assert spent.flops == pytest.approx(2 * u, rel=1e-3) and spent.unet_calls == 1
    assert spent.attention == {FUSED: 2 * LAYERS[family]}


# cached reference -------------------------------------------------------------------------------------------------------------


def injected(family: str, keeps: Keeps = Keeps.AUTO, **how: object) -> object:
    with on_paper():
        return inject(paper_model(family), paper_bank(family, keeps), **how)


@cache
def cached(family: str, **how: object) -> Counting:
    return first_step(injected(family, **how), family)


@LAW(
    ("family", "halves", "bound"),
    [
        ("sd15", "cond only", 1.02),
        ("sd15", "both", 1.04),
        ("sd15", "shared", 1.04),
        ("sdxl", "cond only", 1.025),
        ("sdxl", "both", 1.05),
    ],
)
def test_a_quarter_of_the_photo_costs_a_fiftieth(family, halves, bound):
    assert 1.01 < cached(family, halves=halves).flops / plain(family).flops <= bound


@LAW(("halves", "more"), [("cond only", 0.0040), ("both", 0.0080)])
def test_hidden_states_are_half_the_memory_and_are_projected_at_every_step(halves, more):
    hidden, kept = cached("sd15", keeps=Keeps.HIDDEN, halves=halves), cached("sd15", halves=halves)
    assert (hidden.flops - kept.flops) / plain("sd15").flops == pytest.approx(more, rel=0.02)
    assert added(hidden, kept) == 2 * LAYERS["sd15"]
    assert paper_bank("sd15").bytes == 2 * paper_bank("sd15", Keeps.HIDDEN).bytes


@LAW("keeps", [Keeps.AUTO, Keeps.HIDDEN])
@LAW("halves", ["cond only", "both", "shared"])
def test_ops_of_a_cached_step(halves, keeps):
    """On a GPU, where one picture of SD1.5 is bound by launches, these and not FLOPs are what it costs; one comes after the last step."""
    assert added(cached("sd15", halves=halves, keeps=keeps), plain("sd15")) <= 80 + 1


def test_ops_of_a_weight():
    """Its bias is made once for all layers of a grid, and not again; the five layers of 4096 tokens join by their sums, four ops each."""
    again = cached("sd15", weight=2.0) and first_step(injected("sd15", weight=2.0), "sd15")
    assert added(again, cached("sd15")) == 5 * 4


def test_a_bank_in_host_memory_takes_a_copy_per_half():
    bank = paper_bank("sd15")
    far = replace(
        bank,
        features={
            half: row.new_zeros(row.shape[1], device="cpu").expand_as(row)
            for half, row in bank.features.items()
        },
    )
    with on_paper():
        model = inject(paper_model("sd15"), far, halves="both")
    assert far.kept and first_step(model, "sd15").ops - cached("sd15", halves="both").ops == {
        "_to_copy": 2
    }


@LAW(
    ("family", "how"),
    [
        ("sd15", {}),
        ("sd15", {"halves": "both"}),
        ("sd15", {"weight": 2.0, "halves": "both"}),
        ("sdxl", {}),
        ("sdxl", {"weight": 2.0, "halves": "both"}),
    ],
    ids=str,
)
def test_a_cached_step_waits_for_nothing(family, how):
    assert cached(family, **how).syncs == plain(family).syncs


def dense(spent: Counting, beside: Counting, tokens: int) -> set[tuple[int, ...]]:
    """What holds a number for each query and each key, and the plain step does not make."""
    return {s for s in spent.shapes - beside.shapes if len(s) > 1 and min(s[-2:]) >= tokens}


@LAW(
    ("family", "how"),
    [
        ("sd15", {}),
        ("sd15", {"weight": 2.0}),
        ("sd15", {"weight": 2.0, "halves": "both"}),
        ("sd15", {"weight": 0.5, "weight_mode": "output blend"}),
        ("sd15", {"weight": 2.0, "weight_mode": "key scale"}),
        ("sdxl", {}),
        ("sdxl", {"weight": 2.0, "halves": "both"}),
    ],
    ids=str,
)
def test_a_cached_step_makes_no_mask_of_all_queries(family, how):
    spent, beside, tokens = cached(family, **how), plain(family), 4096
    assert spent.largest <= beside.largest and not dense(spent, beside, tokens)
    assert (
        set(spent.attention) == {FUSED}
        and spent.attention[FUSED] <= beside.attention[FUSED] + 2 * LAYERS[family]
    )
    assert spent.unet_calls == 1


def test_a_mask_of_all_queries_would_be_seen():
    def full(func, q, k, v, heads, mask=None, **kwargs):
        return func(
            q,
            k,
            v,
            heads,
            mask=None if mask is None else mask.expand(-1, -1, q.shape[1], -1) + 0,
            **kwargs,
        )

    model = injected("sd15", weight=2.0)
    model.model_options["transformer_options"]["optimized_attention_override"] = full
    assert dense(first_step(model, "sd15"), plain("sd15"), 4096) == {(1, 1, 4096, 5120)}


# reference passes -------------------------------------------------------------------------------------------------------------


@LAW(("family", "bound"), [("sd15", 0.96), ("sdxl", 0.92)])
def test_a_live_pass_stops_at_the_last_layer_that_is_read(family, bound):
    """Beside the same step that reads the bank: one row of the photo, and nothing after the last keys and values."""
    bank = paper_bank(family, Keeps.HIDDEN)
    path = replace(bank.trajectory, sigmas=bank.trajectory.sigmas * 1.01)
    with on_paper():
        live = first_step(inject(paper_model(family), replace(bank, trajectory=path)), family)
    assert live.unet_calls == 2
    u = plain(family).flops / 2
    assert 0.5 < (live.flops - cached(family, keeps=Keeps.HIDDEN).flops) / u <= bound


# banks ------------------------------------------------------------------------------------------------------------------------


@LAW(
    ("family", "keeps", "gigabytes"),
    [
        ("sd15", Keeps.HIDDEN, 0.289),
        ("sd15", Keeps.KEYS_VALUES, 0.578),
        ("sdxl", Keeps.HIDDEN, 2.62),
        ("sdxl", Keeps.KEYS_VALUES, 5.24),
    ],
)
def test_a_bank_is_as_large_as_the_formula(family, keeps, gigabytes):
    """Steps x halves x sum over the layers of kept tokens x channels x bytes; there 50, 1 and 2."""
    bank, sites = (
        paper_bank(family, keeps),
        host.attention_sites(paper_model(family).model.diffusion_model),
    )
    tokens = {layer.grid: int(bank.masks[layer.grid].sum()) for layer in bank.layers}
    row = sum(
        tokens[layer.grid] * sites[layer.block].module.attn1.to_k.in_features
        for layer in bank.layers
    )
    row *= 2 if keeps is Keeps.KEYS_VALUES else 1
    assert bank.bytes == 2 * 2 * row * 4 and row * 50 * 2 == pytest.approx(
        gigabytes * 1e9, rel=5e-3
    )


@LAW("keeps", Keeps)
@LAW("precision", ["as computed", "float16"])
@LAW("blocks", ["all", "decoder"])
def test_a_captured_bank_holds_nothing_else(precision, blocks, keeps):
    bank, _ = capture(
        random_model("tiny"),
        photo((12, 16)),
        precision=precision,
        blocks=blocks,
        mask=drawn("sd15")[:, ::4, ::4],
        keeps=keeps.value,
    )
    sites = host.attention_sites(random_model("tiny").model.diffusion_model)
    row = sum(
        int(bank.masks[layer.grid].sum()) * sites[layer.block].module.attn1.to_k.in_features
        for layer in bank.layers
    )
    row *= 1 if keeps is Keeps.HIDDEN else 2
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in bank.features.values()
    }
    assert bank.bytes == STEPS * row * (2 if precision == "float16" else 4) == sum(held.values())


# concepts ---------------------------------------------------------------------------------------------------------------------


@cache
def with_concept(
    family: str, weight: float = 1.0, merge: Merge = Merge.CONCAT, halves: Halves = Halves.COND
) -> Counting:
    model = paper_model(family)
    made = {
        block: (torch.empty(1, 257, site.module.attn2.to_k.out_features, device=META),) * 2
        for block, site in host.attention_sites(model.model.diffusion_model).items()
    }
    config = ConceptInjection(
        {Half.COND: made}, 1, weight, WeightMode.LOGIT_BIAS, merge, 0.0, 1.0, halves
    )
    return first_step(host.inject(model, config), family)


@LAW(
    ("family", "how"),
    [
        ("sd15", {}),
        ("sd15", {"halves": Halves.SHARED}),
        ("sd15", {"weight": 0.3}),
        ("sd15", {"merge": Merge.ADD}),
        ("sdxl", {}),
    ],
    ids=str,
)
def test_a_step_with_a_concept(family, how):
    spent, beside = with_concept(family, **how), plain(family)
    assert (
        1 < spent.flops / beside.flops <= 1.02 and added(spent, beside) <= 5 * LAYERS[family] + 2
    )  # one for the run's end
    assert spent.syncs == beside.syncs and spent.largest == beside.largest
    assert set(spent.attention) == {FUSED}


# stories ----------------------------------------------------------------------------------------------------------------------


@cache
def shared(family: str, **how: object) -> Counting:
    """Four pictures, a quarter of each subject and nothing dropped: sharing alone, past the steps that blend."""
    alone = {"masks": drawn(family), "dropout": 0.0, "query_blend": 0.0, "feature_injection": 0.0}
    with on_paper():
        model = story(paper_model(family), **alone | how)
    return first_step(model, family, 4)


SHARING = LAW(
    "how",
    [{}, {"halves": "cond only"}, {"anchors": 0}, {"anchors": 0, "halves": "cond only"}],
    ids=str,
)


@SHARING
@LAW("family", ["sd15", "sdxl"])
def test_four_pictures_share_for_a_twentieth(family, how):
    spent, beside = shared(family, **how), plain(family, 4)
    assert 1.005 < spent.flops / beside.flops <= (1.05 if family == "sdxl" else 1.07)
    assert (
        spent.largest == beside.largest
        and set(spent.attention) == {FUSED}
        and spent.unet_calls == 1
    )
    assert spent.waits == beside.waits


@SHARING
def test_ops_of_a_shared_layer(how):
    """Those on the device: index tensors are made in host memory."""
    spent, beside = shared("sdxl", **how), plain("sdxl", 4)
    assert spent.places["meta"] - beside.places["meta"] <= 8 * SHARED["sdxl"]


# kernels ----------------------------------------------------------------------------------------------------------------------


def test_no_call_falls_to_written_out_attention():
    """With the kernels of this host: every way a reference, a concept and a story are read."""
    model, ways = (
        random_model("tiny"),
        [
            {},
            {"weight": 2.0},
            {"weight": 2.0, "halves": "both"},
            {"halves": "shared"},
            {"target_mask": torch.ones(1, 8, 8).tril()},
        ],
    )
    for made in (
        *(inject(model, bank_of(), **how) for how in ways),
        concept(inject(model, bank_of(), 0.5), 0.3),
        concept(model, target_mask=torch.ones(1, 8, 8).tril()),
    ):
        with Counting() as spent:
            sample(made, batch=2, start_step=0, last_step=1)
        assert set(spent.attention) == {FUSED}
    for how in ({}, {"weight": 2.0}, {"anchors": 0, "halves": "cond only"}):
        with Counting() as spent:
            pictures(story(model, feature_injection=0.0, **how), start_step=0, last_step=2)
        assert set(spent.attention) == {FUSED}
