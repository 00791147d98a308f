"""The registry's and GitHub's files say the same as pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from archive import ROOT
from environment import PYTHONS

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
if not WORKFLOWS:
    pytest.skip("an installed copy has no .github", allow_module_level=True)


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))


@pytest.fixture
def project():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_only_the_owner_publishes(project):
    owner = re.fullmatch(
        r"https://github.com/([^/]+)/[^/]+", project["project"]["urls"]["Repository"]
    ).group(1)
    told = workflow("publish.yml")
    assert told["jobs"]["publish"]["if"] == f"github.repository_owner == '{owner}'"
    assert told[True]["push"] == {
        "branches": ["main"],
        "paths": ["pyproject.toml"],
    }  # YAML 1.1 reads `on` as true
    assert told["permissions"] == {"contents": "read", "issues": "write"}


def test_publishing_waits_for_a_new_version():
    """A published version is immutable: another line of pyproject.toml is no reason to hand it over again."""
    steps = workflow("publish.yml")["jobs"]["publish"]["steps"]
    last = steps[-1]
    assert (
        last["uses"].startswith("Comfy-Org/publish-node-action@")
        and last["if"] == "steps.version.outputs.new == 'true'"
    )
    assert list(last["with"].values()) == ["${{ secrets.REGISTRY_ACCESS_TOKEN }}"]
    assert '"^+version = "' in steps[1]["run"].replace("'", '"')
    assert re.search(r"^version = ", (ROOT / "pyproject.toml").read_text("utf-8"), re.M), (
        "the step looks for this line"
    )


@pytest.fixture
def push(tmp_path):
    """push(versions, before=...): the step of publish.yml after these commits of pyproject.toml -> its exit code, whether it publishes."""
    bash, git = shutil.which("bash"), shutil.which("git")
    if os.name == "nt" or not bash or not git:
        pytest.skip("needs bash and git")
    script = workflow("publish.yml")["jobs"]["publish"]["steps"][1]["run"]
    settings = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    settings |= {
        f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    settings |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}

    def run(*versions, before, event="push"):
        repo, told = tmp_path / "repo", tmp_path / "told"
        repo.mkdir()
        told.touch()

        def ask(*words):
            return subprocess.run(
                [git, *words], cwd=repo, env=settings, check=True, capture_output=True, text=True
            ).stdout.strip()

        ask("init", "-q")
        for number, version in enumerate(versions):
            (repo / "pyproject.toml").write_text(
                f'version = "{version}"\nnumber = {number}\n', "utf-8"
            )
            ask("add", ".")
            ask("commit", "-q", "-m", "x")
        known = {"BEFORE": ask("rev-parse", before) if "HEAD" in before else before}
        done = subprocess.run(
            [bash, "-e", "-c", script],
            cwd=repo,
            capture_output=True,
            text=True,  # -e, as GitHub runs a step
            env=settings | known | {"GITHUB_EVENT_NAME": event, "GITHUB_OUTPUT": str(told)},
        )
        return done.returncode, told.read_text("utf-8") == "new=true\n"

    return run


@pytest.mark.parametrize(
    "versions, before, new",
    [
        ("12", "HEAD^", True),
        ("11", "HEAD^", False),
        ("122", "HEAD~2", True),
        ("112", "HEAD~2", True),
        ("122", "HEAD^", False),
        ("12", "0" * 40, True),
        ("122", "0" * 40, False),  # a first push, or a new branch
        ("12", "f" * 40, True),
        ("11", "f" * 40, False),
        ("12", "", True),
    ],
)  # forced: what was before is gone
def test_a_push_publishes_where_the_version_changed(push, versions, before, new):
    assert push(*versions, before=before) == (0, new)


def test_by_hand_it_always_publishes_and_without_anything_to_compare_with_it_fails(push, tmp_path):
    assert push("1", before="0" * 40, event="workflow_dispatch") == (0, True)
    shutil.rmtree(tmp_path / "repo")
    (tmp_path / "told").unlink()
    code, new = push("1", before="0" * 40)
    assert code != 0 and not new


def test_the_machines_run_pythons_that_the_pins_are_for():
    rows = workflow("test.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    versions = {tuple(map(int, row["python"].split("."))) for row in rows}
    assert {min(versions), max(versions)} == set(PYTHONS)
    assert {row["os"] for row in rows} == {"ubuntu-latest", "windows-latest", "macos-latest"}


def test_every_action_is_one_that_was_meant():
    used = {
        step["uses"]
        for path in WORKFLOWS
        for job in workflow(path.name)["jobs"].values()
        for step in job["steps"]
        if "uses" in step
    }
    assert used == {
        "actions/checkout@v4",
        "actions/setup-python@v5",
        "actions/cache@v4",
        "Comfy-Org/publish-node-action@v1",
    }


def test_the_registry_finds_the_pages(project):
    urls = project["project"]["urls"]
    assert set(urls) == {"Repository", "Documentation", "Issues"} and all(
        url.startswith(urls["Repository"]) for url in urls.values()
    )
    assert 10 < len(project["project"]["description"]) < 200


def test_the_linter_looks_for_what_the_registry_refuses(project):
    chosen = project["tool"]["ruff"]["lint"]["select"]
    assert all(any(code.startswith(entry) for entry in chosen) for code in ("S102", "S307", "E702"))
