"""Concept encoders: their folder, and one under the host's memory management."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.concept.adapters import AnyEncoder
from ...models.concept.config import ConceptConfig, Preprocessing, check_layers
from ...models.concept.encoder import ConceptEncoder, KeysValues
from ...models.concept.siglip import PoolingHead
from ...models.network.blocks import BlockId
from .learning import progress
from .sight import sight

CONCEPTS = "concept_encoders"  # their folder beside checkpoints and loras


def register_folders(shipped: Path) -> None:
    """models/concept_encoders, and the pack's own for the miniature's. Pickles are listed too, so
    that the node can say why not.
    """
    paths, endings = folder_paths.folder_names_and_paths.setdefault(CONCEPTS, ([], set()))
    endings.update((".safetensors", ".sft", ".bin", ".pt", ".ckpt"))
    for folder in (Path(folder_paths.models_dir) / CONCEPTS, shipped):
        folder_paths.add_model_folder_path(CONCEPTS, str(folder))


def concept_files() -> list[str]:
    return folder_paths.get_filename_list(CONCEPTS)


def concept_path(name: str) -> Path:
    """The file behind a name of the list; FileNotFoundError in the host's words where it is
    gone.
    """
    return Path(folder_paths.get_full_path_or_raise(CONCEPTS, name))


def concept_folder() -> Path:  # where a new one is saved
    return Path(folder_paths.get_folder_paths(CONCEPTS)[0])


@dataclass(frozen=True, eq=False)
class ManagedEncoder:
    """A concept encoder under the host's memory management; `vision` (CLIP_VISION) gives the tokens
    where it holds no tower, `head` pools them where it reads one vector of a SigLIP.
    """

    encoder: AnyEncoder
    patcher: ModelPatcher
    name: str
    vision: Any = None
    head: PoolingHead | None = None

    @staticmethod
    def of(
        encoder: AnyEncoder, name: str, vision: Any = None, head: PoolingHead | None = None
    ) -> ManagedEncoder:
        device = comfy.model_management.get_torch_device()
        half = comfy.model_management.should_use_fp16(device)
        encoder = encoder.to(torch.float16 if half else torch.float32).eval().requires_grad_(False)
        return ManagedEncoder(
            encoder,
            comfy.model_patcher.ModelPatcher(
                encoder, device, comfy.model_management.unet_offload_device()
            ),
            name,
            vision,
            head,
        )

    @staticmethod
    def tower_of(vision: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A CLIP_VISION's configuration and weights in transformers' names, to train from;
        ValueError for towers of other kinds.
        """
        if vision.model_type != "clip_vision_model":
            raise ValueError(
                f"Kindred: a concept encoder is made from a CLIP vision model, but the one given "
                f"is {vision.model_type}. "
                "Take CLIP ViT-L or ViT-H."
            )
        config = {
            k: v
            for k, v in vision.config.items()
            if isinstance(v, (int, float, str)) and k not in ("model_type", "torch_dtype")
        }
        return config, {k: v.detach().float().cpu().clone() for k, v in vision.get_sd().items()}

    def look(self, images: Tensor, empty: bool = False) -> Tensor:
        """What the encoder reads of images [b Y X c] through the wired CLIP Vision, [b n d]
        float32, where it is computed; empty: of no picture instead, b = 1.
        """
        images = images[:1] if empty else images
        tell, seen = progress(len(images)), []
        for i, image in enumerate(images):
            tell(i)
            seen.append(self._look(image, empty).float())
        tell(len(images))
        return torch.cat(seen)

    def encode(self, images: Tensor, empty: bool = False) -> KeysValues:
        """Images [b Y X c] in 0..1 -> (k, v) [b m c] of every layer, where they are computed;
        empty: of zero pixels instead, b = 1.
        """
        images = images[:1] if empty else images
        tell, pictures, layers = progress(2 * len(images)), [], []
        for i, image in enumerate(images):
            tell(i)
            pictures.append(self._look(image, empty))
        # plain layers cannot be loaded in part
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        # --novram leaves them on the CPU
        pictures = [x.to(next(self.encoder.parameters())) for x in pictures]
        for i, x in enumerate(pictures):
            tell(len(pictures) + i)
            layers.append(self._keys_values(x))
        tell(2 * len(pictures))
        keys_values = {
            block: tuple(map(torch.cat, zip(*(kv[block] for kv in layers)))) for block in layers[0]
        }
        self._require_finite(keys_values)
        return keys_values

    def _look(self, image: Tensor, empty: bool) -> Tensor:
        """What the encoder reads of a picture [Y X c]: its pixels, or the tokens of the wired CLIP
        Vision. ValueError where those are of another width.
        """
        if self.vision is None:
            return self.encoder.config.preprocessing(image[None].cpu()) * (not empty)
        tokens = sight(self.encoder.config, self.vision, self.head, None if empty else image)
        if tokens.shape[-1] != (wanted := self.encoder.config.tower_width):
            tower = {1280: "ViT-H", 1024: "ViT-L"}.get(wanted, "another one")
            raise ValueError(
                f"{self.name}: the CLIP Vision given has tokens of width {tokens.shape[-1]}, "
                f"but this concept encoder reads width {wanted}: {tower}. "
                "Connect that CLIP Vision to Concept Encoder Load."
            )
        return tokens

    def _keys_values(self, x: Tensor) -> KeysValues:
        if self.vision is None:
            return self.encoder(x)
        return self.encoder.keys_values(self.encoder.features(x))

    def _require_finite(self, keys_values: KeysValues) -> None:
        finite = [torch.isfinite(x).all() for pair in keys_values.values() for x in pair]
        if not torch.stack(finite).all():  # one wait
            raise ValueError(
                f"Kindred: {self.name} gives NaN or infinite values for this picture. Use another "
                f"picture, or copy or train "
                "the encoder again."
            )


