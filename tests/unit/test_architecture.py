"""The pack's own laws of structure: who imports whom, what is shipped, what never stands in a shipped file."""

import ast
import json
import re
import subprocess
import sys
from pathlib import PurePosixPath

import pytest
from archive import ROOT, files, ignored, shipped

if sys.version_info >= (3, 11):
    import tomllib

STDLIB = set(sys.stdlib_module_names)
MODELS = {"torch", "einops", "safetensors", "transformers", "numpy"}
HOST = {
    "comfy",
    "folder_paths",
    "nodes",
    "server",
    "execution",
    "comfy_extras",
    "comfy_execution",
    "latent_preview",
    "node_helpers",
    "app",
}
HOST_DOORS = {"nodes/host.py", "miniature/registration.py"}
ROOMS = ("nodes", "models", "miniature", "web", "workflows", "tools", "tests")

# what the registry's scanner flags by plain text, whatever the code means
FLAGGED = [
    "os.environ.get(",
    "subprocess",
    "os.system",
    "urlopen",
    "requests.",
    "urllib.request",
    "sqlite",
    "eval(",
    "exec(",
]
FLAGGED_SCRIPT = FLAGGED[:7] + [".connect(", ".bind("]
# a word ends here: model.eval() and re.compile are no calls of the builtins
BUILTIN = re.compile(r"(?<![\w.])(?:eval|exec)\(")


SHIPPED = shipped()
PACK = [
    name
    for name in files(".py")
    if PurePosixPath(name).parts[0] in ("nodes", "models", "miniature") or name == "__init__.py"
]


def imports(name: str) -> list[tuple[int, str, int]]:
    """(level, module, line) of every import in a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module or "", node.lineno)]
            if node.module is None:  # from . import a, b
                found += [(node.level, alias.name, node.lineno) for alias in node.names]
    return found


def breach(name: str, level: int, module: str) -> str | None:
    """The rule that this import breaks, or None."""
    room, top = PurePosixPath(name).parts[0], module.split(".")[0]
    for shared in ("host", "drawing"):  # packages; their rooms import each other, and no family
        if name.startswith(f"nodes/{shared}/"):
            family = name.count("/")  # so many dots reach nodes/
            if 0 < level <= family:
                return None if level < family else f"{shared}/ knows no family of nodes ({module})"
            name = f"nodes/{shared}.py"
    if level == 0 and top in ROOMS and top not in ("nodes",):
        return "the pack imports itself relatively"
    if room == "models":
        if level == 0:
            return (
                None
                if top in MODELS | STDLIB
                else f"models/ is pure torch: {module} does not belong there"
            )
        return None if level <= name.count("/") else "models/ imports only its siblings"
    if (
        level == 0
        and top in HOST
        and name not in HOST_DOORS
        and not (ignored(name) and room == "miniature")
    ):
        return f"only {' and '.join(sorted(HOST_DOORS))} touch the host: take {module} through them"
    if room == "nodes" and level == 0 and top not in MODELS | STDLIB | HOST | {"comfy_api", "PIL"}:
        return f"{module} is not what the host brings"
    if (
        room == "nodes"
        and level == 1
        and name != "nodes/__init__.py"
        and top not in ("host", "drawing", "sockets", "")
    ):
        return f"a family of nodes does not import another one ({module}): put what they share into models/, host/ or drawing/"
    if (
        room == "nodes"
        and level == 2
        and (parts := module.split("."))[0] == "miniature"
        and parts[1:2] not in (["reader"], ["world"])
    ):
        return f"of the miniature a node takes the reader and the world that pictures are judged by, not {module}"
    return None


def test_who_imports_whom():
    broken = [
        f"{name}:{line}: {rule}"
        for name in PACK
        for level, module, line in imports(name)
        if (rule := breach(name, level, module))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "name, level, module",
    [
        ("models/subject/masks.py", 0, "comfy.utils"),
        ("models/subject/masks.py", 3, "nodes.host"),
        ("models/subject/masks.py", 0, "models.attention"),
        ("nodes/host/run.py", 2, "concept"),
        ("nodes/host/networks/flux.py", 3, "concept"),
        ("nodes/drawing/card.py", 2, "evaluation"),
        ("nodes/drawing/card.py", 0, "comfy.utils"),
        ("nodes/host/run.py", 0, "cv2"),
        ("models/network/backbone.py", 3, "nodes.host"),
        ("nodes/hosts/run.py", 0, "comfy.samplers"),
        ("nodes/capture.py", 0, "comfy.samplers"),
        ("nodes/capture.py", 1, "inversion"),
        ("nodes/evaluation.py", 2, "miniature.training"),
        ("nodes/evaluation.py", 2, "miniature"),
        ("miniature/world.py", 0, "folder_paths"),
        ("nodes/capture.py", 0, "cv2"),
    ],
)
def test_the_rule_bites(name, level, module):
    assert breach(name, level, module)


@pytest.mark.parametrize(
    "name, level, module",
    [
        ("models/subject/masks.py", 1, "attention"),
        ("models/subject/masks.py", 0, "torch.nn"),
        ("nodes/host.py", 0, "comfy.samplers"),
        ("nodes/host/run.py", 0, "comfy.samplers"),
        ("nodes/host/run.py", 1, "model"),
        ("nodes/host/run.py", 3, "models.run"),
        ("nodes/drawing/card.py", 1, "pen"),
        ("nodes/drawing/card.py", 3, "models.overlay"),
        ("nodes/host/networks/flux.py", 1, "parts"),
        ("nodes/host/networks/flux.py", 2, "model"),
        ("nodes/host/networks/flux.py", 4, "models.network.backbone"),
        ("models/network/backbone.py", 2, "reference"),
        ("nodes/capture.py", 2, "models.reference"),
        ("nodes/capture.py", 1, "host"),
        ("nodes/capture.py", 0, "comfy_api.v0_0_2"),
        ("nodes/evaluation.py", 1, "drawing.card"),
        ("nodes/evaluation.py", 2, "miniature.reader"),
        ("miniature/registration.py", 0, "comfy.supported_models"),
        ("miniature/train.py", 0, "comfy.model_base"),
    ],
)
def test_the_rule_lets_through(name, level, module):
    assert breach(name, level, module) is None


def siblings(name: str) -> set[str]:
    """The files of models/ that a file of models/ imports, for types alone too."""
    found = set()
    for level, module, _ in imports(name):
        if level:
            room = PurePosixPath(name).parents[level - 1]
            found.add(str(room.joinpath(*module.split("."))) + ".py")
    return found


def test_models_import_one_another_in_no_circle():
    """Each round takes away the files that import none of those left; what stays stands in a circle."""
    left = {name: siblings(name) for name in PACK if name.startswith("models/")}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, sorted(left)


def test_no_shipped_file_trips_the_registrys_scanner():
    """Plain text, comments included: the scanner does not parse. Python's builtins are looked for as calls."""
    trips = []
    for name in SHIPPED:
        if name.endswith((".py", ".js", ".mjs")):
            for number, line in enumerate((ROOT / name).read_text("utf-8").splitlines(), 1):
                words = FLAGGED[:7] if name.endswith(".py") else FLAGGED_SCRIPT
                trips += [f"{name}:{number}: {word}" for word in words if word in line]
                trips += [f"{name}:{number}: eval or exec"] * bool(BUILTIN.search(line))
    assert not trips, "\n".join(trips)


