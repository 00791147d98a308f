"""Every inject node beside packs that copy a block's forward, run references of their own or change own keys (strange_attention.py)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from kindred.models.attention.weights import WeightMode
from kindred.models.network.call import Half
from kindred.nodes.host import page
from kindred.nodes.host.foreign import hand_once, hands_on
from kindred.nodes.host.model import KEY
from ours import FELT, MODEL, OURS, TIGHT, leaving_nothing
from ours import alone as undisturbed
from strange_attention import (
    alone,
    copied,
    deaf,
    fewer_keys,
    left_in_the_class,
    own_reference,
    style_aligned,
)
from strangers import BLOCKS
from studio import (
    anchors,
    bank_of,
    capture,
    differs,
    inject,
    invert,
    negative,
    pictures,
    plain,
    sample,
    story,
)

LAW = pytest.mark.parametrize
UNET = MODEL.model.diffusion_model
NAMES = {
    "self cached": "Masked Self-Attn Inject",
    "self live": "Masked Self-Attn Inject",
    "cross": "Cross-Attn Detail Inject",
    "sharing": "ConsiStory Shared Attention",
    "story": "ConsiStory Shared Attention",
}


@pytest.fixture(autouse=True)
def nothing_is_left():
    with leaving_nothing():
        yield
    assert not any(module._forward_pre_hooks for module in UNET.modules())


# a copy of a block's forward --------------------------------------------------------------------------------------------------


@LAW("column", OURS)
def test_in_a_copy_of_the_blocks_forward_ours_is_read_bit_for_bit(column):
    """Also where the copy was left in the class by a node that is long gone; and the plain picture is the plain picture."""
    meant = undisturbed(column)
    with left_in_the_class(copied, MODEL):
        out = OURS[column].sampled(OURS[column](MODEL))
        none = sample(MODEL)
    assert torch.equal(out, meant) and torch.equal(none, plain())


def test_in_a_copy_of_one_blocks_forward_it_is_read_too():
    m, name = MODEL.clone(), "diffusion_model.middle_block.1.transformer_blocks.0"
    m.add_object_patch(name + ".forward", copied.__get__(m.get_model_object(name)))
    assert torch.equal(sample(inject(m, bank_of(), 2.0)), sample(inject(MODEL, bank_of(), 2.0)))


def test_a_capture_in_a_copy_of_the_blocks_forward_is_the_capture():
    meant, mask = capture(MODEL, negative=negative())
    with left_in_the_class(copied, MODEL):
        bank, found = capture(MODEL, negative=negative())
    assert torch.equal(found, mask) and all(
        torch.equal(bank.features[half], meant.features[half]) for half in Half
    )


def test_its_neighbours_kernels_stay_unasked():
    """The copy tells its attentions nothing, so a kernel that another node wired is not asked, with ours silent or without."""
    seen = []

    def counted(model):
        m = model.clone()

        def override(func, *args, **kwargs):
            seen.append(func)
            return func(*args, **kwargs)

        m.model_options["transformer_options"]["optimized_attention_override"] = override
        return m

    with left_in_the_class(copied, MODEL):
        sample(counted(inject(MODEL, bank_of(), 2.0)))
        assert not seen
    sample(counted(inject(MODEL, bank_of(), 2.0)))
    assert seen


def test_a_run_that_ends_in_the_middle_of_a_block_leaves_nothing_on_it():
    """An interrupt between our last patch and the attention: no hook stays, and the next picture is as ever."""

    def breaks(self, x, context=None, transformer_options=None):
        n = self.norm1(x)
        for patch in transformer_options.get("patches", {}).get("attn1_patch", ()):
            patch(
                n,
                n,
                n,
                {k: v for k, v in transformer_options.items() if "patches" not in k}
                | {"n_heads": self.n_heads},
            )
        raise InterruptProcessingException

    with left_in_the_class(breaks, MODEL), pytest.raises(InterruptProcessingException):
        sample(inject(MODEL, bank_of(), 2.0))
    assert not any(module._forward_pre_hooks for module in UNET.modules())
    assert torch.equal(sample(MODEL), plain())


class Asked(torch.nn.Module):
    """An attention that keeps the options of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x, context=None, transformer_options=None):
        self.seen.append(transformer_options)


