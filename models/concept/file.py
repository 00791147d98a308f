"""A concept encoder read from its .safetensors; nothing of the file is believed before it is looked
at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import torn, unread
from ..safetensor import GREATEST, check_safetensors, number, shape_of
from .adapter_file import read_adapter
from .adapters import AnyEncoder, built
from .config import FORMAT, VERSION, ConceptConfig
from .full_face import read_full_face

FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors spells them


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors, before one of them is read."""

    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str]


def load_concept_encoder(path: Path) -> AnyEncoder:
    """A Kindred concept encoder, or public weights without a tower, merge "add" (IP-Adapter
    full-face, or an adapter of a transformer), in float32.

    Raises ValueError that names the file, what is wrong and what to do: a pickle, a torn or foreign
    file, another version.
    """
    header = read_header(path)
    if FORMAT in header.metadata:
        config = read_description(path, header.metadata[FORMAT])
        names = {name: name for name in header.shapes}
    else:
        adapter = read_adapter(path, header.shapes)
        config, names = adapter or read_full_face(path, header.shapes)
    with torch.device("meta"):  # sizes alone: a file that lies about them gets no memory
        encoder = built(config)
    check_shapes(path, encoder, {own: header.shapes[theirs] for own, theirs in names.items()})
    check_kinds(path, {theirs: header.kinds[theirs] for theirs in names.values()})
    weights = read_weights(path, names)
    check_bounded(path, weights)
    encoder.load_state_dict(weights, assign=True)
    return encoder.eval().requires_grad_(False)


def read_header(path: Path) -> Header:
    """ValueError for what is no .safetensors, OSError where the system does not give it."""
    check_safetensors(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            views = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: shape_of(view) for name, view in views.items()}
            kinds = {name: view.get_dtype() for name, view in views.items()}
    except OSError as error:
        raise unread(path, error) from error
    except (SafetensorError, RuntimeError) as error:
        raise torn(path, error) from error
    return Header(metadata, shapes, kinds)


def check_shapes(path: Path, encoder: AnyEncoder, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The file's tensors are those that its description says."""
    expected = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ValueError(
                f"{path.name}: {name:.80} is {str(shapes.get(name, 'missing')):.80}, but its "
                f"description says "
                f"{expected.get(name, 'that there is none')}. Copy or download it again."
            )


def check_kinds(path: Path, kinds: Mapping[str, str]) -> None:
    """All tensors are floating points."""
    for name, kind in kinds.items():
        if kind not in FLOATS:
            raise ValueError(
                f"{path.name}: {name} is stored as {kind}. Use a file of 16 or 32 bit floats."
            )


def read_weights(path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """names: ours -> the file's. In float32."""
    try:
        with safe_open(path, "pt") as file:
            return {own: file.get_tensor(name).to(torch.float32) for own, name in names.items()}
    except OSError as error:
        raise unread(path, error) from error
    except SafetensorError as error:
        raise torn(path, error) from error


def check_bounded(path: Path, weights: Mapping[str, Tensor]) -> None:
    """None of them is NaN, infinite or beyond GREATEST."""
    for name, value in weights.items():
        if value.numel() and not (value.abs().max() <= GREATEST):
            raise ValueError(
                f"{path.name}: {name} holds NaN or infinite values, or some beyond {GREATEST:g}. "
                f"Copy it again, or train with a "
                "lower learning rate."
            )


def read_description(path: Path, description: str) -> ConceptConfig:
    """The metadata's entry -> configuration; ValueError for a damaged one and for another
    version.
    """
    try:
        settings = json.loads(description)
        version = number(settings["version"], 1, 1 << 31, "version")
        config = ConceptConfig.read(settings) if version == VERSION else None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path.name}: its description is damaged ({error!r:.200}). Copy or download it again."
        ) from error
    if config is None:
        raise ValueError(
            f"{path.name} is a concept encoder of format {version}, but this Kindred reads format "
            f"{VERSION}. "
            "Update Kindred, or train the encoder again."
        )
    return config
