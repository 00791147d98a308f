"""Every inject node beside the host's own patches, before and behind them: both are felt, or a sentence says what to do.

After each cell no run of ours is alive, the input MODEL is as it was, and the plain picture comes back bit for bit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_advanced import (
    ModelSamplingContinuousEDM,
    ModelSamplingDiscrete,
    RescaleCFG,
)
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tcfg import TCFG
from comfy_extras.nodes_tomesd import TomePatchModel
from comfy_extras.nodes_torch_compile import TorchCompileModel, skip_torch_compile_dict
from kindred.nodes.host import model_key
from ours import FELT, MODEL, OURS, READERS, STORIES, TIGHT, alone, leaving_nothing, seeded
from studio import (
    STEPS,
    bank_of,
    capture,
    concept,
    differs,
    inject,
    invert,
    photo,
    pictures,
    sample,
    story,
)
from torch import Tensor
from torch._dynamo import OptimizedModule

LAW = pytest.mark.parametrize
EVERY = tuple(OURS)
MOST = tuple(
    c for c in OURS if c != "story"
)  # FreeU, PAG and SAG beside a story alone: test_story_compose.py
LONG = os.environ.get("KINDRED_LONG") == "1"


@dataclass(frozen=True)
class Row:
    """patch: the neighbour's node; how: what a sampler is given; refused: what stories say to it; columns: those worth a run."""

    patch: Callable[[Any], Any]
    how: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    columns: tuple[str, ...] = EVERY
    live: str = ""  # what a reference read live says to it
    no_one_alone: bool = False  # it changes a picture only by what it does to others'


def soft_mask() -> dict[str, Tensor]:
    """A photo to be inpainted, the mask a slope."""
    return photo(pictures=2) | {"noise_mask": torch.linspace(0, 1, 64).expand(1, 64, 64)}


TILES = "ConsiStory Shared Attention: the model was given 32 pictures at once, but the batch has 2.*remove the node that splits them"
WINDOWS = "ConsiStory Shared Attention: the model was given 1 pictures at once, but the batch has 2.*remove the node that splits them"
GRID = r"ConsiStory Shared Attention: block \w+ \d has \d+ tokens .* where the latent's size makes .*merges or tiles tokens.*remove it"
LIVE = "Kindred: block .* gave 4 tokens where the reference has 4x4. A node that changes the grid .*remove it"
ROWS = {
    "FreeU": Row(lambda m: FreeU.execute(m, 1.3, 1.4, 0.9, 0.2)[0], columns=MOST),
    "FreeU V2": Row(lambda m: FreeU_V2.execute(m, 1.3, 1.4, 0.9, 0.2)[0]),
    "PAG": Row(lambda m: PerturbedAttentionGuidance.execute(m, 2.0)[0], columns=MOST),
    "SAG": Row(lambda m: SelfAttentionGuidance.execute(m, 0.5, 2.0)[0], columns=MOST),
    "HyperTile": Row(
        lambda m: HyperTile.execute(m, 32, 1, 0, False)[0], {"size": (16, 16)}, refused=TILES
    ),
    "ToMe": Row(lambda m: TomePatchModel.execute(m, 0.3)[0], refused=GRID),
    "Deep Shrink": Row(
        lambda m: PatchModelAddDownscale.execute(m, 2, 2.0, 0.0, 0.5, True, "bilinear", "bilinear")[
            0
        ],
        refused=GRID,
        live=LIVE,
    ),
    "context windows": Row(
        lambda m: ContextWindowsManualNode.execute(
            m, 1, 0, "standard_static", 1, False, "pyramid", 0, False
        )[0],
        refused=WINDOWS,
        no_one_alone=True,
    ),
    "Differential Diffusion": Row(
        lambda m: DifferentialDiffusion.execute(m, 1.0)[0], {"latent": soft_mask()}
    ),
    "RescaleCFG": Row(lambda m: RescaleCFG().patch(m, 0.7)[0], columns=("all",)),
    "Mahiro": Row(lambda m: Mahiro.execute(m)[0], columns=("all",)),
    "TCFG": Row(lambda m: TCFG.execute(m)[0], columns=("all",)),
}
CELLS = [(row, column) for row, told in ROWS.items() for column in told.columns]