class Open(Asked):
    def forward(self, x, **more):
        self.seen.append(more.get("transformer_options"))


class Closed(Asked):
    def forward(self, x, context=None):
        self.seen.append(None)


@LAW("kind", [Asked, Open])
def test_an_attention_is_told_once_whoever_asks_it_next(kind):
    layer, options = kind(), {KEY: "a run"}
    assert hand_once(layer, options) is not None
    layer(0), layer(0)
    assert layer.seen == [options, None] and not layer._forward_pre_hooks
    hand_once(layer, options)()
    layer(0)
    assert layer.seen[2:] == [None] and not layer._forward_pre_hooks


def test_an_attention_that_its_caller_tells_by_name_or_by_place_is_left_alone():
    """Options without a run are a copy's own, and ours takes their place."""
    layer, ours, theirs = Asked(), {KEY: "ours"}, {KEY: "theirs"}
    hand_once(layer, ours)
    layer(0, transformer_options=theirs)
    hand_once(layer, ours)
    layer(0, None, theirs)
    for call in (
        lambda: layer(0, 1),
        lambda: layer(0, transformer_options={}),
        lambda: layer(0, transformer_options=None),
    ):
        hand_once(layer, ours)
        call()
    assert layer.seen == [theirs, theirs, ours, ours, ours]


def test_an_attention_that_takes_no_options_is_not_told():
    layer = Closed()
    assert hand_once(layer, {KEY: "a run"}) is None and not layer._forward_pre_hooks
    layer.forward = len  # no signature to be read in some Pythons, none with options in the others
    assert hand_once(layer, {KEY: "a run"}) is None


def test_the_hosts_own_forward_is_known_by_where_it_is_written():
    block = UNET.middle_block[1].transformer_blocks[0]
    assert hands_on(block)
    for forward in (copied, alone, len):
        with left_in_the_class(forward, MODEL):
            assert not hands_on(block)


# where nothing can be read ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_the_page(monkeypatch):
    """What the page shows under the node that runs, 7; each is sent once to show and once to keep."""
    told, kept = [], []
    server = SimpleNamespace(
        client_id="a page",
        send_progress_text=lambda text, node, client: told.append((node, client, text)),
        send_sync=lambda event, data, client: kept.append((event, data, client)),
    )
    monkeypatch.setattr(page, "PromptServer", SimpleNamespace(instance=server))
    with CurrentNodeContext("a prompt", "7"):
        yield told
    assert [(event, data["node"], client, data["text"]) for event, data, client in kept] == [
        ("kindred.text", *sent) for sent in told
    ]
    warnings = {data["warning"] for _, data, _ in kept if data["warning"]}
    said = {line for *_, text in told for line in text.split("\n")}
    assert {line for line in said if "had no effect" in line} <= warnings <= said
    assert not any("is read live" in warning for warning in warnings)  # a note, and no mistake


@LAW(
    ("forward", "column"),
    [
        (forward, column)
        for forward in (alone, deaf)
        for column in NAMES
        if (forward, column) != (alone, "self live")
    ],
)
def test_a_run_that_read_nothing_ends_with_a_warning_on_the_node(
    forward, column, on_the_page, caplog
):
    """Once, with the node's name and the remedy; the picture is the plain one."""
    ours, none = OURS[column], pictures(MODEL, (0, 1), steps=OURS[column].steps)
    model = ours(MODEL)
    with left_in_the_class(forward, MODEL):
        out = ours.sampled(model)
    assert differs(out, none) < TIGHT
    words = (
        f"{NAMES[column]}: it had no effect on these pictures, because no block read it at any step"
    )
    assert [(node, client) for node, client, text in on_the_page if words in text] == [
        ("7", "a page")
    ]
    assert (
        caplog.text.count(words) == 1
        and "computes the network's attention by itself" in caplog.text
    )
    assert "ends before" not in caplog.text
    if column == "story" and forward is deaf:
        assert (
            "the subject's word could not be followed, so no features are injected" in caplog.text
        )


