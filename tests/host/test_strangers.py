"""Every inject node beside another pack that does what the popular ones do (strangers.py), in both orders of application."""

from __future__ import annotations

from functools import partial

import pytest
import strangers
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from kindred.nodes.host import model_key
from ours import FELT, MODEL, OURS, TIGHT, alone, leaving_nothing, seeded
from strangers import BLOCKS, adapter
from studio import (
    MOMENTS,
    STEPS,
    bank_of,
    capture,
    concept,
    differs,
    inject,
    negative,
    pictures,
    sample,
    story,
)

LAW = pytest.mark.parametrize
COLUMNS = ("self cached", "self live", "cross", "sharing", "story", "all")  # all: cached
CHAINED = [
    strangers.patches,
    strangers.wrappers,
    strangers.fast_kernel,
    strangers.block_forward,
    strangers.guidance,
]


@pytest.fixture(autouse=True)
def nothing_is_left():
    with leaving_nothing():
        yield


@LAW("stranger", CHAINED)
@LAW("column", COLUMNS)
def test_what_chains_is_felt_in_either_order(stranger, column):
    """Both effects are there, nothing that the stranger attends to by itself is joined by ours, and no random state is moved."""
    ours, seen = OURS[column], []
    (before, left), (behind, left_behind), (none, left_by_them) = (
        seeded(lambda m=m: ours.sampled(m))
        for m in (ours(stranger(MODEL, seen)), stranger(ours(MODEL), seen), stranger(MODEL, []))
    )
    assert torch.equal(before, behind) and left == left_behind == left_by_them
    assert differs(before, alone(column)) > FELT < differs(before, none)
    if stranger is strangers.patches:
        assert seen and all(seen)
    elif stranger is strangers.wrappers:
        assert {*seen} == {
            WrappersMP.OUTER_SAMPLE,
            WrappersMP.PREPARE_SAMPLING,
            WrappersMP.SAMPLER_SAMPLE,
            WrappersMP.PREDICT_NOISE,
            WrappersMP.CALC_COND_BATCH,
            WrappersMP.APPLY_MODEL,
            WrappersMP.DIFFUSION_MODEL,
            "model_function_wrapper",
        }
    elif stranger is strangers.fast_kernel:
        assert {*seen} == {
            "fast",
            "host",
        }  # ours asks with masks: they find their way to the host's function
    else:
        assert seen


def test_both_halves_are_heard_at_cfg_1_where_another_pack_wants_them():
    seen, ours = [], OURS["self cached"]
    out = ours.sampled(strangers.guidance(ours(MODEL), seen), cfg=1.0)
    assert {*seen} == {2} and differs(
        out, pictures(strangers.guidance(MODEL, []), (0, 1), steps=STEPS, cfg=1.0)
    ) > FELT


# replaced self-attention -----------------------------------------------------------------------------------------------------


def same(hands_on):
    """A replacement that is the plain attention."""

    def f(q, k, v, options):
        return optimized_attention(
            q, k, v, options["n_heads"], **({"transformer_options": options} if hands_on else {})
        )

    return f


def replaced(model, f):
    m = model.clone()
    for block in BLOCKS:
        m.set_model_attn1_replace(f, *block)
    return m


@LAW("hands_on", [False, True])
@LAW("column", ["self cached", "self live", "all"])
def test_beside_a_plain_replacement_of_self_attention_ours_is_ours(hands_on, column):
    ours = OURS[column]
    for model in (ours(replaced(MODEL, same(hands_on))), replaced(ours(MODEL), same(hands_on))):
        assert differs(ours.sampled(model), alone(column)) < TIGHT


@LAW("read", [STEPS, MOMENTS], ids=["cached", "live"])
@LAW("hands_on", [False, True])
def test_what_another_adapter_adds_to_self_attention_stays_its_own_beside_ours(hands_on, read):
    """f + (ours - plain) in every layer: written out by hand, in the place of a replacement that hands nothing on."""
    reads = bank_of(steps=read)

    def both(kernel):
        def f(q, k, v, options):
            return kernel(q, k, v, options) + 0.7 * strangers.own(q, None, options["n_heads"])

        return f

    meant = sample(inject(replaced(MODEL, both(same(False))), reads, 2.0))
    outs = [
        sample(m)
        for m in (
            inject(adapter(MODEL, hands_on=hands_on), reads, 2.0),
            adapter(inject(MODEL, reads, 2.0), hands_on=hands_on),
        )
    ]
    assert torch.equal(*outs) and differs(outs[0], meant) < TIGHT
    assert (
        min(differs(outs[0], sample(m)) for m in (adapter(MODEL), inject(MODEL, reads, 2.0), MODEL))
        > FELT
    )


