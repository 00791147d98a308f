"""What a reference is bound to: its model's weights, LoRAs, sampling and injected modules, compared
by what each precision can hold.

No digest of weights is the same in two precisions: wherever a value lies near the middle between
two neighbours, both roundings are right. So a key carries two thousand of the weights themselves,
each with the precision that it is stored in.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# bits of the mantissa, and the exponent of the least normal number: IEEE 754, and OCP's 8-bit
# formats
FORMATS = {
    torch.float64: (52, -1022),
    torch.float32: (23, -126),
    torch.float16: (10, -14),
    torch.bfloat16: (7, -126),
    torch.float8_e4m3fn: (3, -6),
    torch.float8_e5m2: (2, -14),
}
# what a wider dtype may be filled from
COARSER = (
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
)
TELLING = 8  # different values that must all fit a coarser format before it counts as theirs
# a float16's rounding error: of a normal number, relative; of a tiny one
HALF_STEP, LEAST_HALF = (
    2.0**-11,
    2.0**-25,
)
MOST = 1 << 16  # values in a sketch; a key has a few thousand
ALIKE = ("weights", "LoRAs", "sampling", "injected modules")


def held_as(values: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The coarsest format that holds all values [n] float32: a float16 file that was loaded in
    float32 is one of float16.

    dtype: what they are stored in, which is the answer where they fit nothing coarser, or are too
    few to tell.
    """
    finite = values[values.isfinite() & (values != 0)]
    if dtype not in FORMATS or finite.unique().numel() < TELLING:
        return dtype
    # one bit less fits by chance
    coarser = (kind for kind in COARSER if FORMATS[kind][0] + 2 < FORMATS[dtype][0])
    return next((kind for kind in coarser if torch.equal(finite.to(kind).float(), finite)), dtype)


