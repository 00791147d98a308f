"""The eight scenes of the miniature's world: backgrounds drawn with Pillow, varied by a generator, nothing of any subject in them."""

from __future__ import annotations

import colorsys
from math import pi

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128  # pixels of a picture, y and x
SUPER = 2  # drawn at twice the size and averaged down: cheap anti-aliasing
Colour = tuple[int, int, int]


def rgb(hue: float, saturation: float, value: float) -> Colour:
    """HSV in 0..1 (hue wraps) -> 8-bit RGB."""
    return tuple(
        round(255 * part)
        for part in colorsys.hsv_to_rgb(
            hue % 1.0, min(max(saturation, 0), 1), min(max(value, 0), 1)
        )
    )


def _sky(top: Colour, bottom: Colour) -> Image.Image:
    ramp = np.linspace(0, 1, SIZE * SUPER)[:, None, None]
    rows = np.asarray(top) * (1 - ramp) + np.asarray(bottom) * ramp
    return Image.fromarray(np.broadcast_to(rows, (SIZE * SUPER, SIZE * SUPER, 3)).astype(np.uint8))


def _hills(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    base: float,
    height: float,
    colour: Colour,
    waves: float = 1.5,
) -> None:
    xs = np.linspace(0, 1, 33)
    ys = base - height * (0.5 + 0.5 * np.sin(2 * pi * (waves * xs + rng.random())))
    pixels = SIZE * SUPER
    draw.polygon(
        [
            (0, pixels),
            *[(x * pixels, y * pixels) for x, y in zip(xs, ys, strict=True)],
            (pixels, pixels),
        ],
        fill=colour,
    )


def _box(
    draw: ImageDraw.ImageDraw, x0: float, y0: float, x1: float, y1: float, colour: Colour
) -> None:
    n = SIZE * SUPER
    draw.rectangle((x0 * n, y0 * n, x1 * n, y1 * n), fill=colour)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    n = SIZE * SUPER
    draw.ellipse(((x - r) * n, (y - r) * n, (x + r) * n, (y + r) * n), fill=colour)


def _beach(rng: np.random.Generator) -> Image.Image:
    h = rng.uniform(-0.02, 0.02)
    image = _sky(rgb(0.55 + h, 0.45, 0.95), rgb(0.54 + h, 0.15, 1.0))
    draw = ImageDraw.Draw(image)
    _disc(draw, rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2), 0.07, rgb(0.15, 0.45, 1.0))
    horizon = rng.uniform(0.36, 0.46)
    _box(draw, 0, horizon, 1, 1, rgb(0.54 + h, 0.8, rng.uniform(0.6, 0.75)))
    _hills(draw, rng, horizon + rng.uniform(0.17, 0.24), 0.03, rgb(0.5, 0.1, 1.0), 1.0)
    _hills(
        draw,
        rng,
        horizon + rng.uniform(0.22, 0.27),
        0.03,
        rgb(0.12 + h / 2, 0.38, rng.uniform(0.88, 0.96)),
        1.0,
    )
    return image


def _snow(rng: np.random.Generator) -> Image.Image:
    h = rng.uniform(-0.03, 0.03)
    image = _sky(rgb(0.6 + h, 0.22, 0.78), rgb(0.6 + h, 0.1, 0.9))
    draw = ImageDraw.Draw(image)
    _hills(draw, rng, rng.uniform(0.5, 0.56), 0.1, rgb(0.58 + h, 0.12, 0.86), 1.2)
    _hills(draw, rng, rng.uniform(0.64, 0.72), 0.06, rgb(0.58 + h, 0.03, 0.98), 0.8)
    for x, y in rng.random((22, 2)):
        _disc(draw, x, y, 0.012, (255, 255, 255))
    return image


def _forest(rng: np.random.Generator) -> Image.Image:
    h = rng.uniform(-0.03, 0.03)
    image = _sky(rgb(0.36 + h, 0.6, 0.3), rgb(0.33 + h, 0.5, 0.45))
    draw = ImageDraw.Draw(image)
    start, step = rng.uniform(-0.05, 0.1), rng.uniform(0.19, 0.24)
    for index in range(6):
        x, width = start + step * index + rng.uniform(-0.03, 0.03), rng.uniform(0.05, 0.08)
        _box(draw, x, 0, x + width, 0.75, rgb(0.07, 0.55, rng.uniform(0.26, 0.36)))
    for index in range(7):
        _disc(
            draw,
            index / 6 + rng.uniform(-0.05, 0.05),
            rng.uniform(-0.02, 0.1),
            0.14,
            rgb(0.35 + h, 0.75, rng.uniform(0.32, 0.46)),
        )
    _hills(draw, rng, rng.uniform(0.68, 0.76), 0.04, rgb(0.28 + h, 0.6, 0.34), 1.3)
    return image


def _night(rng: np.random.Generator) -> Image.Image:
    h = rng.uniform(-0.03, 0.03)
    image = _sky(rgb(0.66 + h, 0.8, 0.12), rgb(0.66 + h, 0.7, 0.3))
    draw = ImageDraw.Draw(image)
    for x, y in rng.random((16, 2)):
        _disc(draw, x, y * 0.6, 0.01, (250, 245, 215))
    x, y = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.22)
    _disc(draw, x, y, 0.08, (245, 240, 205))
    _hills(draw, rng, rng.uniform(0.7, 0.78), 0.08, rgb(0.68 + h, 0.6, 0.14), 1.2)
    return image


