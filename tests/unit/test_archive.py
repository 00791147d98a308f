"""What users install is the pack, whole, and nothing else."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import archive
import pytest
from archive import ROOT, files, git, ignored, shipped

SHIPPED = set(shipped())
TOP = {
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "__init__.py",
    "locales",
    "miniature",
    "models",
    "nodes",
    "pyproject.toml",
    "requirements.txt",
    "subgraphs",
    "web",
    "workflows",
}
ENDS = {
    ".css",
    ".jpg",
    ".js",
    ".json",
    ".md",
    ".mjs",
    ".png",
    ".py",
    ".safetensors",
    ".toml",
    ".txt",
}
WEIGHS = 50_000_000  # bytes before compression, weights included


def targets(name: str) -> set[str]:
    """The pack's files that a file imports, with the __init__.py of the folders they lie in; files that do not exist included."""
    folder, found = PurePosixPath(name).parent, set()
    for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder.joinpath(*[".."] * (node.level - 1), *(node.module or "").split("."))
            base = PurePosixPath(*flatten(base.parts))
            for place in (base, *(base / alias.name for alias in node.names)):
                found |= {
                    path
                    for path in (f"{place}.py", f"{place / '__init__.py'}")
                    if (ROOT / path).is_file()
                }
    return found | {
        str(parent / "__init__.py")
        for path in found
        for parent in PurePosixPath(path).parents
        if (ROOT / parent / "__init__.py").is_file()
    }


def flatten(parts):
    """Path parts with their `..` carried out."""
    out = []
    for part in parts:
        out = out[:-1] if part == ".." else [*out, part]
    return out


def test_the_top_of_the_archive():
    assert {PurePosixPath(name).parts[0] for name in SHIPPED} == TOP
    assert not {name for name in SHIPPED if PurePosixPath(name).suffix not in ENDS} - {"LICENSE"}


def test_every_module_in_it_is_used_and_every_module_used_is_in_it():
    """Following the imports from the door, wherever they stand: no file for training, none forgotten."""
    reached, queue = set(), ["__init__.py"]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += targets(name)
    modules = {name for name in SHIPPED if name.endswith(".py")}
    assert not reached - modules, (
        f"the pack imports what .comfyignore leaves out: {sorted(reached - modules)}"
    )
    assert not modules - reached, (
        f"nothing of the pack imports these, so .comfyignore can leave them out: {sorted(modules - reached)}"
    )


def test_it_is_small():
    sizes = {name: (ROOT / name).stat().st_size for name in SHIPPED}
    assert sum(sizes.values()) < WEIGHS, sorted(sizes.items(), key=lambda item: -item[1])[:8]


def test_no_template_or_help_page_lacks_its_picture():
    """Pages link pictures beside themselves; docs/, which the README on the web shows, is not installed."""
    lacking = []
    for name in shipped(".md"):
        for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / name).read_text("utf-8")):
            folder = (
                PurePosixPath("web/docs")
                if name.startswith("web/docs/")
                else PurePosixPath(name).parent
            )
            target = str(PurePosixPath(*flatten(folder.joinpath(link).parts)))
            if target not in SHIPPED and name not in ("README.md", "miniature/README.md"):
                lacking.append(f"{name}: {link}")
            assert (ROOT / target).is_file(), f"{name}: {link}"
    assert not lacking, "\n".join(lacking)


def test_git_reads_comfyignore_as_we_do():
    """The registry's packer reads it with all of gitignore's rules."""
    told = git("ls-files", "-z", "--cached", "--others", "--ignored", "--exclude-from=.comfyignore")
    if told.returncode:
        pytest.skip("no git checkout to ask")
    out = set(told.stdout.split("\0"))
    assert [name for name in files() if ignored(name) != (name in out)] == []


