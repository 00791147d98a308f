"""Laws of a saved reference: what comes back is what was saved, bit for bit; whatever is not whole is refused with a sentence."""
from __future__ import annotations

import errno
import json
import pickle
import re
import struct
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kindred.models import bank_file
from kindred.models.bank_file import FORMAT, load_reference, save_reference
from kindred.models.inversion import InversionTrajectory
from kindred.models.reference import (
    BANK_VERSION, AnchorFeatures, BankBuilder, Half, Layer, ReferenceBank, ReferencePrompt, SubjectTokens,
)

SIGMAS = torch.tensor([0.0, 0.5, 2.0, 9.0])
T, R, Y, X = 3, 2, 4, 6
BLOCKS = {("input", 1, 0): ((4, 6), 3), ("middle", 0, 0): ((2, 3), 5), ("middle", 0, 1): ((2, 3), 5)}  # block -> grid, channels
LAYERS = tuple(Layer(block, *told) for block, told in BLOCKS.items())
EMPTY = torch.zeros(0)  # float32, whatever the features are
LAW = pytest.mark.parametrize


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masks() -> dict:
    fine, coarse = torch.zeros(R, 4, 6, dtype=torch.bool), torch.zeros(R, 2, 3, dtype=torch.bool)
    fine[0, 1, 2:5] = fine[1, 3, 0] = True
    coarse[0, 0, 1] = coarse[1, 1, 2] = coarse[1, 0, 0] = True
    return {(4, 6): fine, (2, 3): coarse}


def prompts() -> dict:
    """One tensor stands in both halves, and a float that no short decimal names; order of the extras is theirs."""
    pooled = rand(1, 7, seed=20)
    subject = SubjectTokens(("red panda", "fox"), ((3, 4, 9), ()), (((3, 4), ()), ((9,), ())))
    return {
        Half.COND: ReferencePrompt('a "red" \N{PANDA FACE}', rand(1, 77, 8, seed=21), {
            "pooled_output": pooled, "width": 1024, "guidance": 0.1 + 0.2, "kindred_text": "a / b", "flags": torch.tensor([True, False]),
            "crop": torch.tensor(3)}, subject),
        Half.UNCOND: ReferencePrompt("", rand(2, 77, 8, seed=22).half(), {"pooled_output": pooled}),
    }


def photo_bank(dtype: torch.dtype | None = None, edit_friendly: bool = False, maps: bool = True) -> ReferenceBank:
    builder = BankBuilder(dtype)
    for step in range(T):
        for half in Half:
            builder.add(half, step, {b: rand(R, y * x, c, seed=100 * step + i + 10 * (half is Half.UNCOND))
                                     for i, (b, ((y, x), c)) in enumerate(BLOCKS.items())})
    noise = rand(T, R, 4, Y, X, seed=2) if edit_friendly else None
    path = InversionTrajectory(SIGMAS, rand(T + 1, R, 4, Y, X, seed=1), "ddim", "a cat", "SD15 0a", "normal, 3 steps", noise)
    return builder.finish({b: grid for b, (grid, _) in BLOCKS.items()}, masks(), path, prompts(), "SD15 0a",
                          rand(T, R, 3, 4, seed=5) if maps else None)


def kept(seed: int, lengths: tuple[int, ...]) -> dict:
    """Other positions at every step; on the finer grid twice as many."""
    gen = torch.Generator().manual_seed(seed)
    return {(y, x): [torch.randperm(R * y * x, generator=gen)[:n * (1 + (y == 4))].sort().values for n in lengths]
            for y, x in ((4, 6), (2, 3))}


def rows_of(kept: dict, seed: int, dtype: torch.dtype) -> list[Tensor]:
    made = [sum(len(kept[layer.grid][i]) * layer.channels for layer in LAYERS) for i in range(T)]
    return [rand(n, seed=seed + i).to(dtype) if n else EMPTY for i, n in enumerate(made)]


