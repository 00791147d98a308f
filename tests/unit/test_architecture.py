"""The pack's own laws of structure: who imports whom, what is shipped, what never stands in a shipped file."""

import ast
import json
import re
import statistics
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
    for shared in ("host", "drawing"):  # packages; their rooms import each other, and no family
        if name.startswith(f"nodes/{shared}/"):
            family = name.count("/")  # so many dots reach nodes/
            if 0 < level <= family:
                return None if level < family else f"{shared}/ knows no family of nodes ({module})"
            name = f"nodes/{shared}.py"
    room = PurePosixPath(name).parts[0]
    if level == 0 and module.split(".")[0] in set(ROOMS) - {"nodes"}:
        return "the pack imports itself relatively"
    if room == "models":
        return breach_of_models(name, level, module)
    return breach_at_the_door(name, level, module) or (
        breach_of_nodes(name, level, module) if room == "nodes" else None
    )


def breach_of_models(name: str, level: int, module: str) -> str | None:
    if level == 0 and module.split(".")[0] not in MODELS | STDLIB:
        return f"models/ is pure torch: {module} does not belong there"
    return None if level <= name.count("/") else "models/ imports only its siblings"


def breach_at_the_door(name: str, level: int, module: str) -> str | None:
    trains = ignored(name) and name.startswith("miniature/")
    if level == 0 and module.split(".")[0] in HOST and name not in HOST_DOORS and not trains:
        return f"only {' and '.join(sorted(HOST_DOORS))} touch the host: take {module} through them"
    return None


def breach_of_nodes(name: str, level: int, module: str) -> str | None:
    top, *below = module.split(".")
    if level == 0 and top not in MODELS | STDLIB | HOST | {"comfy_api", "PIL"}:
        return f"{module} is not what the host brings"
    if (
        level == 1
        and name != "nodes/__init__.py"
        and top not in ("host", "drawing", "inputs", "sockets", "")
    ):
        return f"a family of nodes does not import another one ({module}): put what they share into models/, host/ or drawing/"
    if level == 2 and top == "miniature" and below[:1] not in (["reader"], ["world"]):
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


HOST_KEYS = {
    "transformer_options",
    "model_conds",
    "cross_attn",
    "c_crossattn",
    "uuid",
    "uuids",
    "cond_or_uncond",
    "original_shape",
    "activations_shape",
    "block_index",
    "patches_replace",
}


def test_models_read_no_dict_of_the_host():
    """Its keys stand in nodes/host/ alone, which hands their values."""
    read = {
        (name, node.value)
        for name in PACK
        for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value in HOST_KEYS
    }
    assert {name.split("/")[0] for name, _ in read} >= {"nodes"}
    assert not {(name, key) for name, key in read if name.startswith("models/")}


def siblings(name: str) -> set[str]:
    """The files of the pack that a file of it imports, wherever the import stands and for types
    alone too.
    """
    return {
        path
        for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
        if (path := file_of(PurePosixPath(name).parents[node.level - 1], node.module, alias.name))
    }


def file_of(room: PurePosixPath, module: str | None, name: str) -> str | None:
    """Where `from .module import name` of a room finds it; None for what is no file of the pack."""
    place = room.joinpath(*(module or "").split("."))
    places = (place / f"{name}.py", place / name / "__init__.py", place.with_suffix(".py"))
    return next((str(p) for p in (*places, place / "__init__.py") if str(p) in PACK), None)


def test_the_pack_imports_itself_in_no_circle():
    """Each round takes away the files that import none of those left; what stays stands in a circle."""
    left = {name: siblings(name) - {name} for name in PACK}
    assert left["models/run.py"] > {"models/network/call.py", "models/network/sites.py"}
    assert "nodes/host/__init__.py" in left["nodes/library.py"]
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


PRODUCT = [name for name in PACK if name.startswith(("models/", "nodes/"))]


def functions() -> dict[tuple[str, str], tuple[int, int]]:
    """(file, name) of every function of the product -> its lines without the docstring, and those
    of its body.
    """
    return {
        (name, f"{node.name} in line {node.lineno}"): lines_of(node)
        for name in PRODUCT
        for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    own = node.body[1:] if ast.get_docstring(node) else node.body
    docstring = sum(s.end_lineno - s.lineno + 1 for s in node.body if s not in own)
    body = own[-1].end_lineno - own[0].lineno + 1 if own else 0
    return node.end_lineno - node.lineno + 1 - docstring, body


def test_functions_fit_on_a_screen() -> None:
    """But schemas, which are lists."""
    long = {
        key
        for key, (lines, _) in functions().items()
        if lines > 40 and not key[1].startswith("define_schema ")
    }
    assert not long


def test_a_function_is_read_at_a_glance() -> None:
    assert statistics.median(body for _, body in functions().values()) <= 6


def test_lines_are_not_packed() -> None:
    """Their mean length, blank ones aside."""
    lines = [
        line for name in PRODUCT for line in (ROOT / name).read_text("utf-8").splitlines() if line
    ]
    assert statistics.mean(map(len, lines)) < 46


def test_no_file_is_longer_than_500_lines():
    lengths = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name in files(".py")}
    assert {name.split("/")[0] for name in lengths} >= {*ROOMS} - {"web", "workflows"}
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