def test_no_line_of_the_product_is_longer_than_100_columns() -> None:
    """Comments and sentences too, which the formatter leaves alone."""
    long = [
        f"{name}:{number}"
        for name in PACK
        if not name.startswith("miniature/")
        for number, line in enumerate((ROOT / name).read_text("utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert not long


def test_no_file_is_longer_than_500_lines():
    lengths = {
        name: len((ROOT / name).read_text("utf-8").splitlines())
        for name in files(".py")
        if not name.startswith("tests/")
    }
    assert not {name: length for name, length in lengths.items() if length > 500}


def test_no_drawer_for_odds_and_ends():
    odd = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [
        name for name in files() if odd & {part.split(".")[0] for part in PurePosixPath(name).parts}
    ]


def test_the_door_is_light():
    """Importing the root takes no time, for the host does it at every start: no file but its own is opened, no folder listed, no program
    begun, nothing imported but typing, and hardly a call made."""
    script = (
        "import __future__, importlib.util as u, json, sys, typing; before, seen, calls = set(sys.modules), [], [];"
        f"s = u.spec_from_file_location('door', {str(ROOT / '__init__.py')!r}, submodule_search_locations=[{str(ROOT)!r}]);"
        "m = u.module_from_spec(s); sys.modules['door'] = m;"
        "sys.addaudithook(lambda event, args: seen.append([event, str(args[:1])]));"
        "sys.setprofile(lambda frame, event, arg: calls.append(event)); s.loader.exec_module(m); sys.setprofile(None);"
        "print(json.dumps([seen, len(calls), sorted(set(sys.modules) - before), [n for n in vars(m) if not n.startswith('_')]]))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], capture_output=True, text=True, check=True
    )
    seen, calls, imported, names = json.loads(done.stdout)
    touched = [
        args
        for event, args in seen
        if event.split(".")[0]
        in ("open", "os", "subprocess", "socket", "shutil", "tempfile", "glob")
    ]
    assert touched and all("__init__" in args for args in touched)
    assert imported == ["door"] and calls < 1000
    assert {"WEB_DIRECTORY", "comfy_entrypoint"} <= set(
        names
    ) and "NODE_CLASS_MAPPINGS" not in names


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_pyproject_is_what_the_registry_reads():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project, comfy = told["project"], told["tool"]["comfy"]
    assert (
        re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,99}", project["name"])
        and "comfyui" not in project["name"].lower()
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"]) and project["version"] in (
        ROOT / "CHANGELOG.md"
    ).read_text("utf-8")
    assert project["license"] == {"file": "LICENSE"} and project["dependencies"] == []
    assert (
        comfy["PublisherId"]
        and re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
        and "web" not in comfy
    )
    assert (ROOT / "requirements.txt").read_bytes() == b""
    assert "GNU GENERAL PUBLIC LICENSE" in (ROOT / "LICENSE").read_text("utf-8")


def test_every_file_reads_on_every_platform():
    """No file name that Windows refuses, no two that differ in case only, no text that its code page cannot hold."""
    names = files()
    assert len({name.lower() for name in names}) == len(names)
    assert not [name for name in names if re.search(r'[<>:"|?*\\]|[ .]$', name)]
    for name in files(".py"):
        (ROOT / name).read_text("utf-8").encode("cp1252")
