"""Laws of the concept encoder's file: what comes back, what is refused and in which words, and other packs' weights."""

from __future__ import annotations

import errno
import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from effort import at_most
from kindred.models.concept import encoder as concept
from kindred.models.concept.encoder import (
    FORMAT,
    ConceptConfig,
    ConceptEncoder,
    check_layers,
    load_concept_encoder,
    read_full_face,
)
from kindred.models.injection import Merge
from safetensors.torch import load_file, save_file
from small_concept import LAYERS, SD15, SDXL, SMALL, TOWER
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REMEDY = ("Copy", "Use", "Update", "Choose")


class OnPaper(TorchDispatchMode):
    """Nothing larger than a MiB may be made outside of the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if (
                isinstance(made, torch.Tensor)
                and made.device.type != "meta"
                and made.untyped_storage().nbytes() > 1 << 20
            ):
                raise AssertionError(f"{func} made {list(made.shape)}")
        return out


@pytest.fixture
def encoder() -> ConceptEncoder:
    torch.manual_seed(1)
    return ConceptEncoder(SMALL)


@pytest.fixture
def file(encoder, tmp_path) -> Path:
    encoder.save(tmp_path / "faces.safetensors")
    return tmp_path / "faces.safetensors"


def refused(path: Path, *words: str) -> str:
    """The sentence: it names the file, what is wrong and what to do, and comes at once without taking memory."""
    with OnPaper(), at_most(500_000), pytest.raises(ValueError) as caught:
        load_concept_encoder(path)
    said = str(caught.value)
    assert path.name in said and any(r in said for r in REMEDY) and all(w in said for w in words), (
        said
    )
    assert len(said) < 600 and "\n" not in said
    return said


def written_with(path: Path, description: object) -> Path:
    """The file with another description."""
    save_file(
        load_file(path),
        path,
        {FORMAT: description if isinstance(description, str) else json.dumps(description)},
    )
    return path


def description() -> dict:
    return json.loads(SMALL.metadata()[FORMAT])


# the file --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tower", [True, False])
def test_save_load_save_gives_the_same_bytes(encoder, tmp_path, dtype, tower) -> None:
    if not tower:
        encoder = ConceptEncoder(
            ConceptConfig(
                "SDXL", LAYERS, 12, 16, merge=Merge.ADD, training={"b": [1, 2.5], "a": "x"}
            )
        )
    encoder.save(tmp_path / "a.safetensors", dtype)
    state, loaded = torch.get_rng_state(), load_concept_encoder(tmp_path / "a.safetensors")
    assert torch.equal(state, torch.get_rng_state())
    loaded.save(tmp_path / "b.safetensors", dtype)
    encoder.save(tmp_path / "c.safetensors", dtype)
    assert len({(tmp_path / f"{n}.safetensors").read_bytes() for n in "abc"}) == 1
    assert (
        loaded.config == encoder.config
        and not loaded.training
        and not any(p.requires_grad for p in loaded.parameters())
    )
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in loaded.parameters())
    if dtype == torch.float32 and tower:
        pixels = torch.randn(2, 3, 16, 16)
        for block, pair in encoder(pixels).items():
            assert all(torch.equal(a, b) for a, b in zip(pair, loaded(pixels)[block]))


def test_a_loaded_encoder_can_be_trained_and_moved(file) -> None:
    loaded = load_concept_encoder(file).train().requires_grad_(True)
    sum(k.sum() + v.sum() for k, v in loaded(torch.randn(1, 3, 16, 16)).values()).backward()
    assert all(p.grad is not None for p in loaded.parameters())
    assert loaded.to(torch.float64)(torch.randn(1, 3, 16, 16, dtype=torch.float64))


@pytest.mark.parametrize("length, begins", [(0x80, b"\x80"), (0x4B50, b"PK")])
def test_a_header_may_be_as_long_as_a_pickle_begins(encoder, tmp_path, length, begins) -> None:
    """The first bytes of a .safetensors are a length: some of them look like a pickle's or an archive's."""
    path, wide = tmp_path / "x.safetensors", 1 << (8 * len(begins))
    for note in range(0, 2 * wide, 8) if wide == 256 else (0, None):
        if note is None:
            note = length - struct.unpack("<Q", path.read_bytes()[:8])[0]
        encoder.config = replace(SMALL, training={"note": "x" * note})
        encoder.save(path)
        if path.read_bytes().startswith(begins):
            break
    assert path.read_bytes().startswith(begins)
    assert load_concept_encoder(path).config == encoder.config


@pytest.mark.parametrize(
    "stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("older", [True, False])
def test_a_write_that_fails_leaves_the_older_file(
    encoder, tmp_path, monkeypatch, stop, older
) -> None:
    path = tmp_path / "faces.safetensors"
    if older:
        encoder.save(path)
    before = path.read_bytes() if older else None

    def half(weights, to, metadata) -> None:
        Path(to).write_bytes(b"half of it")
        raise stop

    monkeypatch.setattr(concept, "save_file", half)
    with pytest.raises(type(stop)):
        encoder.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["faces.safetensors"] * older
    assert not older or path.read_bytes() == before


def test_a_full_disk_is_an_oserror(encoder, file) -> None:
    """safetensors has an exception of its own for it; whoever saves expects the disk's."""
    resource = pytest.importorskip("resource")
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="faces.safetensors"):
            encoder.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


