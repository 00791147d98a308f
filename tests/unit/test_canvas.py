"""tools/workshop/canvas.py finds the browser that is there."""

import pytest

pytest.importorskip("playwright.sync_api")

import canvas


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without any browser; the folder may get one."""
    for name in ("KINDRED_BROWSER", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(canvas, "ELSEWHERE", ())
    monkeypatch.setattr(canvas.shutil, "which", lambda name: None)
    return tmp_path


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_chrome_of_one_windows_user_is_found(bare, monkeypatch):
    """Where Chrome's installer puts it without an administrator; asked for at the time of the call."""
    assert canvas.find_browser() is None
    monkeypatch.setenv("LOCALAPPDATA", str(bare))
    assert canvas.find_browser() is None
    chrome = put(bare / "Google" / "Chrome" / "Application" / "chrome.exe")
    assert canvas.find_browser() == chrome


def test_what_stands_on_the_path_or_was_named_comes_first(bare, monkeypatch):
    put(bare / "Google" / "Chrome" / "Application" / "chrome.exe")
    monkeypatch.setenv("LOCALAPPDATA", str(bare))
    chromium, other = put(bare / "bin" / "chromium"), put(bare / "other")
    monkeypatch.setattr(
        canvas.shutil, "which", lambda name: str(chromium) if name == "chromium" else None
    )
    assert canvas.find_browser() == chromium
    monkeypatch.setenv("KINDRED_BROWSER", str(other))
    assert canvas.find_browser() == other
    other.unlink()
    assert canvas.find_browser() is None
