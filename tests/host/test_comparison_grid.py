"""Host laws of Comparison Grid: where every picture and every word stands, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from judged import grid, noise
from kindred.nodes import drawing
from kindred.nodes.evaluation import ComparisonGrid
from PIL import Image
from torch import Tensor

LAW = pytest.mark.parametrize
NAN = float("nan")


def flat(*greys: int, y: int = 20, x: int = 20) -> Tensor:
    return torch.tensor(greys).view(-1, 1, 1, 1).expand(-1, y, x, 3) / 255


def painted(sheet: Tensor, grey: int) -> Tensor:
    """Pixels of one grey -> [n 2], y and x."""
    return ((255 * sheet[0]).round() == grey).all(2).nonzero().double()


def cells(sheet: Tensor, greys: list[int]) -> list[tuple[float, float]]:
    """Where the flat pictures of these greys lie: middle y, x."""
    found = []
    for grey in greys:
        at = painted(sheet, grey)
        assert len(at), grey
        found.append(tuple(at.mean(0).tolist()))
    return found


def test_every_batch_is_a_row_and_every_picture_a_column():
    a, b, c, d, e = values = [130, 140, 150, 160, 170]
    at = dict(zip(values, cells(grid(flat(a, b), flat(c, d, e), cell=64), values)))
    assert at[a][0] == at[b][0] < at[c][0] == at[d][0] == at[e][0]
    assert at[a][1] == at[c][1] < at[b][1] == at[d][1] < at[e][1]
    turned = dict(
        zip(values, cells(grid(flat(a, b), flat(c, d, e), cell=64, batches_as="columns"), values))
    )
    assert (
        turned[a][0] == turned[c][0] < turned[b][0] == turned[d][0] < turned[e][0]
        and turned[a][1] == turned[b][1] < turned[c][1]
    )


def test_sockets_count_and_not_the_order_they_come_in():
    wired = {f"image{i}": flat(130 + i) for i in range(12)}
    with torch.inference_mode():
        one, other = (
            ComparisonGrid.execute(dict(order), cell=32).result[0]
            for order in (wired.items(), reversed(wired.items()))
        )
    assert torch.equal(one, other)
    at = cells(one, [130 + i for i in range(12)])
    assert at == sorted(at)


def test_pictures_of_any_shape_stand_whole_in_the_middle_of_their_cells():
    sheet = grid(flat(130, y=40, x=20), flat(140, y=10, x=40), cell=80)
    tall, wide = painted(sheet, 130), painted(sheet, 140)
    assert [(at.amax(0) - at.amin(0) + 1).tolist() for at in (tall, wide)] == [[80, 40], [20, 80]]
    assert abs(float(tall[:, 1].mean() - wide[:, 1].mean())) <= 1


def test_pictures_of_one_portrait_shape_stand_close():
    assert grid(flat(130, 140, y=60, x=30), cell=120).shape[2] < 2 * 60 + 60


def test_the_reference_stands_first_and_many_of_them_fit():
    at = cells(grid(flat(130, 140), flat(150, 160), reference=flat(170), cell=64), [170, 130, 150])
    assert at[0][1] < at[1][1] and at[0][0] == pytest.approx((at[1][0] + at[2][0]) / 2, abs=1)
    many = cells(grid(flat(200), reference=flat(*range(130, 137)), cell=64), [*range(130, 137)])
    assert many == sorted(many)


def test_words_take_room_and_are_drawn():
    bare = grid(flat(128, 128), flat(128, 128), cell=128)
    labelled = grid(
        flat(128, 128),
        flat(128, 128),
        cell=128,
        labels="plain\n" + "a very long name of a setting " * 20,
    )
    captioned = grid(
        flat(128, 128), flat(128, 128), cell=128, captions="\n\u732b \u00e9 \u043a\u043e\u0442"
    )
    assert labelled.shape[2] > bare.shape[2] and labelled.shape[1] == bare.shape[1]
    assert captioned.shape[1] > bare.shape[1] and captioned.shape[2] == bare.shape[2]
    assert labelled.min() < 0.3 and captioned.min() < 0.3 and bare.min() > 0.4
    assert torch.equal(grid(flat(128), labels="\n", captions=" "), grid(flat(128)))


@LAW(
    "batches, more, words",
    [
        ([], {}, "no batch is wired.*image0"),
        ([None], {}, "no batch is wired"),
        (
            [noise(2), noise(1)],
            {"labels": "a\nb\nc"},
            "labels has 3 lines, but the sheet has 2 batches.*Take 1 of them out",
        ),
        (
            [noise(2), noise(1)],
            {"captions": "a\nb\n\nc"},
            "captions has 4 lines, but the sheet has 2 pictures",
        ),
        ([noise(2), torch.full((1, 4, 4, 3), NAN)], {}, "48 values of image1 are NaN"),
        ([noise(1)[0]], {}, r"image0 is \[40, 56, 3\]"),
        ([noise(1)], {"reference": noise(0)}, r"reference is \[0, 40, 56, 3\]"),
        (
            [noise(1, 2, 2).expand(40, -1, -1, -1)] * 2,
            {"cell": 2048},
            "2 batches of up to 40 pictures at 2048.*64 million.*cell to 888",
        ),
    ],
)
def test_what_cannot_be_laid_out_names_both_values_and_the_remedy(batches, more, words):
    with pytest.raises(ValueError, match="Comparison Grid: .*" + words):
        grid(*batches, **more)


# words ---------------------------------------------------------------------------------------------------------------------


@LAW(
    "text",
    [
        "a few words that do not fit on one line",
        "oneverylongwordwithoutanyspaceinit",
        "\u732b" * 40,
        "",
        "a",
    ],
)
def test_wrapped_words_stay_within_their_width(text):
    font = drawing.typeface(14, text)
    made = drawing.wrapped(text, font, 90, 3)
    assert len(made) <= 3 and all(font.getlength(line) <= 90 for line in made)
    everything = drawing.wrapped(text, font, 90, 99)
    assert "".join(everything).replace(" ", "") == text.replace(" ", "") and (
        made == everything
    ) == (len(everything) <= 3)


def test_a_caption_behind_many_spaces_is_drawn():
    assert drawing.wrapped(
        " " * 5000 + "a" + " " * 5000 + "b", drawing.typeface(14, "a"), 90, 3
    ) == ["a b"]


@LAW("text", ["x" * 100_000, "\u200b" * 100_000, "a " * 50_000, "i" * 100_000])
def test_of_a_text_of_any_length_no_more_is_measured_than_can_be_seen(text):
    """A caption of one word of 3,000 letters once kept a server busy for minutes."""
    font, measured = drawing.typeface(14, "a"), []
    told = SimpleNamespace(
        getlength=lambda part: measured.append(len(part)) or font.getlength(part)
    )
    made = drawing.wrapped(text, told, 90, 3)
    assert len(made) <= 3 and sum(measured) < 20_000


def test_a_picture_is_fitted_whole_and_never_vanishes():
    assert drawing.fitted(Image.new("RGB", (4000, 1)), 64, 64).size == (64, 1)
