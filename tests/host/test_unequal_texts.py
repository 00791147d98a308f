"""Pictures of one batch with texts of unequal length: each is the picture of its own text alone, where a mask hides the pads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kindred.nodes.host import REPEATS
from kindred.nodes.prompts import of_one_length
from studio import inject
from test_encoders import HIDING
from test_transformers import FELT, SAME, apart, bank_of
from tiny_networks import READ, denoised, latent, prompt, tiny
from torch import Tensor

families = pytest.mark.parametrize("name", HIDING)
reads = pytest.mark.parametrize("how", [{}, {"positions": "none"}, {"text_share": "plain"}, None], ids=str)  # fmt: skip


def texts(name: str) -> list[list]:
    """Three prompts of their own lengths."""
    words = READ[name].words
    return [prompt(name, seed=n, words=words + more) for n, more in ((2, 0), (3, 5), (4, 2))]


def together(name: str) -> list:
    """The same as one CONDITIONING, as Subject Prompts makes it."""
    lines = of_one_length([(text, extras) for [[text, extras]] in texts(name)], True)
    mask = torch.cat([extras["attention_mask"] for _, extras in lines])
    return [[torch.cat([rows for rows, _ in lines]), lines[0][1] | {"attention_mask": mask}]]


def model_of(name: str, how: dict[str, Any] | None) -> Any:
    return tiny(name) if how is None else inject(tiny(name), bank_of(name), 2.0, **how)


@families
@reads
def test_each_picture_is_that_of_its_own_text(name: str, how: dict[str, Any] | None) -> None:
    """With and without a reference, kept or dimmed, placed or not."""
    model, noisy = model_of(name, how), latent(name, pictures=3)
    batch = denoised(model, noisy, together(name))
    alone = [denoised(model, noisy[n : n + 1], text) for n, text in enumerate(texts(name))]
    for picture, one in zip(batch, alone):
        assert apart(picture, one[0]) < SAME
    assert how is None or apart(batch, denoised(tiny(name), noisy, together(name))) > FELT


@families
def test_without_the_mask_the_pads_are_read(name: str) -> None:
    """What the mask is for."""
    [[rows, extras]] = together(name)
    shown = [[rows, extras | {"attention_mask": torch.ones_like(extras["attention_mask"])}]]
    noisy = latent(name, pictures=3)
    hidden, seen = (denoised(tiny(name), noisy, text) for text in ([[rows, extras]], shown))
    assert apart(hidden[:1], seen[:1]) > FELT and REPEATS not in extras


def test_lines_of_one_length_stay_as_they_are() -> None:
    lines: list[tuple[Tensor, dict]] = [(torch.ones(1, 4, 2), {}), (torch.zeros(1, 4, 2), {"a": 1})]
    for hides in (True, False):
        assert all(a is b for a, b in zip(of_one_length(lines, hides), lines))
