"""Which rows of a pass a reference concerns, on every transformer of the host: a spot is one token, and the text's rows read nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from kindred.models.network.call import Half
from kindred.models.reference.bank import ReferenceBank
from kindred.nodes.host import joint
from kindred.nodes.host.sites import require_backbone
from studio import capture, inject
from test_transformers import FAMILIES, FELT, SAME, WHITE, apart, bank_of
from tiny_networks import READ, denoised, latent, prompt, sample, tiny
from torch import Tensor

every_family = pytest.mark.parametrize("name", FAMILIES)
HELD = "keys and values"
CPU = torch.device("cpu")


def odd(name: str, more: int) -> tuple[int, int]:
    """A size in cells (y, x) of so many tokens more to a side than the family's usual one, odd where the host cuts odd sizes."""
    family = READ[name]
    less = int(family.odd and family.patch > 1)
    rows, columns = family.grid
    return rows * family.patch - less, (columns + more) * family.patch - less


def grid_of(name: str, size: tuple[int, int]) -> tuple[int, int]:
    return require_backbone(tiny(name), "test").grid(size)


def spot(name: str, size: tuple[int, int], row: int, column: int) -> Tensor:
    """A MASK of the cells of one token."""
    mask, side = torch.zeros(1, *size), READ[name].patch
    mask[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = 1
    return mask


@cache
def held(name: str, row: int = -1, column: int = -1) -> ReferenceBank:
    """Keys and values of an odd photo: all of them, or those of one token."""
    size = odd(name, 2)
    mask = WHITE if row < 0 else spot(name, size, row, column)
    photo = {"samples": latent(name, seed=21, size=size)}
    how: dict[str, Any] = {"steps": 2, "scheduler": "simple", "keeps": HELD}
    return capture(tiny(name), photo, prompt(name, seed=4), **how, mask=mask)[0]


@every_family
def test_a_spot_of_the_photo_is_the_same_token_in_every_block(name: str) -> None:
    """I40: of a photo of another and odd size, what is held of a spot are the keys and values of the token that lies there."""
    rows, columns = grid = grid_of(name, odd(name, 2))
    for row, column in ((1, 2), (rows - 1, columns - 1)):
        one, whole = held(name, row, column), held(name)
        token = row * columns + column
        assert one.kept[grid].tolist() == [token]
        for step in range(2):
            spots, tokens = (b.tokens(Half.COND, step, CPU, torch.float32) for b in (one, whole))
            assert set(spots) == set(require_backbone(tiny(name), "test").blocks)
            for block, keys in spots.items():
                assert tokens[block].shape[0] == rows * columns
                assert torch.equal(keys, tokens[block][token : token + 1])


def first_read(
    monkeypatch: pytest.MonkeyPatch, model: Any, name: str, noisy: Tensor
) -> tuple[slice, Tensor, Tensor]:
    """Where the picture stands in the first call in which something is read, its answer, and the host's own without."""
    seen: list[tuple[slice, Tensor, Tensor]] = []
    read = joint._BlockCall.read

    def noted(call: Any, references: Any, attend: Any, kernel: Any, mask: Tensor | None) -> Tensor:
        out = read(call, references, attend, kernel, mask)
        own = attend(call.q, call.k, call.v, call.heads, mask=mask)
        seen.append((call.picture(call.q), out.clone(), own))
        return out

    monkeypatch.setattr(joint._BlockCall, "read", noted)
    denoised(model, noisy, prompt(name))
    return seen[0]


def moved(after: Tensor, before: Tensor) -> list[int]:
    """The rows [b n c] that are others."""
    far = (after - before).abs().amax((0, 2)) > SAME * before.abs().max()
    return far.nonzero().flatten().tolist()


@every_family
def test_the_texts_rows_read_no_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I50: in the first block that is read every row of the picture is another, and no row of anything else."""
    model = inject(tiny(name), bank_of(name), 3.0)
    picture, out, alone = first_read(monkeypatch, model, name, latent(name))
    assert moved(out, alone) == list(range(picture.start, picture.stop))


@every_family
def test_a_spot_of_the_target_mask_is_one_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I40: on a picture of odd sizes the row that reads is the token that lies under the spot."""
    size = odd(name, 1)
    rows, columns = grid_of(name, size)
    for row, column in ((2, 1), (rows - 1, columns - 1)):
        target = spot(name, size, row, column)
        model = inject(tiny(name), bank_of(name), 3.0, target_mask=target)
        with monkeypatch.context() as patch:
            picture, out, alone = first_read(patch, model, name, latent(name, size=size))
        assert moved(out, alone) == [picture.start + row * columns + column]


@every_family
def test_of_a_batch_the_picture_with_a_white_mask_alone_reads(name: str) -> None:
    """I1: the two others, whose masks are black, are the plain ones."""
    masks, how = torch.zeros(3, 8, 8), {"pictures": 3, "cfg": 1.0}
    masks[1] = 1
    read = sample(inject(tiny(name), bank_of(name), target_mask=masks), name, **how)
    alone = sample(tiny(name), name, **how)
    assert max(apart(read[i], alone[i]) for i in (0, 2)) < SAME < FELT < apart(read[1], alone[1])
