"""Host laws of Block Probe: planted blocks are found, nothing is left behind, `blocks = measured` means what was measured."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import torch
from kindred.models.probe.file import load_measurement
from kindred.models.probe.measurement import Measurement
from kindred.models.probe.prober import NODE, Change, Prober, with_reference
from kindred.models.probe.published import PUBLISHED
from kindred.nodes import host
from kindred.nodes.capture import RefUNetCapture
from kindred.nodes.consistory import ConsiStory
from kindred.nodes.host.latents import unframed
from kindred.nodes.host import measured as host_measured
from kindred.nodes.host.measured import measurement_folder
from kindred.nodes.host.sites import require_backbone
from kindred.nodes.inject import MaskedSelfAttnInject
from kindred.nodes.probe import BlockProbe
from networks import build_model, random_model
from studio import capture, coarse, inject, photo, plain
from studio import sample as sample_unet
from tiny_networks import FLUX, READ, Family, build, latent, pooled, prompt, sample, tiny
from torch import Tensor

LAW = pytest.mark.parametrize
UNTURNED = ("SD3", "SD3.5", "AuraFlow")  # positions stand in the hidden states
ROTARY = "Flux"  # of the families that lay FLUX's blocks


@pytest.fixture(autouse=True)
def kept() -> Iterator[Path]:
    """The folder of measurements, gone before and after."""
    folder = measurement_folder()
    shutil.rmtree(folder.parent, ignore_errors=True)
    yield folder
    shutil.rmtree(folder.parent, ignore_errors=True)


@torch.inference_mode()
def measured(
    model: Any, name: str = "", levels: int = 1, pictures: int = 1
) -> tuple[Measurement, str, Tensor]:
    """Block Probe -> what it kept, its report, its chart. Without a name: the tiny UNet."""
    before = {*measurement_folder().glob("*")}
    samples = {"samples": latent(name, seed=21, pictures=pictures)} if name else photo()
    words = prompt(name, seed=4) if name else coarse()
    chart, report = BlockProbe.execute(model, words, samples, levels).result
    (path,) = {*measurement_folder().glob("*")} - before
    return load_measurement(path), report, chart


def passes(model: Any, name: str, prober: Prober | None, x: Tensor, changes: list) -> list[Tensor]:
    """The denoised x [r c y x] of a pass at sigma 0.5 for each (change, block) or None."""

    def loop(denoise: Any, device: torch.device, progress: Any) -> list[Tensor]:
        made = []
        for what in changes:
            if prober is not None:
                prober.change, prober.block = what or (None, None)
            made.append(denoise(x, torch.tensor([0.5])))
        return made

    words = host.read_prompt(model, prompt(name) if name else coarse(), "positive", NODE, 1)
    down = torch.tensor([0.5, 0.0])
    with torch.inference_mode():
        return host.reference_pass(model, x.shape, down, words, None, loop, prober=prober)


# planted blocks ------------------------------------------------------------------------------------


@cache
def planted_flux() -> Any:
    """FLUX's layout: double 1 decides, single 0 adds nothing, single 1 asks nothing of any key."""
    model = build(READ[ROTARY])
    network = model.model.diffusion_model
    decides, adds, asks = network.double_blocks[1], *network.single_blocks
    decides.img_attn.proj.weight.data *= 8
    width = network.hidden_size
    adds.linear2.weight.data[:, :width] = 0
    asks.linear1.weight.data[:width] = 0
    asks.linear1.bias.data[:width] = 0
    return model


def test_in_flux_the_decisive_block_ranks_first_and_the_useless_one_last():
    one = measured(planted_flux(), ROTARY)[0]
    bypassed = one.figures[Change.BYPASSED]
    assert bypassed["single", 0, 0] == 0.0
    assert max(bypassed, key=bypassed.get) == ("double", 1, 0) in one.vital
    assert ("single", 0, 0) not in one.vital and one.figures[Change.LENT]["single", 0, 0] == 0.0


def test_in_flux_a_block_that_asks_no_key_minds_no_position():
    one = measured(planted_flux(), ROTARY)[0]
    moved = one.figures[Change.MOVED]
    assert moved.keys() == {*one.blocks}
    assert moved["single", 1, 0] < 1e-6 and ("single", 1, 0) in one.content
    assert moved["double", 1, 0] > 1e-3
    assert one.figures[Change.BYPASSED]["single", 1, 0] > 1e-3


