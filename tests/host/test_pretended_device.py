"""The pack on a device that is not there: nothing mixes with what lies on the CPU, and how often the host waits and copies is counted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import astuple, fields, is_dataclass
from typing import Any

import comfy.model_management as management
import copies_table
import pytest
import torch
from device_ways import (
    WAYS,
    Cost,
    Way,
    built,
    cost_of,
    on_the_cpu,
    on_the_device,
    ours,
    ran,
    sample,
    there,
)
from kindred.models.copies import RowWriter
from kindred.models.reference.bank import ReferenceBank
from kindred.models.reference.inject import ActiveMaskedSelf
from kindred.models.reference.rows import RowReader
from kindred.models.story import step
from kindred.nodes.concept import ConceptEncoderLoad
from kindred.nodes.preview import ReferencePreview
from kindred.nodes.prompts import SubjectPrompts
from networks import build_model
from pretended_device import DeviceMix, OnDevice
from pretended_host import host_there
from studio import capture, concept, inject, subject
from test_precisions import little_memory
from torch import Tensor

import nodes

LAW = pytest.mark.parametrize
EVERY = LAW("name", WAYS)
# of a usual step: waits, copies down, copies up
MOST = {
    "DDIM Invert": Cost(0, 0, 0),
    "capture, ": Cost(0, 2, 0),
    "capture": Cost(0, 2, 2),  # each latent and its noise level go up
    "injection, cached": Cost(0, 0, 1),
    "injection, hidden states": Cost(0, 0, 1),
    "injection, both": Cost(0, 0, 2),
    "injection, aside": Cost(0, 0, 1),
    "injection, read live": Cost(0, 0, 1),
    "concept": Cost(0, 0, 0),
    "concept and injection": Cost(0, 0, 1),
    "story": Cost(1, 0, 2),
    "story, heun": Cost(2, 0, 2),
    "anchors": Cost(1, 2, 4),
    "story beside anchors": Cost(1, 0, 3),
    "story beside photos": Cost(1, 0, 8),
    "block probe": Cost(0, 0, 1),
}


def most_of(name: str) -> Cost:
    """What a way may cost: of the longest beginning that its name has, without its family."""
    way = name.split(": ")[-1]
    return MOST[max((known for known in MOST if way.startswith(known)), key=len)]


def cost_with(way: Way) -> Cost:
    with there(way) as (device, model):
        ran(way, model, device)
        return cost_of(list(device.acts))


def numbers(made: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor and number in what was made, with its place."""
    if isinstance(made, Tensor):
        yield "", made
    elif isinstance(made, Mapping):
        for key, value in made.items():
            yield from ((f"{key} {place}", x) for place, x in numbers(value))
    elif isinstance(made, (list, tuple)):
        for i, value in enumerate(made):
            yield from ((f"{i} {place}", x) for place, x in numbers(value))
    elif is_dataclass(made):
        for f in fields(made):
            yield from ((f"{f.name} {place}", x) for place, x in numbers(getattr(made, f.name)))
    elif isinstance(made, str):
        yield from (("", torch.tensor(float(x))) for x in re.findall(r"\d+\.\d+", made))


def same(made: Any, meant: Any) -> None:
    """Everything is in host memory, and as the CPU makes it, but for the last bits: a product of matrices depends on where they lie."""
    pairs = list(zip(numbers(made), numbers(meant), strict=True))
    for (place, x), (_, y) in pairs:
        assert not isinstance(x, OnDevice) and x.dtype == y.dtype, place
        if x.is_floating_point() and x.numel():
            assert (x - y).abs().max() <= 1e-5 * y.abs().max(), place
        else:
            assert torch.equal(x, y), place
    assert pairs


@EVERY
def test_nothing_mixes_and_all_is_as_on_the_cpu(name):
    same(on_the_device(name)[0], on_the_cpu(name))


@EVERY
def test_waits_and_copies_of_a_step(name, record_property):
    """`tools/workshop/copies_table.py` writes them into docs/performance.md, and there they stay as they are counted."""
    acts = on_the_device(name)[1]
    cost = cost_of(list(acts))
    record_property("way", name)
    for column in copies_table.COLUMNS:
        record_property(column, getattr(cost, column))
    inner = [f"step {a.step}: {a}" for a in acts if a.step is not None]
    assert cost.within(most_of(name)), "\n".join([f"{cost}", *inner])


@EVERY
def test_the_page_says_what_is_counted(name):
    cost = cost_of(list(on_the_device(name)[1]))
    row = copies_table.table({name: astuple(cost)}).splitlines()[3]
    assert row in copies_table.PAGE.read_text("utf-8").splitlines()


def test_plain_sampling_waits_for_nothing_in_a_step():
    """Then whatever is counted is the pack's."""
    assert cost_with(Way(lambda m, _: sample(m))) == Cost(0, 0, 0)


def test_a_bank_comes_up_once_for_all_its_steps():
    """Each row of a cached reference is copied once, from pinned memory, while the step before computes."""
    acts = [a for a in on_the_device("injection, cached")[1] if "rows.py" in a.where]
    assert len(acts) == 4 and all(a.kind == "up" and a.pinned and not a.blocks for a in acts)


@LAW(
    ("name", "up"),
    [
        ("capture, the mask by its words", 4),
        ("capture, the mask wired", 0),
        ("capture, float16", 0),
    ],
)
def test_keys_and_values_are_made_before_they_are_copied(name, up):
    """Where the mask is known; else the tokens of each step go up once more, in one copy, and their keys and values come down in one of
    each half."""
    rows = [a for a in on_the_device(name)[1] if a.pinned]
    assert sum(a.kind == "up" for a in rows) == up
    inside, behind = (
        sum(a.kind == "down" and not a.blocks and (a.step is None) is end for a in rows)
        for end in (False, True)
    )
    assert inside == 2 * 4 and behind == (2 * 4 if up else 0)


