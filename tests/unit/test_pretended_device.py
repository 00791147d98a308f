"""Laws of the device that is not there: it refuses what CUDA refuses, and sees what the host waits for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pretended_device import CPU, CUDA, DeviceMix, OnDevice, Pretended, pretended


@pytest.fixture
def device() -> Iterator[Pretended]:
    with torch.inference_mode(), pretended() as seen:
        yield seen


def told(device: Pretended) -> list[str]:
    """What was seen since the last time, without the lines."""
    acts = [str(act).split(" at ")[0] for act in device.acts]
    device.clear()
    return acts


def test_what_is_made_there_says_so_and_computes_as_the_cpu_does(device) -> None:
    x = torch.randn(4, 3)
    there = x.to("cuda")
    assert isinstance(there, OnDevice) and there.device == CUDA and (there @ there.T).is_cuda
    assert torch.equal(there.softmax(-1).cpu(), x.softmax(-1))
    assert torch.zeros(2, device="cuda").device == CUDA and x.new_zeros(2).device == CPU
    q = torch.randn(1, 2, 5, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(attend(*[q.cuda()] * 3).cpu(), attend(q, q, q))
    layer = torch.nn.Linear(3, 2)
    here = layer(x)
    assert torch.equal(layer.to("cuda")(there).cpu(), here)


MIXES = {
    "arithmetic": lambda here, there: here + there,
    "a product": lambda here, there: there @ here,
    "one row": lambda here, there: torch.cat([there, here]),
    "a choice": lambda here, there: there.index_select(0, torch.tensor([0])),
    "a number there": lambda here, there: here * there.sum(),
    "a number in no arithmetic": lambda here, there: torch.stack([there[0, 0], torch.tensor(1.0)]),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_tensors_of_two_devices_do_not_mix(device, mix) -> None:
    here = torch.ones(2, 2)
    with pytest.raises(DeviceMix, match="mixes devices"):
        mix(here, here.cuda())


def test_a_number_in_host_memory_may_stand_in_arithmetic(device) -> None:
    assert (torch.ones(2, device="cuda") * torch.tensor(2.0)).tolist() == [2, 2]


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "a mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_every_wait_is_seen_once(device, wait) -> None:
    x = torch.ones(3, device="cuda")
    wait(x)
    (seen,) = told(device)
    assert seen.startswith("wait: ")
    x.sum().clamp(min=0)
    assert told(device) == []


def test_copies_are_seen_and_whether_they_are_waited_for(device) -> None:
    x, slow, fast = torch.ones(3), {}, {"non_blocking": True}
    for how, word in ((slow, "blocking"), (fast, "asynchronous")):
        there = x.to(CUDA, **how)
        assert told(device) == [f"up {word}: to"]
        there.to("cpu", **how)
        assert told(device) == [f"down {word}: to"]
        there.copy_(x, **how)
        assert told(device) == [f"up {word}: copy_"]
    x.copy_(there, **fast)  # into memory that is not pinned
    assert told(device) == ["down blocking: copy_"]
    torch.empty(3, pin_memory=True).copy_(there, **fast)
    assert told(device) == ["down asynchronous: copy_"]
    there[torch.tensor([0])]
    assert told(device) == ["up blocking: index by host memory"]
    there.to(CUDA), there.half(), x.half()
    assert told(device) == []
    assert torch.tensor([1.0], device="cuda").is_cuda and told(device) == ["up blocking: to"]


def test_what_is_read_before_its_copy_has_come_is_no_number(device) -> None:
    there = torch.ones(3, device="cuda")
    for wait in (
        torch.cuda.synchronize,
        lambda: torch.cuda.current_stream().synchronize(),
        lambda: there.sum().item(),
    ):
        home = there.to("cpu", non_blocking=True)
        assert home.isnan().all()
        wait()
        assert home.tolist() == [1, 1, 1]
    home = there.to("cpu", non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    later = there.to("cpu", non_blocking=True)
    event.synchronize()
    assert home.tolist() == [1, 1, 1] and later.isnan().all()


def test_a_copy_of_another_stream_is_there_for_who_waits_for_it(device) -> None:
    x, side = torch.ones(3).pin_memory(), torch.cuda.Stream(CUDA)
    with torch.cuda.stream(side):
        there = x.to(CUDA, non_blocking=True)
        copied = side.record_event()
    assert there.isnan().all().item()
    torch.cuda.current_stream(CUDA).wait_event(copied)
    assert there.tolist() == [1, 1, 1]


def test_pinned_memory_may_not_be_written_before_its_copy_is_done(device) -> None:
    x = torch.ones(3).pin_memory()
    assert x.is_pinned() and x[1:].is_pinned() and not torch.ones(3).is_pinned()
    x.to(CUDA, non_blocking=True)
    x.zero_()
    with pytest.raises(RuntimeError, match="was written before its copy was done"):
        torch.cuda.synchronize()


def test_afterwards_torch_has_no_device() -> None:
    before = torch.cuda.Stream, torch.cuda.current_stream, torch.cuda.device_count
    with pretended():
        assert torch.cuda.device_count() == 1
    assert before == (torch.cuda.Stream, torch.cuda.current_stream, torch.cuda.device_count)
