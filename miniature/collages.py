"""Pictures of the miniature's world that do not show one whole subject, and some put together that do: for the reader's head.

Every one is a function of its seed, whose rendering (`random_rendering`) it is made from. uint8 [128 128 3].
`python -m miniature.collages` writes the sheet on the miniature's card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .program import run_program
from .scenes import SIZE
from .world import (
    CLASSES,
    HELD_OUT,
    SCENES,
    Rendering,
    backdrop,
    head_of,
    random_identity,
    random_rendering,
    render,
)

TRIES = 40  # before the last place found is taken
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Cutting:
    """A piece of a picture with its outline."""

    image: Image.Image  # RGB
    mask: Image.Image  # L, 255 where the piece is

    def sized(self, factor: float, turn: float = 0.0, mirrored: bool = False) -> Cutting:
        """Scaled, turned by degrees, mirrored or not."""
        size = tuple(max(1, round(side * factor)) for side in self.image.size)
        parts = [part.resize(size, Image.Resampling.BICUBIC) for part in (self.image, self.mask)]
        if mirrored:
            parts = [part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in parts]
        return Cutting(
            *(part.rotate(turn, Image.Resampling.BICUBIC, expand=True) for part in parts)
        )

    def at(self, x: int, y: int) -> np.ndarray:
        """Where it lies with its upper left corner there: bool [y x] of the whole picture."""
        page = Image.new("L", (SIZE, SIZE))
        page.paste(self.mask, (x, y))
        return np.asarray(page) > 127

    def area(self) -> int:
        """Pixels, those outside of the picture too."""
        return int((np.asarray(self.mask) > 127).sum())

    def onto(self, picture: Image.Image, x: int, y: int, share: float = 1.0) -> None:
        """Paste it; share: how much of it covers, 1 for all."""
        picture.paste(self.image, (x, y), self.mask.point(lambda value: int(value * share)))


def box_of(mask: np.ndarray) -> Box:
    """Left, top, right, bottom of what is True."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def cut(drawn: Rendering, within: np.ndarray | None = None) -> tuple[Cutting, Box]:
    """A rendering's subject, or its part within a mask [y x], and the box that it came from."""
    mask = drawn.mask if within is None else drawn.mask & within
    box = box_of(mask)
    return Cutting(
        Image.fromarray(drawn.image).crop(box),
        Image.fromarray((mask * 255).astype(np.uint8)).crop(box),
    ), box


def scene_of(drawn: Rendering, seed: int) -> Image.Image:
    """A rendering's picture without its subject."""
    return Image.fromarray(backdrop(drawn.class_name, drawn.scene, seed))


