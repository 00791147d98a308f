"""Laws of rows on their way to host memory: behind the step that computes, and complete when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kindred.models import copies
from kindred.models.copies import RowWriter, fetched
from kindred.models.reference.rows import RowReader
from pretended_device import CUDA, Pretended, pretended


@pytest.fixture
def device() -> Iterator[Pretended]:
    with torch.inference_mode(), pretended() as seen:
        yield seen


def parts(step: int, there: torch.device | str = CUDA) -> list[torch.Tensor]:
    return [torch.arange(6.0).view(2, 3).to(there) + step, torch.full((4,), 10.0 + step).to(there)]


def row(step: int) -> list[float]:
    return torch.cat([part.flatten() for part in parts(step, "cpu")]).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_row_is_one_copy_that_nobody_waits_for(device, dtype) -> None:
    write, rows = RowWriter(), torch.empty(5, 10, dtype=dtype)
    given = [parts(step) for step in range(5)]
    device.clear()
    for step in range(5):
        write(given[step], rows[step])
    assert [(a.kind, a.blocks, a.pinned) for a in device.acts] == [("down", False, True)] * 5
    write.finish()
    assert rows.tolist() == [row(step) for step in range(5)]


def test_few_rows_are_on_their_way_at_once(device) -> None:
    write, rows = RowWriter(), torch.full((5, 10), -1.0)
    for step in range(5):
        write(parts(step), rows[step])
        assert len(write._behind) == 1
        assert rows[:step].tolist() == [row(s) for s in range(step)] and (rows[step] == -1).all()


def test_what_was_copied_may_change_behind_it(device) -> None:
    write, home, given = RowWriter(), torch.empty(10), parts(0)
    write(given, home)
    for part in given:
        part.zero_()
    write.finish()
    assert home.tolist() == row(0)


@pytest.mark.parametrize("why", ["no pinned memory", "refused", "too long", "host memory"])
def test_where_a_row_cannot_be_pinned_it_comes_all_the_same(device, why, monkeypatch) -> None:
    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    if why == "refused":
        monkeypatch.setattr(device, "pin", full)
    if why == "too long":
        monkeypatch.setattr(copies, "MOST_PINNED", 39)
    write, rows = RowWriter(pins=why != "no pinned memory"), torch.empty(3, 10)
    for step in range(3):
        write(parts(step, "cpu" if why == "host memory" else CUDA), rows[step])
        assert rows[step].tolist() == row(step)
    write.finish()
    assert write.pins == (why in ("too long", "host memory"))


def test_an_empty_row_is_no_copy(device) -> None:
    write = RowWriter()
    device.clear()
    write([torch.zeros(0, 3, device=CUDA)], torch.empty(0))
    write.finish()
    assert not device.acts


def test_several_values_are_read_in_one_wait(device) -> None:
    given = [torch.tensor([2.5]).cuda(), torch.ones(2, 2).cuda().half(), torch.tensor(True).cuda()]
    device.clear()
    assert [t.tolist() for t in fetched(given)] == [[2.5], [1, 1, 1, 1], [1]]
    assert [str(a).split(" at ")[0] for a in device.acts] == ["down blocking: to"]


def test_rows_go_up_beside_the_step_that_computes(device) -> None:
    """Each in one asynchronous copy from pinned memory, on a stream that the computing one waits for."""
    rows = torch.arange(12.0).view(4, 3)
    reader = RowReader(CUDA)
    for step in (3, 2, 1, 0):
        assert torch.equal(reader(rows, step).cpu(), rows[step])
    ups = [a for a in device.acts if a.kind == "up"]
    assert [(a.blocks, a.pinned) for a in ups] == [(False, True)] * 4
