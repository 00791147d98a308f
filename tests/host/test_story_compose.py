"""Host laws of stories beside everything else: ControlNet, LoRA, neighbours, regions, segments, inpainting, long prompts, real photos."""

from __future__ import annotations

from functools import cache

import comfy.controlnet
import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_freelunch import FreeU
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from kindred.models.network.call import Half
from kindred.models.reference.bank import ReferenceBank
from kindred.nodes.host import REPEATS, SUBJECT
from networks import build_model
from stories import FELT, MODEL, SHARING, TIGHT, plain, told
from studio import (
    MOMENTS,
    SIZE,
    anchors,
    bank_of,
    capture,
    coarse,
    concept,
    counted,
    differs,
    inject,
    negative,
    passes,
    photo,
    pictures,
    prompt,
    prompts_of,
    story,
)

LAW = pytest.mark.parametrize


# ControlNet and LoRA ---------------------------------------------------------------------------------------------------------


class Nudge(comfy.controlnet.ControlBase):
    """A ControlNet that adds a pattern in the middle: its lists are emptied by the UNet that reads them."""

    def pre_run(self, model, percent_to_timestep_function) -> None:
        pass

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return {"input": [], "middle": [pattern()], "output": []}


def pattern() -> torch.Tensor:
    return torch.randn(1, 64, 1, 1, generator=torch.Generator().manual_seed(9))


def controlled(conditioning: list, control: Nudge) -> list:
    """As Apply ControlNet leaves it: the same object on positive and negative."""
    return [
        [cross, extras | {"control": control, "control_apply_to_uncond": False}]
        for cross, extras in conditioning
    ]


def test_both_passes_of_a_step_see_the_same_control():
    """The pattern added by a patch, which no pass can use up, draws the same bits."""
    control = Nudge()
    how = {
        "positive": controlled(prompts_of(3), control),
        "uncond": controlled(negative(), control),
    }

    def nudged(model):
        m = model.clone()
        m.model_options["transformer_options"].setdefault("patches", {})[
            "middle_block_after_patch"
        ] = [lambda args: {"h": args["h"] + pattern()}]
        return m

    out = pictures(story(MODEL), **how)
    assert torch.equal(pictures(MODEL, **how), pictures(nudged(MODEL)))
    assert torch.equal(out, pictures(nudged(story(MODEL))))
    assert differs(out, told()) > FELT and differs(out, pictures(MODEL, **how)) > FELT


def with_lora(model, seed: int = 0):
    m, key = (
        model.clone(),
        "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn1.to_k.weight",
    )
    delta = torch.randn(
        m.model.diffusion_model.output_blocks[1][1].transformer_blocks[0].attn1.to_k.weight.shape,
        generator=torch.Generator().manual_seed(seed),
    )
    assert m.add_patches({key: ("diff", (delta,))}, 1.0) == [key]
    return m


def test_a_lora_before_or_behind_the_node():
    """The same pictures; and further pictures under the same LoRA."""
    model = build_model("tiny")
    before = pictures(story(with_lora(model)))
    assert torch.equal(pictures(with_lora(story(model))), before) and differs(before, told()) > 1e-3
    _, bank = anchors(story(with_lora(model)), (0, 1))
    assert differs(pictures(story(with_lora(model), reference=bank), [2]), before[2:]) < TIGHT
    assert torch.equal(pictures(story(model)), told())


# other nodes -----------------------------------------------------------------------------------------------------------------


def test_the_packs_other_injections_in_any_order():
    """All of them read at once: the order of the nodes is not felt, each of them is; the vanilla pass keeps the others."""

    def self_inject(model):
        return inject(model, bank_of(steps=MOMENTS), 1.5)

    nodes = {"story": story, "self": self_inject, "cross": concept}
    of = {}
    for names in (
        ("story", "self", "cross"),
        ("cross", "self", "story"),
        ("self", "cross"),
        ("story", "cross"),
        ("story", "self"),
    ):
        model = MODEL
        for name in names:
            model = nodes[name](model)
        of[names] = pictures(model)
    one, other, *fewer = of.values()
    assert differs(one, other) < TIGHT and all(differs(one, less) > 1e-3 for less in fewer)


