"""Laws of a bank's rows on their way to a device: the next one is copied behind the step that computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kindred.models.reference.bank import RowReader

ROWS = torch.arange(12.0).view(4, 3)


def test_in_host_memory_a_row_is_a_view() -> None:
    read = RowReader(torch.device("cpu"))(ROWS, 2)
    assert torch.equal(read, ROWS[2]) and read.data_ptr() == ROWS[2].data_ptr()


class Copies:
    """A CUDA that copies within host memory and remembers what was done in which order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.inside = False

    def Stream(self, device):
        return SimpleNamespace(
            record_event=lambda: f"event {sum(d.startswith('copy') for d in self.done)}"
        )

    def stream(self, stream):
        cuda = self

        class Within:
            def __enter__(self):
                cuda.inside = True

            def __exit__(self, *error):
                cuda.inside = False

        return Within()

    def current_stream(self, device):
        return SimpleNamespace(wait_event=lambda event: self.done.append(f"wait for {event}"))


@pytest.fixture
def cuda(monkeypatch) -> Copies:
    seen = Copies()
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(seen, name))

    def to(self, device, non_blocking=False):
        assert (
            seen.inside and non_blocking and str(device) == "cuda:0"
        )  # beside the computing stream, and nobody waits
        seen.done.append(f"copy {self[0].item():.0f}")
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda self, stream: seen.done.append(f"held {self[0].item():.0f}"),
    )
    return seen


def test_each_row_is_copied_once_and_the_next_one_ahead(cuda) -> None:
    """Noisiest first: row 3, 2, 1, 0; its use waits for its copy, and its memory for its use."""
    reader = RowReader(torch.device("cuda:0"))
    for i in (3, 2, 1, 0):
        assert torch.equal(reader(ROWS, i), ROWS[i])
    assert cuda.done == [
        "copy 9",
        "wait for event 1",
        "held 9",
        "copy 6",
        "wait for event 2",
        "held 6",
        "copy 3",
        "wait for event 3",
        "held 3",
        "copy 0",
        "wait for event 4",
        "held 0",
    ]


def test_a_wrong_guess_is_dropped_and_the_right_row_read(cuda) -> None:
    reader = RowReader(torch.device("cuda:0"))
    reader(ROWS, 3)
    assert (
        torch.equal(reader(ROWS, 0), ROWS[0])
        and torch.equal(reader(ROWS, 3), ROWS[3])
        and len(reader._ahead) == 1
    )


def test_where_no_memory_can_be_pinned_rows_come_all_the_same(cuda, monkeypatch) -> None:
    tried = []

    def full(self):
        tried.append(self)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", full)
    for reader in (
        RowReader(torch.device("cuda:0")),
        RowReader(torch.device("cuda:0"), pins=False),
    ):
        for i in (3, 2, 1):
            assert torch.equal(reader(ROWS, i), ROWS[i])
    assert len(tried) == 1


def test_two_banks_do_not_take_each_others_rows(cuda) -> None:
    reader, others = (
        RowReader(torch.device("cuda:0")),
        [torch.full((3,), float(i)) for i in range(4)],
    )
    for i in (3, 2, 1, 0):
        assert torch.equal(reader(ROWS, i), ROWS[i]) and torch.equal(reader(others, i), others[i])
    assert sum(d.startswith("copy") for d in cuda.done) == 8