# what is refused -------------------------------------------------------------------------------------------------------------


def test_a_pickle_is_not_opened(tmp_path) -> None:
    path, opened = tmp_path / "ip-adapter-full-face_sd15.bin", []

    class Program:
        def __reduce__(self):
            return opened.append, (1,)

    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps({"a": 1}, protocol))
        refused(path, "pickle", "safetensors form")
    torch.save({"a": torch.zeros(2)}, path)
    assert path.read_bytes()[:2] == b"PK"
    refused(path, "pickle")
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    refused(path, "pickle")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"1234567",
        struct.pack("<Q", 0),
        struct.pack("<Q", 8),
        struct.pack("<Q", 1 << 40) + b"{}      ",
        struct.pack("<Q", (1 << 64) - 1) + b"{}      ",
        struct.pack("<Q", 8) + b"no JSON ",
        struct.pack("<Q", 8) + b"{torn:  ",
        struct.pack("<Q", 8) + b'{"a":1} ',
        b"<html><body>404 Not Found</body></html>",
        struct.pack("<Q", 40000) + b"{" + b"[" * 39999,
        struct.pack("<Q", 80)
        + b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,8]}}'.ljust(80)
        + b"\0" * 8,
    ],
)
def test_what_is_no_safetensors(tmp_path, content) -> None:
    path = tmp_path / "torn.safetensors"
    path.write_bytes(content)
    refused(path, "torn", "Copy or download it again")


def test_a_file_cut_anywhere(file) -> None:
    content = file.read_bytes()
    for cut in (1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        refused(file, "torn", "Copy or download it again")
    file.write_bytes(content + b"x")
    refused(file, "torn")


def test_a_missing_file_is_the_systems_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        load_concept_encoder(tmp_path / "none.safetensors")


@pytest.mark.parametrize("version", [2, 3, 99])
def test_another_format(file, version) -> None:
    refused(
        written_with(file, description() | {"version": version, "unknown": 1}),
        f"format {version}",
        "format 1",
        "Update Kindred",
    )


WRONG = (None, 7, -1, True, "x", [], [[]], [1, 2, 3], {}, {"a": 1}, float("nan"), float("inf"))


@pytest.mark.parametrize(
    "key",
    [
        "version",
        "family",
        "layers",
        "width",
        "tower_width",
        "tower",
        "preprocessing",
        "merge",
        "training",
    ],
)
def test_a_damaged_description(file, key) -> None:
    whole = description()
    refused(
        written_with(file, {k: v for k, v in whole.items() if k != key}),
        "description is damaged",
        key,
    )
    right = {"family": ["x"], "training": [{}, {"a": 1}], "version": [7]}.get(key, [])
    for value in WRONG:
        if value not in right or isinstance(value, bool):
            refused(written_with(file, whole | {key: value}))


@pytest.mark.parametrize("key", ["size", "mean", "std"])
def test_a_damaged_preprocessing(file, key) -> None:
    whole = description()
    refused(
        written_with(
            file,
            whole
            | {"preprocessing": {k: v for k, v in whole["preprocessing"].items() if k != key}},
        ),
        "damaged",
    )
    for value in WRONG if key != "mean" else [v for v in WRONG if v != [1, 2, 3]]:
        if not (key == "std" and value == [1, 2, 3]):
            refused(
                written_with(
                    file, whole | {"preprocessing": whole["preprocessing"] | {key: value}}
                ),
                "damaged",
            )
    for value in (
        [0, 1, 1],
        [1, -1, 1],
        [1, 1, 1, 1],
        [1, 1],
        ["1", 1, 1],
        [float("nan"), 1, 1],
        [1e300, 1, 1],
    ):
        refused(
            written_with(file, whole | {"preprocessing": whole["preprocessing"] | {"std": value}}),
            "damaged",
        )


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "7", "{", "[" * 100_000, '{"version": ' + "1" * 5000 + "}", "\x00"]
)
def test_a_description_that_is_none(file, text) -> None:
    refused(written_with(file, text), "description is damaged")