def freeu(model):
    return FreeU.execute(model, 1.3, 1.4, 0.9, 0.2)[0]


def pag(model):
    return PerturbedAttentionGuidance.execute(model, 2.0)[0]


def sag(model):
    return SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]


@LAW("neighbour", [freeu, pag, sag])
def test_guidance_nodes_of_the_host_before_and_behind(neighbour):
    how = {"who": (0, 1), "size": (16, 16)}
    before, behind = (
        pictures(story(neighbour(MODEL)), **how),
        pictures(neighbour(story(MODEL)), **how),
    )
    assert torch.equal(before, behind) and differs(before, pictures(neighbour(MODEL), **how)) > 1e-3
    assert differs(before, pictures(story(MODEL), **how)) > 1e-3


def test_further_pictures_beside_freeu():
    model = story(freeu(MODEL))
    whole, (_, bank) = pictures(model), anchors(model, (0, 1))
    assert differs(pictures(story(freeu(MODEL), reference=bank), [2]), whole[2:]) < TIGHT


def test_what_anchors_leave_is_the_samplers_own_pass():
    """PAG asks the model once more at each level, of a network in which a layer is blind: that pass is not what is kept."""
    told = {"masks": torch.ones(1, 64, 64), "feature_injection": 0.0, "dropout": 0.0}
    banks = [
        anchors(story(model, **told), (0, 1), size=(16, 16))[1] for model in (MODEL, pag(MODEL))
    ]
    noisiest = [bank.features[half][-1] for half in banks[0].features for bank in banks]
    assert len(noisiest) == 4 and all(
        torch.equal(a, b) for a, b in zip(noisiest[::2], noisiest[1::2])
    )
    assert not torch.equal(
        banks[0].features[Half.COND][0], banks[1].features[Half.COND][0]
    )  # later their pictures part


SPLIT = [
    lambda m: ContextWindowsManualNode.execute(
        m, 2, 1, "standard_static", 1, False, "pyramid", 0, False
    )[0],
    lambda m: HyperTile.execute(m, 32, 1, 0, False)[0],
]


@LAW("splits", SPLIT, ids=["context windows", "hypertile"])
@LAW("how", [{}, {"masks": torch.ones(1, 64, 64)}], ids=["word", "masks"])
def test_a_node_that_splits_the_pictures_is_named(splits, how):
    """Never silently something else: pictures in windows, or pictures in tiles."""
    for model in (story(splits(MODEL), **how), splits(story(MODEL, **how))):
        with pytest.raises(ValueError, match="ConsiStory Shared Attention: .*(remove|Remove)"):
            pictures(model, range(4), size=(16, 16))


@LAW("how", [{}, {"feature_injection": 0.0}], ids=["stages", "sharing"])
@LAW("sampled", [pictures, anchors])
def test_deep_shrink_is_named(sampled, how):
    """Its smaller grids hold other tokens than those that are matched, masked and kept."""
    shrunk = PatchModelAddDownscale.execute(MODEL, 2, 2.0, 0.0, 0.5, True, "bilinear", "bilinear")[
        0
    ]
    with pytest.raises(
        ValueError, match="ConsiStory Shared Attention: .*Deep Shrink.*(remove|Remove)"
    ):
        sampled(story(shrunk, **how), (0, 1), size=(16, 16))


# regions, segments, pictures that begin as something -------------------------------------------------------------------------


def area(host, conditioning: list) -> list:
    """5 x 6 cells at (1, 2)."""
    return host.NODE_CLASS_MAPPINGS["ConditioningSetArea"]().append(
        conditioning, 48, 40, 16, 8, 1.0
    )[0]


def test_area_prompts_beside_whole_ones(host):
    positive = prompts_of(3) + area(host, prompt(6))
    out = pictures(story(MODEL), positive=positive)
    assert differs(out, pictures(MODEL, positive=positive)) > FELT and differs(out, told()) > FELT


