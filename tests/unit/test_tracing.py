"""Laws of telling whose the rows and keys of an attention are, on tensors written by hand."""

from __future__ import annotations

import pytest
import torch
from kindred.models.network.traced import trace
from torch import Tensor

T, C = 6, 8  # tokens of a text, channels


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WAS = rand(2, 4, C, seed=1)  # one picture's cond and uncond
TEXT = rand(2, T, C, seed=2)
OTHER = rand(1, T, C, seed=3)  # of another prompt
ALL = tuple(range(T))


def test_what_nobody_changed_is_what_it_was() -> None:
    found = trace(2, WAS, WAS, TEXT, TEXT, (T, T))
    assert found is not None and found.parts == (0, 1) and found.places == (ALL, ALL)
    assert found.repeats == ((1,), (1,))


def test_without_keys_rows_are_told_by_their_queries() -> None:
    found = trace(2, WAS, torch.cat((WAS[:1], WAS)))
    assert (
        found is not None
        and found.parts == (0, 0, 1)
        and found.places == found.repeats == (None,) * 3
    )


def test_keys_behind_the_text_have_no_place_in_it() -> None:
    found = trace(2, WAS, WAS, TEXT, torch.cat((TEXT, OTHER.expand(2, -1, -1)), 1), (T, T))
    assert (
        found is not None
        and found.places == ((*ALL, *(-1,) * T),) * 2
        and found.repeats == ((1,), (1,))
    )


def test_a_text_of_which_some_is_gone_is_not_followed() -> None:
    found = trace(2, WAS, WAS, TEXT, TEXT[:, ::2], (T, T))
    assert found is not None and found.places == found.repeats == (None, None)


def test_all_pictures_of_a_part_have_to_agree() -> None:
    was, text = rand(2, 4, C, seed=4), torch.cat((TEXT[:1], OTHER))  # one part, two pictures
    keys = torch.cat((TEXT[:1], TEXT[:1]))
    assert trace(1, was, was, text, text, (T,)).places == (ALL,)
    assert trace(1, was, was, text, keys, (T,)).places == (None,)


def test_regions_are_told_by_their_texts_where_the_queries_are_equal() -> None:
    """Cond and uncond begin with equal queries; the copies are of whose text stands among their keys."""
    same = WAS[:1].expand(2, -1, -1)
    now = same[:1].expand(3, -1, -1)
    for keys, parts, places in (
        ((TEXT[:1], OTHER, TEXT[1:]), (0, 0, 1), (ALL, None, ALL)),
        ((TEXT[:1], TEXT[1:], TEXT[1:]), (0, 1, 1), (ALL, ALL, ALL)),
    ):
        found = trace(2, same, now, TEXT, torch.cat(keys), (T, T))
        assert found is not None and (found.parts, found.places) == (parts, places)
    assert trace(2, same, now, TEXT, OTHER.expand(3, -1, -1), (T, T)) is None
    assert trace(2, same, now) is None


def test_a_regions_text_that_stands_several_times_is_counted() -> None:
    keys = torch.cat((TEXT[:1].repeat(1, 2, 1), OTHER.repeat(1, 2, 1), TEXT[1:].repeat(1, 2, 1)))
    found = trace(2, WAS, torch.cat((WAS[:1], WAS)), TEXT, keys, (T, T))
    assert found is not None and found.parts == (0, 0, 1) and found.repeats == ((2,), (2,), (2,))


def test_what_the_host_repeated_is_counted_and_equal_tokens_are_not() -> None:
    """A short prompt beside a long one stands in it twice; a long one's starts are alike, and it stands there once."""
    long = torch.cat((TEXT[:1], TEXT[:1, :1], OTHER[:, 1:]), 1)
    text = torch.cat((TEXT[:1].repeat(1, 2, 1), long))
    found = trace(2, WAS, WAS, text, text, (T, 2 * T))
    assert found is not None and found.repeats == ((2,), (1,))


@pytest.mark.parametrize(
    "now, keys",
    [
        (WAS[:1].expand(3, -1, -1)[:, :2], TEXT[:1].expand(3, -1, -1)),  # other tokens
        (torch.cat((WAS[:1], WAS)), TEXT),  # keys for other rows
        (rand(3, 4, C, seed=5), None),
    ],
)  # other queries
def test_what_cannot_be_told_is_not(now: Tensor, keys: Tensor | None) -> None:
    assert trace(2, WAS, now, None if keys is None else TEXT, keys, (T, T)) is None


def test_rows_of_fewer_tokens_are_not_compared_in_samples() -> None:
    """Every other token of a long row is what a sample of it would hold."""
    was = rand(2, 128, C, seed=7)
    assert trace(2, was, torch.cat((was[:1], was))) is not None
    assert trace(2, was, torch.cat((was[:1], was))[:, ::2]) is None


def test_parts_of_several_rows_are_copied_whole() -> None:
    was = rand(4, 4, C, seed=6)  # two parts of two pictures
    assert trace(2, was, torch.cat((was[:2], was))).parts == (0, 0, 1)
    assert trace(2, was, was.repeat_interleave(2, 0)[:6]) is None
    assert trace(2, was, torch.cat((was, was[:1]))) is None