@pytest.fixture(autouse=True)
def nothing_is_left():
    with leaving_nothing():
        yield


@cache
def neighbour_alone(row: str, steps: int) -> tuple[Tensor, str]:
    return seeded(lambda: pictures(ROWS[row].patch(MODEL), (0, 1), steps=steps, **ROWS[row].how))


@LAW(("row", "column"), CELLS)
def test_both_are_felt_in_either_order_or_a_sentence_says_what_to_do(row, column):
    ours, theirs, how = OURS[column], ROWS[row].patch, ROWS[row].how
    refused = (
        ROWS[row].refused if column in STORIES else ROWS[row].live if column == "self live" else ""
    )
    if refused:
        for model in (ours(theirs(MODEL)), theirs(ours(MODEL))):
            with pytest.raises(ValueError, match=refused):
                ours.sampled(model, **how)
        return
    (before, left), (behind, left_behind) = (
        seeded(lambda m=m: ours.sampled(m, **how))
        for m in (ours(theirs(MODEL)), theirs(ours(MODEL)))
    )
    without = ours.sampled(ours(MODEL), **how) if how else alone(column)
    none, left_by_them = neighbour_alone(row, ours.steps)
    assert torch.equal(before, behind) and left == left_behind == left_by_them
    assert differs(before, none) > FELT
    assert (
        differs(before, without) < TIGHT
        if ROWS[row].no_one_alone
        else differs(before, without) > FELT
    )


# what is not the same in either order ----------------------------------------------------------------------------------------


def v_prediction(model):
    return ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]


def zero_terminal(model):
    return ModelSamplingDiscrete().patch(model, "eps", True)[0]


@LAW("sampling", [v_prediction, zero_terminal])
@LAW("column", EVERY)
def test_a_reference_belongs_to_one_kind_of_sampling(sampling, column):
    """Before the reference is made it is part of the model; behind it the reference is refused, with both models named."""
    ours, other = OURS[column], sampling(MODEL)
    model = ours(other, maker=other)
    before, left = seeded(lambda: ours.sampled(model))
    none, left_by_them = seeded(lambda: pictures(other, (0, 1), steps=ours.steps))
    assert left == left_by_them
    if column in READERS:
        words = (
            r"was made with model SD15 \w+, but the model given is SD15 \w+: sampling \(.*differs\."
            r" Wire a MODEL with the same sampling node"
        )
        with pytest.raises(ValueError, match=words):
            ours(other)
        with pytest.raises(ValueError, match=words):
            ours.sampled(sampling(ours(MODEL)))
    else:
        assert torch.equal(ours.sampled(sampling(ours(MODEL))), before)
    assert differs(before, none) > FELT < differs(before, alone(column))


def edm(least, kind="edm"):
    return lambda model: ModelSamplingContinuousEDM().patch(model, kind, 80.0, least)[0]


SAMPLINGS = {
    "v": v_prediction,
    "zsnr": zero_terminal,
    "v edm": edm(0.002, "v_prediction"),
    "edm": edm(0.002),
}
WINDOWED = {
    "cross from": lambda m: concept(m, 2.0, start_percent=0.1),
    "cross until": lambda m: concept(m, 2.0, end_percent=0.1),
    "blending": lambda m: story(m, feature_injection=0.0, blend_end_percent=0.1),
    "injecting from": lambda m: story(m, injection_start_percent=0.45, injection_end_percent=0.9),
    "injecting until": lambda m: story(m, injection_start_percent=0.1, injection_end_percent=0.45),
}


