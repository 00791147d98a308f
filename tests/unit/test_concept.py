"""Laws of the concept encoder and its file: shapes (I41), pixels, the tower's penultimate layer, what is refused and in which words."""
from __future__ import annotations

import errno
import json
import pickle
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kindred.models import concept
from kindred.models.concept import FORMAT, ConceptConfig, ConceptEncoder, Preprocessing, VisionTower, check_layers, load_concept_encoder
from kindred.models.concept import read_full_face
from kindred.models.injection import Merge
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
LAYERS = ((("input", 1, 0), 8), (("middle", 0, 0), 16), (("output", 3, 1), 8))
SMALL = ConceptConfig("SD15", LAYERS, 12, 16, TOWER, Preprocessing(16), training={"steps": 3})

# the table of method.md section 1, written out: block, channels, depth
SD15 = tuple(((s, i, 0), c) for s, blocks in (
    ("input", {1: 320, 2: 320, 4: 640, 5: 640, 7: 1280, 8: 1280}), ("middle", {0: 1280}),
    ("output", {3: 1280, 4: 1280, 5: 1280, 6: 640, 7: 640, 8: 640, 9: 320, 10: 320, 11: 320})) for i, c in blocks.items())
SDXL = tuple(((s, i, d), c) for s, blocks in (
    ("input", {4: (640, 2), 5: (640, 2), 7: (1280, 10), 8: (1280, 10)}), ("middle", {0: (1280, 10)}),
    ("output", {0: (1280, 10), 1: (1280, 10), 2: (1280, 10), 3: (640, 2), 4: (640, 2), 5: (640, 2)}))
    for i, (c, depth) in blocks.items() for d in range(depth))
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224,
         "patch_size": 14}
REMEDY = ("Copy", "Use", "Update", "Choose")


class OnPaper(TorchDispatchMode):
    """Nothing larger than a MiB may be made outside of the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.device.type != "meta" and made.untyped_storage().nbytes() > 1 << 20:
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
    began = time.process_time()
    with OnPaper(), pytest.raises(ValueError) as caught:
        load_concept_encoder(path)
    said = str(caught.value)
    assert time.process_time() - began < 2
    assert path.name in said and any(r in said for r in REMEDY) and all(w in said for w in words), said
    assert len(said) < 600 and "\n" not in said
    return said


def written_with(path: Path, description: object) -> Path:
    """The file with another description."""
    save_file(load_file(path), path, {FORMAT: description if isinstance(description, str) else json.dumps(description)})
    return path


def description() -> dict:
    return json.loads(SMALL.metadata()[FORMAT])


# what it is made of (I41) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, width, count", [(SD15, 768, 16), (SDXL, 2048, 70)])
def test_real_sizes(layers, width, count) -> None:
    """I41 on the meta device: tokens of ViT-L, F [b 257 w], K_c and V_c [b 257 C_l] for every layer."""
    with torch.device("meta"):
        encoder = ConceptEncoder(ConceptConfig("SD15", layers, width, 1024, VIT_L))
        pixels = torch.empty(2, 3, 224, 224)
        tokens = encoder.tower(pixels)
        made = encoder(pixels)
    assert tokens.shape == (2, 257, 1024) and encoder.features(tokens).shape == (2, 257, width)
    assert len(made) == count and {b: (tuple(k.shape), tuple(v.shape)) for b, (k, v) in made.items()} == {
        b: ((2, 257, c), (2, 257, c)) for b, c in layers}


def test_parameters_of_sd15() -> None:
    """method.md 2.3: 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280) = 19.17 M in the keys and values, 1.84 M in the MLP of ViT-L."""
    with torch.device("meta"):
        encoder = ConceptEncoder(ConceptConfig("SD15", SD15, 768, 1024))
    projections = sum(p.numel() for m in (encoder.to_k, encoder.to_v) for p in m.parameters())
    assert projections == 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280) == 19_169_280
    assert round(sum(p.numel() for p in encoder.mlp.parameters()) / 1e6, 2) == 1.84


def test_the_tower_holds_nothing_behind_the_penultimate_layer() -> None:
    """So that nothing in it can be without a gradient: 23 of ViT-L's 24 layers, no last norm."""
    with torch.device("meta"):
        names = {n for n, _ in VisionTower(VIT_L).named_parameters()}
    assert {int(n.split("layers.")[1].split(".")[0]) for n in names if "layers." in n} == set(range(23))
    assert not any("post_layernorm" in n for n in names)


