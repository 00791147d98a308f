"""The concept encoder that a run begins with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:  # the pack is there once the host has loaded it
    from kindred.models.concept.config import ConceptConfig, Preprocessing
    from kindred.models.concept.encoder import ConceptEncoder

NODE = "train_concept_encoder"  # what the pack's sentences call this program


def find_file(kind: str, name: str, host: Path) -> str:
    """A path as given, or a name in models/ of the host or of the pack; SystemExit names both."""
    for path in (Path(name), host / "models" / kind / name):
        if path.is_file():
            return str(path)
    import folder_paths

    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise SystemExit(
            f"train_concept_encoder: {name} is neither a file nor in {host / 'models' / kind}."
        )
    return path


def make_encoder(
    args: argparse.Namespace, model: Any, seed: int
) -> tuple[ConceptEncoder, dict[str, Any]]:
    """The encoder for a MODEL, with the tower that is asked for -> encoder, the tower's description.

    Its keys and values begin as the text's (a transformer's values as 0), or as those of --start, whose merge `given` takes over.
    Raises ValueError.
    """
    from kindred.models.attention.parts import Merge
    from kindred.models.concept.config import ConceptConfig, tokens_width
    from kindred.models.concept.encoder import ConceptEncoder
    from kindred.models.concept.file import load_concept_encoder
    from kindred.nodes import host

    family, layers, width = host.concept_layers(model, NODE)
    if width is not None and args.tie > 1:
        raise ValueError("--tie is for transformers: a UNet's layers have keys and values each.")
    if width is None:
        args.merge = Merge.ADD.value  # a transformer reads it beside its attention
    if args.start:
        start = load_concept_encoder(args.start)
        check_start(args.start, start.config, family, layers, width)
        tower, weights, pixels = dict(start.config.tower), None, start.config.preprocessing
        args.merge = start.config.merge.value
    else:
        start = None
        tower, weights, pixels = new_tower(args)
    torch.manual_seed(seed)
    own = tokens_width(layers, width) if start is None else start.config.width
    config = ConceptConfig(
        family,
        layers,
        own,
        tower["hidden_size"],
        tower,
        pixels,
        Merge(args.merge),
        tied=args.tie if start is None else start.config.tied,
    )
    encoder = ConceptEncoder(config)
    if weights:
        encoder.tower.load_clip(weights)
    if config.decoupled:
        encoder.start_silent()
    else:
        encoder.start_from_text(text_projections(model))
    if start is not None:
        encoder.load_state_dict(start.state_dict())
    return encoder, tower


def check_start(
    path: Path, config: ConceptConfig, family: str, layers: Mapping[str, int], width: int | None
) -> None:
    from kindred.models.concept.config import check_layers

    check_layers(config, family, layers, width, NODE)
    if config.tower is None:
        raise ValueError(
            f"{path.name} holds no CLIP tower. Start from one that does, or give --clip-vision."
        )


def new_tower(
    args: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Tensor] | None, Preprocessing]:
    """Description, weights and pictures of the tower that --clip-vision names or --new-tower describes."""
    from kindred.models.concept.config import Preprocessing
    from kindred.nodes import host

    if not args.clip_vision:
        tower = json.loads(args.new_tower)
        weights = load_file(args.tower_weights) if args.tower_weights else None
        return tower, weights, Preprocessing(tower["image_size"])
    import comfy.clip_vision

    vision = comfy.clip_vision.load(find_file("clip_vision", args.clip_vision, args.host))
    if vision is None:
        raise ValueError(f"{args.clip_vision} is no CLIP vision model.")
    tower, weights = host.ManagedEncoder.tower_of(vision)
    pixels = Preprocessing(vision.image_size, tuple(vision.image_mean), tuple(vision.image_std))
    return tower, weights, pixels


def text_projections(model: Any) -> dict[Any, tuple[Tensor, Tensor]]:
    """A MODEL's weights of cross-attention's keys and values, by block."""
    from kindred.nodes import host

    projections = {}
    for block, site in host.attention_sites(model.model.diffusion_model).items():
        attention = site.module.attn2
        projections[block] = (
            attention.to_k.weight.float().cpu(),
            attention.to_v.weight.float().cpu(),
        )
    return projections
