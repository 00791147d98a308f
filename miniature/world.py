"""The rendered world of the miniature: five classes, eight scenes, identities that are known exactly.

Everything is drawn from a seed with numpy and Pillow: nothing here needs torch or the host. Subject and scene are
independent of one another, a caption names class and scene only, so identity is what a reference has to bring.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import cos, pi, radians, sin

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from .scenes import PAINTERS, SIZE, SUPER, rgb

CLASSES = ("cat", "dog", "bird", "fish", "robot")
SCENES = ("beach", "snow", "forest", "night", "desert", "city", "meadow", "room")
PATTERNS = ("plain", "stripes", "spots", "patch")
HATS = ("none", "cone", "top", "cap")
PLACES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "forest": "in the forest",
    "night": "at night",
    "desert": "in the desert",
    "city": "in the city",
    "meadow": "in a meadow",
    "room": "in a room",
}
TEMPLATES = (
    "a photo of a {}",
    "a photo of a {}",
    "a picture of a {}",
    "a {}",
    "photo of a {}",
)  # the first is twice as common
HELD_OUT = 1 << 40  # seeds of identities from here on are never trained on

Point = tuple[float, float]


@dataclass(frozen=True)
class Identity:
    """What makes one subject this subject. Hues, saturation and value lie in 0..1; hues wrap around."""

    hue: float  # body
    saturation: float  # body, 0.5..1
    value: float  # body, 0.5..1
    second_hue: float  # ears, fins, wings, arms and the marks of the pattern; at least 0.2 of the circle from the body's hue
    pattern: str  # one of PATTERNS
    hat: str  # one of HATS
    hat_hue: float  # means nothing where hat is "none"


@dataclass(frozen=True)
class Rendering:
    """One picture and everything that is true about it."""

    image: np.ndarray  # uint8 [y x 3]
    mask: np.ndarray  # bool [y x], True on the subject, hat included
    identity: Identity
    class_name: str
    scene: str


def random_identity(seed: int) -> Identity:
    """An identity drawn evenly from the whole space; the same seed gives the same identity."""
    rng = np.random.default_rng([seed, 1])
    hue = float(rng.random())
    return Identity(
        hue=hue,
        saturation=float(rng.uniform(0.5, 1.0)),
        value=float(rng.uniform(0.5, 1.0)),
        second_hue=float((hue + rng.uniform(0.2, 0.8)) % 1.0),
        pattern=PATTERNS[int(rng.integers(len(PATTERNS)))],
        hat=HATS[int(rng.integers(len(HATS)))],
        hat_hue=float(rng.random()),
    )


def held_out_identity(index: int) -> Identity:
    """Identity number `index` of those that no training ever sees: their seeds start at HELD_OUT."""
    return random_identity(HELD_OUT + index)


def prompt(class_name: str, scene: str | None = None) -> str:
    """The plain caption, "a photo of a cat on the beach"; without a scene the coarse one, "a photo of a cat"."""
    return f"a photo of a {class_name}" + (f" {PLACES[scene]}" if scene else "")


def caption(class_name: str, scene: str, seed: int) -> str:
    """A training caption: 10 % empty (for guidance), 15 % the class alone (a reference's coarse prompt), else class and scene."""
    rng = np.random.default_rng([seed, 2])
    kind, template = rng.random(), TEMPLATES[int(rng.integers(len(TEMPLATES)))]
    if kind < 0.10:
        return ""
    words = template.format(class_name)
    return words if kind < 0.25 else f"{words} {PLACES[scene]}"


def all_captions() -> list[str]:
    """Every caption that `caption` can give, the empty one first."""
    named = [template.format(name) for template in dict.fromkeys(TEMPLATES) for name in CLASSES]
    return ["", *named, *(f"{words} {place}" for words in named for place in PLACES.values())]


def world_hash() -> str:
    """A fingerprint of the first renderings, written into the weights: it tells which world they were trained on."""
    return hashlib.sha256(
        b"".join(random_rendering(seed).image.tobytes() for seed in range(8))
    ).hexdigest()[:16]


@dataclass(frozen=True)
class Pose:
    """Where a subject stands: centre and half height in picture heights, a turn in radians, mirrored or not."""

    x: float
    y: float
    scale: float
    turn: float
    mirrored: bool

    def place(self, points: list[Point]) -> list[Point]:
        """Subject coordinates (-1..1, y down) -> supersampled pixels."""
        pixels, c, s = SIZE * SUPER, cos(self.turn), sin(self.turn)
        side = -1.0 if self.mirrored else 1.0
        return [
            (
                (self.x + self.scale * side * (c * x - s * y)) * pixels,
                (self.y + self.scale * (s * x + c * y)) * pixels,
            )
            for x, y in points
        ]


@dataclass(frozen=True)
class Part:
    """One filled outline in subject coordinates; `paint` names its colour."""

    points: list[Point]
    paint: str  # body, second, white, black


def _oval(x: float, y: float, rx: float, ry: float, paint: str = "body", tilt: float = 0.0) -> Part:
    c, s = cos(radians(tilt)), sin(radians(tilt))
    turns = [2 * pi * index / 28 for index in range(28)]
    return Part(
        [
            (x + rx * cos(a) * c - ry * sin(a) * s, y + rx * cos(a) * s + ry * sin(a) * c)
            for a in turns
        ],
        paint,
    )


def _shape(paint: str, *points: Point) -> Part:
    return Part(list(points), paint)


def _block(x0: float, y0: float, x1: float, y1: float, paint: str = "body") -> Part:
    return Part([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], paint)


@dataclass(frozen=True)
class Figure:
    """One class: parts behind, parts that carry the pattern, parts in front; where hat and head sit."""

    behind: tuple[Part, ...]
    body: tuple[Part, ...]
    front: tuple[Part, ...]
    hat_at: Point
    hat_width: float
    patch: Part
    head: tuple[float, float, float]  # centre and radius of a circle around it


_FIGURES = {
    "cat": Figure(  # sits, seen from the front
        behind=(_oval(0.6, 0.45, 0.14, 0.5, "second", 20),),
        body=(
            _shape("body", (-0.52, -0.5), (-0.5, -1.0), (-0.1, -0.7)),
            _shape("body", (0.52, -0.5), (0.5, -1.0), (0.1, -0.7)),
            _oval(0, 0.45, 0.52, 0.55),
            _oval(0, -0.32, 0.56, 0.46),
        ),
        front=(
            _shape("second", (-0.44, -0.62), (-0.44, -0.88), (-0.22, -0.7)),
            _shape("second", (0.44, -0.62), (0.44, -0.88), (0.22, -0.7)),
            _oval(-0.22, 0.92, 0.18, 0.12, "second"),
            _oval(0.22, 0.92, 0.18, 0.12, "second"),
            _oval(-0.22, -0.38, 0.12, 0.13, "white"),
            _oval(0.22, -0.38, 0.12, 0.13, "white"),
            _oval(-0.2, -0.37, 0.06, 0.09, "black"),
            _oval(0.2, -0.37, 0.06, 0.09, "black"),
            _shape("black", (-0.08, -0.18), (0.08, -0.18), (0, -0.08)),
        ),
        hat_at=(0, -0.72),
        hat_width=0.3,
        patch=_oval(0.22, 0.4, 0.34, 0.4),
        head=(0, -0.4, 0.62),
    ),
    "dog": Figure(  # stands, seen from the side, looks to the right
        behind=(
            _oval(-0.95, -0.3, 0.1, 0.38, "second", -30),
            _block(-0.5, 0.3, -0.3, 1.0),
            _block(0.34, 0.3, 0.54, 1.0),
        ),
        body=(
            _oval(-0.12, 0.12, 0.78, 0.4),
            _block(-0.8, 0.15, -0.56, 1.0),
            _block(0.12, 0.3, 0.34, 1.0),
            _oval(0.62, -0.42, 0.38, 0.4),
            _oval(0.98, -0.3, 0.26, 0.19),
        ),
        front=(
            _oval(0.42, -0.34, 0.17, 0.36, "second", 12),
            _oval(1.18, -0.36, 0.1, 0.09, "black"),
            _oval(0.76, -0.52, 0.11, 0.12, "white"),
            _oval(0.79, -0.51, 0.06, 0.08, "black"),
            _block(-0.82, 0.84, -0.5, 1.02, "second"),
            _block(0.1, 0.84, 0.4, 1.02, "second"),
        ),
        hat_at=(0.62, -0.76),
        hat_width=0.27,
        patch=_oval(-0.3, 0.05, 0.34, 0.4),
        head=(0.75, -0.4, 0.52),
    ),
    "bird": Figure(  # stands on two thin legs, seen from the side
        behind=(
            _shape("second", (-0.5, 0.1), (-1.15, -0.2), (-1.1, 0.3)),
            _block(-0.16, 0.55, -0.08, 1.0, "black"),
            _block(0.12, 0.55, 0.2, 1.0, "black"),
        ),
        body=(_oval(-0.02, 0.18, 0.66, 0.52, "body", 12), _oval(0.44, -0.46, 0.36, 0.36)),
        front=(
            _oval(-0.24, 0.16, 0.4, 0.22, "second", 24),
            _shape("second", (0.74, -0.56), (1.16, -0.42), (0.74, -0.3)),
            _oval(0.54, -0.52, 0.11, 0.11, "white"),
            _oval(0.56, -0.52, 0.06, 0.06, "black"),
            _block(-0.2, 0.96, 0.06, 1.02, "black"),
            _block(0.08, 0.96, 0.34, 1.02, "black"),
        ),
        hat_at=(0.42, -0.77),
        hat_width=0.26,
        patch=_oval(0.32, 0.22, 0.3, 0.36),
        head=(0.56, -0.46, 0.5),
    ),
    "fish": Figure(  # swims in the air, seen from the side
        behind=(
            _shape("second", (-0.6, 0.05), (-1.25, -0.5), (-1.05, 0.05), (-1.25, 0.6)),
            _shape("second", (-0.4, -0.4), (0.0, -0.85), (0.3, -0.45)),
            _shape("second", (-0.3, 0.45), (-0.1, 0.88), (0.25, 0.45)),
        ),
        body=(_oval(0.1, 0.05, 0.9, 0.52),),
        front=(
            _shape("second", (0.1, 0.1), (-0.28, 0.02), (-0.24, 0.36)),
            _oval(0.62, -0.1, 0.15, 0.15, "white"),
            _oval(0.65, -0.1, 0.08, 0.09, "black"),
            _shape("black", (0.98, 0.16), (0.72, 0.24), (0.96, 0.24)),
        ),
        hat_at=(0.42, -0.42),
        hat_width=0.26,
        patch=_oval(0.24, 0.02, 0.26, 0.5),
        head=(0.66, 0.02, 0.48),
    ),
    "robot": Figure(  # stands, seen from the front, all boxes
        behind=(
            _block(-0.86, -0.12, -0.56, 0.5, "second"),
            _block(0.56, -0.12, 0.86, 0.5, "second"),
            _block(-0.4, 0.6, -0.12, 1.0),
            _block(0.12, 0.6, 0.4, 1.0),
        ),
        body=(_block(-0.58, -0.18, 0.58, 0.66), _block(-0.44, -0.84, 0.44, -0.24)),
        front=(
            _block(-0.5, 0.86, -0.08, 1.02, "second"),
            _block(0.08, 0.86, 0.5, 1.02, "second"),
            _block(-0.32, -0.7, -0.08, -0.46, "white"),
            _block(0.08, -0.7, 0.32, -0.46, "white"),
            _block(-0.24, -0.64, -0.14, -0.52, "black"),
            _block(0.14, -0.64, 0.24, -0.52, "black"),
            _block(-0.26, -0.38, 0.26, -0.31, "black"),
        ),
        hat_at=(0, -0.82),
        hat_width=0.36,
        patch=_block(-0.1, -0.18, 0.58, 0.4),
        head=(0, -0.54, 0.56),
    ),
}


def _hat(kind: str, at: Point, width: float) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Hat parts and the white parts on them."""
    x, y = at
    if kind == "cone":
        return (_shape("hat", (x - width, y + 0.06), (x, y - 0.72), (x + width, y + 0.06)),), (
            _oval(x, y - 0.7, 0.1, 0.1, "white"),
        )
    if kind == "top":
        crown = _block(x - 0.72 * width, y - 0.52, x + 0.72 * width, y, "hat")
        return (crown, _block(x - 1.3 * width, y - 0.06, x + 1.3 * width, y + 0.07, "hat")), ()
    dome = [
        (x + 1.02 * width * cos(pi + pi * i / 12), y + 0.04 + 0.36 * sin(pi + pi * i / 12))
        for i in range(13)
    ]
    return (Part(dome, "hat"), _block(x, y - 0.05, x + 1.8 * width, y + 0.07, "hat")), (
        _oval(x, y - 0.32, 0.07, 0.07, "white"),
    )


def _marks(pattern: str, figure: Figure) -> list[list[Point]]:
    """The pattern's outlines in subject coordinates: fixed to the body, so one identity looks the same everywhere."""
    if pattern == "stripes":
        return [
            [(x, -1.2), (x + 0.17, -1.2), (x + 0.05, 1.2), (x - 0.12, 1.2)]
            for x in np.arange(-1.17, 1.3, 0.36)
        ]
    if pattern == "spots":
        rows = [
            (x + 0.2 * (row % 2), -1.0 + 0.3 * row)
            for row in range(7)
            for x in np.arange(-1.2, 1.3, 0.4)
        ]
        return [_oval(x, y, 0.12, 0.12).points for x, y in rows]
    return [figure.patch.points] if pattern == "patch" else []


def _pose(class_name: str, rng: np.random.Generator) -> Pose:
    scale = rng.uniform(0.27, 0.36)
    reach = 1.2 * scale if class_name in ("dog", "bird", "fish") else 0.9 * scale
    x = rng.uniform(max(0.1 + 0.8 * reach, 0.3), min(0.9 - 0.8 * reach, 0.7))
    foot = rng.uniform(0.7, 0.86) if class_name == "fish" else rng.uniform(0.8, 0.96)
    return Pose(x, foot - scale, scale, radians(rng.uniform(-7, 7)), bool(rng.random() < 0.5))


def _stage(class_name: str, scene: str, seed: int) -> tuple[Pose, Image.Image]:
    """Where the subject will stand, and the scene around it, supersampled."""
    if class_name not in CLASSES or scene not in SCENES:
        raise ValueError(
            f"Unknown class {class_name!r} or scene {scene!r}; classes are {CLASSES}, scenes are {SCENES}."
        )
    rng = np.random.default_rng([seed, 3])
    return _pose(class_name, rng), PAINTERS[scene](rng)


def backdrop(class_name: str, scene: str, seed: int) -> np.ndarray:
    """`render`'s picture before its subject is drawn: uint8 [y x 3]. Raises ValueError as `render` does."""
    return np.asarray(_stage(class_name, scene, seed)[1].reduce(SUPER))


def head_of(class_name: str, scene: str, seed: int) -> tuple[float, float, float]:
    """Where `render` draws the head: centre x, y and radius in picture sizes. Raises ValueError as `render` does."""
    pose, (x, y, radius) = _stage(class_name, scene, seed)[0], _FIGURES[class_name].head
    ((across, down),) = pose.place([(x, y)])
    return across / (SIZE * SUPER), down / (SIZE * SUPER), radius * pose.scale


def render(identity: Identity, class_name: str, scene: str, seed: int) -> Rendering:
    """Draws one subject in one scene; `seed` chooses its pose and the scene's details, never anything of the identity.

    Raises ValueError for an unknown class or scene.
    """
    (pose, image), figure = _stage(class_name, scene, seed), _FIGURES[class_name]
    pixels = SIZE * SUPER
    silhouette = Image.new("L", (pixels, pixels))
    draw, draw_silhouette = ImageDraw.Draw(image), ImageDraw.Draw(silhouette)
    body = rgb(identity.hue, identity.saturation, identity.value)
    second = rgb(identity.second_hue, 0.85, 0.92)
    paints = {
        "body": body,
        "second": second,
        "hat": rgb(identity.hat_hue, 0.9, 0.85),
        "white": (250, 250, 250),
        "black": (20, 18, 22),
    }
    line = (28, 24, 30)

    def paint(parts: tuple[Part, ...], width: int) -> None:
        for part in parts:
            points = pose.place(part.points)
            if width:
                draw.line([*points, points[0], points[1]], fill=line, width=width)
                draw_silhouette.line([*points, points[0], points[1]], fill=255, width=width)
            draw.polygon(points, fill=paints[part.paint])
            draw_silhouette.polygon(points, fill=255)

    marks = Image.new("L", (pixels, pixels))
    draw_marks = ImageDraw.Draw(marks)
    for outline in _marks(identity.pattern, figure):
        draw_marks.polygon(pose.place(outline), fill=255)
    paint(figure.behind, 5)
    for part in (
        figure.body
    ):  # each with its own share of the pattern, so that a head covers the body behind it
        paint((part,), 5)
        coat = Image.new("L", (pixels, pixels))
        ImageDraw.Draw(coat).polygon(pose.place(part.points), fill=255)
        image.paste(second, mask=ImageChops.darker(coat, marks))
    paint(figure.front, 3)
    if identity.hat != "none":
        hat, trim = _hat(identity.hat, figure.hat_at, figure.hat_width)
        paint(hat, 5)
        paint(trim, 0)
    mask = np.asarray(silhouette.reduce(SUPER)) > 127
    return Rendering(np.asarray(image.reduce(SUPER)), mask, identity, class_name, scene)


def random_rendering(seed: int) -> Rendering:
    """Class, scene and identity drawn independently: the training distribution."""
    rng = np.random.default_rng([seed, 4])
    class_name, scene = (
        CLASSES[int(rng.integers(len(CLASSES)))],
        SCENES[int(rng.integers(len(SCENES)))],
    )
    return render(random_identity(seed), class_name, scene, seed)
