"""Cross-Attn Detail Inject against equations (7)-(9) written out by hand in attn2 replacements, with prompts of any length (I12)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kindred.miniature.pack import CHECKPOINT
from kindred.nodes.prompts import SubjectPrompts
from networks import random_model
from studio import concept, counted, differs, encoder_of, negative, plain, prompt, sample, subject

EXACT = 1e-5
TIGHT = 1e-4  # float32 through a few UNet calls, relative to the picture's spread
FELT = 1e-2  # an effect that cannot be rounding
MODEL = random_model("tiny")
LAW = pytest.mark.parametrize


def softmax_attention(q, k, v, heads, bias):
    """Plain arithmetic in float64: q [b n (h d)], k v [b m (h d)], bias [m]."""
    b, n, c = q.shape
    q, k, v = (t.double().reshape(b, -1, heads, c // heads).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(2, 3) / (c // heads) ** 0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, c)


def by_hand(
    model, weight, image, halves="cond only", merge="concat", family="tiny", texts=(77, 77)
):
    """The model with every cross-attention replaced; texts: tokens of the (positive, negative) as the user wrote them."""
    encoder = encoder_of(family)
    photo, black = encoder.encode(image), encoder.encode(image, empty=True)

    def replacement(block, q, k, v, options):
        heads, kinds, out = options["n_heads"], options["cond_or_uncond"], []
        for kind, *own in zip(kinds, *(t.chunk(len(kinds)) for t in (q, k, v))):
            own[1], own[2] = (
                own[1][:, : texts[kind]],
                own[2][:, : texts[kind]],
            )  # without what the host repeated
            more = (
                None
                if kind == 1 and halves == "cond only"
                else black
                if kind == 1 and halves == "both"
                else photo
            )
            text = softmax_attention(*own, heads, torch.zeros(texts[kind]))
            if more is None:
                out.append(text)
                continue
            k_c, v_c = (t.flatten(0, 1).expand(len(own[0]), -1, -1) for t in more[block])
            share = weight / (len(image) if more is photo else 1)
            if merge == "concat":
                bias = torch.cat(
                    (torch.zeros(texts[kind]), torch.full((k_c.shape[1],), share).log())
                )
                out.append(
                    softmax_attention(
                        own[0],
                        torch.cat((own[1], k_c), 1),
                        torch.cat((own[2], v_c), 1),
                        heads,
                        bias,
                    )
                )
            else:
                out.append(
                    text
                    + weight * softmax_attention(own[0], k_c, v_c, heads, torch.zeros(k_c.shape[1]))
                )
        return torch.cat(out).to(q)

    m = model.clone()
    for block in photo:
        m.set_model_attn2_replace(partial(replacement, block), *block)
    return m


@torch.inference_mode()
def compare(family="tiny", weight=2.0, pictures=1, bound=EXACT, tokens=(77, 77), how=None, **more):
    """The node's picture against the written one, and that the subject was felt at all."""
    model, image = random_model(family), subject(pictures)
    how = {
        "positive": prompt(5, family, tokens[0]),
        "uncond": negative(family, tokens[1]),
        "steps": 2,
    } | (how or {})
    mine = sample(concept(model, weight, image, family=family, **more), **how)
    assert (
        differs(
            mine, sample(by_hand(model, weight, image, family=family, texts=tokens, **more), **how)
        )
        < bound
    )
    assert differs(mine, sample(model, **how)) > 1e-3


@LAW("merge", ["concat", "add"])
@LAW("halves", ["cond only", "both", "shared"])
@LAW("cfg", [1.0, 4.0])
def test_the_equations(merge, halves, cfg):
    compare(merge=merge, halves=halves, how={"cfg": cfg})


@LAW("family", ["tiny_v", "tiny_xl"])
@LAW("merge", ["concat", "add"])
def test_the_equations_for_v_prediction_and_sdxls_layout(family, merge):
    compare(family, merge=merge, halves="both")


@LAW("halves", ["cond only", "both", "shared"])
@LAW("merge", ["concat", "add"])
def test_the_equations_for_several_pictures_of_the_subject_and_several_drawn(halves, merge):
    compare(pictures=3, merge=merge, halves=halves, how={"batch": 3, "size": (5, 9)})


