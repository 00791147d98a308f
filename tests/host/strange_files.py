"""Files that are no .safetensors under its name, any file torn, and trees with one value changed, from a seed."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from typing import Any

from mutations import FLOATS, VALUES, joined


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def strangers(sprung: str) -> dict[str, bytes]:
    """Files of other kinds under a .safetensors name; `sprung` appears where somebody unpickles."""
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap(sprung)))
        archive.writestr("archive/version", "3")
    trap = pickle.dumps(Trap(sprung))
    small = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    return {
        "a text": b"a photo of a cat\n" * 9,
        "a page": b"<!DOCTYPE html><html><body>404</body></html>",
        "nothing": b"",
        "zeros": bytes(4096),
        "a png": b"\x89PNG\r\n\x1a\n" + bytes(200),
        "a jpeg": b"\xff\xd8\xff\xe0" + bytes(200),
        "a zip": zipped.getvalue(),
        "a pickle": trap,
        "an old pickle": pickle.dumps(Trap(sprung), 0),
        "a pickle behind a length": struct.pack("<Q", len(trap)) + trap,
        "gguf": b"GGUF\3\0\0\0" + bytes(99),
        "a pickle as tensors": joined(
            {"a": {"dtype": "U8", "shape": [len(trap)], "data_offsets": [0, len(trap)]}}, trap
        ),
        "a LoRA": joined(
            {"lora_unet_down.weight": small, "__metadata__": {"ss_network_dim": "1"}}, bytes(4)
        ),
        "a checkpoint": joined({"model.diffusion_model.input_blocks.0.0.weight": small}, bytes(4)),
        "json alone": b'{"a": 1}' * 9,
        "an empty header": joined({}, b""),
        "a pointer": b"version https://git-lfs.github.com/spec/v1\nsize 9\n",
    }


def torn(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Any file with flipped bytes, cut off, or with a piece out, twice or zero."""
    if rng.random() < 0.4:
        made = bytearray(whole)
        edge = rng.choice((0, 0, max(len(whole) - 3000, 0)))  # a zip's directory stands at its end
        at = [rng.randrange(edge, len(whole)) for _ in range(rng.choice((1, 1, 2, 8, 64)))]
        for place in at:
            made[place] ^= rng.randrange(1, 256)
        return bytes(made), f"flipped {at[:4]}"
    a, b = sorted((rng.randrange(len(whole)), rng.randrange(len(whole))))
    b = min(b, a + 10 ** rng.randrange(1, 6))
    which = rng.randrange(4)
    return (
        whole[:a],
        whole[:a] + whole[b:],
        whole[:b] + whole[a:],
        whole[:a] + bytes(b - a) + whole[b:],
    )[which], f"torn {which}, {a}:{b}"


def changed(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """A tree of mappings, lists and tensors with one value changed: another one, none, another shape, NaN."""
    inner, words = tree, []
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = rng.choice(keys)
        words.append(str(key))
        own = inner[key]
        if isinstance(own, (dict, list)) and len(own) and rng.random() < 0.9:
            inner = own
            continue
        break
    which = rng.randrange(6)
    if which == 0:
        del inner[key]
        words.append("gone")
    elif hasattr(own, "shape") and which < 5:
        made = own.clone().float()
        if which == 1:
            made.view(-1)[rng.randrange(max(made.numel(), 1)) :].fill_(
                rng.choice(FLOATS)
            ) if made.numel() else made
        made = (made, made, made.flatten()[:-1], made.long(), made.expand(2, *made.shape))[which]
        inner[key] = made
        words.append(f"tensor {which} {list(made.shape)}")
    else:
        inner[key] = rng.choice(VALUES)
        words.append(f"-> {str(inner[key])[:60]!r}")
    return tree, ".".join(words)