@LAW("sampling", SAMPLINGS)
@LAW("node", WINDOWED)
def test_percents_are_of_the_schedule_that_is_sampled(sampling, node):
    """Whether the node that changes the schedule stands before ours or behind."""
    theirs, ours, how = (
        SAMPLINGS[sampling],
        WINDOWED[node],
        {"who": (0, 1), "steps": 7, "scheduler": "normal"},
    )
    before, behind = (pictures(m, **how) for m in (ours(theirs(MODEL)), theirs(ours(MODEL))))
    assert torch.equal(before, behind) and differs(before, pictures(theirs(MODEL), **how)) > (
        0 if sampling == "zsnr" else FELT
    )


@LAW("window", [{"start_percent": 0.45}, {"end_percent": 0.45}], ids=str)
def test_percents_of_a_reference_too(window):
    """The least sigma belongs to the schedule, not to what the reference was made with."""
    made, sampled = edm(0.002)(MODEL), edm(2.0)
    bank, how = capture(made, steps=STEPS)[0], {"steps": 7, "scheduler": "normal"}
    before, behind = (
        sample(m, **how)
        for m in (
            inject(sampled(made), bank, 2.0, **window),
            sampled(inject(made, bank, 2.0, **window)),
        )
    )
    assert torch.equal(before, behind) and differs(before, sample(sampled(made), **how)) > FELT


@LAW("skipping", [EasyCacheNode, LazyCacheNode])
@LAW("first", [True, False])
@LAW("column", EVERY)
def test_calls_that_are_skipped_carry_what_was_injected_before_and_stories_say_so(
    skipping, first, column, caplog
):
    """A story alone may be skipped as a whole: then its pictures are the neighbour's, and the log says why."""
    ours = OURS[column]

    def theirs(model):
        return skipping.execute(model, 3.0, 0.0, 1.0, False)[
            0
        ]  # as bold as it goes: nearly every call it may skip

    (out, left), (none, left_by_them) = (
        seeded(lambda m=m: ours.sampled(m))
        for m in (ours(theirs(MODEL)) if first else theirs(ours(MODEL)), theirs(MODEL))
    )
    assert torch.isfinite(out).all() and differs(out, alone(column)) > FELT and left == left_by_them
    assert column in ("sharing", "story") or differs(out, none) > FELT
    assert bool(re.search("EasyCache, LazyCache|LazyCache does this", caplog.text)) == (
        column in STORIES
    )


# torch.compile -------------------------------------------------------------------------------------------------------------


def compiled(model, backend: str = "eager"):
    """As the host's node does it: its guards forget the options, patches among them."""
    m = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(
        model=m, backend=backend, options={"guard_filter_fn": skip_torch_compile_dict}
    )
    return m


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_model_that_was_compiled_and_run_without_us_still_reads_what_is_injected(fresh_compiler):
    """And back: what was compiled for one is never run for the other."""
    model, ours = compiled(MODEL), OURS["all"]
    none = pictures(model, (0, 1), steps=1)
    assert differs(none, pictures(MODEL, (0, 1), steps=1)) < TIGHT
    meant, left = seeded(lambda: ours.sampled(ours(MODEL)))
    for patched in (ours(model), compiled(ours(MODEL))):
        out, left_by_us = seeded(lambda m=patched: ours.sampled(m))
        assert differs(out, meant) < TIGHT and left_by_us == left
    assert torch.equal(pictures(model, (0, 1), steps=1), none)


def module_compiled(model, backend: str = "eager"):
    """As other packs' nodes do it: the compiled network as an object patch, which stands in the model's place from its first run on."""
    m = model.clone()
    m.add_object_patch(
        "diffusion_model", torch.compile(m.get_model_object("diffusion_model"), backend=backend)
    )
    return m


def blocks_compiled(model):
    """The same for every transformer block by itself: no smaller part of the network can be asked by the host once it is compiled."""
    m, unet = model.clone(), model.get_model_object("diffusion_model")
    for name, module in unet.named_modules():
        if isinstance(module, BasicTransformerBlock):
            m.add_object_patch(f"diffusion_model.{name}", torch.compile(module, backend="eager"))
    return m