def test_an_area_alone_is_left_alone_and_said(host, caplog):
    """A crop's tokens are not the pictures': nothing is shared, and the log says that nothing could be compared."""
    positive = area(host, prompts_of(3))
    assert torch.equal(
        pictures(story(MODEL, halves="cond only"), positive=positive),
        pictures(MODEL, positive=positive),
    )
    assert "ConsiStory Shared Attention" in caplog.text
    with pytest.raises(ValueError, match="ConsiStory Anchor Sampler: .*no whole picture.*Remove"):
        anchors(story(MODEL, halves="cond only"), positive=positive)


def test_two_combined_prompts(monkeypatch):
    """Each shares with its own kind; one call of the model or three."""
    positive = prompts_of(3) + prompts_of((4, 5, 6))
    model = story(MODEL)
    out = pictures(model, positive=positive)
    assert differs(out, pictures(MODEL, positive=positive)) > FELT and differs(out, told()) > FELT
    assert torch.isfinite(
        pictures(model, positive=prompts_of(3) + prompt(6))
    ).all()  # only one of them marks a subject
    monkeypatch.setattr(type(MODEL), "get_free_memory", lambda self, device: 0)
    with counted(MODEL) as rows:
        assert differs(pictures(model, positive=positive), out) < TIGHT
    assert set(rows) == {3}


def test_pictures_that_begin_as_pictures():
    """img2img at half the noise: the windows are of the schedule, and further pictures serve as ever."""
    latent = photo(pictures=3)
    how = {"denoise": 0.5, "latent": latent}
    whole = pictures(story(MODEL, injection_start_percent=0.55, injection_end_percent=0.65), **how)
    shared = pictures(
        story(MODEL, injection_end_percent=0.4), **how
    )  # the window is over before the first step
    assert torch.equal(shared, pictures(story(MODEL, **SHARING), **how))
    assert differs(whole, shared) > 1e-3 < differs(shared, pictures(MODEL, **how))


def test_segments_of_ksampler_advanced():
    """Two segments are one run where nothing runs along: drawn masks, no dropout, one strength of the blend."""
    masks = torch.zeros(3, 64, 64)
    masks[:, 16:48, 8:40] = 1
    steady = story(MODEL, masks=masks, dropout=0.0, query_blend_end=0.9, **SHARING)
    for model, same in ((steady, True), (story(MODEL), False)):
        first = pictures(model, start_step=0, last_step=3)
        second = pictures(
            model, latent={"samples": first}, start_step=3, last_step=10000, disable_noise=True
        )
        assert (
            differs(second, plain()) > FELT and (differs(second, pictures(model)) < TIGHT) == same
        )


def test_inpainting():
    """Outside of the mask the given picture, inside another than the plain one."""
    latent = photo(pictures=3) | {"noise_mask": torch.zeros(1, 64, 64)}
    latent["noise_mask"][:, :, 32:] = 1
    out, none = (pictures(m, latent=latent) for m in (story(MODEL), MODEL))
    assert torch.equal(out[..., :4], none[..., :4]) and differs(out[..., 4:], none[..., 4:]) > FELT


# prompts ---------------------------------------------------------------------------------------------------------------------


def doubled(conditioning: list) -> list:
    """Every text twice, as Subject Prompts lays out a short line beside a long one."""
    ((cross, extras),) = conditioning
    s, w = extras[SUBJECT], cross.shape[1]
    twice = type(s)(
        s.words,
        tuple(p + tuple(i + w for i in p) for p in s.positions),
        tuple(tuple(p + tuple(i + w for i in p) for p in word) for word in s.by_word),
    )
    return [[cross.repeat(1, 2, 1), extras | {SUBJECT: twice, REPEATS: (2,) * len(cross)}]]


def test_a_repeated_text_is_the_text():
    assert differs(pictures(story(MODEL), positive=doubled(prompts_of(3))), told()) < TIGHT


@LAW("tokens", [154, 8 * 77])
def test_a_negative_of_another_length(tokens, monkeypatch):
    """The host repeats the shorter of the two, or calls twice."""
    how = {
        "uncond": negative(tokens=tokens),
        "seed": 2,
    }  # with seed 1 the last bit decides what the story does, on AVX2
    out = pictures(story(MODEL), **how)
    assert differs(out, pictures(MODEL, **how)) > FELT
    monkeypatch.setattr(type(MODEL), "get_free_memory", lambda self, device: 0)
    assert differs(pictures(story(MODEL), **how), out) < TIGHT


