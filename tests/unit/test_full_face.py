"""Laws of other packs' weights as concept encoders: full-face ones are read, others refused by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kindred.models.attention.parts import Merge
from kindred.models.concept.config import check_layers
from kindred.models.concept.encoder import ConceptEncoder
from kindred.models.concept.file import load_concept_encoder
from kindred.models.concept.full_face import read_full_face
from refused_encoders import HUGE, refused
from safetensors.torch import save_file
from small_concept import LAYERS, SD15, SDXL


def full_face(layers: tuple, width: int, tower: int) -> tuple[dict[str, tuple[int, ...]], list]:
    """Shapes of a full-face file by its own names, and our blocks in its order: input, output, middle (arXiv 2308.06721's code)."""
    numbered = sorted(
        layers, key=lambda layer: (("input", "output", "middle").index(layer[0][0]), layer[0])
    )
    shapes = {
        "proj.0.weight": (tower, tower),
        "proj.0.bias": (tower,),
        "proj.2.weight": (width, tower),
        "proj.2.bias": (width,),
        "proj.3.weight": (width,),
        "proj.3.bias": (width,),
    }
    return {f"image_proj.{k}": v for k, v in shapes.items()} | {
        f"ip_adapter.{2 * n + 1}.to_{half}_ip.weight": (c, width)
        for n, (_, c) in enumerate(numbered)
        for half in "kv"
    }, numbered


@pytest.mark.parametrize(
    "family, layers, width", [("SD15", SD15, 768), ("SD20", SD15, 1024), ("SDXL", SDXL, 2048)]
)
def test_full_face_weights_are_read_layer_by_layer(family, layers, width) -> None:
    shapes, numbered = full_face(layers, width, 1280)
    config, names = read_full_face(Path("ip-adapter-full-face.safetensors"), shapes)
    assert (config.family, config.width, config.tower_width, config.tower, config.merge) == (
        family,
        width,
        1280,
        None,
        Merge.ADD,
    )
    assert config.layers == layers
    for n, (block, _) in enumerate(numbered):
        own = "_".join(map(str, block))
        assert names[f"to_k.{own}.weight"] == f"ip_adapter.{2 * n + 1}.to_k_ip.weight"
        assert names[f"to_v.{own}.weight"] == f"ip_adapter.{2 * n + 1}.to_v_ip.weight"
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in ConceptEncoder(config).state_dict().items()}
    assert {own: shapes[theirs] for own, theirs in names.items()} == expected and sorted(
        names.values()
    ) == sorted(shapes)


def test_a_full_face_file_of_sd15_loads(tmp_path) -> None:
    shapes, numbered = full_face(SD15, 768, 8)
    path = tmp_path / "ip-adapter-full-face_sd15.safetensors"
    save_file(
        {
            name: torch.full(shape, i / 64, dtype=torch.float16)
            for i, (name, shape) in enumerate(shapes.items())
        },
        path,
    )
    place = {name: i / 64 for i, name in enumerate(shapes)}
    encoder = load_concept_encoder(path)
    check_layers(encoder.config, "SD15", SD15, 768, "node")
    made = encoder.keys_values(torch.ones(1, 1, 768) / 768)
    for n, (block, c) in enumerate(numbered):
        for half, t in zip("kv", made[block]):
            torch.testing.assert_close(
                t, torch.full((1, 1, c), place[f"ip_adapter.{2 * n + 1}.to_{half}_ip.weight"])
            )
    assert float(encoder.mlp[2].bias[0]) == place["image_proj.proj.2.bias"]
    encoder.save(tmp_path / "own.safetensors")
    again = load_concept_encoder(tmp_path / "own.safetensors")
    assert again.config == encoder.config and again.config.merge is Merge.ADD


@pytest.mark.parametrize(
    "keys, word",
    [
        (
            ("image_proj.proj.weight", "image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"),
            "the plain kind",
        ),
        (
            ("image_proj.latents", "image_proj.proj_in.weight", "ip_adapter.1.to_k_ip.weight"),
            "IP-Adapter Plus",
        ),
        (
            ("image_proj.proj.0.weight", "image_proj.proj.2.weight", "image_proj.norm.weight"),
            "IP-Adapter FaceID,",
        ),
        (
            (
                "image_proj.perceiver_resampler.proj_in.weight",
                "image_proj.proj.0.weight",
                "image_proj.norm.weight",
            ),
            "FaceID Plus",
        ),
        (("image_proj.something",), "unknown kind"),
        (("lora_unet_down.alpha", "a"), "no concept encoder"),
        ((), "no concept encoder"),
    ],
)
def test_other_adapters_are_called_by_their_names(tmp_path, keys, word) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file({key: torch.zeros(4, 4) for key in keys}, path)
    refused(path, word, "full-face")


def test_full_face_weights_for_nobody(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    shapes, _ = full_face(LAYERS, 1280, 8)
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(ValueError, match="text width 1280, 3 layers"):
        load_concept_encoder(path)
    shapes, _ = full_face(SD15[:15], 768, 8)
    with pytest.raises(ValueError, match="text width 768, 15 layers"):
        read_full_face(path, shapes)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    "name, shape",
    [
        ("image_proj.proj.0.weight", (HUGE, 0)),
        ("image_proj.proj.0.weight", ()),
        ("image_proj.proj.3.weight", ()),
        ("ip_adapter.1.to_k_ip.weight", (HUGE, 0)),
        ("ip_adapter.1.to_k_ip.weight", ()),
        ("ip_adapter.7.to_v_ip.weight", (0,)),
    ],
)
def test_full_face_weights_that_lie(tmp_path, name, shape) -> None:
    """An empty tensor may claim any size and has no bytes."""
    path, (shapes, _) = tmp_path / "adapter.safetensors", full_face(SD15, 768, 8)
    shapes = {
        n: s if n.startswith("image_proj.proj.3") else (0, *s[1:]) for n, s in shapes.items()
    } | {name: shape}
    save_file({n: torch.zeros(s) for n, s in shapes.items()}, path)
    refused(path)