def test_by_hand_without_a_concept_is_the_host():
    """The comparison itself: weight 0 by hand is the plain picture."""
    with torch.inference_mode():
        assert differs(sample(by_hand(MODEL, 0.0, subject())), plain()) < EXACT


# the repeat hazard (I12) ----------------------------------------------------------------------------------------------------


@LAW("tokens", [(77, 154), (154, 77), (231, 154), (77, 231), (231, 77)])
@LAW("merge", ["concat", "add"])
def test_prompts_of_unequal_length_weigh_as_the_user_wrote_them(tokens, merge):
    compare(
        tokens=tokens, halves="shared", merge=merge, how={"cfg": 2.0}
    )  # at 4, AVX2 rounds to 1.03e-5


@LAW("tokens", [(77, 154), (154, 231), (231, 77), (77, 8 * 77)])
def test_one_call_of_the_host_or_two(tokens, monkeypatch):
    how = {"positive": prompt(tokens=tokens[0]), "uncond": negative(tokens=tokens[1]), "batch": 2}
    model = concept(MODEL, 2.0, halves="both")
    with counted(MODEL) as joined:
        together = sample(model, **how)
    monkeypatch.setattr(
        type(MODEL), "get_free_memory", lambda self, device: 0
    )  # the host then runs one cond per call
    with counted(MODEL) as split:
        apart = sample(model, **how)
    assert set(split) == {2} and set(joined) == ({2} if tokens[1] > 4 * 77 else {4})
    assert differs(apart, together) < TIGHT and differs(together, sample(MODEL, **how)) > FELT


def test_a_longer_negative_does_not_make_the_subject_fainter():
    """Guidance 4 whose negative is the same text three times: the same picture as with the text once."""
    once = negative()
    thrice = [[once[0][0].repeat(1, 3, 1), once[0][1]]]
    assert differs(sample(MODEL, uncond=thrice), plain()) < TIGHT
    for halves in (
        "cond only",
        "both",
    ):  # uncond's own text stands there three times, so only cond is the same where it reads too
        a, b = (sample(concept(MODEL, 2.0, halves=halves), uncond=u) for u in (thrice, once))
        assert (differs(a, b) < TIGHT) == (halves == "cond only")


# Subject Prompts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(host):
    if not CHECKPOINT.exists():
        pytest.skip("no weights: python -m miniature.train pack writes them")
    with torch.inference_mode():
        return host.CheckpointLoaderSimple().load_checkpoint("kindred_miniature.safetensors")[1]


@torch.inference_mode()
def lines(clip, *prompts):
    return SubjectPrompts.execute(clip, "\n".join(prompts), "cat").result[0]


@LAW("merge", ["concat", "add"])
def test_each_line_of_subject_prompts_is_the_line_alone(clip, merge):
    """Lines of 77, 154 and 231 tokens: 6 chunks each in the batch, and a negative of one."""
    said = (
        "a photo of a cat on the beach",
        "a red cat, " + "very red, " * 40,
        "a blue cat, " + "very blue, " * 70,
    )
    batch = lines(clip, *said)
    assert batch[0][0].shape[:2] == (3, 6 * 77)
    start = 14 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    how = {"disable_noise": True, "uncond": negative(), "steps": 2}
    model = concept(MODEL, 2.0, merge=merge, halves="both")
    together, none = (
        sample(model, positive=batch, latent=start, **how),
        sample(MODEL, positive=batch, latent=start, **how),
    )
    for i, line in enumerate(said):
        alone = sample(model, positive=lines(clip, line), latent=start[i : i + 1], **how)
        assert (
            differs(together[i : i + 1], alone) < TIGHT and differs(alone, none[i : i + 1]) > 1e-3
        )