def _desert(rng: np.random.Generator) -> Image.Image:
    h = rng.uniform(-0.015, 0.015)
    image = _sky(rgb(0.07 + h, 0.45, 0.98), rgb(0.12 + h, 0.3, 1.0))
    draw = ImageDraw.Draw(image)
    _hills(draw, rng, rng.uniform(0.5, 0.56), 0.12, rgb(0.07 + h, 0.65, 0.82), 1.0)
    x, y, green = (
        rng.choice((rng.uniform(0.06, 0.2), rng.uniform(0.8, 0.94))),
        rng.uniform(0.58, 0.64),
        rgb(0.36, 0.6, 0.45),
    )
    _box(draw, x - 0.025, y - 0.26, x + 0.025, y, green)
    _box(draw, x - 0.085, y - 0.15, x + 0.085, y - 0.11, green)
    _box(draw, x - 0.085, y - 0.2, x - 0.05, y - 0.11, green)
    _box(draw, x + 0.05, y - 0.22, x + 0.085, y - 0.11, green)
    _hills(draw, rng, rng.uniform(0.66, 0.74), 0.1, rgb(0.08 + h, 0.7, 0.92), 0.8)
    return image


def _city(rng: np.random.Generator) -> Image.Image:
    h = rng.uniform(0.55, 0.65)
    image = _sky(rgb(h, 0.12, 0.7), rgb(h, 0.05, 0.85))
    draw = ImageDraw.Draw(image)
    x = rng.uniform(-0.1, 0.0)
    while x < 1:
        width, top, grey = rng.uniform(0.17, 0.24), rng.uniform(0.08, 0.36), rng.uniform(0.28, 0.48)
        _box(draw, x, top, x + width - 0.015, 0.8, rgb(h, 0.12, grey))
        for row in np.arange(top + 0.05, 0.7, 0.1):
            for column in (0.2, 0.6):
                _box(
                    draw,
                    x + column * width,
                    row,
                    x + (column + 0.2) * width,
                    row + 0.05,
                    rgb(0.14, 0.5, 0.95),
                )
        x += width
    road = rng.uniform(0.7, 0.78)
    _box(draw, 0, road, 1, 1, rgb(h, 0.05, 0.3))
    start = rng.uniform(-0.2, 0)
    for index in range(5):
        _box(
            draw,
            start + 0.28 * index,
            road + 0.12,
            start + 0.28 * index + 0.14,
            road + 0.145,
            (235, 235, 225),
        )
    return image


def _meadow(rng: np.random.Generator) -> Image.Image:
    h = rng.uniform(-0.03, 0.03)
    image = _sky(rgb(0.57 + h, 0.6, 1.0), rgb(0.55 + h, 0.3, 1.0))
    draw = ImageDraw.Draw(image)
    x, y = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.2)
    for shift in (-0.08, 0, 0.08):
        _disc(draw, x + shift, y - 0.03 * (shift == 0), 0.065, (250, 252, 255))
    horizon = rng.uniform(0.46, 0.56)
    _hills(draw, rng, horizon, 0.06, rgb(0.27 + h, 0.7, rng.uniform(0.72, 0.85)), 1.0)
    flower = rgb(rng.choice((0.0, 0.15, 0.85)), 0.7, 1.0)
    for x, y in rng.random((16, 2)):
        _disc(draw, x, horizon + 0.06 + y * (0.94 - horizon), 0.018, flower)
    return image


def _room(rng: np.random.Generator) -> Image.Image:
    wall = rgb(
        rng.choice((0.03, 0.09, 0.93)) + rng.uniform(-0.02, 0.02), rng.uniform(0.2, 0.3), 0.88
    )
    image = _sky(wall, wall)
    draw = ImageDraw.Draw(image)
    x, y = rng.choice((rng.uniform(0.05, 0.15), rng.uniform(0.6, 0.7))), rng.uniform(0.06, 0.14)
    _box(draw, x, y, x + 0.28, y + 0.34, (250, 250, 245))
    _box(draw, x + 0.03, y + 0.03, x + 0.25, y + 0.31, rgb(0.56, 0.4, 0.95))
    _box(draw, x + 0.13, y, x + 0.15, y + 0.34, (250, 250, 245))
    floor = rng.uniform(0.66, 0.74)
    _box(draw, 0, floor, 1, 1, rgb(0.07, 0.55, rng.uniform(0.5, 0.62)))
    _box(draw, 0, floor - 0.03, 1, floor, (245, 240, 232))
    for index in range(3):
        row = floor + 0.08 + 0.1 * index
        _box(draw, 0, row, 1, row + 0.012, rgb(0.06, 0.6, 0.4))
    return image


PAINTERS = {
    "beach": _beach,
    "snow": _snow,
    "forest": _forest,
    "night": _night,
    "desert": _desert,
    "city": _city,
    "meadow": _meadow,
    "room": _room,
}