def anchor_bank(dtype: torch.dtype = torch.float16, injected: bool = True) -> ReferenceBank:
    """As generated anchors leave it: rows of other lengths at every step, and none where the first stage did not come."""
    last, first = kept(1, (5, 0, 8)), kept(2, (0, 4, 3))
    made = AnchorFeatures(
        last, {half: rows_of(first, 40 + i, dtype) for i, half in enumerate(Half)}, first,
        [EMPTY, *(rand(3 * 5, seed=60 + i).to(dtype) for i in range(2))] if injected else [EMPTY] * T,
        LAYERS[1:2] if injected else (), rand(R, 6, 5, seed=62) if injected else None, torch.tensor([1, 7, 11]) if injected else None,
        {"dropout": 0.5, "seed": 2**53 + 1, "method": "shared"})
    return replace(photo_bank(dtype), features={half: rows_of(last, 50 + i, dtype) for i, half in enumerate(Half)}, anchors=made)


BANKS = {
    "a photo": photo_bank, "a photo in half precision": lambda: photo_bank(torch.float16),
    "bfloat16": lambda: photo_bank(torch.bfloat16), "an edit-friendly path": lambda: photo_bank(edit_friendly=True, maps=False),
    "anchors": anchor_bank, "anchors in float32": lambda: anchor_bank(torch.float32),
    "anchors without feature injection": lambda: anchor_bank(injected=False),
    "anchors that had one stage": lambda: replace(anchor_bank(), anchors=replace(
        anchor_bank().anchors, first={}, first_kept={}, outputs=(), output_layers=(), features=None, subject=None, settings={})),
}