# other dtypes, and weights elsewhere --------------------------------------------------------------------------------------------


SEVERAL = {
    "concept and injection": WAYS["concept and injection"],
    "story": WAYS["story"],
    "story beside anchors": WAYS["story beside anchors"],
    "capture": WAYS["capture, the mask by its words"],
}


@LAW("several", SEVERAL)
@LAW("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_halves_too(dtype, several):
    def in_halves() -> Any:
        model = build_model("tiny")
        model.model.diffusion_model.to(dtype)
        model.model.diffusion_model.dtype = dtype
        model.model.manual_cast_dtype = dtype
        return model

    way = SEVERAL[several]
    meant = ran(way, in_halves())
    with there(way, in_halves()) as (device, model):
        made = ran(way, model, device)
        assert cost_of(list(device.acts)).within(most_of(several))
    for (place, x), (_, y) in zip(numbers(made), numbers(meant), strict=True):
        assert torch.isfinite(x).all() and x.shape == y.shape, place


@LAW(
    "several",
    ["injection, hidden states", "story", "story beside anchors", "capture, the mask by its words"],
)
def test_weights_that_stay_in_host_memory(several):
    """Low memory: half of them are cast at each use, for which the host itself waits; for what is ours it waits no more than else."""
    way = WAYS[several]
    with there(way) as (device, model), little_memory() as left:
        made = ran(way, model, device)
        assert cost_of([a for a in device.acts if ours(a)]).within(most_of(several))
    assert any(left)
    same(made, ran(way, built(way)))


@torch.inference_mode()
def whole_workflow() -> tuple[torch.dtype, ReferenceBank, Tensor, Tensor]:
    """The shipped checkpoint from its file to its pictures, as the host loads it: its dtype, the reference, the picture, the preview."""
    file = "kindred_miniature.safetensors"
    model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(file)[:3]
    encoder = ConceptEncoderLoad.execute("kindred_miniature_concept.safetensors").result[0]
    positive = SubjectPrompts.execute(clip, "a photo of a cat", "cat").result[0]
    empty = nodes.CLIPTextEncode().encode(clip, "")[0]
    image = subject(size=(64, 64))
    latent = {"samples": vae.encode(image)}
    bank = capture(model, latent, positive, 4, negative=empty)[0]
    both = concept(inject(model, bank), image=image, encoder=encoder)
    steps = (1, 4, 4.0, "euler", "ddim_uniform")
    drawn = nodes.common_ksampler(both, *steps, positive, empty, latent)[0]["samples"]
    preview = ReferencePreview.execute(bank, vae, "all").result[0]
    return model.model.get_dtype(), bank, vae.decode(drawn), preview


def test_a_workflow_on_the_shipped_checkpoint():
    """In the dtypes that the host chooses for a device; of the sampler's steps as always."""
    with host_there() as device:
        dtype, *made = whole_workflow()
        steps = [a for a in device.acts if a.step]
        cost = cost_of([a for a in steps if a.step[0] == steps[-1].step[0]])
    assert cost.within(MOST["concept and injection"])
    assert dtype in (torch.float16, torch.bfloat16)
    for place, x in numbers(made):
        assert not isinstance(x, OnDevice) and torch.isfinite(x).all(), place


def test_a_model_that_was_moved_away_and_back():
    way = WAYS["concept and injection"]
    with there(way) as (device, model):
        first = ran(way, model, device)
        management.unload_all_models()
        assert not isinstance(next(model.model.parameters()), OnDevice)
        same(ran(way, model, device), first)


def test_afterwards_all_is_as_it_was():
    on_the_device("injection, cached")
    same(
        ran(WAYS["injection, cached"], built(WAYS["injection, cached"])),
        on_the_cpu("injection, cached"),
    )
    assert management.get_torch_device() == torch.device("cpu")


# planted faults ---------------------------------------------------------------------------------------------------------------


def test_a_tensor_that_was_left_on_the_cpu_is_caught(monkeypatch):
    monkeypatch.setattr(step, "sent", lambda tensor, device: tensor)
    with pytest.raises(DeviceMix, match=r"models/attention/sharing.py:\d+ mixes devices"):
        cost_with(WAYS["story, one stage"])


def test_an_item_in_a_layer_is_caught(monkeypatch):
    right = ActiveMaskedSelf._weight

    def asking(self, block, k):
        assert k.sum().item() < torch.inf
        return right(self, block, k)

    monkeypatch.setattr(ActiveMaskedSelf, "_weight", asking)
    cost = cost_with(WAYS["injection, cached"])
    assert cost.waits == 7 and not cost.within(most_of("injection, cached"))


@LAW(
    ("cls", "method", "fault", "name"),
    [
        (RowWriter, "_staged", lambda self, parts, into: None, "capture, the mask wired"),
        (
            RowReader,
            "__call__",
            lambda self, rows, step: rows[step].to(self.device),
            "injection, cached",
        ),
    ],
)
def test_a_blocking_copy_is_caught(monkeypatch, cls, method, fault, name):
    monkeypatch.setattr(cls, method, fault)
    cost = cost_with(WAYS[name])
    assert cost.waits and not cost.within(most_of(name))


def test_what_is_read_before_it_came_is_caught(monkeypatch):
    monkeypatch.setattr(RowWriter, "finish", lambda self: None)
    way = WAYS["capture, the mask wired"]
    with there(way) as (device, model):
        made = ran(way, model, device)
    with pytest.raises(AssertionError, match="features"):
        same(made, on_the_cpu("capture, the mask wired"))
