"""Laws of every program of the repository: what it prints never ends it, and what it leaves is nobody else's."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from archive import ROOT, files
from fake_host import FakeHost

MAIN = 'if __name__ == "__main__":'
PROGRAMS = [name for name in files(".py") if not name.startswith("tests/") and MAIN in (ROOT / name).read_text("utf-8")]
LINE = 'sys.stdout.reconfigure(errors="backslashreplace")'
GRAPH = {"2": {"class_type": "Draw", "inputs": {"prompts": "x", "seed": 0, "steps": 1, "cfg": 4.0, "sampler": "ddim"},
               "_meta": {"title": "\u4e00\u53ea\u732b"}}}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_prints_any_text(name: str) -> None:
    assert LINE in (ROOT / name).read_text("utf-8").split(MAIN)[1]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_jobs_with_titles_that_the_terminal_cannot_show_are_all_done(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "w.json").write_text(json.dumps(GRAPH), "utf-8")
    (tmp_path / "lines.txt").write_text("\u4e00\n\u4e8c\n\u4e09\n", "utf-8")
    with FakeHost() as host:
        words = ["w.json", "--server", host.url, "--each", "\u4e00\u53ea\u732b.prompts=@lines.txt"]
        done = subprocess.run([sys.executable, str(ROOT / "tools" / "automate.py"), *words], cwd=tmp_path,
                              capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert done.returncode == 0 and b"3 of 3 jobs done" in done.stderr and b"Traceback" not in done.stderr, done.stderr


def outputs() -> set[str]:
    """The folders that programs write to unless told otherwise, and those of the commands in the pages."""
    found = {match for name in PROGRAMS for match in re.findall(r'"--out".*default=Path\("([^"]+)"\)', (ROOT / name).read_text("utf-8"))}
    for page in files(".md"):
        for block in re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S):
            found |= set(re.findall(r"--out (\w[\w./-]*)", block))
    return found


@pytest.mark.parametrize("folder", sorted(outputs()))
def test_what_a_command_leaves_is_ignored_by_git_and_so_by_the_archive(folder: str) -> None:
    done = subprocess.run(["git", "check-ignore", "-q", f"{folder}/picture.png"], cwd=ROOT)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.returncode == 0, f"{folder} is not ignored"


def test_the_commands_have_outputs() -> None:
    assert {"kindred-demo", "kindred-story", "kindred-evaluation", "pictures"} <= outputs()


@pytest.mark.skipif(os.name == "nt", reason="no ignored signals there")
@pytest.mark.parametrize("line", ["print(signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)"])
def test_tests_do_not_inherit_ignored_signals(line: str) -> None:
    """As a script's `dev.py test &`, nohup or some CI runners leave them."""
    program = f"import signal, sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest; {line}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert done.stdout.strip() == "True", done.stderr
