"""Laws of a saved reference that is not whole: whatever does not fit is refused with a sentence."""

from __future__ import annotations

import json
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from kindred.models.reference.bank import BANK_VERSION
from kindred.models.reference.file import (
    FORMAT,
    TRANSFORMER_VERSION,
    load_reference,
    save_reference,
)
from safetensors.torch import load_file, save_file
from small_banks import anchor_bank, described, flow_bank, rewrite, same

LAW = pytest.mark.parametrize


@pytest.fixture
def file(tmp_path) -> Path:
    save_reference(anchor_bank(), tmp_path / "cat.safetensors")
    return tmp_path / "cat.safetensors"


def refuse(path: Path, *said: str) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, (path.name, *said)))) as refused:
        load_reference(path)
    assert (
        str(refused.value).endswith(".")
        and ".." not in str(refused.value)
        and str(path.parent) not in str(refused.value)
    )


def test_a_file_torn_anywhere_is_refused(file) -> None:
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    points = {
        0,
        1,
        7,
        8,
        9,
        header // 2,
        header - 1,
        header,
        header + 1,
        *range(0, len(whole), max(len(whole) // 60, 1)),
        len(whole) - 1,
    }
    for point in sorted(points):
        file.write_bytes(whole[:point])
        refuse(file, "torn", "again")
    file.write_bytes(whole)
    same(anchor_bank(), load_reference(file))


@LAW(
    ("content", "said"),
    [
        (pickle.dumps({"a": 1}), "is a pickle"),
        (b"PK\x03\x04" + bytes(60), "is a pickle"),
        (b"<html>not found</html>", "no .safetensors"),
    ],
)
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


@LAW(
    ("metadata", "said"),
    [
        (None, "is no reference (its metadata names nothing)"),
        ({"format": "pt"}, "is no reference (its metadata names format)"),
        ({"kindred.concept_encoder": "{}"}, "is of format kindred.concept_encoder"),
    ],
)
def test_another_format(metadata, said, tmp_path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata)
    refuse(
        tmp_path / "x.safetensors",
        said,
        f"but a reference is of format {FORMAT}",
        "Choose a file that Save Reference wrote",
    )


@LAW("share", [0, -0.5, 1.5, "1", True, None, float("nan")])
def test_another_share(share, file) -> None:
    rewrite(file, described(file) | {"share": share})
    refuse(file, "where a share of the tokens belongs, above 0 and up to 1", "Copy it again")


@LAW("scale", [0, -1.0, "1", True, None, float("nan"), float("inf"), 10**400])
def test_a_flow_of_another_scale(scale, tmp_path) -> None:
    path = tmp_path / "flow.safetensors"
    save_reference(flow_bank(), path)
    told = described(path)
    rewrite(path, told | {"trajectory": told["trajectory"] | {"flow": {"scale": scale}}})
    refuse(path, "where the scale of a flow's noise belongs, above 0", "Copy it again")


@LAW(
    "change",
    [lambda path: path.update(flow=5), lambda path: path["flow"].pop("scale")],
    ids=["a number", "no scale"],
)
def test_a_flow_that_is_none(change, tmp_path) -> None:
    path = tmp_path / "flow.safetensors"
    save_reference(flow_bank(), path)
    told = described(path)
    change(told["trajectory"])
    rewrite(path, told)
    refuse(path, "its description is damaged", "Copy it again")


def test_a_flow_beyond_its_end(tmp_path) -> None:
    save_reference(flow_bank(), tmp_path / "flow.safetensors")
    rewrite(
        tmp_path / "flow.safetensors", **{"trajectory.sigmas": torch.tensor([0.0, 0.5, 2.0, 9.0])}
    )
    refuse(
        tmp_path / "flow.safetensors",
        "does not fit together",
        "a flow's sigmas go from 0 to 1; got 9",
    )


@LAW("version", [0, TRANSFORMER_VERSION + 1, 10**30, -1, "1", True, None])
def test_another_version(version, file) -> None:
    rewrite(file, described(file) | {"version": version})
    if isinstance(version, int) and not isinstance(version, bool) and 0 <= version < 1 << 31:
        refuse(
            file,
            f"is a reference of version {version}, but this Kindred reads versions {BANK_VERSION} and {TRANSFORMER_VERSION}",
            "Update Kindred",
        )
    else:
        refuse(file, "its description is damaged", "Copy it again")


def test_another_version_is_named_before_anything_else_is_read(file) -> None:
    rewrite(file, json.dumps({"version": TRANSFORMER_VERSION + 1}))
    refuse(file, f"of version {TRANSFORMER_VERSION + 1}")


def test_every_tensor_is_needed(file) -> None:
    whole = file.read_bytes()
    for name in load_file(file):
        file.write_bytes(whole)
        rewrite(file, **{name: None})
        refuse(file, f"the tensor '{name}' is missing", "Copy it again")


@LAW(
    "name",
    [
        "features.cond",
        "features.uncond",
        "anchors.outputs",
        "anchors.features",
        "anchors.first.cond",
        "prompt.cond.cross",
        "trajectory.latents",
    ],
)
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
    refuse(
        file,
        "the features of the cond half hold 2 NaN or infinite values of",
        "in row 0",
        "save the reference again",
    )


LIES = {
    "a row longer": (
        lambda told: told["features"]["cond"]["lengths"].__setitem__(0, 10**9),
        "features.cond is",
        "3 rows of 10000",
    ),
    "a row moved": (
        lambda told: told["features"]["cond"].update(
            lengths=told["features"]["cond"]["lengths"][::-1]
        ),
        "the features of the cond half are",
        "at step 0, but the tokens kept there need",
    ),
    "a step less": (
        lambda told: told["features"]["uncond"].update(
            lengths=[
                sum(told["features"]["uncond"]["lengths"][:2]),
                *told["features"]["uncond"]["lengths"][2:],
            ],
            dtypes=["float16"],
        ),
        "the features of the uncond half have 2 rows, but there are 3 steps",
    ),
    "a negative row": (
        lambda told: told["anchors"]["outputs"]["lengths"].__setitem__(1, -1),
        "a row of anchors.outputs is -1",
    ),
    "dtypes of other rows": (
        lambda told: told["anchors"]["outputs"].update(dtypes=["float16"] * 2),
        "has 3 rows",
        "2 dtypes",
    ),
    "an unknown dtype": (
        lambda told: told["anchors"]["outputs"].update(dtypes=["load"]),
        "its description is damaged",
    ),
    "features of whole numbers": (
        lambda told: told["features"]["cond"].update(dtypes=["int64"]),
        "which is no floating point",
    ),
    "outputs of other tokens": (
        lambda told: told["anchors"]["output_layers"][0].__setitem__(5, 6),
        "the anchors' outputs are [15] at step 1, but the tokens kept there need [18]",
    ),
    "another grid": (
        lambda told: told["layers"][0].__setitem__(3, 5),
        "input 1 has 5x6 tokens, but nothing says which of them are kept",
    ),
    "a mask less": (lambda told: told["masks"].pop(0), "there are masks of", "but none of"),
    "other channels": (
        lambda told: told["layers"][0].__setitem__(5, 4),
        "the features of the cond half are",
        "need",
    ),
    "a layer of no UNet": (
        lambda told: told["layers"][0].__setitem__(0, "side"),
        "a layer lies in 'side'",
    ),
    "a layer too short": (lambda told: told["layers"][0].pop(), "does not fit together"),
    "a third half": (
        lambda told: told["features"].update(other=None),
        "'other' is not a valid Half",
    ),
    "no anchors": (
        lambda told: told.update(anchors=None),
        "the features of the cond half are",
        "at step 0",
    ),
    "no prompt": (lambda told: told["prompts"]["cond"].pop("text"), "its description is damaged"),
    "a number for a name": (lambda told: told.update(model=5), "its description is damaged"),
    "a list for a number": (
        lambda told: told["anchors"]["settings"].update(dropout=[1]),
        "its description is damaged",
    ),
    "words at no place": (
        lambda told: told["prompts"]["cond"]["subject"]["positions"][0].__setitem__(0, -3),
        "a token's position is -3",
    ),
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


@LAW(
    ("name", "change", "said"),
    [
        (
            "mask.4x6",
            lambda m: m[:1],
            "the mask of 4x6 is torch.bool [1, 4, 6], but it has to be bool [2, 4, 6]",
        ),
        ("mask.2x3", lambda m: m.float(), "the mask of 2x3 is torch.float32"),
        ("anchors.kept.2x3", lambda p: p + 10, "the kept tokens of 2x3 are not positions below 12"),
        ("anchors.kept.4x6", lambda p: -p - 1, "the kept tokens of 4x6 are not positions below 48"),
        ("anchors.subject", lambda p: p + 1, "the anchors' subject are not positions below 12"),
        ("features.cond", lambda f: f[:-1], "but its description says 3 rows of"),
        ("trajectory.sigmas", lambda s: s.flip(0), "the lowest sigma must be 0"),
        ("trajectory.latents", lambda x: x[1:], "latents must be"),
        ("trajectory.latents", lambda x: x.half(), "latents must be float32"),
    ],
)
def test_tensors_that_do_not_fit(name, change, said, file) -> None:
    rewrite(file, **{name: change(load_file(file)[name]).contiguous()})
    refuse(file, "does not fit together", said, "save the reference again")


def test_a_file_that_is_gone(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        load_reference(tmp_path / "gone.safetensors")
