"""Damaged and lying forms of one .safetensors, from a seed: the same file and number give the same mutant on every machine.

A file is its header (JSON: the tensors' entries and, under __metadata__, a description that is JSON again) and its data. Kinds
of damage are the methods of Mutator; each returns the bytes of one mutant and a few words for the message of a failing test.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    255,
    4097,
    2**20,
    2**31,
    2**32 + 1,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**40,
    0.5,
    -0.0,
    1e308,
    1e-320,
    math.nan,
    math.inf,
    -math.inf,
)
WORDS = (
    "",
    "0",
    "1",
    "-1",
    "1e9",
    "nan",
    "true",
    "None",
    "cond",
    "uncond",
    "input",
    "middle",
    "output",
    "float32",
    "load",
    "__class__",
    "../x",
    "a\0b",
    "\ud800",
    "\u202egnp.exe",
    "\uff43\uff4f\uff4e\uff44",
    "\xe9" * 50,
    "x" * 70_000,
    "{}",
    "[" * 2000,
    "%s%n%d",
    "{0.__class__}",
)
VALUES = (
    *NUMBERS,
    *WORDS,
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [0, 0],
    {"a": 1},
    [1] * 3000,
    {"cond": None},
    {str(i): i for i in range(300)},
)
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "U16",
    "U32",
    "U64",
    "F8_E4M3",
    "F8_E5M2",
    "C64",
    "F4",
    "E8M0",
    "f32",
    "",
    "OBJECT",
    5,
    None,
)
FLOATS = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e30, 1e9, 7e4, 0.0, -0.0, 1e-40)


def split(whole: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a .safetensors."""
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def joined(header: str | dict[str, Any], data: bytes, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode(
        "utf-8", "surrogatepass"
    )
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to every value inside JSON, containers too."""
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield (*path, key)
        yield from places(inner, (*path, key))


class Mutator:
    """Mutants of one file; key: the metadata's entry that holds its description."""

    def __init__(self, whole: bytes, key: str, seed: str = "") -> None:
        self.whole, self.key, self.seed = whole, key, seed
        self.header, self.data = split(whole)
        self.names = [name for name in self.header if name != "__metadata__"]
        self.told = json.loads(
            self.header.get("__metadata__", {}).get(key, "{}")
        )  # {}: a format of names alone
        self.kinds: list[Callable[[random.Random], tuple[bytes, str]]] = [
            self.flipped,
            self.flipped_header,
            self.flipped_data,
            self.cut,
            self.spliced,
            self.length,
            self.entry,
            self.entry,
            self.overlap,
            self.tensors,
            self.values,
            self.values,
        ]
        if self.told:
            self.kinds += [self.description] * 4 + [self.text, self.layered]

    def mutants(self, count: int) -> Iterator[tuple[bytes, str]]:
        for number in range(count):
            rng = random.Random(f"{self.seed}{number}")
            made, words = self.kinds[number % len(self.kinds)](rng)
            yield made, f"{number}: {words}"

    def flip(self, rng: random.Random, start: int, end: int) -> tuple[bytes, str]:
        made = bytearray(self.whole)
        at = [rng.randrange(start, end) for _ in range(rng.choice((1, 1, 2, 8, 64)))]
        for place in at:
            made[place] ^= 1 << rng.randrange(8) if rng.random() < 0.7 else rng.randrange(1, 256)
        return bytes(made), f"flipped {at[:4]}"

    def flipped(self, rng: random.Random) -> tuple[bytes, str]:
        return self.flip(rng, 0, len(self.whole))

    def flipped_header(self, rng: random.Random) -> tuple[bytes, str]:
        return self.flip(rng, 0, len(self.whole) - len(self.data))

    def flipped_data(self, rng: random.Random) -> tuple[bytes, str]:
        """Also all of one tensor's last bytes: exponents."""
        name = rng.choice(self.names)
        begin, end = self.header[name]["data_offsets"]
        head = len(self.whole) - len(self.data)
        if begin == end:
            return self.flip(rng, head, len(self.whole))
        return self.flip(rng, head + begin, head + end)

    def cut(self, rng: random.Random) -> tuple[bytes, str]:
        """At the edges of header and tensors, and anywhere; or with something behind."""
        head = len(self.whole) - len(self.data)
        edges = [
            0,
            1,
            7,
            8,
            9,
            head - 1,
            head,
            head + 1,
            *(head + e for name in self.names for e in self.header[name]["data_offsets"]),
        ]
        at = rng.choice(edges) if rng.random() < 0.6 else rng.randrange(len(self.whole))
        if rng.random() < 0.2:
            more = rng.choice((1, 8, 4096))
            return self.whole + bytes(more), f"{more} bytes more"
        return self.whole[:at], f"cut at {at}"

    def spliced(self, rng: random.Random) -> tuple[bytes, str]:
        """A piece taken out, doubled, zeroed or moved."""
        a, b = sorted(rng.sample(range(len(self.whole)), 2))
        b = min(b, a + 10 ** rng.randrange(1, 6))
        piece = self.whole[a:b]
        how = rng.choice(("out", "twice", "zero", "front"))
        made = {
            "out": self.whole[:a] + self.whole[b:],
            "twice": self.whole[:b] + piece + self.whole[b:],
            "zero": self.whole[:a] + bytes(len(piece)) + self.whole[b:],
            "front": piece + self.whole,
        }[how]
        return made, f"{how} {a}:{b}"

    def length(self, rng: random.Random) -> tuple[bytes, str]:
        size = len(self.whole)
        told = rng.choice(
            (
                0,
                1,
                2,
                7,
                size - 8,
                size,
                size - 9,
                2**26,
                2**26 + 1,
                2**31,
                2**32,
                2**40,
                2**63 - 1,
                2**63,
                2**64 - 1,
                rng.randrange(2, size),
            )
        )
        return struct.pack("<Q", told) + self.whole[8:], f"length {told}"

    def entry(self, rng: random.Random) -> tuple[bytes, str]:
        """A tensor of another shape, dtype or place than there is data for."""
        header = json.loads(json.dumps(self.header))
        name = rng.choice(self.names)
        entry = header[name]
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        which = rng.randrange(7)
        if which == 0 and shape:
            shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
        elif which == 1:
            entry["dtype"] = rng.choice(DTYPES)
        elif which == 2:
            entry["data_offsets"] = [
                rng.choice((begin, 0, -1, end, 2**62)),
                rng.choice((end, begin, len(self.data), 2**63, "9")),
            ]
        elif which == 3:  # as much data, in another form
            n = math.prod(shape)
            entry["shape"] = rng.choice(
                ([n], [1, *shape], [*shape, 1], shape[::-1], [1, n], [n, 1, 1], [0, *shape])
            )
        elif which == 4:  # the same bytes as another kind of the same width
            entry["dtype"] = {
                "F32": rng.choice(("I32", "U32")),
                "F16": rng.choice(("BF16", "I16")),
                "BOOL": rng.choice(("U8", "I8", "F8_E4M3")),
                "I64": "F64",
                "I32": "F32",
            }.get(entry["dtype"], "U8")
        elif which == 5:
            entry["shape"] = [0, rng.choice((2**31, 2**40, 2**62))]
            entry["data_offsets"] = [begin, begin]
        else:
            header[name] = rng.choice(VALUES)
        return joined(header, self.data), f"{name} as {str(header[name])[:120]}"

    def overlap(self, rng: random.Random) -> tuple[bytes, str]:
        """Two tensors in one place, exchanged places, or exchanged names."""
        header = json.loads(json.dumps(self.header))
        a, b = rng.sample(self.names, 2)
        if rng.random() < 0.4:
            header[a]["data_offsets"] = header[b]["data_offsets"]
        elif rng.random() < 0.5:
            header[a]["data_offsets"], header[b]["data_offsets"] = (
                header[b]["data_offsets"],
                header[a]["data_offsets"],
            )
        else:
            header[a], header[b] = header[b], header[a]
        return joined(header, self.data), f"{a} and {b}"

    def tensors(self, rng: random.Random) -> tuple[bytes, str]:
        """One tensor less, one more, one under another name."""
        header, data = json.loads(json.dumps(self.header)), self.data
        name = rng.choice(self.names)
        which = rng.randrange(4)
        if which == 0:
            del header[name]
        elif which == 1:
            header[rng.choice(WORDS[1:]) + name] = header.pop(name)
        elif which == 2:
            header[rng.choice(WORDS)] = {
                "dtype": "F32",
                "shape": [1],
                "data_offsets": [len(data), len(data) + 4],
            }
            data += bytes(4)
        else:
            text = json.dumps(header)
            return joined(
                text[:-1] + f', "{name}": {json.dumps(header[rng.choice(self.names)])}}}', data
            ), f"{name} twice"
        return joined(header, data), f"tensors, {name}, {which}"

    def described(self, told: Any) -> bytes:
        text = told if isinstance(told, str) else json.dumps(told)
        return joined(self.header | {"__metadata__": {self.key: text}}, self.data)

    def description(self, rng: random.Random) -> tuple[bytes, str]:
        """One or two values of the description are others, gone, doubled or exchanged."""
        told, words = json.loads(json.dumps(self.told)), []
        for _ in range(rng.choice((1, 1, 1, 2))):
            path = rng.choice(list(places(told)) or [()])
            if not path:
                break
            inner = told
            for key in path[:-1]:
                inner = inner[key]
            own, which = inner[path[-1]], rng.randrange(8)
            if which == 0:
                del inner[path[-1]]
            elif which == 1 and isinstance(inner, list):
                inner.append(inner[path[-1]])
            elif which == 2 and isinstance(own, list):
                rng.shuffle(own)
            elif which == 3 and type(own) is int:
                inner[path[-1]] = own + rng.choice((-1, 1, -own, 10, 2**40))
            elif which == 4 and isinstance(own, (list, dict)):
                inner[path[-1]] = type(own)()
            elif which == 5 and isinstance(own, (int, float)):
                inner[path[-1]] = str(own)
            else:
                inner[path[-1]] = json.loads(json.dumps(rng.choice(VALUES)))
            words.append(
                f"{'.'.join(map(str, path))} {which}: {str(own)[:40]} -> {str(inner)[:90]}"
            )
        return self.described(told), "; ".join(words)

    def text(self, rng: random.Random) -> tuple[bytes, str]:
        """The description as text that is no JSON, deep JSON, or JSON that says something twice."""
        text = json.dumps(self.told)
        at = rng.randrange(len(text))
        name = rng.choice(list(self.told))
        made = rng.choice(
            (
                lambda: text[:at],
                lambda: text[:at] + rng.choice('{}[],:"\\\0 0-e') + text[at + 1 :],
                lambda: "[" * 10 ** rng.randrange(1, 6),
                lambda: '{"version":' * 900 + "1" + "}" * 900,
                lambda: text[:-1] + f', "{name}": {json.dumps(rng.choice(VALUES[:40]))}}}',
                lambda: text.replace("true", "1").replace("null", "0"),
                lambda: "1e999",
                lambda: "9" * 5000,
                lambda: "\ufeff" + text,
                lambda: json.dumps([self.told]),
                lambda: "NaN",
                lambda: text.replace("1", "1" * 400, 1),
            )
        )()
        if rng.random() < 0.1:  # the metadata itself
            header = self.header | {
                "__metadata__": rng.choice(
                    (
                        {},
                        None,
                        5,
                        [],
                        {self.key: self.told},
                        {self.key: None},
                        {self.key: 1},
                        {"": text},
                    )
                )
            }
            return joined(header, self.data), f"metadata {str(header['__metadata__'])[:40]}"
        return self.described(made), f"text {made[:20]!r}... of {len(made)}"

    def values(self, rng: random.Random) -> tuple[bytes, str]:
        """A tensor with values that no run would leave: NaN, huge, all alike, shuffled."""
        name = rng.choice(self.names)
        begin, end = self.header[name]["data_offsets"]
        code = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "BOOL": "?"}.get(
            self.header[name]["dtype"]
        )
        if begin == end or code is None:
            return self.flipped_data(rng)
        size = struct.calcsize(code)
        value = rng.choice(FLOATS if code in "dfe" else (-1, 2**31 - 1, 0, 77777, 1))
        if code == "e" and abs(value) > 65504 and math.isfinite(value):
            value = math.copysign(65504.0, value)
        data, count = bytearray(self.data), (end - begin) // size
        at = rng.choice(
            ([rng.randrange(count)], [0], [count - 1], range(count), range(0, count, 2))
        )
        packed = struct.pack(f"<{code}", bool(value) if code == "?" else value)
        for i in at:
            data[begin + i * size : begin + (i + 1) * size] = packed
        return joined(self.header, bytes(data)), f"{name}: {value} at {len(at)} of {count}"

    def layered(self, rng: random.Random) -> tuple[bytes, str]:
        """Two kinds of damage on one another, where the first is still a file."""
        first, words = self.entry(rng) if rng.random() < 0.5 else self.description(rng)
        try:
            again, more = Mutator(first, self.key).values(rng)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error):
            return first, words
        return again, f"{words}; {more}"
