"""A concept encoder read from its .safetensors; nothing of the file is believed before it is looked at."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files import torn, unread
from ..reference.soundness import GREATEST
from ..safetensor import check_safetensors, number, shape_of
from .config import FORMAT, VERSION, ConceptConfig
from .encoder import ConceptEncoder
from .full_face import read_full_face


def load_concept_encoder(path: Path, device: torch.device | str = "cpu") -> ConceptEncoder:
    """A Kindred concept encoder, or IP-Adapter full-face weights (merge "add", no tower), in float32.

    Raises ValueError that names the file, what is wrong and what to do: a pickle, a torn or foreign file, another version.
    """
    check_safetensors(path)
    try:
        with safe_open(path, "pt") as file:
            metadata, views = (
                file.metadata() or {},
                {name: file.get_slice(name) for name in file.keys()},
            )
            shapes, kinds = (
                {name: f(view) for name, view in views.items()}
                for f in (shape_of, lambda view: view.get_dtype())
            )
    except OSError as error:
        raise unread(path, error) from error
    except (SafetensorError, RuntimeError) as error:
        raise torn(path, error) from error
    if FORMAT in metadata:
        config, names = read_description(path, metadata[FORMAT]), {name: name for name in shapes}
    else:
        config, names = read_full_face(path, shapes)
    with torch.device("meta"):  # sizes alone: a file that lies about them gets no memory
        encoder = ConceptEncoder(config)
    expected = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    found = {own: shapes[theirs] for own, theirs in names.items()}
    if expected != found:
        name = next(
            n for n in sorted(expected.keys() | found.keys()) if expected.get(n) != found.get(n)
        )
        raise ValueError(
            f"{path.name}: {name:.80} is {str(found.get(name, 'missing')):.80}, but its description says "
            f"{expected.get(name, 'that there is none')}. Copy or download it again."
        )
    whole_numbers = next(
        (theirs for theirs in names.values() if kinds[theirs] not in ("F16", "BF16", "F32", "F64")),
        None,
    )
    if whole_numbers:
        raise ValueError(
            f"{path.name}: {whole_numbers} is stored as {kinds[whole_numbers]}. Use a file of 16 or 32 bit floats."
        )
    try:
        with safe_open(path, "pt") as file:
            weights = {
                own: file.get_tensor(theirs).to(device, torch.float32)
                for own, theirs in names.items()
            }
    except OSError as error:
        raise unread(path, error) from error
    except SafetensorError as error:
        raise torn(path, error) from error
    bad = next(
        (
            name
            for name, value in weights.items()
            if value.numel() and not (value.abs().max() <= GREATEST)
        ),
        None,
    )
    if bad:
        raise ValueError(
            f"{path.name}: {bad} holds NaN or infinite values, or some beyond {GREATEST:g}. Copy it again, or train with a "
            "lower learning rate."
        )
    encoder.load_state_dict(weights, assign=True)
    return encoder.to(device).eval().requires_grad_(False)


def read_description(path: Path, description: str) -> ConceptConfig:
    """The metadata's entry -> configuration; ValueError for a damaged one and for another version."""
    try:
        told = json.loads(description)
        version = number(told["version"], 1, 1 << 31, "version")
        config = ConceptConfig.read(told) if version == VERSION else None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path.name}: its description is damaged ({error!r:.200}). Copy or download it again."
        ) from error
    if config is None:
        raise ValueError(
            f"{path.name} is a concept encoder of format {version}, but this Kindred reads format {VERSION}. "
            "Update Kindred, or train the encoder again."
        )
    return config