@LAW("attention", ["attn1", "attn2"])
def test_beside_an_adapter_that_hands_its_options_on_silence_is_its_own_bit_for_bit(attention):
    theirs = adapter(MODEL, attention)
    none = sample(theirs)
    for model in (
        inject(theirs, capture(theirs, negative=negative())[0], 0.0),
        inject(theirs, bank_of(steps=MOMENTS), 0.0),
        concept(theirs, 0.0),
        inject(theirs, bank_of(), 2.0, start_percent=0.4, end_percent=0.5),
    ):
        assert torch.equal(sample(model), none)


@LAW("attention", ["attn1", "attn2"])
@LAW("column", ["self cached", "cross", "story", "all"])
def test_adapters_on_either_side_of_ours_add_up(attention, column):
    """Theirs twice, ours between: the second application finds the first, not us, in its place."""
    ours = OURS[column]
    outs = [
        ours.sampled(m)
        for m in (
            adapter(ours(adapter(MODEL, attention, 0.3)), attention, 0.4),
            ours(adapter(MODEL, attention, 0.7)),
        )
    ]
    assert differs(*outs) < TIGHT
    assert (
        differs(outs[0], alone(column))
        > FELT
        < differs(outs[0], pictures(adapter(MODEL, attention), (0, 1), steps=ours.steps))
    )


def test_a_story_blends_queries_and_mixes_features_through_a_replacement():
    theirs = adapter(MODEL)
    less = [{"query_blend": 0.0, "query_blend_end": 0.0}, {"feature_injection": 0.0}]
    told = [pictures(story(theirs, **how), (0, 1)) for how in ({}, *less)]
    assert (
        all(differs(told[0], other) > FELT for other in told[1:])
        and differs(told[0], pictures(theirs, (0, 1), steps=MOMENTS)) > FELT
    )


# a latent cut into tiles -----------------------------------------------------------------------------------------------------

TALL, CORNER = (16, 8), torch.zeros(1, 16, 8)
CORNER[:, :8] = 1
TILED = {"two calls": strangers.tiles, "one call": partial(strangers.tiles, stacked=True)}
ELSEWHERE = torch.tensor([13.1, 1.17, 0.0])
TOLD = {
    "cached": lambda m: inject(m, bank_of(steps=1), 2.0),
    "live": lambda m: inject(m, capture(MODEL, sigmas=ELSEWHERE)[0], 2.0),
    "two references": lambda m: inject(
        inject(m, bank_of(steps=1), 2.0), bank_of(steps=1, seed=4), 0.5, halves="both"
    ),
    "cross": lambda m: concept(m, 2.0),
}


@LAW("told", TOLD)
def test_every_tile_reads_the_whole_subject(told, caplog):
    """Tiles that do not meet are pictures of their own: what the model gives for both is what it gives for each."""
    caplog.set_level("INFO")
    ours, noise = (
        TOLD[told],
        14 * torch.randn(2, 4, *TALL, generator=torch.Generator().manual_seed(1)),
    )

    def drawn(model, latent):
        return sample(model, steps=1, latent=latent, disable_noise=True)

    each = torch.cat([drawn(ours(MODEL), half) for half in noise.chunk(2, 2)], 2)
    for way in TILED.values():
        assert differs(drawn(way(ours(MODEL), []), noise), each) < TIGHT
    assert differs(each, drawn(strangers.tiles(MODEL, []), noise)) > FELT
    assert ("is read live" in caplog.text) == (told == "live")


@LAW("column", ["self cached", "self live", "cross"])
def test_beside_tiles_that_overlap_both_are_felt(column):
    ours = OURS[column]

    def theirs(model):
        return strangers.tiles(model, [], overlap=2)

    before, behind = (
        ours.sampled(ours(theirs(MODEL)), size=TALL),
        ours.sampled(theirs(ours(MODEL)), size=TALL),
    )
    assert torch.equal(before, behind)
    assert (
        differs(before, pictures(theirs(MODEL), (0, 1), steps=ours.steps, size=TALL))
        > FELT
        < differs(before, ours.sampled(ours(MODEL), size=TALL))
    )


