"""Names of files that lead elsewhere: nothing is read or written outside of the host's folders, and what is refused is told in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from kindred.models.reference.file import save_reference
from kindred.nodes.concept import ConceptEncoderLoad
from kindred.nodes.host import CONCEPTS, REFERENCES, concept_folder
from kindred.nodes.library import LoadReference, SaveReference
from kindred.nodes.photos import LoadPhoto
from kindred.nodes.training import Order
from PIL import Image
from refusals import faults_of
from studio import bank_of, fresh_encoder

BASE = Path(folder_paths.base_path)
OUT, REFERENCE = Path(folder_paths.get_output_directory()), "outside.safetensors"
LAW = pytest.mark.parametrize


def shown(name: str) -> str:
    return repr(name.replace(str(BASE), "BASE"))[:40]  # which another worker calls otherwise


NAMES = [
    "../x",
    "../../x",
    "..",
    ".",
    "",
    " ",
    "/",
    "//x/y",
    "/x",
    str(BASE.parent / "x"),
    "kindred/../../x",
    "a/../../../x",
    "a/b/c/d/e/f",
    "./x",
    "x/",
    "..\\x",
    "..\\..\\x",
    "C:\\x",
    "C:/x",
    "c:x",
    "\\\\server\\share\\x",
    "~",
    "~/x",
    "$HOME/x",
    "%USERPROFILE%/x",
    "file:///x",
    "a\0b",
    "\0",
    "x\0/../../y",
    "a\nb",
    "a\rb",
    "\x1b[31mx",
    "x" * 300,
    "x/" * 300,
    "/".join(["y" * 200] * 30),
    "\u2025/x",
    "\uff0e\uff0e/x",
    "\u2024\u2024/x",
    "..\u2215x",
    "..\uff0fx",
    "\u202egnp",
    "\ud800",
    "e\u0301",
    "\U0001f431",
    "x.",
    "x...",
    "x ",
    " x",
    ".hidden",
    "CON",
    "NUL",
    "aux",
    "com1",
    "LPT9.txt",
    "x:y",
    "x*",
    "x?",
    "x|y",
    "<x>",
    'x"y',
    "%date:yyyy-MM-dd%",
    "%year%-%month%/x",
    "%width%",
    "%",
    "%s%n",
    "{0}",
    "x [temp]",
    "x [output]",
    "../x [temp]",
    "x.safetensors",
    "x.pt",
    "-rf",
    "--help",
    "`x`",
    "$(x)",
    ";x",
    "&x",
]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Iterator[Path]:
    """A reference, an encoder and a picture beside the host's folders and above them; gone afterwards."""
    planted, elsewhere = [], tmp_path_factory.mktemp("elsewhere")
    for folder in (BASE, BASE.parent, BASE / "models", elsewhere):
        save_reference(bank_of(), folder / REFERENCE)
        fresh_encoder().save(folder / "outside_encoder.safetensors")
        Image.new("RGB", (8, 8), "red").save(folder / "outside.png")
        planted += [
            folder / REFERENCE,
            folder / "outside_encoder.safetensors",
            folder / "outside.png",
        ]
    yield elsewhere
    for path in planted:
        path.unlink()


def everything() -> dict[str, Any]:
    """Files and folders of the base directory, and the names beside it."""
    inside = {
        str(p.relative_to(BASE)): p.is_file() and (p.stat().st_size, p.stat().st_mtime_ns)
        for p in BASE.rglob("*")
    }
    return inside | {
        f"../{p.name}": True
        for p in BASE.parent.iterdir()
        if not p.name.startswith(("pytest", "tmp", "kindred-"))
    }


def added(before: dict[str, Any]) -> set[str]:
    """What is new; nothing else may have changed."""
    after = everything()
    assert {
        name: after.get(name) for name in before if not before[name] or before[name] is True
    } == {name: before[name] for name in before if not before[name] or before[name] is True}
    assert all(after[name] == told for name, told in before.items() if told)
    return set(after) - set(before)


@LAW("name", NAMES, ids=shown)
@torch.inference_mode()
def test_a_reference_is_saved_in_the_output_folder_or_not_at_all(name):
    OUT.mkdir(exist_ok=True)
    bank = bank_of()  # which shows its subject in the temp folder
    before = everything()
    try:
        SaveReference.execute(bank, name)
        refused = False
    except ValueError as error:
        refused = True
        assert (
            str(error).startswith("Save Reference: filename_prefix is ")
            and "Give a short name" in str(error)
            and len(str(error)) < 400
        )
    except Exception as error:  # the host's own word
        refused = True
        assert "outside the output folder is not allowed" in str(error)
    new = added(before)
    try:
        assert all(path.split("/")[0] == "output" for path in new)
        files = [path for path in new if (BASE / path).is_file()]
        assert len(files) == (not refused) and all(path.endswith("_.safetensors") for path in files)
    finally:
        for path in sorted(new, reverse=True):
            (BASE / path).rmdir() if (BASE / path).is_dir() else (BASE / path).unlink()


