"""Laws of names: none that is a word of our own where the field has a term, and none imported that is not there."""

import ast
import symtable
from collections.abc import Iterator
from functools import cache
from pathlib import PurePosixPath

import pytest
from archive import ROOT, files
from test_rooms import ROOMS

OURS = {"made", "found", "told", "given", "asked", "heard"}
PROGRAMS = [name for name in files(".py") if not name.startswith("tests/")]
NAMING = ("id", "arg", "attr", "name", "asname")  # the fields of Python's syntax that hold a name


def modules() -> dict[str, str]:
    """What a module or a package lies at -> its file, "" for a package without one."""
    known = {str(place): "" for name in PROGRAMS for place in PurePosixPath(name).parents}
    known |= {name.removesuffix(".py"): name for name in PROGRAMS}
    return known | {
        str(PurePosixPath(name).parent): name for name in PROGRAMS if name.endswith("__init__.py")
    }


MODULES = modules()


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text("utf-8"))


def names(program: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a program gives or uses, without underscores around it, and its line."""
    for node in ast.walk(program):
        for field in NAMING:
            if isinstance(name := getattr(node, field, None), str):
                yield name.strip("_").lower(), node.lineno


def place_of(name: str, level: int, module: str) -> str | None:
    """Where the module that a file imports from lies; None where it is not of this repository."""
    parts = module.split(".") if module else []
    if level:
        places = [PurePosixPath(name).parents[level - 1].joinpath(*parts)]
    elif parts[0] == "kindred":
        places = [PurePosixPath(*parts[1:])]
    else:
        places = [PurePosixPath("tools", room, *parts) for room in ROOMS]
    return next((str(place) for place in places if str(place) in MODULES), None)


@cache
def bound(place: str) -> set[str]:
    """What a module has on its top level."""
    if not MODULES[place]:
        return set()
    text = (ROOT / MODULES[place]).read_text("utf-8")
    symbols = symtable.symtable(text, MODULES[place], "exec").get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}


def missing(name: str, program: ast.AST) -> Iterator[str]:
    """What the file `name` imports from modules of this repository that do not have it."""
    for node in ast.walk(program):
        if isinstance(node, ast.ImportFrom):
            place = place_of(name, node.level, node.module or "")
            there = set() if place is None else bound(place)
            for alias in node.names if place is not None else ():
                if alias.name not in there and str(PurePosixPath(place, alias.name)) not in MODULES:
                    yield f"{name}:{node.lineno}: {alias.name} of {place}"


def test_names_are_the_fields_terms() -> None:
    """What a thing is: a match, a message, options, a result; not that somebody found or told it."""
    words = [
        f"{name}:{line}: {word}"
        for name in PROGRAMS
        for word, line in names(tree(name))
        if word in OURS
    ]
    assert not words, "\n".join(words)


@pytest.mark.parametrize(
    "text",
    [
        "made = 1",
        "TOLD = ()",
        "class Found: pass",
        "self._made = {}",
        "def told(): pass",
        "class heard: pass",
        "lambda found: 0",
        "def f(*, asked): pass",
        "f(asked=1)",
        "import a as given",
        "from a import told",
        "if found := 1: pass",
        "try: pass\nexcept E as told: pass",
    ],
)
def test_a_word_of_our_own_is_seen(text: str) -> None:
    assert OURS & {word for word, _ in names(ast.parse(text))}


def test_a_name_with_more_words_says_more() -> None:
    assert not OURS & {
        word for word, _ in names(ast.parse("made_with, as_asked = 'told', 'found'"))
    }


def test_what_is_imported_is_there() -> None:
    """Also inside of functions, which no other test may have called."""
    absent = [line for name in PROGRAMS for line in missing(name, tree(name))]
    assert not absent, "\n".join(absent)


@pytest.mark.parametrize(
    "name, text",
    [
        ("tools/evidence/face_figures.py", "from evaluation.tables import told"),
        ("tools/evidence/evaluation/report.py", "from .tables import told"),
        ("tools/client/automate.py", "def f():\n    from jobs import Work"),
        ("tools/workshop/demo.py", "from kindred.models.metrics import Median"),
        ("models/run.py", "from .network import calls"),
        ("nodes/capture.py", "from ..models import nowhere"),
    ],
)
def test_an_import_of_nothing_is_seen(name: str, text: str) -> None:
    assert [*missing(name, ast.parse(text))]