@LAW("way", TILED)
@LAW("node", ["self", "cross"])
def test_a_target_mask_is_refused_where_the_latent_is_cut(node, way):
    """It lies over the whole picture, and nobody says which part of that a tile is."""

    def ours(model):
        return (
            concept(model, target_mask=CORNER)
            if node == "cross"
            else inject(model, bank_of(steps=1), target_mask=CORNER)
        )

    for model in (TILED[way](ours(MODEL), []), ours(TILED[way](MODEL, []))):
        with pytest.raises(
            ValueError,
            match="a target mask needs whole pictures.*8x8 of a latent of 16x8: tiled diffusion.*Remove that",
        ):
            sample(model, steps=1, size=TALL)


@LAW("way", TILED)
@LAW("column", ["story", "all"])
def test_a_story_is_refused_where_the_latent_is_cut(column, way):
    ours = OURS[column]
    for model in (TILED[way](ours(MODEL), []), ours(TILED[way](MODEL, []))):
        with pytest.raises(
            ValueError, match="ConsiStory.*given 8x8 of a latent of 16x8.*remove the node that cuts"
        ):
            ours.sampled(model, size=TALL)


# where ours cannot be read ---------------------------------------------------------------------------------------------------


def test_a_layer_without_keys_is_refused_in_words():
    """Layered diffusion and IP-Adapter crash on it; whoever reads nothing there is not concerned."""
    for model in (
        inject(strangers.layered(MODEL), bank_of()),
        strangers.layered(inject(MODEL, bank_of())),
        inject(strangers.layered(MODEL), bank_of(steps=MOMENTS)),
        strangers.layered(inject(MODEL, bank_of(steps=MOMENTS))),
    ):
        with pytest.raises(
            ValueError,
            match="Layered in the place of the attention of block middle 0.*to_k.*Remove that node, or choose",
        ):
            sample(model)
    decoder = strangers.layered(inject(MODEL, bank_of(), 2.0, blocks="decoder"))
    assert differs(sample(decoder), sample(strangers.layered(MODEL))) > FELT
    assert (
        differs(sample(concept(strangers.layered(MODEL), 2.0)), sample(strangers.layered(MODEL)))
        > FELT
    )


def test_a_key_does_not_depend_on_what_ran_before():
    """The host leaves a model's objects in the shared network until another model runs."""
    key = model_key(MODEL)
    sample(strangers.layered(MODEL))
    assert model_key(MODEL) == key == model_key(strangers.layered(MODEL)) and "Layered" in str(
        MODEL.model.diffusion_model.middle_block
    )


def test_a_block_that_is_computed_past_the_host_is_said_once(caplog):
    caplog.set_level("INFO")
    silent = strangers.in_silence(inject(MODEL, bank_of(), 2.0))
    blocks = "input 1, input 3, output 0-3"
    assert (
        differs(sample(silent), sample(inject(MODEL, bank_of(), 2.0, blocks=blocks))) < TIGHT
    )  # the others are read
    assert caplog.text.count("computes the self-attention of block middle 0 by itself") == 1
    caplog.clear()
    sample(strangers.in_silence(inject(MODEL, bank_of(), 2.0, blocks="decoder")))
    sample(strangers.in_silence(concept(MODEL, 2.0)))
    assert "by itself" not in caplog.text  # nothing should have been read there


def test_pag_in_its_own_pass_is_said_once(caplog):
    """Its perturbed pass has no self-attention in the middle, reference or not: as its authors mean it."""
    caplog.set_level("INFO")
    sample(PerturbedAttentionGuidance.execute(inject(MODEL, bank_of(), 2.0), 2.0)[0])
    assert caplog.text.count("PAG does so in its own pass") == 1


def test_a_kernel_that_refuses_masks_refuses_in_its_own_words():
    """Ours needs a mask where a weight is not 1; at weight 1 none is asked for."""
    with pytest.raises(RuntimeError, match="this kernel knows no masks"):
        sample(inject(strangers.strict_kernel(MODEL, []), bank_of(), 2.0))
    assert (
        differs(
            sample(inject(strangers.strict_kernel(MODEL, []), bank_of(), 1.0)),
            sample(inject(MODEL, bank_of(), 1.0)),
        )
        < TIGHT
    )


def test_keys_that_another_node_lengthened_are_named_as_such():
    """StyleAligned lets every picture read all of the first one beside its own."""
    model = MODEL.clone()

    def aligned(n, context, value, options):
        first = context[:1].expand(len(context), -1, -1)
        return n, torch.cat((context, first), 1), torch.cat((value, first), 1)

    model.set_model_attn1_patch(aligned)
    with pytest.raises(
        ValueError,
        match=r"each picture has 32 keys where its own 4x4 tokens make 16: another node lengthened them "
        r"\(StyleAligned.*Remove that node",
    ):
        pictures(story(model), (0, 1))
    assert torch.isfinite(pictures(model, (0, 1))).all()