@pytest.mark.parametrize(
    "name",
    [
        "tests/unit/test_archive.py",
        "tools/workshop/archive.py",
        "dev.py",
        ".github/workflows/test.yml",
        ".comfyignore",
        "docs/sheet.png",
        "miniature/train.py",
        "miniature/train_tower.py",
        "miniature/samples.jpg",
        ".ci/run",
    ],
)
def test_left_out(name):
    assert ignored(name)


@pytest.mark.parametrize(
    "name",
    [
        "__init__.py",
        "nodes/host/run.py",
        "web/docs/KindredConsiStory.md",
        "workflows/api/story.json",
        "locales/zh/nodeDefs.json",
        "miniature/registration.py",
        "miniature/reference.png",
        "miniature/weights/checkpoints/kindred_miniature.safetensors",
        "requirements.txt",
    ],
)
def test_taken_along(name):
    assert not ignored(name)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository that tracks two files, one of them against its rules, ignores one and has one to come."""
    place = tmp_path / "a checkout"
    place.mkdir()
    for name in ("tracked.py", "kept.py", "new.py", "ignored.py"):
        (place / name).write_text("", "utf-8")
    (place / ".gitignore").write_text("kept.py\nignored.py\n", "utf-8")
    if git("init", "-q", cwd=place).returncode:
        pytest.skip("no git")
    assert git("add", "-f", "tracked.py", "kept.py", ".gitignore", cwd=place).returncode == 0
    return place


def test_another_repository_in_the_environment_is_not_asked(checkout: Path, tmp_path: Path) -> None:
    """As git leaves it to its hooks, to `rebase --exec` and to aliases of another clone."""
    for name in ("tools/workshop/archive.py", "tools/client/terminal.py"):
        (checkout / name).parent.mkdir(parents=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    other = tmp_path / "other"
    other.mkdir()
    git("init", "-q", cwd=other)
    (other / "theirs.py").write_text("", "utf-8")
    git("add", "theirs.py", cwd=other)
    theirs = {
        "GIT_DIR": other / ".git",
        "GIT_WORK_TREE": other,
        "GIT_INDEX_FILE": other / ".git" / "index",
        "GIT_PREFIX": "docs/",
        "GIT_OBJECT_DIRECTORY": other / ".git" / "objects",
        "GIT_COMMON_DIR": other / ".git",
    }
    program = f"import sys; sys.path.insert(0, {str(checkout / 'tools' / 'workshop')!r}); import archive; print(*archive.files('.py'))"
    for names in (["GIT_DIR"], ["GIT_INDEX_FILE"], ["GIT_WORK_TREE", "GIT_DIR"], [*theirs]):
        told = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=other,
            env=os.environ | {name: str(theirs[name]) for name in names},
        )
        assert told.stdout.split() == [
            "kept.py",
            "new.py",
            "tools/client/terminal.py",
            "tools/workshop/archive.py",
            "tracked.py",
        ], names


def test_an_unpacked_archive_has_its_files_and_not_what_programs_left(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without git, and below custom_nodes, which ComfyUI's own repository ignores: the rules of every .gitignore hold all the same."""
    (checkout / ".gitignore").write_text("custom_nodes\n", "utf-8")
    pack = checkout / "custom_nodes" / "pack"
    texts = {
        "__init__.py": "",
        ".gitignore": "/kindred-demo/\n*.log\n",
        "a.log": "",
        "docs/a.png": "",
        "docs/kindred-demo/b.png": "",
        "docs/mine/.gitignore": "*\n",
        "docs/mine/deep/c.png": "",
        "kindred-demo/sheet.png": "",
        "docs/__pycache__/x.pyc": "",
    }
    for name, text in texts.items():
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        (pack / name).write_text(text, "utf-8")
    monkeypatch.setattr(archive, "ROOT", pack)
    assert files() == ["__init__.py", "docs/a.png", "docs/kindred-demo/b.png"]
    monkeypatch.setenv("PATH", "")
    assert files() == ["__init__.py", "docs/a.png", "docs/kindred-demo/b.png"]