@LAW(
    "ours",
    [
        lambda m: OURS["self live"].sampled(OURS["self live"](m)),
        lambda m: capture(m, negative=negative()),
        lambda m: capture(m, None, None, inversion=invert(MODEL)[0]),
    ],
    ids=["live", "capture", "replay"],
)
def test_a_reference_pass_that_saw_nothing_is_refused_in_words(ours):
    with (
        left_in_the_class(alone, MODEL),
        pytest.raises(ValueError, match="saw nothing of .*middle 0.* in a copy of its own"),
    ):
        ours(MODEL)


@LAW("column", OURS)
def test_where_something_was_read_nothing_is_warned_of(column, on_the_page, caplog):
    undisturbed.cache_clear()
    undisturbed(column)
    perturbed = PerturbedAttentionGuidance.execute(OURS[column](MODEL), 2.0)[0]
    OURS[column].sampled(perturbed)
    assert "had no effect on these pictures" not in caplog.text
    costs = "the reference is read live in" if column == "self live" else None
    assert all(costs and costs in text for *_, text in on_the_page), on_the_page


# which pass counts ------------------------------------------------------------------------------------------------------------

DRAWN = torch.zeros(1, 64, 64)
DRAWN[:, 16:48, 16:48] = 1


def same_bank(a, b):
    rows = [(a.features[half], b.features[half]) for half in a.features]
    rows += [(a.anchors.outputs, b.anchors.outputs)] + [
        (a.anchors.first[half], b.anchors.first[half]) for half in a.anchors.first
    ]
    pairs = [pair for x, y in rows for pair in zip(x, y, strict=True)] + [
        (a.anchors.features, b.anchors.features)
    ]
    return all(torch.equal(x, y) for x, y in pairs) and all(
        torch.equal(a.masks[grid], b.masks[grid]) for grid in a.masks
    )


@LAW("how", [{"masks": DRAWN}, {}], ids=["masks", "word"])
def test_anchors_are_those_of_the_picture_where_a_pack_runs_a_reference_of_its_own_first(how):
    """Inside one call of the model the last pass counts: its reference changes no picture, so no anchor either."""
    meant, bank = anchors(story(MODEL, **how))
    for model in (own_reference(story(MODEL, **how)), story(own_reference(MODEL), **how)):
        out, other = anchors(model)
        assert torch.equal(out, meant) and same_bank(other, bank)


def test_between_calls_the_first_counts():
    """PAG asks again, perturbed, after each: at the first noise level the anchors are those without it."""
    kept = [
        anchors(m)[1]
        for m in (
            story(MODEL, masks=DRAWN, feature_injection=0.0),
            PerturbedAttentionGuidance.execute(
                story(MODEL, masks=DRAWN, feature_injection=0.0), 2.0
            )[0],
        )
    ]
    assert all(
        torch.equal(kept[0].features[half][-1], kept[1].features[half][-1])
        for half in kept[0].features
    )
    assert not torch.equal(kept[0].features[Half.COND][0], kept[1].features[Half.COND][0])


def test_a_capture_keeps_the_last_pass():
    """Another pack's network that runs a reference of its own first, as an object patch: those are left to a reference pass."""
    m, unet = MODEL.clone(), UNET
    forward = unet.forward

    def twice(x, *args, **kwargs):
        forward(torch.full_like(x, 0.5), *args, **kwargs)
        return forward(x, *args, **kwargs)

    m.add_object_patch("diffusion_model.forward", twice)
    meant, mask = capture(MODEL, negative=negative())
    bank, found = capture(m, negative=negative())
    assert torch.equal(found, mask) and all(
        torch.equal(bank.features[half], meant.features[half]) for half in Half
    )


# how many of its own keys a query sees ----------------------------------------------------------------------------------------

WIDE = (16, 16)