def test_one_prompt_for_all_pictures_is_as_many_equal_ones():
    assert torch.equal(
        pictures(story(MODEL), positive=prompts_of((1,))),
        pictures(story(MODEL), positive=prompts_of((1, 1, 1))),
    )


def test_several_subjects_are_the_union_of_each():
    """I32: the order of the words is irrelevant, and a mask is the union of the masks of each."""
    one, other = (
        pictures(story(MODEL), positive=prompts_of(3, by_word=words)) for words in ((5, 9), (9, 5))
    )
    assert differs(one, other) < TIGHT and differs(one, told()) > 1e-3
    alone = story(
        MODEL, **SHARING | {"dropout": 0.999999}
    )  # nothing is left to read, so every way's pictures and maps are the same
    of = [
        anchors(alone, positive=prompts_of(3, by_word=words), steps=2)[1].masks
        for words in ((5,), (9,), (5, 9))
    ]
    assert all(
        torch.equal(of[2][g], of[0][g] | of[1][g]) and not torch.equal(of[0][g], of[1][g])
        for g in of[2]
    )


def test_drawn_masks_need_no_word():
    """I32."""
    masks = torch.zeros(3, 64, 64)
    masks[0, :32], masks[1, :, :32], masks[2, 16:48, 16:48] = 1, 1, 1
    out = pictures(story(MODEL, masks=masks))
    for positive in (prompts_of(3, by_word=(9,)), [[prompts_of(3)[0][0], {}]]):
        assert torch.equal(pictures(story(MODEL, masks=masks), positive=positive), out)
    assert differs(out, told()) > FELT


# photos as anchors (appendix E) ----------------------------------------------------------------------------------------------


@cache
def photos() -> ReferenceBank:
    return capture(MODEL, photo(pictures=2), coarse(), MOMENTS, negative=negative())[0]


@LAW("how", [{}, SHARING, {"halves": "cond only", "dropout": 0.0}], ids=["both", "sharing", "cond"])
def test_photos_cached_and_live(how, monkeypatch):
    cached = pictures(story(MODEL, reference=photos(), **how), (0, 1))
    with passes(MODEL) as rows:
        monkeypatch.setattr(ReferenceBank, "step_of", lambda self, sigma: None)
        live = pictures(story(MODEL, reference=photos(), **how), (0, 1))
    assert (
        differs(live, cached) < TIGHT
        and differs(cached, plain((0, 1))) > FELT
        and len(rows) > 2 * MOMENTS
    )


def test_keys_of_photos_are_aligned_to_their_readers():
    reads = story(MODEL, reference=photos())
    assert (
        differs(pictures(reads), pictures(story(MODEL, reference=photos(), align_keys=False)))
        > 1e-3
    )
    assert (
        differs(pictures(reads, [1]), pictures(reads)[1:2]) < TIGHT
    )  # readers do not see one another
    assert (
        differs(pictures(story(MODEL, reference=photos(), seed=3), [1]), pictures(reads, [1]))
        > 1e-3
    )  # photos drop out too


def test_photos_see_nobody():
    """Two photos are each what they are alone, and who reads them leaves the bank as it was."""
    alone = [
        capture(MODEL, {"samples": photo(pictures=2)["samples"][i : i + 1]}, coarse(), MOMENTS)[0]
        for i in range(2)
    ]
    for row in range(MOMENTS):
        of = photos().tokens(Half.COND, row, torch.device("cpu"), torch.float32)
        each = [bank.tokens(Half.COND, row, torch.device("cpu"), torch.float32) for bank in alone]
        assert all(differs(of[b], torch.cat([e[b] for e in each])) < TIGHT for b in of)


def test_photos_of_another_size_and_schedule():
    for bank in (bank_of(size=(12, 10), steps=MOMENTS), bank_of()):
        assert differs(pictures(story(MODEL, reference=bank), size=SIZE), plain()) > FELT