def cells(stored: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Numbers as they are stored [n] -> [2 n] float32: times their scale, and half a step of the
    format there: what rounding may do.

    dtype: the format they were rounded to; scale: what the numbers of weights in float8 may have
    beside them. Integers, and what is of no known format, stand for themselves; NaN and infinite
    numbers for any.
    """
    exact = stored.double()
    if dtype not in FORMATS:
        return torch.stack([exact, torch.zeros_like(exact)]).float()
    mantissa, least = FORMATS[dtype]
    exponent = torch.frexp(exact).exponent - 1  # frexp: 0.5 <= |m| < 1, and 0 for 0
    exponent = torch.where(exact == 0, least, exponent.clamp(min=least))
    half = torch.ldexp(torch.ones_like(exact), exponent - mantissa - 1)
    known = exact.isfinite()
    return torch.stack(
        [torch.where(known, scale * exact, 0), torch.where(known, scale * half, torch.inf)]
    ).float()


def alike(a: Tensor, b: Tensor) -> Tensor:
    """bool [n]: whether one number can have been rounded to both; a, b: cells [2 n].

    Formats of binary numbers lie on one another's grids, so the finer value lies in the coarser
    one's cell, and in one format they are equal. Steps of a scale lie anywhere: there the cells
    have to meet. Of two formats the finer one may also be a float32 file and the coarser one made
    of its float16 file.
    """
    (x, half_x), (y, half_y) = a.double(), b.double()
    one_grid = torch.frexp(half_x).mantissa == torch.frexp(half_y).mantissa
    far = torch.where(one_grid, torch.maximum(half_x, half_y), half_x + half_y)
    far = torch.where(half_x == half_y, far, far + HALF_STEP * torch.maximum(x.abs(), y.abs()))
    return (x - y).abs() <= far + LEAST_HALF


@dataclass(frozen=True, eq=False)
class Sketch:
    """A part of some tensors. Raises ValueError where the values are none."""

    # of whatever is no tensor's value: names and shapes; of LoRAs also kinds and strengths
    digest: str
    values: Tensor  # [2 n] float32 CPU, see cells
    layers: int = 0  # how many there are in all
    # a foreign storage whose numbers nobody here can read, which equals itself alone
    stored: str = ""

    def __post_init__(self) -> None:
        v = self.values
        if (
            v.dtype != torch.float32
            or v.ndim != 2
            or len(v) != 2
            or v.shape[1] > MOST
            or not (v[0].isfinite() & (v[1] >= 0)).all()
        ):
            raise ValueError(
                f"a model's key holds {v.dtype} {list(v.shape)} where float32 values and their "
                f"precision belong"
            )

    def like(self, other: Sketch) -> bool:
        """Whether the same numbers, rounded in two ways, give both."""
        same = self.digest == other.digest and self.values.shape == other.values.shape
        return same and bool(alike(self.values, other.values).all())

    def description(self) -> dict[str, Any]:
        """For JSON; little-endian float32."""
        raw = self.values.numpy().astype("<f4").tobytes()
        return {
            "digest": self.digest,
            "values": base64.b64encode(raw).decode("ascii"),
            "layers": self.layers,
            "stored": self.stored,
        }

    @classmethod
    def read(cls, description: Mapping[str, Any]) -> Sketch:
        """ValueError, KeyError or TypeError where it is not what `description()` gives."""
        raw = bytearray(base64.b64decode(description["values"], validate=True))
        if len(raw) % 8 or len(raw) > 8 * MOST:
            raise ValueError(f"a model's key of {len(raw)} bytes")
        flat = torch.frombuffer(raw, dtype=torch.float32) if raw else torch.zeros(0)
        if (
            not isinstance(description["digest"], str)
            or type(description["layers"]) is not int
            or not isinstance(description["stored"], str)
        ):
            raise TypeError("a model's key of other kinds")
        return cls(
            description["digest"], flat.view(2, -1), description["layers"], description["stored"]
        )


@dataclass(frozen=True, eq=False)
class Parts:
    """What has to be the same for features of one model to mean something to another.

    Weights are other ones where one of some two thousand values cannot be both. A change of a
    thousandth, of every weight, shows in each of them in float32 and float16, in a tenth of them in
    bfloat16 and in a hundredth in float8: what is told apart there are fine-tunes of the whole
    network, and not those of a few layers. Between bfloat16 and float8, and between the two float8,
    it takes a change of a hundredth. A float32 file and its float16 file are one model, but for
    both in the same coarser format.
    """

    weights: Sketch
    patches: Sketch  # LoRAs, bypassed ones too, and whatever else is added to weights
    sampling: str  # what the network predicts and how its noise is scaled
    modules: tuple[str, ...]  # of other packs, injected into the network


class ModelKey(str):
    """A model's name, "SD15 1a2b3c4d5e6f", as it is shown; what is compared stands beside it, in
    `parts`.

    The name is exact: another precision has another one. References of older versions have only
    that, as plain text.
    """

    parts: Parts | None

    def __new__(cls, name: str, parts: Parts | None = None) -> ModelKey:
        key = super().__new__(cls, name)
        key.parts = parts
        return key


def parts_of(key: str) -> Parts | None:
    return getattr(key, "parts", None)


def tell_parts(key: str) -> dict[str, Any] | None:
    """What of a key is not its name, for JSON; None where there is nothing."""
    if (parts := parts_of(key)) is None:
        return None
    return {
        "weights": parts.weights.description(),
        "patches": parts.patches.description(),
        "sampling": parts.sampling,
        "modules": [*parts.modules],
    }


def read_parts(name: str, description: Mapping[str, Any] | None) -> str:
    """The key of that name; ValueError, KeyError or TypeError where it is not what tell_parts
    gives.
    """
    if description is None:
        return name
    words = [description["sampling"], *description["modules"]]
    if not all(isinstance(word, str) for word in words):
        raise TypeError("a model's key without words")
    weights, patches = Sketch.read(description["weights"]), Sketch.read(description["patches"])
    return ModelKey(name, Parts(weights, patches, words[0], tuple(words[1:])))


def tell_key(key: str) -> str:
    """A key as one text, for a file that keeps nothing but plain values."""
    description = tell_parts(key)
    return str(key) if description is None else json.dumps({"name": key, **description})


def read_key(text: object) -> str:
    """What tell_key wrote; anything else as the text that it is."""
    try:
        description = json.loads(str(text))
        return read_parts(description["name"], description)
    except (ValueError, KeyError, TypeError, RecursionError):  # a damaged one may be nested deep
        return str(text)


def without_latents(key: str) -> str:
    """A model's name as older versions wrote it."""
    kind, _, rest = key.partition(" ")
    return f"{kind.partition('/')[0]} {rest}"


def differences(made_with: str, current: str) -> tuple[str, ...] | None:
    """What of two models differs, of ALIKE, or "kind"; () where they are one; None where they
    differ and a name is all there is.
    """
    ours, theirs = (without_latents(key) for key in (made_with, current))
    a, b = parts_of(made_with), parts_of(current)
    if a is None or b is None:
        return (
            ()
            if ours == theirs
            else ("kind",)
            if ours.split(" ")[0] != theirs.split(" ")[0]
            else None
        )
    if ours.split(" ")[0] != theirs.split(" ")[0]:
        return ("kind",)
    same = (
        a.weights.like(b.weights),
        a.patches.like(b.patches),
        a.sampling == b.sampling,
        a.modules == b.modules,
    )
    return tuple(name for name, alike in zip(ALIKE, same) if not alike)


def explain(made_with: str, current: str, differ: Iterable[str]) -> str:
    """Both sides of every difference, for a sentence: "LoRAs (none there, on 4 layers here)"."""
    a, b = parts_of(made_with), parts_of(current)
    if a is None or b is None:
        return ", ".join(differ)

    def loras(parts: Parts) -> str:
        return (
            f"on {parts.patches.layers} layer{'s' * (parts.patches.layers > 1)}"
            if parts.patches.layers
            else "none"
        )

    tell: dict[str, Callable[[Parts], str]] = {
        "weights": lambda parts: parts.weights.stored or "plain numbers",
        "LoRAs": loras,
        "sampling": lambda parts: parts.sampling,
        "injected modules": lambda parts: ", ".join(parts.modules) or "none",
    }

    def one(name: str) -> str:
        there, here = (tell.get(name, lambda parts: "")(parts) for parts in (a, b))
        return f"{name} ({there} there, {here} here)" if there != here else name

    return ", ".join(map(one, differ))
