"""Paper B on every transformer of the host: laws on tiny random networks, one row per family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from kindred.models.story.matching import Comparison
from kindred.nodes.host import joint
from kindred.nodes.host.sites import require_backbone
from matrix import split_calls
from test_transformers import FAMILIES, FELT, SAME, apart
from tiny_networks import READ, prompt, tiny
from torch import Tensor
from transformer_stories import BLACK, SHARING, WHITE, WORD, pictures, plain, prompts_of, story

LAW = pytest.mark.parametrize
every_family = LAW("name", FAMILIES)
SEVERAL = 5e-4  # of the greatest value: what rounding may do through guidance and two stages


@every_family
def test_the_others_are_felt_and_gone_with_the_node(name: str) -> None:
    """By sharing alone; and another picture beside it makes another picture."""
    model = story(name, **SHARING)
    shared, other = pictures(model, name), pictures(model, name, (0, 3, 2))
    assert all(apart(a, b) > FELT for a, b in zip(shared, plain(name)))
    assert apart(other[0], shared[0]) > FELT
    assert torch.equal(pictures(tiny(name), name), plain(name))


@every_family
def test_where_nothing_is_shared_no_bit_changes(name: str) -> None:
    """Strength 0, all hidden, black masks, an anchors' mask that is black, one picture alone."""
    mine = torch.cat([BLACK, BLACK, WHITE])
    for inputs in (
        {"strength": 0.0},
        {"dropout": 1.0, **SHARING},
        {"masks": BLACK},
        {"masks": mine},
    ):
        assert torch.equal(pictures(story(name, **inputs), name), plain(name)), inputs
    assert torch.equal(pictures(story(name), name, (0,)), plain(name, (0,)))


@every_family
def test_outside_of_their_windows_blending_and_injection_change_no_bit(name: str) -> None:
    """The first step is all of the blending's window, and there the word is not known yet."""
    never = {"injection_start_percent": 0.98, "injection_end_percent": 0.99}
    first = {"query_blend": 0.9, "blend_end_percent": 0.0, "masks": None}
    shared = pictures(story(name, **SHARING), name)
    assert torch.equal(pictures(story(name, **never, query_blend=0.0), name), shared)
    by_word = pictures(story(name, **SHARING | {"masks": None}), name)
    assert torch.equal(pictures(story(name, **SHARING | first), name), by_word)


@every_family
def test_the_order_of_the_pictures_is_irrelevant(name: str) -> None:
    """All read all, queries blended; of features, whose matches may flip by rounding, small_unet's laws tell."""
    order = (2, 0, 3, 1)
    model = story(name, anchors=0, feature_injection=0.0)
    one, other = pictures(model, name, range(4)), pictures(model, name, order)
    assert apart(other, one[list(order)]) < SEVERAL and apart(other, one) > FELT


@every_family
def test_extras_change_neither_the_anchors_nor_one_another(name: str) -> None:
    model = story(name, dropout=0.5, feature_injection=0.0)
    two, four, other = (pictures(model, name, who) for who in ((0, 1), range(4), (0, 1, 3)))
    assert apart(four[:2], two) < SEVERAL and apart(other[:2], two) < SEVERAL
    assert apart(other[2:], four[3:]) < SEVERAL


@every_family
def test_equal_pictures_stay_as_they_are_and_the_text_keeps_its_share(name: str) -> None:
    """Equal prompts and noise under white masks; plain concatenation dims the text of a joint softmax."""
    who, how = (1, 1, 1), {"cfg": 1.0}
    alone = pictures(tiny(name), name, who, **how)
    white = {"masks": WHITE, "weight": 3.0, "blocks": "all"} | SHARING
    kept, dimmed = (
        pictures(story(name, text_share=share, **white), name, who, **how)
        for share in ("kept", "plain")
    )
    joint = require_backbone(tiny(name), "test").joint
    assert apart(kept, alone) < SAME and (apart(dimmed, alone) > FELT) is joint


@every_family
@LAW("how", [
    {"cfg": 1.0}, {"sampler": "heun"}, {"sampler": "dpmpp_2m_sde"}, {"steps": 4},
], ids=str)  # fmt: skip
def test_it_is_felt_however_one_samples(name: str, how: dict[str, Any]) -> None:
    """With all that a story does: blending, two stages, injection."""
    told, without = (pictures(m, name, (0, 1), **how) for m in (story(name), tiny(name)))
    assert told.isfinite().all() and apart(told, without) > FELT