@LAW("way", [module_compiled, blocks_compiled])
@LAW(
    "stance",
    [
        "force_eager",
        pytest.param(
            "default",
            marks=pytest.mark.skipif(not LONG, reason="half a minute: KINDRED_LONG=1 runs it"),
        ),
    ],
)
def test_a_network_that_another_pack_compiled_is_read_and_stands_in_nobodys_way(
    stance, way, fresh_compiler
):
    """Also once it ran, and for the plain MODEL of the same checkpoint: the host leaves it there until another model runs."""
    model, reads, key = way(MODEL), bank_of(steps=1), model_key(MODEL)
    meant, none = (pictures(m, (0, 1), steps=1) for m in (inject(MODEL, reads, 2.0), MODEL))
    with torch.compiler.set_stance(
        stance
    ):  # force_eager: the module that torch.compile gives, of which nothing is traced
        assert differs(pictures(inject(model, reads, 2.0), (0, 1), steps=1), meant) < TIGHT
    assert differs(meant, none) > FELT
    assert any(
        isinstance(module, OptimizedModule) for module in MODEL.model.diffusion_model.modules()
    )
    for node in (lambda m: inject(m, reads), concept, story):
        assert model_key(node(model)) == key == model_key(node(MODEL))


class Around(torch.nn.Module):
    """Another pack's network that computes with the UNet and is none."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.dtype = unet, unet.dtype

    def forward(self, *args, **kwargs):
        return self.unet(*args, **kwargs)


def around(model):
    m = model.clone()
    m.add_object_patch("diffusion_model", Around(m.get_model_object("diffusion_model")))
    return m


def test_a_network_of_another_packs_own_is_refused_in_words_and_the_plain_model_is_read():
    """Once it ran it stands in the plain MODEL's place too, until that one runs."""
    theirs, words = (
        around(MODEL),
        r"(the model given is SD15 \(Around, .*|does not know the network Around\. )Remove the node that puts a network of its own",
    )
    pictures(theirs, (0, 1), steps=1)
    assert isinstance(MODEL.model.diffusion_model, Around)
    for node in (capture, invert, lambda m: inject(m, bank_of()), concept, story):
        with pytest.raises(ValueError, match=words):
            node(theirs)
    assert capture(MODEL)[0].model_key == bank_of().model_key
    pictures(theirs, (0, 1), steps=1)
    patched = [node(MODEL) for node in (lambda m: inject(m, bank_of()), concept, story)]
    for model in patched:
        with pytest.raises(ValueError, match=words):
            pictures(around(model), (0, 1), steps=4)


@pytest.mark.skipif(not LONG, reason="minutes: KINDRED_LONG=1 runs it")
def test_one_compiled_model_serves_one_node_after_the_other(fresh_compiler):
    """What was compiled for a reference is not run for a story."""
    model = compiled(MODEL)
    for column in ("self cached", "story", "self live", "cross", "all"):
        assert differs(OURS[column].sampled(OURS[column](model)), alone(column)) < TIGHT, column


@pytest.mark.skipif(not LONG, reason="minutes: KINDRED_LONG=1 runs it")
@LAW("column", EVERY)
def test_wherever_the_compiler_stands(column, fresh_compiler):
    model, ours = compiled(MODEL), OURS[column]
    pictures(model, (0, 1), steps=1)
    for patched in (
        ours(model),
        compiled(ours(MODEL)),
        ours(compiled(MODEL)),
        ours(module_compiled(MODEL)),
        module_compiled(ours(MODEL)),
    ):
        assert differs(ours.sampled(patched), alone(column)) < TIGHT


@pytest.mark.skipif(not LONG, reason="minutes: KINDRED_LONG=1 runs it")
def test_the_hosts_own_compiler(fresh_compiler):
    ours = OURS["all"]
    model = TorchCompileModel.execute(MODEL, "inductor")[0]
    none = pictures(model, (0, 1), steps=ours.steps)
    assert differs(none, pictures(MODEL, (0, 1), steps=ours.steps)) < FELT
    for patched in (ours(model), TorchCompileModel.execute(ours(MODEL), "inductor")[0]):
        assert differs(ours.sampled(patched), alone("all")) < FELT
