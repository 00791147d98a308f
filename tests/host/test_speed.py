"""Host laws of what makes a run quick: nothing of it changes a picture (I5, I33), and the host is told what it takes."""

from __future__ import annotations

import logging
from functools import cache, partial

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from kindred.models.attention.fused import FusedAttend
from kindred.models.network.call import Turn
from kindred.models.reference.builder import Keeps
from kindred.models.run import Run
from kindred.nodes.host import SamplerRun, attention, foresight, injected, install, wrappers
from networks import random_model
from studio import (
    bank_of,
    capture,
    concept,
    counted,
    differs,
    inject,
    negative,
    pictures,
    plain,
    prompt,
    sample,
    story,
)

MODEL = random_model("tiny")
LAW = pytest.mark.parametrize
EXACT = 1e-5
IN_ORDER = [
    "euler",
    "euler_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "lcm",
    "ddpm",
    "lms",
    "ipndm",
    "deis",
    "ddim",
]


@pytest.fixture
def reads(monkeypatch):
    """How many noise levels were foreseen, and how many runs were made again."""
    seen = {"foreseen": 0, "runs": 0}
    begin, ahead = SamplerRun.begin, foresight.Foreseen.next

    def counted_begin(self, *args):
        seen["runs"] += 1
        return begin(self, *args)

    def counted_next(self, timestep):
        told = ahead(self, timestep)
        seen["foreseen"] += told is not None
        return told

    monkeypatch.setattr(SamplerRun, "begin", counted_begin)
    monkeypatch.setattr(foresight.Foreseen, "next", counted_next)
    return seen


# noise levels ----------------------------------------------------------------------------------------------------------------


def read_each(monkeypatch):
    monkeypatch.setattr(foresight, "_IN_ORDER", set())


@LAW("sampler", IN_ORDER)
def test_foreseen_noise_levels_are_those_that_are_asked_for(sampler, reads, monkeypatch):
    model = inject(MODEL, bank_of())
    before = reads["runs"]  # of the capture
    found = sample(model, sampler=sampler, steps=4)
    assert reads == {"foreseen": 4, "runs": before + 1}
    read_each(monkeypatch)
    assert (
        torch.equal(found, sample(inject(MODEL, bank_of()), sampler=sampler, steps=4))
        and reads["foreseen"] == 4
    )


@LAW(
    "sampler",
    [
        "heun",
        "dpm_2",
        "dpmpp_sde",
        "uni_pc",
        "dpm_adaptive",
        "dpmpp_2s_ancestral",
        "heunpp2",
        "res_multistep",
    ],
)
def test_samplers_that_ask_otherwise_are_read(sampler, reads):
    assert (
        torch.isfinite(sample(inject(MODEL, bank_of()), sampler=sampler)).all()
        and reads["foreseen"] == 0
    )


def stranger(model, times: float):
    """Another pack's wrapper that asks twice, the first time at a noise level of its own."""
    model = model.clone()

    def twice(executor, x, timestep, options, seed):
        executor(x, timestep * times, options, seed)
        return executor(x, timestep, options, seed)

    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "stranger", twice)
    return model


@LAW(
    "patched",
    [
        lambda m: inject(m, bank_of()),
        lambda m: inject(concept(m), bank_of()),
        lambda m: story(m, feature_injection=0.0),
    ],
    ids=["self", "both", "story"],
)
@LAW("theirs_first", [True, False])
def test_beside_another_wrapper_every_level_is_read(patched, theirs_first, reads, monkeypatch):
    """It may ask for levels of its own, or leave some out as LazyCache does, and keep a state of its own."""
    model = patched(stranger(MODEL, 0.9)) if theirs_first else stranger(patched(MODEL), 0.9)
    how = {"start_step": 0, "last_step": 3}
    before = reads["runs"]
    found = pictures(model, **how)
    assert reads == {"foreseen": 0, "runs": before + 1}
    read_each(monkeypatch)
    assert torch.equal(found, pictures(model, **how))


@LAW("start", [0.0, 0.15])
def test_a_cache_that_skips_steps_is_never_run_twice(start, reads):
    from comfy_extras.nodes_easycache import LazyCacheNode

    cached = LazyCacheNode.execute(
        MODEL, reuse_threshold=1.0, start_percent=start, end_percent=0.95, verbose=False
    ).result[0]
    model, before = inject(cached, bank_of()), reads["runs"]
    assert torch.isfinite(sample(model, steps=10)).all() and reads == {
        "foreseen": 0,
        "runs": before + 1,
    }


class Twice(comfy.samplers.CFGGuider):
    """A guider of another pack, past all wrappers: it asks twice, the first time at a noise level of its own."""

    def __call__(self, x, timestep, *args, **kwargs):
        super().__call__(x, timestep * 0.9, *args, **kwargs)
        return super().__call__(x, timestep, *args, **kwargs)