@LAW("name", NAMES, ids=shown)
def test_an_encoder_is_saved_in_its_folder_or_not_at_all(name):
    """Where the files would go: known before the training begins, and nothing of the name is made where it is refused."""
    given = {"model": None, "vae": None, "clip": None, "images": [], "prompt": ["x"]}
    concept_folder().mkdir(parents=True, exist_ok=True)
    before = everything()
    try:
        paths, said = Order(**given, save_name=name).files(), ""
    except ValueError as error:
        paths, said = (), str(error)
    new = added(before)
    for path in sorted(new, reverse=True):
        (BASE / path).rmdir()
    home = concept_folder().resolve()
    assert all(path.resolve().is_relative_to(home) and len(path.name) < 240 for path in paths)
    assert all((BASE / path).resolve().is_relative_to(home) for path in new)
    assert bool(paths) != bool(said) and (
        said or not set(name) & set(':*?"<>|')
    )  # Windows knows no such file
    assert (
        not said
        or said.startswith("Concept Encoder Train: save_name is ")
        and "Give the name of a file" in said
        and not new
    )


def spellings(planted: str) -> list[str]:
    """The same outside file by every way that a name may lead out of a folder."""
    up = [
        prefix + planted
        for prefix in (
            "../",
            "../../",
            "../../../",
            "sub/../../",
            "./../",
            "..//",
            "..\\",
            "..\\..\\",
            "%2e%2e/",
            "\uff0e\uff0e/",
            "..\u2215",
            "x/../../../",
            "/../",
            "....//",
            "",
        )
    ]
    return [
        *up,
        str(BASE / planted),
        str(BASE.parent / planted),
        f"file://{BASE / planted}",
        f"~/{planted}",
        f"../{planted}\0.safetensors",
        f"\0../{planted}",
        f"../{planted} [input]",
        f"../{planted} [output]",
        f"../{planted} [temp]",
        f"../../{planted} [temp]",
    ]


@LAW("name", spellings(REFERENCE), ids=shown)
@torch.inference_mode()
def test_no_reference_or_encoder_is_read_from_outside(name, sandbox):
    before = everything()
    for act in (
        lambda: LoadReference.execute(name),
        lambda: LoadReference.fingerprint_inputs(name),
        lambda: ConceptEncoderLoad.execute(name.replace("outside", "outside_encoder")),
        lambda: ConceptEncoderLoad.fingerprint_inputs(name.replace("outside", "outside_encoder")),
    ):
        with pytest.raises((FileNotFoundError, ValueError)):
            act()
    assert not added(before)


@LAW("name", [*spellings("outside.png"), *NAMES], ids=shown)
def test_no_picture_is_read_from_outside(name, sandbox):
    before = everything()
    answer = LoadPhoto.validate_inputs(name)
    assert (
        isinstance(answer, str)
        and answer.startswith("Load Photo: there is no picture")
        and "Choose" in answer
    )
    assert not added(before)


def test_a_link_that_the_user_laid_is_followed_as_the_host_does(sandbox, place):
    """Whole model folders lie on other disks behind links: what the host lists is read."""
    folder = place(REFERENCES)
    try:
        (folder / "linked.safetensors").symlink_to(sandbox / REFERENCE)
        (folder / "nowhere.safetensors").symlink_to(sandbox / "gone.safetensors")
    except OSError:
        pytest.skip("this system makes no links")
    assert LoadReference.execute("linked.safetensors").result[0].pictures == 1
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        LoadReference.execute("nowhere.safetensors")


def test_no_encoder_is_saved_through_a_link_that_leads_out(tmp_path, place):
    folder = place(CONCEPTS)
    (tmp_path / "elsewhere").mkdir()
    try:
        (folder / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (folder / "named.safetensors").symlink_to(tmp_path / "elsewhere" / "there.safetensors")
    except OSError:
        pytest.skip("this system makes no links")
    given = {"model": None, "vae": None, "clip": None, "images": [], "prompt": ["x"]}
    for name in ("link/x", "link/../../x", "named"):
        made, fault = faults_of(lambda: Order(**given, save_name=name).files(), "save_name is")
        assert made is None and "Give the name" in fault or not fault, fault
    assert not list((tmp_path / "elsewhere").iterdir())