def places(
    piece: Cutting, rng: np.random.Generator, inside: float = 0.9
) -> Iterator[tuple[int, int]]:
    """Corners at which so much of a piece lies in the picture, at most TRIES of them."""
    area = max(piece.area(), 1)
    width, height = piece.image.size
    for _ in range(TRIES):
        x, y = (int(rng.integers(-side // 4, SIZE - 3 * side // 4)) for side in (width, height))
        if piece.at(x, y).sum() >= inside * area:
            yield x, y


# whole subjects ---------------------------------------------------------------------------------------------------------------


def as_drawn(seed: int, rng: np.random.Generator) -> np.ndarray:
    """The rendering itself."""
    return random_rendering(seed).image


def moved(seed: int, rng: np.random.Generator) -> np.ndarray:
    """The subject cut out and laid somewhere into another scene: a seam by itself is no fault."""
    drawn = random_rendering(seed)
    other = SCENES[int(rng.integers(len(SCENES)))]
    page = Image.fromarray(backdrop(drawn.class_name, other, seed + 1))
    piece = cut(drawn)[0].sized(rng.uniform(0.75, 1.1), rng.uniform(-6, 6), rng.random() < 0.5)
    for x, y in places(piece, rng, inside=0.985):
        piece.onto(page, x, y)
        return np.asarray(page)
    return drawn.image


# what is wrong ----------------------------------------------------------------------------------------------------------------


def missing(seed: int, rng: np.random.Generator) -> np.ndarray:
    """The scene alone."""
    return np.asarray(scene_of(random_rendering(seed), seed))


def relative(drawn: Rendering, seed: int, rng: np.random.Generator) -> Rendering:
    """Another picture, mostly of the same class and identity."""
    identity = drawn.identity if rng.random() < 0.7 else random_identity(seed + 1)
    kind = drawn.class_name if rng.random() < 0.85 else CLASSES[int(rng.integers(len(CLASSES)))]
    return render(identity, kind, SCENES[int(rng.integers(len(SCENES)))], seed + 1)


def twice(seed: int, rng: np.random.Generator) -> np.ndarray:
    """Two subjects, of which neither covers more than a third of the other."""
    drawn = random_rendering(seed)
    page, other = scene_of(drawn, seed), relative(drawn, seed, rng)
    first = cut(drawn)[0].sized(rng.uniform(0.6, 1.0))
    second = cut(other)[0].sized(
        rng.uniform(0.5, 0.95), rng.uniform(-8, 8), mirrored=rng.random() < 0.5
    )
    for where in places(first, rng):
        below = first.at(*where)
        for x, y in places(second, rng):
            if (below & second.at(x, y)).sum() <= min(first.area(), second.area()) / 3:
                first.onto(page, *where)
                second.onto(page, x, y, rng.uniform(0.7, 1.0))
                return np.asarray(page)
    return inset(seed, rng)


def inset(seed: int, rng: np.random.Generator) -> np.ndarray:
    """Another picture as a small one within this one, or both as halves of one."""
    drawn = random_rendering(seed)
    other = relative(drawn, seed, rng)
    if rng.random() < 0.3:
        return halves(drawn, other, rng)
    page, side = Image.fromarray(drawn.image), int(SIZE * rng.uniform(0.32, 0.55))
    box = box_of(other.mask) if rng.random() < 0.5 else (0, 0, SIZE, SIZE)
    small = Image.fromarray(other.image).crop(box).resize((side, side), Image.Resampling.BICUBIC)
    if rng.random() < 0.2:
        ImageDraw.Draw(small).rectangle((0, 0, side - 1, side - 1), outline=(245, 245, 245))
    piece = Cutting(small, Image.new("L", (side, side), 255))
    x, y = 0, 0
    for x, y in places(piece, rng):
        if (piece.at(x, y) & drawn.mask).sum() <= 0.4 * drawn.mask.sum():
            break
    piece.onto(page, x, y, rng.uniform(0.75, 1.0))
    return np.asarray(page)


def halves(one: Rendering, other: Rendering, rng: np.random.Generator) -> np.ndarray:
    """Two pictures side by side or above one another, each with the middle of its subject."""
    parts = []
    for drawn in (one, other):
        left, top, right, bottom = box_of(drawn.mask)
        corner = int(np.clip((left + right) / 2 - SIZE / 4, 0, SIZE / 2))
        parts.append(drawn.image[:, corner : corner + SIZE // 2])
    if rng.random() < 0.6:
        return np.concatenate(parts, 1)
    small = [Image.fromarray(drawn.image).resize((SIZE, SIZE // 2)) for drawn in (one, other)]
    return np.concatenate([np.asarray(part) for part in small])


def two_heads(seed: int, rng: np.random.Generator) -> np.ndarray:
    """The head once more, beside or behind the first one and joined to the subject."""
    drawn = random_rendering(seed)
    x, y, radius = (SIZE * part for part in head_of(drawn.class_name, drawn.scene, seed))
    down, across = np.mgrid[:SIZE, :SIZE]
    tall = np.where(down < y, 1.5, 1.0)  # with its hat
    circle = ((across - x) ** 2 + ((down - y) / tall) ** 2) < radius**2
    piece, box = cut(drawn, circle)
    page = Image.fromarray(drawn.image)
    turned = piece.sized(rng.uniform(0.85, 1.0), rng.uniform(-35, 35), rng.random() < 0.5)
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    best, place = -np.inf, (0, 0)
    for _ in range(TRIES):
        angle, far = rng.uniform(0, 2 * pi), radius * rng.uniform(1.0, 1.7)
        corner = tuple(
            int(m + far * part - side / 2)
            for m, part, side in zip(
                middle, (cos(angle), sin(angle)), turned.image.size, strict=True
            )
        )
        lies = turned.at(*corner)
        area = max(turned.area(), 1)
        joined, hides = (lies & drawn.mask).sum() / area, (lies & circle & drawn.mask).sum() / area
        score = min(joined, 0.15) - max(hides - 0.3, 0) - 2 * max(0.85 - lies.sum() / area, 0)
        if score > best:
            best, place = score, corner
    turned.onto(page, *place)
    return np.asarray(page)


def half(seed: int, rng: np.random.Generator) -> np.ndarray:
    """A part of the subject alone: cut through anywhere, or out of the picture."""
    drawn = random_rendering(seed)
    page = scene_of(drawn, seed)
    piece, box = cut(drawn)
    if rng.random() < 0.3:
        piece.onto(page, *_pushed_out(box, rng))
        return np.asarray(page)
    down, across = np.mgrid[:SIZE, :SIZE]
    angle, left = rng.uniform(0, 2 * pi), rng.uniform(0.35, 0.62)  # of the subject
    along = across * cos(angle) + down * sin(angle)
    kept, box = cut(drawn, along <= np.quantile(along[drawn.mask], left))
    kept.onto(page, *box[:2])
    return np.asarray(page)


def _pushed_out(box: Box, rng: np.random.Generator) -> tuple[int, int]:
    """A corner at which a piece of this box lies partly beyond an edge of the picture."""
    width, height, beyond = box[2] - box[0], box[3] - box[1], rng.uniform(0.4, 0.62)
    return (
        (int(-beyond * width), box[1]),
        (int(SIZE - (1 - beyond) * width), box[1]),
        (box[0], int(-beyond * height)),
        (box[0], int(SIZE - (1 - beyond) * height)),
    )[int(rng.integers(4))]


def torn(seed: int, rng: np.random.Generator) -> np.ndarray:
    """Where the subject is, its pieces in another order, or blocks of its colours."""
    drawn, side = random_rendering(seed), int(rng.integers(13, 22))
    image, (left, top, right, bottom) = drawn.image.copy(), box_of(drawn.mask)
    corners = [
        (y, x)
        for y in range(top, min(bottom, SIZE - side), side)
        for x in range(left, min(right, SIZE - side), side)
    ]
    cells = [(y, x) for y, x in corners if drawn.mask[y : y + side, x : x + side].mean() > 0.15]
    if rng.random() < 0.5 and len(cells) > 3:
        order = np.roll(rng.permutation(len(cells)), 1)
        pieces = [drawn.image[y : y + side, x : x + side] for y, x in cells]
        for (y, x), number in zip(cells, order, strict=True):
            image[y : y + side, x : x + side] = pieces[number]
        return image
    coarse = Image.fromarray(drawn.image).resize((SIZE // side * 2,) * 2, Image.Resampling.BOX)
    around = Image.fromarray((drawn.mask * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(9))
    page = Image.fromarray(drawn.image)
    page.paste(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), (0, 0), around)
    return np.asarray(page)


WHOLE: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "as drawn": as_drawn,
    "moved": moved,
}
FAULTS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "missing": missing,
    "twice": twice,
    "inset": inset,
    "two heads": two_heads,
    "half": half,
    "torn": torn,
}


def collage(kind: str, seed: int) -> np.ndarray:
    """One picture of a kind of WHOLE or FAULTS: uint8 [y x 3]; the same seed gives the same picture."""
    return (WHOLE | FAULTS)[kind](seed, np.random.default_rng([seed, 6]))


def kind_of(seed: int) -> str:
    """Which kind a training shows under a seed: half of them whole, a third of those moved; the faults evenly."""
    rng = np.random.default_rng([seed, 7])
    if rng.random() < 0.5:
        return "moved" if rng.random() < 1 / 3 else "as drawn"
    return tuple(FAULTS)[int(rng.integers(len(FAULTS)))]


def row_of(kind: str, count: int) -> np.ndarray:
    """Held-out pictures of a kind side by side: uint8 [y x*count 3]."""
    return np.concatenate([collage(kind, HELD_OUT + n) for n in range(count)], 1)


def main() -> None:
    """Writes the sheet on the card: a row per kind, held-out seeds from 0 on."""
    rows = [row_of(kind, 10) for kind in WHOLE | FAULTS]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((960, 768), Image.Resampling.BOX).save(
        Path(__file__).with_suffix(".jpg"), quality=82
    )


if __name__ == "__main__":
    run_program(main)