def test_a_small_one_in_numbers(encoder) -> None:
    """Eq. (6) by hand: F = MLP(tokens), K = F W_k, V = F W_v."""
    pixels = torch.randn(2, 3, 16, 16)
    tokens = encoder.tower(pixels)
    mlp = encoder.mlp
    by_hand = mlp[3](mlp[2](torch.nn.functional.gelu(mlp[0](tokens))))
    for block, (k, v) in encoder(pixels).items():
        name = "_".join(map(str, block))
        torch.testing.assert_close(k, by_hand @ encoder.to_k[name].weight.T)
        torch.testing.assert_close(v, by_hand @ encoder.to_v[name].weight.T)


def test_starting_from_the_text(encoder) -> None:
    text = {block: (torch.randn(c, 12), torch.randn(c, 12)) for block, c in LAYERS}
    encoder.start_from_text(text)
    features = torch.randn(2, 5, 12)
    for block, (k, v) in encoder.keys_values(features).items():
        torch.testing.assert_close(k, features @ text[block][0].T)
        torch.testing.assert_close(v, features @ text[block][1].T)
    assert all(p.requires_grad for p in encoder.parameters())


def test_without_a_tower_it_reads_tokens_only() -> None:
    encoder = ConceptEncoder(ConceptConfig("SD15", LAYERS, 12, 16))
    assert encoder.keys_values(encoder.features(torch.randn(1, 7, 16)))["input", 1, 0][0].shape == (1, 7, 8)
    with pytest.raises(ValueError, match="connect CLIP Vision"):
        encoder(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_penultimate_tokens_are_transformers_hidden_states(prefix) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel
    full = CLIPVisionModel(CLIPVisionConfig(**TOWER)).eval()
    for p in full.parameters():
        p.data += 0.1 * torch.randn_like(p)  # biases and norms too
    pixels, tower = torch.randn(2, 3, 16, 16), VisionTower(TOWER).eval()
    plain = {name.removeprefix("vision_model."): value for name, value in full.state_dict().items()}
    tower.load_clip({prefix + name: value for name, value in plain.items()} | {"visual_projection.weight": torch.zeros(3)})
    with torch.no_grad():
        states = full(pixel_values=pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(tower(pixels), states[-2], rtol=0, atol=1e-6)
        assert (tower(pixels) - states[-1]).abs().max() > 0.1
    del plain["pre_layrnorm.weight"]
    with pytest.raises(RuntimeError, match="pre_layrnorm"):
        tower.load_clip(plain)


def test_a_tower_asked_for_by_hand_is_checked_alike() -> None:
    """The program's --new-tower."""
    for wrong, word in (({"hidden_size": 8}, "num_hidden_layers is None"), (TOWER | {"patch_size": 99}, "no patches of 99"),
                        (TOWER | {"num_attention_heads": 3}, "do not divide into 3 heads")):
        with pytest.raises(ValueError, match=word):
            VisionTower(wrong)


# pixels ----------------------------------------------------------------------------------------------------------------------


def picture(y: int, x: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Eight bits, smooth enough to be scaled: [1 y x c]."""
    coarse = torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (y, x), mode="bilinear").movedim(1, -1)
    return (smooth * 255).round() / 255


def levels(pixels: torch.Tensor, how: Preprocessing) -> torch.Tensor:
    """Back to 0..255."""
    return (pixels * torch.tensor(how.std)[:, None, None] + torch.tensor(how.mean)[:, None, None]) * 255


@pytest.mark.parametrize("y, x", [(224, 224), (300, 200), (200, 300), (225, 224), (7, 5), (1, 1), (900, 640), (64, 513)])
def test_pixels_as_the_host_describes_them(y, x) -> None:
    """Short side to 224 (bicubic, antialiased), centre cut, eight bits, CLIP's mean and deviation."""
    how, image = Preprocessing(), picture(y, x)
    out = how(image)
    assert out.shape == (1, 3, 224, 224) and out.dtype == torch.float32
    scale = 224 / min(y, x)
    tall, wide = round(scale * y), round(scale * x)
    scaled = torch.nn.functional.interpolate(image.permute(0, 3, 1, 2), size=(tall, wide), mode="bicubic", antialias=True)
    cut = scaled[:, :, (tall - 224) // 2:, (wide - 224) // 2:][:, :, :224, :224]
    expected = ((cut * 255).clip(0, 255).round() / 255 - torch.tensor(how.mean).view(3, 1, 1)) / torch.tensor(how.std).view(3, 1, 1)
    assert ((out - expected).abs() > 1e-6).float().mean() < 1e-4  # a tie may round either way
    eight = levels(out, how)
    assert (eight - eight.round()).abs().max() < 1e-3 and eight.min() > -0.1 and eight.max() < 255.1


@pytest.mark.parametrize("y, x", [(300, 200), (640, 900), (50, 60)])
def test_pixels_as_pillow_scales_them(y, x) -> None:
    """Another implementation of the same: within two of 255 levels."""
    how, image = Preprocessing(), picture(y, x)
    scale = 224 / min(y, x)
    tall, wide = round(scale * y), round(scale * x)
    pil = Image.fromarray((image[0] * 255).byte().numpy()).resize((wide, tall), Image.Resampling.BICUBIC)
    top, left = (tall - 224) // 2, (wide - 224) // 2
    import numpy as np
    cut = torch.from_numpy(np.array(pil.crop((left, top, left + 224, top + 224)))).movedim(-1, 0)
    assert (levels(how(image)[0], how) - cut).abs().max() <= 2


def test_alpha_lies_over_white_and_grey_is_three_channels() -> None:
    how, image = Preprocessing(16), picture(20, 30, 4)
    alpha = image[..., 3:]
    torch.testing.assert_close(how(image), how(image[..., :3] * alpha + 1 - alpha))
    assert torch.equal(how(torch.zeros(1, 20, 20, 4)), how(torch.ones(1, 20, 20, 3)))
    grey = picture(20, 30, 1)
    assert torch.equal(how(grey), how(grey.repeat(1, 1, 1, 3)))


def test_pictures_of_a_batch_do_not_touch() -> None:
    how, both = Preprocessing(16), torch.cat((picture(20, 30), picture(20, 30, seed=1)))
    assert torch.equal(how(both), torch.cat([how(one[None]) for one in both])) and not torch.equal(*how(both))
    assert how(both.half()).dtype == torch.float32


# the file --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tower", [True, False])
def test_save_load_save_gives_the_same_bytes(encoder, tmp_path, dtype, tower) -> None:
    if not tower:
        encoder = ConceptEncoder(ConceptConfig("SDXL", LAYERS, 12, 16, merge=Merge.ADD, training={"b": [1, 2.5], "a": "x"}))
    encoder.save(tmp_path / "a.safetensors", dtype)
    state, loaded = torch.get_rng_state(), load_concept_encoder(tmp_path / "a.safetensors")
    assert torch.equal(state, torch.get_rng_state())
    loaded.save(tmp_path / "b.safetensors", dtype)
    encoder.save(tmp_path / "c.safetensors", dtype)
    assert len({(tmp_path / f"{n}.safetensors").read_bytes() for n in "abc"}) == 1
    assert loaded.config == encoder.config and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
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


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("older", [True, False])
def test_a_write_that_fails_leaves_the_older_file(encoder, tmp_path, monkeypatch, stop, older) -> None:
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


@pytest.mark.parametrize("content", [
    b"", b"\0", b"1234567", struct.pack("<Q", 0), struct.pack("<Q", 8), struct.pack("<Q", 1 << 40) + b"{}      ",
    struct.pack("<Q", (1 << 64) - 1) + b"{}      ", struct.pack("<Q", 8) + b"no JSON ", struct.pack("<Q", 8) + b"{torn:  ",
    struct.pack("<Q", 8) + b"{\"a\":1} ", b"<html><body>404 Not Found</body></html>", struct.pack("<Q", 40000) + b"{" + b"[" * 39999,
    struct.pack("<Q", 80) + b"{\"a\":{\"dtype\":\"F32\",\"shape\":[1000000000,1000000000],\"data_offsets\":[0,8]}}".ljust(80) + b"\0" * 8])
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
    refused(written_with(file, description() | {"version": version, "unknown": 1}), f"format {version}", "format 1", "Update Kindred")


WRONG = (None, 7, -1, True, "x", [], [[]], [1, 2, 3], {}, {"a": 1}, float("nan"), float("inf"))


@pytest.mark.parametrize("key", ["version", "family", "layers", "width", "tower_width", "tower", "preprocessing", "merge", "training"])
def test_a_damaged_description(file, key) -> None:
    whole = description()
    refused(written_with(file, {k: v for k, v in whole.items() if k != key}), "description is damaged", key)
    right = {"family": ["x"], "training": [{}, {"a": 1}], "version": [7]}.get(key, [])
    for value in WRONG:
        if value not in right or isinstance(value, bool):
            refused(written_with(file, whole | {key: value}))


@pytest.mark.parametrize("key", ["size", "mean", "std"])
def test_a_damaged_preprocessing(file, key) -> None:
    whole = description()
    refused(written_with(file, whole | {"preprocessing": {k: v for k, v in whole["preprocessing"].items() if k != key}}), "damaged")
    for value in WRONG if key != "mean" else [v for v in WRONG if v != [1, 2, 3]]:
        if not (key == "std" and value == [1, 2, 3]):
            refused(written_with(file, whole | {"preprocessing": whole["preprocessing"] | {key: value}}), "damaged")
    for value in ([0, 1, 1], [1, -1, 1], [1, 1, 1, 1], [1, 1], ["1", 1, 1], [float("nan"), 1, 1], [1e300, 1, 1]):
        refused(written_with(file, whole | {"preprocessing": whole["preprocessing"] | {"std": value}}), "damaged")


@pytest.mark.parametrize("text", ["", "null", "[]", "7", "{", "[" * 100_000, '{"version": ' + "1" * 5000 + "}", "\x00"])
def test_a_description_that_is_none(file, text) -> None:
    refused(written_with(file, text), "description is damaged")


HUGE = 10**9
HOSTILE = [
    *({"tower": TOWER | {name: value}} for name in ("hidden_size", "num_hidden_layers", "image_size", "patch_size", "intermediate_size",
                                                    "num_attention_heads", "num_channels")
      for value in (-1, 0, HUGE, 10**30, 2.0, "16", None, [16, 16], True)),
    {"tower": TOWER | {"patch_size": 17}}, {"tower": TOWER | {"num_attention_heads": 5}}, {"tower": TOWER | {"hidden_act": "relu6"}},
    {"tower": TOWER | {"hidden_act": ["gelu"]}}, {"tower": TOWER | {"layer_norm_eps": 0}},
    {"tower": TOWER | {"image_size": 32, "patch_size": 16}},  # as many patches, but not the pixels it is given
    {"tower": {k: v for k, v in TOWER.items() if k != "patch_size"}}, {"tower": {"hidden_size": 16}},
    {"layers": [["input", 1, 0, HUGE]]}, {"layers": [["input", 1, 0, 0]]}, {"layers": [["input", 1, 0, -8]]},
    {"layers": [["input", HUGE, 0, 8]]}, {"layers": [["input", -1, 0, 8]]}, {"layers": [["a.b", 1, 0, 8]]},
    {"layers": [["input", 1, 0, 8]] * 2}, {"layers": [["input", i // 100, i % 100, 8] for i in range(1100)]},
    {"layers": [["input", 1, 0]]}, {"layers": [[["input"], 1, 0, 8]]},
    {"width": 0}, {"width": HUGE}, {"tower_width": 0}, {"tower_width": HUGE}, {"tower_width": 17},
    # within what could be, so that only the tensors say no
    {"width": 65536}, {"layers": [["input", 1, i, 65536] for i in range(100)]}, {"tower": None, "tower_width": 8192, "width": 60000},
    {"tower": TOWER | {"num_hidden_layers": 24}}, {"tower": TOWER | {"intermediate_size": 65536}},
    {"tower": TOWER | {"hidden_size": 8192}, "tower_width": 8192}, {"tower": TOWER | {"num_hidden_layers": 2}},
]


def test_hostile_descriptions_take_no_memory_and_no_time(file) -> None:
    for lie in HOSTILE:
        refused(written_with(file, description() | lie))


def test_a_description_cannot_choose_code(file) -> None:
    """transformers' configuration can name kernels to fetch; only what is architecture is read of it."""
    pixels = torch.randn(1, 3, 16, 16)
    plain = load_concept_encoder(file)(pixels)
    extra = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel", "auto_map": {"AutoModel": "x--y.Z"},
             "torch_dtype": "float64", "dtype": "float16", "attention_dropout": 0.9, "_name_or_path": "/etc", "projection_dim": 10**9}
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
            (weights | {"to_k.input_2_0.weight": torch.zeros(8, 12)}, ("to_k.input_2_0.weight", "there is none")),
            ({}, ("missing",)),
            (weights | {first: torch.zeros(8, 12, dtype=torch.int64)}, (first, "I64")),
            (weights | {first: torch.zeros(8, 12, dtype=torch.bool)}, (first, "BOOL")),
            (weights | {first: torch.full((8, 12), torch.nan)}, (first, "NaN")),
            (weights | {"mlp.0.bias": torch.full((16,), -torch.inf)}, ("mlp.0.bias", "infinite"))):
        save_file(changed, file, said)
        refused(file, *words)
    save_file({k: v.bfloat16() for k, v in weights.items()}, file, said)
    assert load_concept_encoder(file).config == SMALL


# IP-Adapter ------------------------------------------------------------------------------------------------------------------


def full_face(layers: tuple, width: int, tower: int) -> tuple[dict[str, tuple[int, ...]], list]:
    """Shapes of a full-face file by its own names, and our blocks in its order: input, output, middle (arXiv 2308.06721's code)."""
    numbered = sorted(layers, key=lambda layer: (("input", "output", "middle").index(layer[0][0]), layer[0]))
    shapes = {"proj.0.weight": (tower, tower), "proj.0.bias": (tower,), "proj.2.weight": (width, tower), "proj.2.bias": (width,),
              "proj.3.weight": (width,), "proj.3.bias": (width,)}
    return {f"image_proj.{k}": v for k, v in shapes.items()} | {
        f"ip_adapter.{2 * n + 1}.to_{half}_ip.weight": (c, width) for n, (_, c) in enumerate(numbered) for half in "kv"}, numbered


@pytest.mark.parametrize("family, layers, width", [("SD15", SD15, 768), ("SD20", SD15, 1024), ("SDXL", SDXL, 2048)])
def test_full_face_weights_are_read_layer_by_layer(family, layers, width) -> None:
    shapes, numbered = full_face(layers, width, 1280)
    config, names = read_full_face(Path("ip-adapter-full-face.safetensors"), shapes)
    assert (config.family, config.width, config.tower_width, config.tower, config.merge) == (family, width, 1280, None, Merge.ADD)
    assert config.layers == layers
    for n, (block, _) in enumerate(numbered):
        own = "_".join(map(str, block))
        assert names[f"to_k.{own}.weight"] == f"ip_adapter.{2 * n + 1}.to_k_ip.weight"
        assert names[f"to_v.{own}.weight"] == f"ip_adapter.{2 * n + 1}.to_v_ip.weight"
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in ConceptEncoder(config).state_dict().items()}
    assert {own: shapes[theirs] for own, theirs in names.items()} == expected and sorted(names.values()) == sorted(shapes)


def test_a_full_face_file_of_sd15_loads(tmp_path) -> None:
    shapes, numbered = full_face(SD15, 768, 8)
    path = tmp_path / "ip-adapter-full-face_sd15.safetensors"
    save_file({name: torch.full(shape, i / 64, dtype=torch.float16) for i, (name, shape) in enumerate(shapes.items())}, path)
    place = {name: i / 64 for i, name in enumerate(shapes)}
    encoder = load_concept_encoder(path)
    check_layers(encoder.config, "SD15", SD15, 768, "node")
    made = encoder.keys_values(torch.ones(1, 1, 768) / 768)
    for n, (block, c) in enumerate(numbered):
        for half, t in zip("kv", made[block]):
            torch.testing.assert_close(t, torch.full((1, 1, c), place[f"ip_adapter.{2 * n + 1}.to_{half}_ip.weight"]))
    assert float(encoder.mlp[2].bias[0]) == place["image_proj.proj.2.bias"]
    encoder.save(tmp_path / "own.safetensors")
    again = load_concept_encoder(tmp_path / "own.safetensors")
    assert again.config == encoder.config and again.config.merge is Merge.ADD


@pytest.mark.parametrize("keys, word", [
    (("image_proj.proj.weight", "image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"), "the plain kind"),
    (("image_proj.latents", "image_proj.proj_in.weight", "ip_adapter.1.to_k_ip.weight"), "IP-Adapter Plus"),
    (("image_proj.proj.0.weight", "image_proj.proj.2.weight", "image_proj.norm.weight"), "IP-Adapter FaceID,"),
    (("image_proj.perceiver_resampler.proj_in.weight", "image_proj.proj.0.weight", "image_proj.norm.weight"), "FaceID Plus"),
    (("image_proj.something",), "unknown kind"), (("lora_unet_down.alpha", "a"), "no concept encoder"), ((), "no concept encoder")])
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
@pytest.mark.parametrize("name, shape", [
    ("image_proj.proj.0.weight", (HUGE, 0)), ("image_proj.proj.0.weight", ()), ("image_proj.proj.3.weight", ()),
    ("ip_adapter.1.to_k_ip.weight", (HUGE, 0)), ("ip_adapter.1.to_k_ip.weight", ()), ("ip_adapter.7.to_v_ip.weight", (0,))])
def test_full_face_weights_that_lie(tmp_path, name, shape) -> None:
    """An empty tensor may claim any size and has no bytes."""
    path, (shapes, _) = tmp_path / "adapter.safetensors", full_face(SD15, 768, 8)
    shapes = {n: s if n.startswith("image_proj.proj.3") else (0, *s[1:]) for n, s in shapes.items()} | {name: shape}
    save_file({n: torch.zeros(s) for n, s in shapes.items()}, path)
    refused(path)


# against a model -------------------------------------------------------------------------------------------------------------


def test_an_encoder_fits_its_family_only() -> None:
    sd15, sdxl = ConceptConfig("SD15", SD15, 768, 1024), ConceptConfig("SDXL", SDXL, 2048, 1280)
    check_layers(sd15, "SD15", SD15, 768, "Node")
    check_layers(sd15, "SD15", SD15[::-1], 768, "Node")
    for config, family, layers, width in ((sd15, "SDXL", SDXL, 2048), (sdxl, "SD15", SD15, 768), (sd15, "SD20", SD15, 1024)):
        with pytest.raises(ValueError) as caught:
            check_layers(config, family, layers, width, "Cross-Attn Detail Inject")
        for word in ("Cross-Attn Detail Inject", config.family, family, str(config.width), str(width), str(len(layers)), "Use an encoder"):
            assert word in str(caught.value)
    with pytest.raises(ValueError, match="1280 channels there and 640 here"):
        check_layers(sd15, "SSD", tuple((b, 640 if b == ("middle", 0, 0) else c) for b, c in SD15), 768, "Node")