def test_more_pictures_than_lines_go_round(clip):
    """The host deals lines out again from the first; so do their weights."""
    batch = lines(clip, "a cat", "a red cat, " + "very red, " * 40)
    start = 14 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    how = {"disable_noise": True, "uncond": negative(), "steps": 2, "positive": batch}
    twice = sample(concept(MODEL, 2.0), latent=torch.cat((start, start)), **how)
    assert (
        differs(twice[:2], twice[2:]) < TIGHT
        and differs(twice[:2], sample(concept(MODEL, 2.0), latent=start, **how)) < TIGHT
    )


def test_lines_of_unequal_length_as_negative(clip):
    uneven = lines(clip, "a cat", "a red cat, " + "very red, " * 40)
    start = 14 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    model = concept(MODEL, 2.0, halves="shared")
    out = sample(model, positive=prompt(), uncond=uneven, latent=start, disable_noise=True, steps=2)
    first = sample(
        model,
        positive=prompt(),
        uncond=lines(clip, "a cat"),
        latent=start[:1],
        disable_noise=True,
        steps=2,
    )
    assert differs(out[:1], first) < TIGHT


# several prompts ------------------------------------------------------------------------------------------------------------


def combined(host):
    return prompt() + prompt(6, tokens=154)


def with_area(host):
    """A whole prompt and one for an area of 5 x 6 cells at (1, 2)."""
    return (
        prompt()
        + host.NODE_CLASS_MAPPINGS["ConditioningSetArea"]().append(prompt(6), 48, 40, 16, 8, 1.0)[0]
    )


def with_mask(host):
    mask = torch.zeros(1, 64, 64)
    mask[:, :40, 24:] = 1
    (bounds,) = host.NODE_CLASS_MAPPINGS["ConditioningSetMask"]().append(
        prompt(6), mask, "mask bounds", 1.0
    )
    (whole,) = host.NODE_CLASS_MAPPINGS["ConditioningSetMask"]().append(
        prompt(7), mask, "default", 0.5
    )
    return prompt() + bounds + whole


def timed(host):
    ranged = host.NODE_CLASS_MAPPINGS["ConditioningSetTimestepRange"]()
    return (
        ranged.set_range(prompt(), 0.0, 0.5)[0]
        + ranged.set_range(prompt(6, tokens=154), 0.5, 1.0)[0]
    )


@LAW("several", [combined, with_area, with_mask, timed])
@LAW("halves", ["cond only", "both"])
def test_several_prompts(several, halves, host):
    positive = several(host)
    free = sample(concept(MODEL, 2.0, halves=halves), positive=positive)
    assert differs(free, sample(MODEL, positive=positive)) > FELT
    ones = concept(MODEL, 2.0, halves=halves, target_mask=torch.ones(1, 64, 64))
    assert torch.equal(sample(ones, positive=positive), free)


@LAW("several", [combined, with_area, with_mask, timed])
def test_several_prompts_in_calls_of_their_own(several, host, monkeypatch):
    model, positive = concept(MODEL, 2.0, halves="both"), several(host)
    together = sample(model, positive=positive)
    monkeypatch.setattr(type(MODEL), "get_free_memory", lambda self, device: 0)
    assert differs(sample(model, positive=positive), together) < TIGHT


def test_a_timed_prompt_changes_no_step_but_its_own(host):
    """The concept is heard in the second half alone; the first half is the plain one's."""
    model, positive = concept(MODEL, 2.0, start_percent=0.5), timed(host)
    how = {"positive": positive, "start_step": 0, "last_step": 1}
    assert torch.equal(sample(model, **how), sample(MODEL, **how))
    assert differs(sample(model, positive=positive), sample(MODEL, positive=positive)) > FELT


def test_a_prompt_per_line_beside_a_mask_per_picture(clip):
    batch, masks = (
        lines(clip, "a cat", "a red cat, " + "very red, " * 40),
        torch.stack((torch.zeros(64, 64), torch.ones(64, 64))),
    )
    how = {"positive": batch, "batch": 2, "steps": 2}
    with torch.inference_mode():
        masked = concept(MODEL, 2.0, target_mask=masks)
    out, none, free = (sample(m, **how) for m in (masked, MODEL, concept(MODEL, 2.0)))
    assert torch.equal(out[0], none[0]) and torch.equal(out[1], free[1])
