"""The registry's and GitHub's files say the same as pyproject.toml."""
import re
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
    owner = re.fullmatch(r"https://github.com/([^/]+)/[^/]+", project["project"]["urls"]["Repository"]).group(1)
    told = workflow("publish.yml")
    assert told["jobs"]["publish"]["if"] == f"github.repository_owner == '{owner}'"
    assert told[True]["push"] == {"branches": ["main"], "paths": ["pyproject.toml"]}  # YAML 1.1 reads `on` as true
    assert told["permissions"] == {"contents": "read", "issues": "write"}


def test_publishing_waits_for_a_new_version():
    """A published version is immutable: another line of pyproject.toml is no reason to hand it over again."""
    steps = workflow("publish.yml")["jobs"]["publish"]["steps"]
    last = steps[-1]
    assert last["uses"].startswith("Comfy-Org/publish-node-action@") and last["if"] == "steps.version.outputs.new == 'true'"
    assert list(last["with"].values()) == ["${{ secrets.REGISTRY_ACCESS_TOKEN }}"]
    assert '"^+version = "' in steps[1]["run"].replace("'", '"')
    assert re.search(r"^version = ", (ROOT / "pyproject.toml").read_text("utf-8"), re.M), "the step looks for this line"


def test_the_machines_run_pythons_that_the_pins_are_for():
    rows = workflow("test.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    versions = {tuple(map(int, row["python"].split("."))) for row in rows}
    assert {min(versions), max(versions)} == set(PYTHONS)
    assert {row["os"] for row in rows} == {"ubuntu-latest", "windows-latest", "macos-latest"}


def test_every_action_is_one_that_was_meant():
    used = {step["uses"] for path in WORKFLOWS for job in workflow(path.name)["jobs"].values() for step in job["steps"] if "uses" in step}
    assert used == {"actions/checkout@v4", "actions/setup-python@v5", "actions/cache@v4", "Comfy-Org/publish-node-action@v1"}


def test_the_registry_finds_the_pages(project):
    urls = project["project"]["urls"]
    assert set(urls) == {"Repository", "Documentation", "Issues"} and all(url.startswith(urls["Repository"]) for url in urls.values())
    assert 10 < len(project["project"]["description"]) < 200


def test_the_linter_looks_for_what_the_registry_refuses(project):
    chosen = project["tool"]["ruff"]["lint"]["select"]
    assert all(any(code.startswith(entry) for entry in chosen) for code in ("S102", "S307", "E702"))