def guided(model, guider=comfy.samplers.CFGGuider, sigmas=None, sampler=None):
    asks = guider(model)
    asks.set_conds(prompt(), negative())
    asks.set_cfg(4.0)
    with torch.inference_mode():
        return asks.sample(
            torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
            torch.zeros(1, 4, 8, 8),
            sampler or comfy.samplers.ksampler("euler"),
            bank_of().trajectory.sigmas.flip(0) if sigmas is None else sigmas,
            seed=1,
        )


@LAW(
    "patched",
    [lambda m: inject(m, bank_of()), lambda m: inject(concept(m), bank_of())],
    ids=["self", "both"],
)
def test_who_asks_for_levels_of_its_own_gets_the_picture_of_those(
    patched, reads, monkeypatch, caplog
):
    """The guess is checked after the run, and the picture made again where it was wrong; keyframes of hooks begin again."""
    caplog.set_level(logging.INFO)
    began, model = [], patched(MODEL)
    monkeypatch.setattr(wrappers, "begin_keyframes", began.append)
    before = reads["runs"]
    found = guided(model, Twice)
    assert reads["runs"] == before + 2 and "made again" in caplog.text and len(began) == 1
    read_each(monkeypatch)
    assert torch.equal(found, guided(model, Twice))


def test_sigmas_of_any_precision_are_asked_for_once(reads):
    sigmas = bank_of().trajectory.sigmas.flip(0)
    model, before = inject(MODEL, bank_of()), reads["runs"]
    single, double = (
        guided(model, sigmas=sigmas.to(kind)) for kind in (torch.float32, torch.float64)
    )
    assert (
        reads == {"foreseen": 2 * (len(sigmas) - 1), "runs": before + 2}
        and differs(double, single) < EXACT
    )


def test_a_churned_sampler_is_read(reads):
    out = guided(
        inject(MODEL, bank_of()), sampler=comfy.samplers.ksampler("euler", {"s_churn": 2.0})
    )
    assert torch.isfinite(out).all() and reads["foreseen"] == 0


# keys and values kept ----------------------------------------------------------------------------------------------------------


@cache
def bank_that_keeps(keeps, wired=False):
    """Of the shared photo, both halves; wired: with a mask of half the picture."""
    return capture(
        MODEL,
        keeps=keeps.value,
        negative=negative(),
        **({"mask": torch.ones(1, 64, 64).tril()} if wired else {}),
    )[0]


@LAW(
    "way",
    [
        {},
        {"halves": "both"},
        {"halves": "shared"},
        {"weight": 2.0, "halves": "both"},
        {"weight_mode": "key scale", "weight": 2.0},
        {"weight_mode": "post softmax", "weight": 0.5},
        {"weight_mode": "output blend", "weight": 0.5},
    ],
    ids=str,
)
@LAW("wired", [False, True], ids=["found", "wired"])
def test_kept_keys_and_values_give_the_picture_of_hidden_states(way, wired):
    banks = [bank_that_keeps(keeps, wired) for keeps in (Keeps.HIDDEN, Keeps.KEYS_VALUES)]
    assert banks[1].bytes == 2 * banks[0].bytes
    hidden, kept = (sample(inject(MODEL, bank, **way)) for bank in banks)
    assert differs(hidden, kept) < EXACT and differs(kept, plain()) > 1e-3


def test_automatic_keeps_keys_and_values_up_to_its_limit(monkeypatch):
    from kindred.models.reference import builder

    small = capture(MODEL)[0]
    assert small.bytes == capture(MODEL, keeps="keys and values")[0].bytes
    monkeypatch.setattr(builder, "KEYS_VALUES_UP_TO", small.bytes - 1)
    assert 2 * capture(MODEL)[0].bytes == small.bytes


def test_they_serve_a_live_pass_and_a_story_too():
    banks = [bank_that_keeps(keeps) for keeps in (Keeps.HIDDEN, Keeps.KEYS_VALUES)]
    for ways in (
        lambda bank: sample(inject(MODEL, bank), scheduler="karras"),
        lambda bank: pictures(story(MODEL, reference=bank, feature_injection=0.0), steps=3),
    ):
        hidden, kept = map(ways, banks)
        assert differs(hidden, kept) < EXACT


# a share of the tokens ---------------------------------------------------------------------------------------------------------


