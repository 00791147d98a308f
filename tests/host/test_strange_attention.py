"""Every inject node beside packs that change the rows and keys of cross-attention (strange_attention.py): right, or a sentence."""

from __future__ import annotations

import pytest
import strange_attention
import torch
from kindred.models import injection
from ours import FELT, MODEL, OURS, TIGHT, alone, leaving_nothing
from strange_attention import couple, more_keys
from studio import (
    capture,
    coarse,
    concept,
    differs,
    negative,
    pictures,
    plain,
    prompt,
    prompts_of,
    sample,
    story,
)

LAW = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def nothing_is_left():
    with leaving_nothing():
        yield


# regional prompts -------------------------------------------------------------------------------------------------------------

SCENE = prompt()
SAME, OTHER = SCENE[0][0], prompt(6)[0][0]
LONG = torch.cat((OTHER, SAME), 1)


@LAW("both", [False, True])
@LAW("regions", [1, 2])
@LAW("halves", ["cond only", "both"])
def test_a_photo_in_regions_of_one_prompt_is_the_photo_without_regions(regions, halves, both):
    """Whichever rows the copies stand in, cond reads the photo in all of them, and uncond in none or its own."""
    meant = sample(concept(MODEL, 2.0, halves=halves))
    for text in (None, SAME) if not both else (None,):
        outs = [
            sample(m)
            for m in (
                concept(couple(MODEL, [text] * regions, both), 2.0, halves=halves),
                couple(concept(MODEL, 2.0, halves=halves), [text] * regions, both),
            )
        ]
        assert torch.equal(*outs) and differs(outs[0], meant) < TIGHT
    assert differs(meant, plain()) > FELT


@LAW("region", [OTHER, LONG], ids=["short", "long"])
def test_every_region_reads_the_photo_as_the_prompt_does(region):
    """Two prompts change places: the mean is the same, and neither's copies in the longer text make the photo louder."""
    outs = []
    for base, other in ((SAME, region), (region, SAME)):
        model, how = concept(couple(MODEL, [other]), 2.0), {"positive": [[base, {}]]}
        outs.append(sample(model, **how))
        assert torch.equal(outs[-1], sample(couple(concept(MODEL, 2.0), [other]), **how))
    assert differs(*outs) < TIGHT
    assert (
        differs(outs[0], sample(couple(MODEL, [region])))
        > FELT
        < differs(outs[0], sample(concept(MODEL, 2.0)))
    )


def test_regions_of_several_pictures():
    """The rows of each prompt copied as a whole; a picture's copies beside one another are refused with the numbers."""
    ours = OURS["cross"]
    assert differs(ours.sampled(couple(ours(MODEL), [None])), alone("cross")) < TIGHT
    with pytest.raises(
        ValueError,
        match=r"Cross-Attn Detail Inject: .*cross-attention patch gives block \w+ \d 6 rows where the model was "
        r"given 4 \(2 prompts of 2 pictures\).*Remove that node",
    ):
        ours.sampled(couple(ours(MODEL), [OTHER], alternate=True))


def test_the_word_is_followed_in_the_rows_of_its_own_text():
    """Captured in regions of one prompt the mask and the features are those without; in altered texts the word is lost, in words."""
    meant, mask = capture(MODEL, negative=negative())
    text = coarse()[0][0]
    for model in (couple(MODEL, [text]), couple(MODEL, [text, text])):
        bank, found = capture(model, negative=negative())
        assert torch.equal(found, mask)
        assert all(
            differs(bank.features[half], meant.features[half]) < TIGHT for half in meant.features
        )
    capture(couple(MODEL, [OTHER]), negative=negative())
    with pytest.raises(
        ValueError,
        match="Ref-UNet Feature Capture: another node replaces the cross-attention .*Wire a mask",
    ):
        capture(couple(MODEL, [OTHER], strength=0.9), negative=negative())


@LAW("column", ["sharing", "story", "all"])
def test_a_story_in_regions_of_one_prompt_is_the_story(column):
    ours = OURS[column]
    for both in (False, True):
        for model in (
            ours(couple(MODEL, [None, None], both)),
            couple(ours(MODEL), [None, None], both),
        ):
            assert differs(ours.sampled(model), alone(column)) < TIGHT


# keys that are not the text's -------------------------------------------------------------------------------------------------


@LAW("column", ["sharing", "story", "all"])
def test_a_story_whose_text_is_halved_is_refused_in_words(column):
    ours = OURS[column]
    how = {"positive": prompts_of(2, tokens=154), "uncond": negative(tokens=154)}
    for model in (
        ours(strange_attention.halved_keys(MODEL)),
        strange_attention.halved_keys(ours(MODEL)),
    ):
        with pytest.raises(
            ValueError,
            match=r"ConsiStory Shared Attention: another node's cross-attention patch leaves 77 keys .* where "
            r"the text has 154 tokens.*NegPip.*Wire masks",
        ):
            ours.sampled(model, **how)
    masked = story(strange_attention.halved_keys(MODEL), masks=torch.ones(1, 64, 64))
    assert (
        differs(
            pictures(masked, (0, 1), **how),
            pictures(strange_attention.halved_keys(MODEL), (0, 1), **how),
        )
        > FELT
    )


def test_a_capture_whose_text_is_halved_is_refused_in_words_whatever_the_other_prompt():
    """Beside a negative of twice its length the halved text has as many keys as it had tokens."""
    for uncond in (negative(tokens=154), negative(tokens=308)):
        with pytest.raises(
            ValueError,
            match="Ref-UNet Feature Capture: another node replaces the cross-attention .*Wire a mask",
        ):
            capture(
                strange_attention.halved_keys(MODEL), positive=coarse(tokens=154), negative=uncond
            )


@LAW("tokens", [4, 77, 100])
def test_an_adapters_keys_behind_the_text_are_not_the_word(tokens):
    """However many they are: the map is that of the word's own keys, and a story is told beside them in either order."""
    beside = torch.randn(1, tokens, SAME.shape[-1], generator=torch.Generator().manual_seed(2))
    theirs, maps, ask = more_keys(MODEL, beside), [], injection.token_weights

    def weights(positions, keys, device):
        maps.append((positions, keys))
        return ask(positions, keys, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(injection, "token_weights", weights)
        capture(theirs, negative=negative())
    assert maps == [([[5]], 77 + tokens)]
    outs = [pictures(m, (0, 1)) for m in (story(theirs), more_keys(story(MODEL), beside))]
    assert torch.equal(*outs) and differs(outs[0], pictures(theirs, (0, 1))) > FELT