def test_sd3_holds_its_positions_elsewhere_and_is_told_so():
    model = build(READ["SD3.5"])
    blocks = model.model.diffusion_model.joint_blocks
    blocks[2].x_block.attn.proj.weight.data *= 8
    blocks[0].x_block.attn2.proj.weight.data *= 0
    blocks[0].x_block.attn2.proj.bias.data *= 0
    one, report, _ = measured(model, "SD3.5")
    bypassed = one.figures[Change.BYPASSED]
    assert not one.figures[Change.MOVED] and not one.content and one.measured == one.vital
    assert bypassed["self", 0, 0] == 0.0
    assert max(bypassed, key=bypassed.get) == ("double", 2, 0)
    assert "| double 2 |" in report and "| - |" in report


def test_in_a_unet_the_decisive_block_ranks_first_and_the_useless_one_last():
    model = build_model("tiny")
    sites = host.attention_sites(model.model.diffusion_model)
    decisive, useless = ("output", 2, 0), ("middle", 0, 0)
    sites[decisive].module.attn1.to_out[0].weight.data *= 30
    sites[useless].module.attn1.to_out[0].weight.data *= 0
    one = measured(model)[0]
    bypassed = one.figures[Change.BYPASSED]
    assert {*one.blocks} == {*sites} and not one.figures[Change.MOVED]
    assert bypassed[useless] == 0.0 and max(bypassed, key=bypassed.get) == decisive
    assert useless not in one.measured and decisive in one.measured


# every family --------------------------------------------------------------------------------------


@LAW("name", READ)
def test_every_block_is_measured_in_as_many_passes_as_were_said(name, caplog):
    model = tiny(name)
    calls: list[int] = []
    with caplog.at_level(logging.INFO):
        hook = model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            one = measured(model, name)[0]
        finally:
            hook.remove()
    plan = host.plan_of(model, 1)
    assert one.blocks == plan.blocks and len(calls) == plan.calls
    assert f"{len(plan.blocks)} blocks in {plan.calls} passes" in caplog.text
    assert one.figures[Change.MOVED].keys() == plan.movable
    turning = require_backbone(model, NODE).turn is not None and name not in UNTURNED
    assert plan.movable == ({*plan.blocks} if turning else set())
    for change in Change:
        assert min(one.figures[change].values(), default=1.0) > 0


@LAW("name", READ)
def test_a_pass_in_which_nothing_is_changed_is_the_plain_pass(name):
    model, x = tiny(name), with_reference(unframed(latent(name)))
    (alone,) = passes(model, name, None, x, [None])
    prober = Prober(require_backbone(model, NODE))
    block = host.plan_of(model, 1).blocks[0]
    before, changed, after = passes(model, name, prober, x, [None, (Change.BYPASSED, block), None])
    assert torch.equal(before, alone) and torch.equal(after, alone)
    assert not torch.equal(changed, alone)


@LAW("name", [*READ, ""])
def test_a_picture_that_is_lent_itself_stays_as_it_is(name):
    """In every block: the text keeps its share, so equal tokens twice are equal tokens once."""
    model = tiny(name) if name else random_model("tiny")
    x = (unframed(latent(name)) if name else photo()["samples"]).repeat(2, 1, 1, 1)
    prober = Prober(require_backbone(model, NODE))
    blocks = host.plan_of(model, 1).blocks
    still, *lent = passes(model, name, prober, x, [None, *((Change.LENT, b) for b in blocks)])
    for one in lent:
        assert (one - still).abs().max() <= 2e-5 * still.abs().max()


# nothing is left -----------------------------------------------------------------------------------


@LAW("name", [ROTARY, "SD3.5", ""])
def test_measuring_changes_nothing(name):
    model = tiny(name) if name else random_model("tiny")
    before = sample(model, name) if name else plain()
    measured(model, name)
    after = sample(model, name) if name else sample_unet(model)
    assert torch.equal(before, after)