def same(a, b, where: str = "bank") -> None:
    """Bit for bit, with dtypes and the order of mappings; sequences may be lists or tuples."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b), where
    elif is_dataclass(a):
        assert type(a) is type(b), where
        for f in fields(a):
            same(getattr(a, f.name), getattr(b, f.name), f"{where}.{f.name}")
    elif isinstance(a, dict):
        assert list(a) == list(b) and list(map(type, a)) == list(map(type, b)), where
        for key in a:
            same(a[key], b[key], f"{where}[{key}]")
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple)) and len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b)):
            same(one, other, f"{where}[{i}]")
    else:
        assert type(a) is type(b) and a == b, where


@pytest.fixture
def file(tmp_path) -> Path:
    save_reference(anchor_bank(), tmp_path / "cat.safetensors")
    return tmp_path / "cat.safetensors"


def described(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[FORMAT])


def rewrite(path: Path, told: dict | str | None = None, **changed: Tensor | None) -> None:
    """The same file with another description or other tensors; None takes one out."""
    told = described(path) if told is None else told
    tensors = load_file(path) | {name: value for name, value in changed.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, {FORMAT: told if isinstance(told, str) else json.dumps(told)})


def refuse(path: Path, *said: str) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, (path.name, *said)))) as refused:
        load_reference(path)
    assert str(refused.value).endswith(".") and ".." not in str(refused.value) and str(path.parent) not in str(refused.value)


# round trips -----------------------------------------------------------------------------------------------------------------


@LAW("name", BANKS)
def test_what_comes_back_is_what_was_saved(name, tmp_path) -> None:
    bank = BANKS[name]()
    before = BANKS[name]()
    save_reference(bank, tmp_path / "a.safetensors")
    same(bank, before)
    loaded = load_reference(tmp_path / "a.safetensors")
    same(bank, loaded)
    assert loaded.bytes == bank.bytes and loaded.blocks == bank.blocks and loaded.pictures == R
    for half in Half:
        for step in range(T):
            same(bank.tokens(half, step, torch.device("cpu"), torch.float32), loaded.tokens(half, step, torch.device("cpu"), torch.float32))


@LAW("name", ["a photo", "anchors"])
def test_saving_again_gives_the_same_bytes(name, tmp_path) -> None:
    """Twice the same bank, and the loaded one: nothing of time, folder or order of memory is in a file."""
    (tmp_path / "other").mkdir()
    first, second, third = (tmp_path / n for n in ("a.safetensors", "other/b.safetensors", "c.safetensors"))
    save_reference(BANKS[name](), first)
    save_reference(BANKS[name](), second)
    save_reference(load_reference(first), third)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    assert str(tmp_path).encode() not in first.read_bytes()


def test_a_file_has_few_tensors(file) -> None:
    """However many steps: rows lie in one tensor."""
    names = set(load_file(file))
    assert len(names) < 30 and {"features.cond", "anchors.kept.4x6", "mask.2x3", "trajectory.latents"} <= names
    assert load_file(file)["anchors.kept.4x6"].dtype == torch.int32 and load_file(file)["mask.4x6"].dtype == torch.bool


def test_views_and_shared_memory_are_saved(tmp_path) -> None:
    """A mask for all pictures is expanded, rows are views of one tensor, and both halves may be the same."""
    bank = photo_bank()
    one = masks()[4, 6][:1].expand(R, -1, -1)
    shared = torch.cat([rand(T, 90, seed=9)] * 2, 1)[:, ::2]
    n = sum(int(({(4, 6): one, (2, 3): masks()[2, 3]}[layer.grid]).sum()) * layer.channels for layer in LAYERS)
    bank = replace(bank, masks={(4, 6): one, (2, 3): masks()[2, 3]}, features={half: shared[:, :n] for half in Half})
    save_reference(bank, tmp_path / "a.safetensors")
    same(bank, load_reference(tmp_path / "a.safetensors"))


def test_a_loaded_bank_does_not_need_its_file(file) -> None:
    """It may be overwritten in place or deleted while a server holds the bank."""
    loaded = load_reference(file)
    with file.open("r+b") as held:
        held.seek(0)
        held.write(b"\xff" * file.stat().st_size)
    same(anchor_bank(), loaded)
    file.unlink()
    same(anchor_bank(), loaded)


# what fails ------------------------------------------------------------------------------------------------------------------


@LAW("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@LAW("older", [True, False])
def test_a_save_that_fails_leaves_the_older_file(tmp_path, monkeypatch, stop, older) -> None:
    path = tmp_path / "cat.safetensors"
    if older:
        save_reference(photo_bank(), path)
    before = path.read_bytes() if older else None

    def half(tensors, to, metadata) -> None:
        Path(to).write_bytes(b"half of it")
        raise stop
    monkeypatch.setattr(bank_file, "save_file", half)
    with pytest.raises(type(stop)):
        save_reference(anchor_bank(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["cat.safetensors"] * older
    assert not older or path.read_bytes() == before


def test_a_full_disk_is_an_oserror(file) -> None:
    resource = pytest.importorskip("resource")
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="cat.safetensors"):
            save_reference(photo_bank(), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


def test_what_could_not_be_loaded_is_not_saved(tmp_path) -> None:
    bank = photo_bank()
    bank.features[Half.COND][1, 2] = float("nan")
    with pytest.raises(ValueError, match="cannot be saved: the features of the cond half hold 1 NaN or infinite values"):
        save_reference(bank, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"of version 0, but this Kindred writes version {BANK_VERSION}"):
        save_reference(replace(photo_bank(), version=0), tmp_path / "a.safetensors")
    made = anchor_bank()
    mixed = replace(made, anchors=replace(made.anchors, outputs=[torch.ones(15), torch.ones(15).half(), EMPTY]))
    with pytest.raises(ValueError, match="cannot be saved: anchors.outputs holds rows of .*float16.*float32.*Make it again"):
        save_reference(mixed, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# what is refused -------------------------------------------------------------------------------------------------------------


def test_a_file_torn_anywhere_is_refused(file) -> None:
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    points = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, *range(0, len(whole), max(len(whole) // 60, 1)), len(whole) - 1}
    for point in sorted(points):
        file.write_bytes(whole[:point])
        refuse(file, "torn", "again")
    file.write_bytes(whole)
    same(anchor_bank(), load_reference(file))


@LAW(("content", "said"), [
    (pickle.dumps({"a": 1}), "is a pickle"), (b"PK\x03\x04" + bytes(60), "is a pickle"), (b"<html>not found</html>", "no .safetensors")])
def test_files_of_other_kinds(content, said, tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refuse(path, said)


def test_a_pickle_is_never_opened(tmp_path) -> None:
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Trap()))
    refuse(tmp_path / "x.safetensors", "is a pickle")
    assert not (tmp_path / "sprung").exists()


@LAW(("metadata", "said"), [
    (None, "is no reference (its metadata names nothing)"), ({"format": "pt"}, "is no reference (its metadata names format)"),
    ({"kindred.concept_encoder": "{}"}, "is of format kindred.concept_encoder")])
def test_another_format(metadata, said, tmp_path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata)
    refuse(tmp_path / "x.safetensors", said, f"but a reference is of format {FORMAT}", "Choose a file that Save Reference wrote")


def test_a_share_of_the_tokens_comes_back(tmp_path) -> None:
    whole = photo_bank()
    thin = replace(whole, share=0.5)
    half = replace(thin, features={half: torch.cat([torch.zeros(T, len(thin.kept[each.grid]) * each.channels) for each in whole.layers], 1)
                                   for half in Half})
    save_reference(half, tmp_path / "a.safetensors")
    loaded = load_reference(tmp_path / "a.safetensors")
    assert loaded.share == 0.5 and loaded.loudness == half.loudness and max(loaded.loudness.values()) > 1 and loaded.bytes == half.bytes


@LAW("share", [0, -0.5, 1.5, "1", True, None, float("nan")])
def test_another_share(share, file) -> None:
    rewrite(file, described(file) | {"share": share})
    refuse(file, "where a share of the tokens belongs, above 0 and up to 1", "Copy it again")


def test_a_file_from_before_shares_holds_all_tokens(file) -> None:
    rewrite(file, {k: v for k, v in described(file).items() if k != "share"})
    assert load_reference(file).share == 1.0


@LAW("version", [0, BANK_VERSION + 1, 10**30, -1, "1", True, None])
def test_another_version(version, file) -> None:
    rewrite(file, described(file) | {"version": version})
    if isinstance(version, int) and not isinstance(version, bool) and 0 <= version < 1 << 31:
        refuse(file, f"is a reference of version {version}, but this Kindred reads version {BANK_VERSION}", "Update Kindred")
    else:
        refuse(file, "its description is damaged", "Copy it again")


def test_another_version_is_named_before_anything_else_is_read(file) -> None:
    rewrite(file, json.dumps({"version": BANK_VERSION + 1}))
    refuse(file, f"of version {BANK_VERSION + 1}")


def test_every_tensor_is_needed(file) -> None:
    whole = file.read_bytes()
    for name in load_file(file):
        file.write_bytes(whole)
        rewrite(file, **{name: None})
        refuse(file, f"the tensor '{name}' is missing", "Copy it again")


@LAW("name", ["features.cond", "features.uncond", "anchors.outputs", "anchors.features", "anchors.first.cond", "prompt.cond.cross",
              "trajectory.latents"])
@LAW("value", [float("nan"), float("-inf")])
def test_values_that_are_none(name, value, file) -> None:
    broken = load_file(file)[name]
    broken.view(-1)[3] = value
    rewrite(file, **{name: broken})
    refuse(file, "again")


def test_nan_features_are_counted(file) -> None:
    broken = load_file(file)["features.cond"]
    broken[:2] = float("nan")
    rewrite(file, **{"features.cond": broken})
    refuse(file, "the features of the cond half hold 2 NaN or infinite values of", "in row 0", "save the reference again")


LIES = {
    "a row longer": (lambda told: told["features"]["cond"]["lengths"].__setitem__(0, 10**9), "features.cond is", "3 rows of 10000"),
    "a row moved": (lambda told: told["features"]["cond"].update(lengths=told["features"]["cond"]["lengths"][::-1]),
                    "the features of the cond half are", "at step 0, but the tokens kept there need"),
    "a step less": (lambda told: told["features"]["uncond"].update(
        lengths=[sum(told["features"]["uncond"]["lengths"][:2]), *told["features"]["uncond"]["lengths"][2:]], dtypes=["float16"]),
        "the features of the uncond half have 2 rows, but there are 3 steps"),
    "a negative row": (lambda told: told["anchors"]["outputs"]["lengths"].__setitem__(1, -1), "a row of anchors.outputs is -1"),
    "dtypes of other rows": (lambda told: told["anchors"]["outputs"].update(dtypes=["float16"] * 2), "has 3 rows", "2 dtypes"),
    "an unknown dtype": (lambda told: told["anchors"]["outputs"].update(dtypes=["load"]), "its description is damaged"),
    "features of whole numbers": (lambda told: told["features"]["cond"].update(dtypes=["int64"]), "which is no floating point"),
    "outputs of other tokens": (lambda told: told["anchors"]["output_layers"][0].__setitem__(5, 6),
                                "the anchors' outputs are [15] at step 1, but the tokens kept there need [18]"),
    "another grid": (lambda told: told["layers"][0].__setitem__(3, 5), "input 1 has 5x6 tokens, but nothing says which of them are kept"),
    "other channels": (lambda told: told["layers"][0].__setitem__(5, 4), "the features of the cond half are", "need"),
    "a layer of no UNet": (lambda told: told["layers"][0].__setitem__(0, "side"), "a layer lies in 'side'"),
    "a layer too short": (lambda told: told["layers"][0].pop(), "does not fit together"),
    "a third half": (lambda told: told["features"].update(other=None), "'other' is not a valid Half"),
    "no anchors": (lambda told: told.update(anchors=None), "the features of the cond half are", "at step 0"),
    "no prompt": (lambda told: told["prompts"]["cond"].pop("text"), "its description is damaged"),
    "a number for a name": (lambda told: told.update(model=5), "its description is damaged"),
    "a list for a number": (lambda told: told["anchors"]["settings"].update(dropout=[1]), "its description is damaged"),
    "words at no place": (lambda told: told["prompts"]["cond"]["subject"]["positions"][0].__setitem__(0, -3), "a token's position is -3"),
}


@LAW("lie", LIES)
def test_a_description_that_lies(lie, file) -> None:
    change, *said = LIES[lie]
    told = described(file)
    change(told)
    rewrite(file, told)
    refuse(file, *said)


@LAW("told", ["", "{", "[]", "null", '"a"', "[" * 100_000, json.dumps({"version": BANK_VERSION})])
def test_a_description_that_is_none(told, file) -> None:
    rewrite(file, told)
    refuse(file, "its description is damaged", "Copy it again")


@LAW(("name", "change", "said"), [
    ("mask.4x6", lambda m: m[:1], "the mask of 4x6 is torch.bool [1, 4, 6], but it has to be bool [2, 4, 6]"),
    ("mask.2x3", lambda m: m.float(), "the mask of 2x3 is torch.float32"),
    ("anchors.kept.2x3", lambda p: p + 10, "the kept tokens of 2x3 are not positions below 12"),
    ("anchors.kept.4x6", lambda p: -p - 1, "the kept tokens of 4x6 are not positions below 48"),
    ("anchors.subject", lambda p: p + 1, "the anchors' subject are not positions below 12"),
    ("features.cond", lambda f: f[:-1], "but its description says 3 rows of"),
    ("trajectory.sigmas", lambda s: s.flip(0), "the lowest sigma must be 0"),
    ("trajectory.latents", lambda x: x[1:], "latents must be"),
    ("trajectory.latents", lambda x: x.half(), "latents must be float32"),
])
def test_tensors_that_do_not_fit(name, change, said, file) -> None:
    rewrite(file, **{name: change(load_file(file)[name]).contiguous()})
    refuse(file, "does not fit together", said, "save the reference again")


def test_a_file_that_is_gone(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        load_reference(tmp_path / "gone.safetensors")