@LAW("way", [{}, {"weight": 2.0}, {"weight_mode": "output blend", "weight": 0.5}], ids=str)
def test_a_share_of_equal_tokens_is_all_of_them(way, monkeypatch):
    """Where a subject's tokens are one and the same, half of them speaking twice as loud are all of them (I9)."""
    from kindred.models.reference import bank, builder

    kept_of = builder.kept_of

    def equal(block, grid, tokens, kept):
        return kept_of(block, grid, tokens[:, :1].expand_as(tokens), kept)

    for room in (bank, builder):
        monkeypatch.setattr(room, "kept_of", equal)
    mask = torch.ones(1, 64, 64)
    whole, half = (capture(MODEL, mask=mask, token_share=share)[0] for share in (1.0, 0.5))
    assert half.bytes * 2 == whole.bytes and set(half.loudness.values()) == {2.0}
    pictures_of = [sample(inject(MODEL, bank, **way)) for bank in (whole, half)]
    assert differs(*pictures_of) < EXACT and differs(pictures_of[0], plain()) > 1e-3


def test_a_share_is_refused_where_it_leaves_nothing():
    with counted(MODEL) as rows, pytest.raises(ValueError, match="token_share is 0"):
        capture(MODEL, token_share=0.0)
    assert not rows


# weights by sums ---------------------------------------------------------------------------------------------------------------


@LAW(
    "way",
    [
        {"weight": 2.0},
        {"weight": 0.3, "halves": "both"},
        {"weight": 2.0, "target_mask": torch.ones(1, 8, 8).tril()},
    ],
    ids=str,
)
def test_weights_joined_by_sums_give_the_picture_of_the_mask(way, monkeypatch):
    masked = sample(inject(MODEL, bank_of(), **way), batch=2)
    monkeypatch.setattr(attention, "FusedAttend", partial(FusedAttend, shortest=0))
    assert differs(sample(inject(MODEL, bank_of(), **way), batch=2), masked) < EXACT


def test_another_attention_than_torchs_is_never_gone_past(monkeypatch):
    """Sage, flash, xformers or a pack's own: it is asked, with a mask."""
    model, masks = inject(MODEL, bank_of(), 2.0), []
    monkeypatch.setattr(attention, "FusedAttend", None)  # would raise

    def theirs(func, q, k, v, heads, mask=None, **kwargs):
        masks.append(mask is not None)
        return func(q, k, v, heads, mask=mask, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = theirs
    assert torch.isfinite(sample(model)).all() and any(masks)


def test_more_rows_than_torchs_attention_takes_are_left_to_the_host(monkeypatch):
    """Which cuts them, so that CUDA's kernel does not fail."""
    model = inject(MODEL, bank_of(), 2.0)
    meant = sample(model)
    monkeypatch.setattr(attention, "FusedAttend", None)
    with pytest.raises(TypeError):  # so it is asked for
        sample(model)
    monkeypatch.setattr(attention, "SDP_BATCH_LIMIT", 1)
    assert differs(sample(model), meant) < EXACT


@LAW("how", [{"skip_reshape": True}, {"mask": torch.zeros(1)}], ids=["heads apart", "mask"])
def test_an_attention_of_another_layout_or_with_a_mask_is_not_the_blocks(how):
    """It is the caller's own, and the block's is still to come."""
    run, asked = Run(), []
    run.turn = Turn(call := object(), None, due=True)
    options = install({}, run)["transformer_options"]
    options["optimized_attention_override"](
        lambda *given, **more: asked.append(more),
        *(torch.ones(1, 2, 4),) * 3,
        2,
        transformer_options=options,
        **how,
    )
    assert run.due is call and [{key: more[key] for key in how} for more in asked] == [how]


# memory ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def announced(monkeypatch):
    """Bytes that the host was asked to have free, per sampler run."""
    asked, load = [], comfy.model_management.load_models_gpu

    def seen(models, memory_required=0, **kwargs):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", seen)
    return asked


@LAW(
    "patched",
    [
        lambda m: inject(m, bank_of()),
        lambda m: concept(m),
        lambda m: story(m, feature_injection=0.0),
    ],
    ids=["self", "concept", "story"],
)
def test_the_host_is_told_what_an_injection_holds(patched, announced):
    bare, model = random_model("tiny"), patched(MODEL)
    (injection,) = injected(model)
    pictures(bare, steps=2)
    pictures(model, steps=2)
    more = injection.held(model, (3, 4, 8, 8))
    per_row = bare.memory_required([1, 4, 8, 8])
    plain_run, ours = announced[-2:]
    assert 0 < more <= ours - plain_run < more + 2 * per_row


def test_the_bytes_of_a_reference_are_its_row_and_the_longest_keys():
    model = inject(MODEL, bank_of(), halves="both")
    (injection,) = injected(model)
    one, three = (injection.held(model, (n, 4, 8, 8)) for n in (1, 3))
    row = 2 * bank_of().bytes // (2 * len(bank_of().features["cond"]))
    assert one > 2 * row and three > one