def continued_encoder(
    managed: ManagedEncoder,
    family: str,
    layers: tuple[tuple[BlockId, int], ...],
    width: int | None,
    node: str,
) -> ConceptEncoder:
    """A copy of an encoder to train further, in float32 on the CPU; ValueError where it is for
    another model.
    """
    config = managed.encoder.config
    check_layers(config, family, layers, width, node)
    if config.adapter is not None:
        raise ValueError(
            f"{node}: {managed.name} is an {config.adapter.kind.value}, which can be used but "
            "not trained. Wire clip_vision instead, to train an encoder of your own."
        )
    weights = managed.encoder.state_dict()
    if config.tower is None:  # full-face weights: its CLIP Vision becomes a tower of its own
        config, tower = _with_tower(config, managed.vision, node)
        encoder = ConceptEncoder(config)
        encoder.tower.load_clip(tower)
    else:
        encoder = ConceptEncoder(config)
    encoder.load_state_dict(
        {name: value.detach().float().cpu().clone() for name, value in weights.items()},
        strict=False,
    )
    return encoder


def new_encoder(
    config: ConceptConfig,
    vision: Any,
    seed: int,
    text: Mapping[BlockId, tuple[Tensor, Tensor]],
    node: str,
) -> ConceptEncoder:
    """A new encoder; vision: CLIP_VISION to take the tower from, None for a new one; text: (to_k,
    to_v) of every layer.
    """
    tower = None
    if vision is not None:
        config, tower = _with_tower(config, vision, node)
    torch.default_generator.manual_seed(seed)  # the CPU's, which `training` puts back
    encoder = ConceptEncoder(config)
    if tower:
        encoder.tower.load_clip(tower)
    if config.decoupled:
        encoder.start_silent()
    else:
        encoder.start_from_text(text)
    return encoder


def _with_tower(
    config: ConceptConfig, vision: Any, node: str
) -> tuple[ConceptConfig, dict[str, Tensor]]:
    """The configuration with a CLIP_VISION's tower and pixels, and the tower's weights."""
    try:
        tower, weights = ManagedEncoder.tower_of(vision)
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from error
    pixels = Preprocessing(vision.image_size, tuple(vision.image_mean), tuple(vision.image_std))
    return replace(
        config, tower=tower, tower_width=tower["hidden_size"], preprocessing=pixels
    ), weights