@every_family
def test_cond_and_uncond_in_one_call_or_in_two(name: str) -> None:
    """Without features, whose matches may flip by rounding."""
    model = story(name, halves="cond only", feature_injection=0.0)
    together = pictures(model, name, (0, 1))
    with split_calls():
        two = pictures(model, name, (0, 1))
    assert apart(two, together) < SEVERAL


@every_family
def test_blended_queries_and_injected_features_are_felt(name: str) -> None:
    who, white = (0, 1), SHARING | {"masks": WHITE, "weight": 3.0, "blocks": "all"}
    blend = {"query_blend": 1.0, "query_blend_end": 1.0, "blend_end_percent": 1.0}
    shared, blended, injected = (
        pictures(story(name, **white | more), name, who)
        for more in ({}, blend, {"feature_injection": 0.8})
    )
    assert apart(blended, shared) > FELT / 10 and apart(injected, shared) > FELT


@every_family
def test_the_word_finds_the_subject(name: str) -> None:
    """Without masks the pictures share where they look at the word; the first step is plain, since nothing is known."""
    model = story(name, masks=None, weight=3.0, blocks="all")
    one_step = pictures(model, name, steps=1)
    assert torch.equal(one_step, pictures(tiny(name), name, steps=1))
    assert apart(pictures(model, name), plain(name)) > FELT


@LAW("name", ["Flux", "SD3.5", "ZImage", "Anima"])
def test_several_subjects_are_read_by_their_like(name: str) -> None:
    """The same word twice is that word once; two words are another story than either."""
    model, who = story(name, masks=None, **SHARING), (0, 1, 2)
    once, twice, two, other = (
        pictures(model, name, positive=prompts_of(name, who, *words))
        for words in ((WORD,), (WORD, WORD), (WORD, WORD + 1), (WORD + 1,))
    )
    assert apart(twice, once) < SEVERAL
    assert apart(two, once) > FELT and apart(two, other) > FELT


@every_family
@LAW("inside", [False, True])
def test_an_interrupted_run_leaves_nothing(name: str, inside: bool) -> None:
    """Neither the host's interrupt between two calls nor an error inside of the network."""
    from comfy.model_management import InterruptProcessingException

    model, calls = story(name), []

    def fail(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise InterruptProcessingException()
        return executor(*args, **kwargs)

    kind = WrappersMP.APPLY_MODEL if inside else WrappersMP.PREDICT_NOISE
    failing = model.clone()
    failing.add_wrapper_with_key(kind, "fails", fail)
    with pytest.raises(InterruptProcessingException):
        pictures(failing, name)
    assert torch.equal(pictures(tiny(name), name), plain(name))
    assert torch.equal(pictures(model, name), pictures(story(name), name))


@LAW("name", ["Flux", "SD3.5", "ZImage", "Anima", "PixArtSigma"])
def test_what_pictures_are_compared_by_lies_as_the_picture_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of the tap [b c y x]: one changed token of what it answers is one changed cell."""
    seen, read, answered = [], Comparison.read, joint._BlockCall.answered

    def noted(comparison: Comparison, h: Tensor, *rest: Any) -> None:
        seen.append(h.clone())
        read(comparison, h, *rest)

    def marked(call: Any, out: Tensor) -> Tensor:
        out = out.clone()
        _, columns = READ[name].grid
        out[:, call.picture(out).start + 2 * columns + 1] = 100.0
        return answered(call, out)

    monkeypatch.setattr(Comparison, "read", noted)
    monkeypatch.setattr(joint._BlockCall, "answered", marked)
    pictures(story(name), name, (0, 1))
    h = seen[0]
    assert h.shape[2:] == READ[name].grid
    assert (h == 100.0).all(1).nonzero().tolist() == [[i, 2, 1] for i in range(2)]


def test_prompts_without_a_subject_are_refused() -> None:
    with pytest.raises(ValueError, match="marks no subject word, and no masks are wired"):
        unmarked = [[torch.cat([prompt("Flux")[0][0]] * 2), prompt("Flux")[0][1]]]
        pictures(story("Flux", masks=None), "Flux", (0, 1), positive=unmarked)