@LAW("name", [ROTARY, ""])
@LAW("what", [comfy.model_management.InterruptProcessingException(), RuntimeError("stopped")])
def test_a_probe_that_is_interrupted_leaves_nothing(name, what, kept):
    model = tiny(name) if name else random_model("tiny")
    before = sample(model, name) if name else plain()
    calls: list[int] = []

    def breaks(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise what

    hook = model.model.diffusion_model.register_forward_pre_hook(breaks)
    try:
        with pytest.raises(type(what)):
            measured(model, name)
    finally:
        hook.remove()
    after = sample(model, name) if name else sample_unet(model)
    assert len(calls) >= 6 and torch.equal(before, after) and not kept.exists()


def test_measuring_again_replaces_what_was_measured(kept):
    first = measured(random_model("tiny"))[0]
    with torch.inference_mode():
        BlockProbe.execute(random_model("tiny"), coarse(), photo(), 2)
    (path,) = kept.iterdir()
    again = load_measurement(path)
    assert len(first.sigmas) == 1 and len(again.sigmas) == 2


def test_a_full_disk_is_told_in_words(kept, monkeypatch):
    def full(*_: Any, **how: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="Block Probe: .*make room there"), torch.inference_mode():
        BlockProbe.execute(random_model("tiny"), coarse(), photo())
    assert not [p for p in kept.iterdir() if p.suffix == ".json"]


@LAW(
    "more, words",
    [
        ({"latent": {"samples": torch.zeros(1, 4, 8, 8)}}, "the latent is empty"),
        ({"latent": {"samples": torch.randn(1, 16, 8, 8)}}, "16"),
        ({"noise_levels": 0}, "noise_levels is 0"),
        ({"positive": [*coarse(), *coarse()]}, "one plain prompt"),
    ],
)
def test_bad_input_is_told_before_the_work(more, words, kept):
    inputs = {"model": random_model("tiny"), "positive": coarse(), "latent": photo()} | more
    with pytest.raises(ValueError, match=f"Block Probe: .*{words}"), torch.inference_mode():
        BlockProbe.execute(**inputs)
    assert not kept.exists()


# blocks = measured ---------------------------------------------------------------------------------


def test_measured_is_refused_where_nothing_was_measured():
    with pytest.raises(
        ValueError, match="Ref-UNet Feature Capture: .*not been measured.*Block Probe"
    ):
        capture(random_model("tiny"), blocks="measured")
    bank = capture(random_model("tiny"))[0]
    with pytest.raises(ValueError, match="Masked Self-Attn Inject: .*not been measured"):
        inject(random_model("tiny"), bank, blocks="measured")


def test_measured_is_refused_for_another_checkpoint():
    measured(random_model("tiny"))
    with pytest.raises(ValueError, match="have not been measured"):
        capture(random_model("tiny", seed=1), blocks="measured")


def test_measured_blocks_are_captured_and_injected_and_the_log_says_whence(caplog):
    model = random_model("tiny")
    one = measured(model)[0]
    with caplog.at_level(logging.INFO):
        bank = capture(model, blocks="measured")[0]
    assert {*bank.blocks} == {*one.measured} < {*one.blocks}
    assert "measured by Block Probe on this checkpoint" in caplog.text and one.day in caplog.text
    by_name = inject(model, bank, blocks="measured")
    assert torch.equal(sample_unet(by_name), sample_unet(inject(model, bank, blocks="all")))
    assert not torch.equal(sample_unet(by_name), plain())


def test_a_lora_behind_the_measurement_is_told_not_refused(caplog):
    measured(random_model("tiny"))
    model = random_model("tiny").clone()
    key = next(k for k in model.model_state_dict() if k.endswith("attn1.to_k.weight"))
    weight = model.model_state_dict()[key]
    model.add_patches({key: ("diff", (torch.ones_like(weight),))}, 0.5)
    with caplog.at_level(logging.INFO):
        capture(model, blocks="measured")
    assert "with other LoRAs than now" in caplog.text


@LAW(
    "term",
    [
        "measured vital",
        "measured content",
        "measured position",
        "measured lent",
        "Measured Vital , double 0",
    ],
)
def test_the_parts_of_a_measurement_have_names(term):
    model = tiny(ROTARY)
    one = measured(model, ROTARY)[0]
    sites = host.require_sites(model, "Test")
    chosen = host.chosen_blocks(model, term, sites, "Test")
    expected = {*one.presets[term.split(",")[0].strip().lower()]}
    assert {*chosen} == expected | ({("double", 0, 0)} if "," in term else set())


def test_a_damaged_measurement_is_passed_over_and_told(kept, caplog):
    model = random_model("tiny")
    measured(model)
    (path,) = kept.iterdir()
    (kept / "older.json").write_text("{")
    capture(model, blocks="measured")
    assert "older.json" in caplog.text
    path.write_text(json.dumps(json.loads(path.read_text()) | {"figures": {}}))
    with pytest.raises(ValueError, match="not been measured"):
        capture(model, blocks="measured")


def test_what_is_no_file_is_passed_over_and_told(kept, caplog):
    model = random_model("tiny")
    measured(model)
    (kept / "folder.json").mkdir()
    assert capture(model, blocks="measured")[0].blocks
    assert "a measurement of blocks is passed over" in caplog.text


def with_a_lora(strength: float) -> Any:
    model = random_model("tiny").clone()
    key = next(k for k in model.model_state_dict() if k.endswith("attn1.to_k.weight"))
    weight = model.model_state_dict()[key]
    model.add_patches({key: ("diff", (torch.ones_like(weight),))}, strength)
    return model


def test_of_several_measurements_the_models_own_counts_and_else_the_newest(kept):
    """Files of one checkpoint without a LoRA and with two, the one without the oldest."""
    models = [random_model("tiny"), with_a_lora(0.5), with_a_lora(0.7)]
    for day, model in enumerate(models):
        before = {*kept.glob("*")}
        measured(model)
        (path,) = {*kept.glob("*")} - before
        path.write_text(json.dumps(json.loads(path.read_text()) | {"day": f"day {day}"}))
        os.utime(path, (1000 + day, 1000 + day))
    for day, model in enumerate(models):
        own, differ = host_measured.measurement_of(model)
        assert (own.day, differ) == (f"day {day}", ())
    own, differ = host_measured.measurement_of(with_a_lora(0.9))
    assert own.day == "day 2" and differ == ("LoRAs",)


def test_a_new_measurement_is_another_input_to_the_cache():
    for node in (RefUNetCapture, MaskedSelfAttnInject, ConsiStory):
        assert node.fingerprint_inputs(blocks="all", steps=4) == ""
        before = node.fingerprint_inputs(blocks="measured")
        measured(random_model("tiny"))
        assert node.fingerprint_inputs(blocks="Measured ") != before
        shutil.rmtree(measurement_folder().parent)


def test_a_measurement_that_goes_away_meanwhile_is_left_out(kept, monkeypatch):
    """Between the folder's list and the look at the file."""
    measured(random_model("tiny"))
    before = RefUNetCapture.fingerprint_inputs(blocks="measured")

    class Folder:
        def glob(self, pattern: str) -> list[Path]:
            return [kept / "gone.json", *kept.glob(pattern)]

    monkeypatch.setattr(host_measured, "measurement_folder", Folder)
    assert RefUNetCapture.fingerprint_inputs(blocks="measured") == before != ""
    assert capture(random_model("tiny"), blocks="measured")[0].blocks


# published presets ---------------------------------------------------------------------------------

LIKE_FLUX1 = Family(
    "Flux",
    FLUX | dict(hidden_size=32, num_heads=1, depth=19, depth_single_blocks=38),
    extras=pooled,
)


def test_on_flux_1_the_papers_blocks_are_presets(caplog):
    model = build(LIKE_FLUX1)
    sites = host.require_sites(model, "Test")
    for one in PUBLISHED:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            chosen = host.chosen_blocks(model, one.name, sites, "Test")
        assert {*chosen} == {*one.blocks} and one.source in caplog.text
    with pytest.raises(ValueError, match="freecus"):
        host.chosen_blocks(model, "freecuss", sites, "Test")


@LAW("name, told", [("Flux", "Flux with 4 blocks"), ("SD3.5", "SD3 with"), ("", "a UNet with 7")])
def test_elsewhere_they_are_refused_with_the_reason(name, told):
    model = tiny(name) if name else random_model("tiny")
    sites = host.require_sites(model, "Test")
    with pytest.raises(ValueError, match=f"19 double and 38 single.*{told}.*measured"):
        host.chosen_blocks(model, "stable flow", sites, "Test")


# the chart -----------------------------------------------------------------------------------------


@LAW("name", [ROTARY, ""])
def test_the_chart_is_a_picture_with_a_bar_for_every_block(name):
    _, _, chart = measured(tiny(name) if name else random_model("tiny"), name)
    assert chart.ndim == 4 and chart.shape[-1] == 3 and 0 <= chart.min() and chart.max() <= 1
    blue = torch.tensor([0x1F, 0x4E, 0x8C]) / 255
    assert ((chart - blue).abs().amax(-1) < 0.01).sum() > 100  # bars of the chosen blocks


def test_the_folder_is_the_users(kept):
    assert kept.is_relative_to(folder_paths.get_user_directory())