def shares(how, neighbour=None):
    """Per block, what share of the softmax the reference has where all tokens are alike."""
    seen, cross, bank = {}, [], bank_of(steps=1)
    kept = {layer.block: len(bank.kept[layer.grid]) for layer in bank.layers}
    model = inject(neighbour(MODEL) if neighbour else MODEL, bank, halves="both", **how)

    def override(func, q, k, v, heads, mask=None, **kwargs):
        options = kwargs["transformer_options"]
        block = *options["block"], options["block_index"]
        if not cross[-1]:
            bias = torch.zeros(1, 1, 1, 1) if mask is None else mask.float()
            share = bias.expand(-1, -1, -1, k.shape[1]).softmax(-1)[..., -kept[block] :].sum(-1)
            seen.setdefault(block, set()).add(round(share.flatten()[0].item(), 5))
        return func(q, k, v, heads, mask=mask, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    for attention, number in (("attn1", 0), ("attn2", 1)):
        model.set_model_patch(
            lambda n, context, value, options, number=number: (
                cross.append(number),
                (n, context, value),
            )[1],
            f"{attention}_patch",
        )
    sample(model, steps=1, size=WIDE)
    return {block: max(found) for block, found in seen.items() if len(found) == 1}


NEIGHBOURS = {
    "HyperTile": lambda m: HyperTile.execute(m, 32, 1, 2, False)[0],
    "token merging": lambda m: TomePatchModel.execute(m, 0.5)[0],
    "half of the keys": fewer_keys,
    "a quarter": lambda m: fewer_keys(m, 4),
    "Deep Shrink": lambda m: PatchModelAddDownscale.execute(
        m, 2, 2.0, 0.0, 1.0, True, "bilinear", "bilinear"
    )[0],
}


@LAW("neighbour", NEIGHBOURS)
@LAW("mode", [WeightMode.LOGIT_BIAS, WeightMode.POST_SOFTMAX, WeightMode.KEY_SCALE])
def test_a_references_share_is_that_without_what_takes_own_keys_away(neighbour, mode):
    how = {"weight": 2.0, "weight_mode": mode.value}
    meant, found = shares(how), shares(how, NEIGHBOURS[neighbour])
    assert meant.keys() == found.keys() == {*BLOCKS}
    for block, share in meant.items():
        assert found[block] == pytest.approx(share, abs=3e-5), block


def test_what_lengthens_the_own_keys_leaves_a_references_odds():
    """Another node's reference stands beside ours as a second one of ours would: own to ours is as ever."""
    ours, beside = shares({"weight": 2.0}), shares({"weight": 2.0}, style_aligned)
    assert ours.keys() == beside.keys() == {*BLOCKS}
    for block, share in ours.items():  # theirs are as many as the own
        assert beside[block] / (1 - beside[block]) == pytest.approx(
            share / (1 - share) / 2, rel=1e-3
        )


@LAW("column", ["sharing", "story", "all"])
def test_a_story_beside_lengthened_keys_is_refused_with_what_was_lengthened(column):
    ours = OURS[column]
    for model in (ours(style_aligned(MODEL)), style_aligned(ours(MODEL))):
        with pytest.raises(
            ValueError,
            match=r"ConsiStory Shared Attention: in block .* another node lengthened them \(StyleAligned",
        ):
            ours.sampled(model)
    with pytest.raises(
        ValueError,
        match=r"another node shortened the keys of self-attention: block \w+ \d has \d+ keys for \d+ tokens",
    ):
        ours.sampled(ours(fewer_keys(MODEL)))


def test_beside_a_pack_that_adds_keys_in_a_copy_of_the_forward_both_are_felt():
    """As Reference ControlNets do it: the copy, and what it adds to the keys by a patch of its own."""
    theirs = style_aligned(MODEL)
    with left_in_the_class(copied, MODEL):
        outs = [
            pictures(m, (0, 1))
            for m in (
                inject(theirs, bank_of(steps=5), 2.0),
                style_aligned(inject(MODEL, bank_of(steps=5), 2.0)),
            )
        ]
        none = pictures(theirs, (0, 1))
    assert torch.equal(*outs) and differs(outs[0], none) > FELT < differs(
        outs[0], pictures(inject(MODEL, bank_of(steps=5), 2.0), (0, 1))
    )
