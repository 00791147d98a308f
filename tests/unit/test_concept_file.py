"""Laws of the concept encoder's file: what comes back, and what is refused and in which words."""

from __future__ import annotations

import errno
import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kindred.models.attention.parts import Merge
from kindred.models.concept import encoder as concept
from kindred.models.concept.config import FORMAT, ConceptConfig
from kindred.models.concept.encoder import ConceptEncoder
from kindred.models.concept.file import load_concept_encoder
from refused_encoders import HUGE, refused
from safetensors.torch import load_file, save_file
from small_concept import LAYERS, SMALL, TOWER


@pytest.fixture
def encoder() -> ConceptEncoder:
    torch.manual_seed(1)
    return ConceptEncoder(SMALL)


@pytest.fixture
def file(encoder, tmp_path) -> Path:
    encoder.save(tmp_path / "faces.safetensors")
    return tmp_path / "faces.safetensors"


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
