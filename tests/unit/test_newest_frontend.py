"""The newest frontend beside the environment, without an index: where it lies, what is found, and what is said where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import newest_frontend
import pytest
from checkout import ROOT
from environment import Refusal

LOST = "Retrying (Retry(total=0)) after NewConnectionError: Failed to establish a new connection\n"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """This user's cache folder, empty."""
    monkeypatch.setattr(newest_frontend, "cache_folder", lambda: tmp_path / "kindred")
    return tmp_path / "kindred"


def unpacked(folder: Path, version: str = "9.8.7") -> None:
    """As pip leaves the package."""
    static = folder / "comfyui_frontend_package" / "static"
    static.mkdir(parents=True)
    (static / "index.html").touch()
    told = folder / f"comfyui_frontend_package-{version}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nVersion: {version}\n", "utf-8")


def pip_that(leaves):
    """A pip that puts something into its --target, and is asked for nothing but the package."""

    def pip(python, arguments, log, progress) -> None:
        assert python == Path(sys.executable) and arguments[-1] == newest_frontend.PACKAGE
        assert "--no-deps" in arguments
        leaves(Path(arguments[arguments.index("--target") + 1]))

    return pip


def test_it_lies_in_the_cache_folder_and_is_fetched_anew(cache, monkeypatch):
    for version in ("9.8.7", "9.9.0"):
        monkeypatch.setattr(newest_frontend, "pip", pip_that(lambda at: unpacked(at, version)))
        found = newest_frontend.fetch(Path(sys.executable))
        assert found.version == version and (found.root / "index.html").is_file()
        assert found.root.is_relative_to(cache)
        assert len(list(found.root.parent.parent.glob("*.dist-info"))) == 1


def test_a_package_that_is_no_frontend_is_refused_with_what_came(cache, monkeypatch):
    monkeypatch.setattr(
        newest_frontend, "pip", pip_that(lambda at: (at / "other").mkdir(parents=True))
    )
    with pytest.raises(Refusal, match=r"holds other, but no static/index\.html"):
        newest_frontend.fetch(Path(sys.executable))


def test_an_index_that_cannot_be_reached_is_a_sentence_with_both_ways_out(cache, tmp_path):
    """By the real pip's own words; here a Python that says them."""
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nprint({LOST!r})\nraise SystemExit(1)\n", "utf-8")
    python.chmod(0o755)
    with pytest.raises(Refusal) as refused:
        newest_frontend.fetch(python)
    said = str(refused.value)
    assert "index cannot be reached" in said and "check the network" in said
    assert "Without --newest-frontend the tests take the pinned frontend" in said


def test_only_the_browser_tests_run_on_it_and_they_are_told_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    import dev

    ran = []
    monkeypatch.setattr(dev, "refuse_without_test_packages", lambda environment: None)
    frontend = newest_frontend.Frontend("9.8.7", tmp_path)
    monkeypatch.setattr(dev.newest_frontend, "fetch", lambda python: frontend)

    def together(environment, commands, **settings):
        ran.append((commands, settings))
        return [(0, 1.0)] * len(commands)

    monkeypatch.setattr(dev, "together", together)
    own = SimpleNamespace(python=Path(sys.executable), host=tmp_path)
    assert dev.test(own, "page", False, False, newest=True) == 0
    [([words], settings)] = ran
    assert "tests/browser" in words and words[-2:] == ["-k", "page"]
    assert settings[newest_frontend.VARIABLE] == str(tmp_path)
    ran.clear()
    assert dev.test(own, None, False, False) == 0
    assert len(ran) > 2 and not any(newest_frontend.VARIABLE in told for _, told in ran)


def test_what_leaves_the_browser_tests_out_cannot_ask_for_it(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    import dev

    with pytest.raises(SystemExit):
        dev.main(["test", "--fast", "--newest-frontend"])
    assert "--newest-frontend is about the browser tests" in capsys.readouterr().err