HUGE = 10**9
HOSTILE = [
    *(
        {"tower": TOWER | {name: value}}
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "image_size",
            "patch_size",
            "intermediate_size",
            "num_attention_heads",
            "num_channels",
        )
        for value in (-1, 0, HUGE, 10**30, 2.0, "16", None, [16, 16], True)
    ),
    {"tower": TOWER | {"patch_size": 17}},
    {"tower": TOWER | {"num_attention_heads": 5}},
    {"tower": TOWER | {"hidden_act": "relu6"}},
    {"tower": TOWER | {"hidden_act": ["gelu"]}},
    {"tower": TOWER | {"layer_norm_eps": 0}},
    {
        "tower": TOWER | {"image_size": 32, "patch_size": 16}
    },  # as many patches, but not the pixels it is given
    {"tower": {k: v for k, v in TOWER.items() if k != "patch_size"}},
    {"tower": {"hidden_size": 16}},
    {"layers": [["input", 1, 0, HUGE]]},
    {"layers": [["input", 1, 0, 0]]},
    {"layers": [["input", 1, 0, -8]]},
    {"layers": [["input", HUGE, 0, 8]]},
    {"layers": [["input", -1, 0, 8]]},
    {"layers": [["a.b", 1, 0, 8]]},
    {"layers": [["input", 1, 0, 8]] * 2},
    {"layers": [["input", i // 100, i % 100, 8] for i in range(1100)]},
    {"layers": [["input", 1, 0]]},
    {"layers": [[["input"], 1, 0, 8]]},
    {"width": 0},
    {"width": HUGE},
    {"tower_width": 0},
    {"tower_width": HUGE},
    {"tower_width": 17},
    # within what could be, so that only the tensors say no
    {"width": 65536},
    {"layers": [["input", 1, i, 65536] for i in range(100)]},
    {"tower": None, "tower_width": 8192, "width": 60000},
    {"tower": TOWER | {"num_hidden_layers": 24}},
    {"tower": TOWER | {"intermediate_size": 65536}},
    {"tower": TOWER | {"hidden_size": 8192}, "tower_width": 8192},
    {"tower": TOWER | {"num_hidden_layers": 2}},
]


def test_hostile_descriptions_take_no_memory_and_no_time(file) -> None:
    for lie in HOSTILE:
        refused(written_with(file, description() | lie))


def test_a_description_cannot_choose_code(file) -> None:
    """transformers' configuration can name kernels to fetch; only what is architecture is read of it."""
    pixels = torch.randn(1, 3, 16, 16)
    plain = load_concept_encoder(file)(pixels)
    extra = {
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "auto_map": {"AutoModel": "x--y.Z"},
        "torch_dtype": "float64",
        "dtype": "float16",
        "attention_dropout": 0.9,
        "_name_or_path": "/etc",
        "projection_dim": 10**9,
    }
    loaded = load_concept_encoder(written_with(file, description() | {"tower": TOWER | extra}))
    assert loaded.tower.model.config._attn_implementation in ("sdpa", "eager")
    for block, pair in loaded.train()(pixels).items():
        assert all(torch.equal(a, b) for a, b in zip(pair, plain[block]))


def test_tensors_that_do_not_fit_the_description(file) -> None:
    weights, said = load_file(file), SMALL.metadata()
    first = "to_k.input_1_0.weight"
    for changed, words in (
        ({k: v for k, v in weights.items() if k != first}, (first, "missing")),
        (weights | {first: torch.zeros(8, 13)}, (first, "(8, 13)", "(8, 12)")),
        (weights | {first: torch.zeros(())}, (first,)),
        (
            weights | {"to_k.input_2_0.weight": torch.zeros(8, 12)},
            ("to_k.input_2_0.weight", "there is none"),
        ),
        ({}, ("missing",)),
        (weights | {first: torch.zeros(8, 12, dtype=torch.int64)}, (first, "I64")),
        (weights | {first: torch.zeros(8, 12, dtype=torch.bool)}, (first, "BOOL")),
        (weights | {first: torch.full((8, 12), torch.nan)}, (first, "NaN")),
        (weights | {"mlp.0.bias": torch.full((16,), -torch.inf)}, ("mlp.0.bias", "infinite")),
    ):
        save_file(changed, file, said)
        refused(file, *words)
    save_file({k: v.bfloat16() for k, v in weights.items()}, file, said)
    assert load_concept_encoder(file).config == SMALL


# IP-Adapter ------------------------------------------------------------------------------------------------------------------


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
