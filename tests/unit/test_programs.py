"""Laws of every program of the repository: what it prints never ends it, and what it leaves is nobody else's."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import results
from archive import ROOT, files, git
from fake_host import FakeHost

MAIN = 'if __name__ == "__main__":'
PROGRAMS = [
    name
    for name in files(".py")
    if not name.startswith("tests/") and MAIN in (ROOT / name).read_text("utf-8")
]
GRAPH = {
    "2": {
        "class_type": "Draw",
        "inputs": {"prompts": "x", "seed": 0, "steps": 1, "cfg": 4.0, "sampler": "ddim"},
        "_meta": {"title": "\u4e00\u53ea\u732b"},
    }
}


def test_the_programs_are_found() -> None:
    assert {
        "dev.py",
        "tools/client/automate.py",
        "tools/workshop/archive.py",
        "miniature/train.py",
        "miniature/album.py",
    } <= set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_runs_as_the_laws_below_want_it(name: str) -> None:
    """The only thing that its last block runs."""
    assert re.findall(r"(?<!\w)\w*main\b.*", (ROOT / name).read_text("utf-8").split(MAIN)[1]) == [
        "main)"
    ]
    assert "run_program(main)" in (ROOT / name).read_text("utf-8").split(MAIN)[1]


def three_jobs(folder: Path, **more: object) -> subprocess.CompletedProcess[bytes]:
    """tools/client/automate.py with titles and lines in Chinese."""
    (folder / "w.json").write_text(json.dumps(GRAPH), "utf-8")
    (folder / "lines.txt").write_text("\u4e00\n\u4e8c\n\u4e09\n", "utf-8")
    with FakeHost() as host:
        words = ["w.json", "--server", host.url, "--each", "2.prompts=@lines.txt"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / "client" / "automate.py"), *words],
            cwd=folder,
            **more,
        )
    assert len(host.posts) == len(list((folder / "pictures").glob("*.png"))) == 3, done
    return done


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_jobs_with_titles_that_the_terminal_cannot_show_are_all_done(
    tmp_path: Path, encoding: str
) -> None:
    done = three_jobs(
        tmp_path,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert (
        done.returncode == 0
        and b"3 of 3 jobs done" in done.stderr
        and b"Traceback" not in done.stderr
    ), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_titles_that_no_file_can_have_here_are_left_out_of_the_names(tmp_path: Path) -> None:
    """A locale of one byte per letter: names of files are letters of it."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert three_jobs(tmp_path, capture_output=True, env=os.environ | plain).returncode == 0
    assert sorted(path.name for path in (tmp_path / "pictures").glob("*.png")) == [
        f"0000{i}_output_1.png" for i in (1, 2, 3)
    ]


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe whose reader has left, as after `| head -1`."""
    reads, writes = os.pipe()
    os.close(reads)
    yield writes
    os.close(writes)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_jobs_go_on_when_nobody_reads_what_is_said(
    tmp_path: Path, unread: int, unbuffered: str
) -> None:
    done = three_jobs(
        tmp_path,
        stdout=unread,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    assert (
        done.returncode == 0 and b"3 of 3 jobs done" in done.stderr and b"Error" not in done.stderr
    ), done.stderr
    (tmp_path / "again").mkdir()
    assert three_jobs(tmp_path / "again", stdout=unread, stderr=unread).returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="no descriptors to close there")
@pytest.mark.parametrize("closed", ["0<&-", ">&-", "2>&-", "0<&- >&- 2>&-"])
def test_jobs_go_on_without_standard_streams(tmp_path: Path, closed: str) -> None:
    """A file opened later must not become one of them."""
    shell = tmp_path / "python"
    shell.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@" {closed}\n', "utf-8")
    shell.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(shell))
        assert three_jobs(tmp_path).returncode == 0


def settled(lines: str, **more: object) -> subprocess.CompletedProcess[str]:
    """A program of these lines, begun as all of them are."""
    own = "".join(f"    {line}\n" for line in lines.splitlines())
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools' / 'client')!r}); import terminal\n"
        f"def main():\n{own}\nterminal.run_program(main)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, **more
    )


@pytest.mark.parametrize(
    "lines, code", [("pass", 0), ("return 3", 3), ("sys.exit(4)", 4), ("sys.exit('a sentence')", 1)]
)
def test_the_exit_code_is_the_works(unread: int, lines: str, code: int) -> None:
    done = settled(
        f"print('x' * 100_000)\nsys.stdout.buffer.write(b'bytes')\n{lines}", stdout=unread
    )
    assert done.returncode == code and done.stderr == ("a sentence\n" if code == 1 else "")


def test_children_write_where_the_program_does(tmp_path: Path, unread: int) -> None:
    """They are not ended by the reader that left; and while there is one, what both say comes in its order."""
    lines = (
        "import subprocess\nprint('first', flush=True)\n"
        "return subprocess.run([sys.executable, '-c', \"print('second', flush=True)\"]).returncode"
    )
    assert settled(lines, stdout=subprocess.PIPE).stdout.split() == ["first", "second"]
    done = settled(lines, stdout=unread)
    assert (done.returncode, done.stderr) == (0, "")


def test_tests_go_on_when_nobody_reads_their_report(tmp_path: Path, unread: int) -> None:
    """`dev.py test | head`: the exit code is still the tests'."""
    room = [
        "-m",
        "pytest",
        "tests/unit/test_archive.py",
        "-k",
        "taken_along",
        "-v",
        "-p",
        "no:cacheprovider",
        "--junitxml",
        tmp_path / "r",
    ]
    done = subprocess.run(
        [sys.executable, *room], cwd=ROOT, stdout=unread, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and 'tests="9"' in (tmp_path / "r").read_text(
        "utf-8"
    )
    read = subprocess.run(
        [sys.executable, *room],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    assert "9 passed" in read.stdout, "its last lines are read too"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("code, told", [(0, 120), (3, 3)])
def test_output_that_found_no_room_is_told_once(code: int, told: int, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        lines = f"for i in range(9): print(i, flush=True)\nreturn {code}"
        done = settled(lines, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == told and "Traceback" not in done.stderr
    assert (
        done.stderr.startswith("Not everything could be written to stdout: ")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.skipif(os.name == "nt", reason="no such pipes there")
def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    """As some parents hand them down; more than any pipe holds."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    heard: list[int] = []
    with os.fdopen(reads, "rb") as reader:
        thread = threading.Thread(target=lambda: heard.append(len(reader.read())))
        thread.start()
        done = settled("sys.stdout.write('x' * 5_000_000)", stdout=writes)
        os.close(writes)
        thread.join()
    assert (done.returncode, done.stderr, heard) == (0, "", [5_000_000])


def text_of(program: str) -> str:
    """A program with the files of the room that its options lie in, where it has one."""
    text = (ROOT / program).read_text("utf-8")
    for room in re.findall(r"^from (\w+)\.options import", text, re.M):
        text += "".join(
            f.read_text("utf-8")
            for f in sorted((ROOT / program).parent.joinpath(room).glob("*.py"))
        )
    return text


def outputs() -> set[str]:
    """The folders that programs write to unless told otherwise, and those of the commands in the pages."""
    found = {
        match
        for name in PROGRAMS
        for match in re.findall(
            r'(?:"--out",[^()]*default=|args\.out = )Path\("([^"]+)"\)', text_of(name)
        )
    }
    for page in files(".md"):
        for block in re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S):
            found |= set(re.findall(r"--out (\w[\w./-]*)", block))
    return found


@pytest.mark.parametrize("folder", sorted(outputs()))
def test_what_a_command_leaves_is_ignored_by_git_and_so_by_the_archive(folder: str) -> None:
    done = git("check-ignore", "-q", f"{folder}/picture.png")
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.returncode == 0, f"{folder} is not ignored"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The tools in a repository of their own, with a folder of pages."""
    place = tmp_path / "repository"
    for name in (*files(".py"), ".gitignore", ".comfyignore"):
        if name.startswith("tools/") or "/" not in name:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    (place / "docs").mkdir()
    (place / "docs" / "page.md").touch()
    if git("init", "-q", cwd=place).returncode:
        pytest.skip("no git")
    who = [
        "-c",
        "user.name=a tester",
        "-c",
        "user.email=tester@localhost",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "core.hooksPath=",
    ]
    for words in (["add", "-A"], [*who, "commit", "-q", "-m", "all"]):
        assert git(*words, cwd=place).returncode == 0
    return place


@pytest.mark.parametrize("out", ["docs/story", "docs/deep/er/story", "results", "docs/../one/more"])
def test_a_folder_that_a_program_makes_in_the_repository_is_none_of_its_files(
    tmp_path: Path, repository: Path, out: str
) -> None:
    (tmp_path / "w.json").write_text(json.dumps(GRAPH), "utf-8")
    with FakeHost() as host:
        words = [tmp_path / "w.json", "--server", host.url, "--out", out]
        for _ in range(2):
            subprocess.run(
                [sys.executable, "tools/client/automate.py", *words],
                cwd=repository,
                check=True,
                capture_output=True,
            )
    assert len(list((repository / out).glob("*.png"))) == 2
    assert git("status", "--porcelain", cwd=repository).stdout == ""
    listed = subprocess.run(
        [sys.executable, "tools/workshop/archive.py"],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert ".png" not in listed and "__init__.py" in listed


def test_only_folders_made_in_the_repository_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there is the user's, who may want the files in git; what lies elsewhere is none of ours."""
    monkeypatch.setattr(results, "ROOT", tmp_path / "repository")
    there = tmp_path / "repository" / "docs"
    there.mkdir(parents=True)
    results.make_folder(there)
    results.make_folder(tmp_path / "elsewhere" / "pictures")
    results.prepare(there, there / "figures.json", tmp_path / "further" / "figures.json")
    assert not list(tmp_path.rglob(".gitignore"))
    results.prepare(None, None, there / "more" / "deep" / "figures.json")
    assert [path.parent for path in tmp_path.rglob(".gitignore")] == [there / "more"]


@pytest.mark.parametrize(
    "out, figures, told",
    [
        ("taken", "f.json", "taken cannot be a folder"),
        ("taken/deep", "f.json", "taken.* cannot be a folder"),
        ("new", "taken/f.json", "taken cannot be a folder"),
        ("new", "folder", "folder is a folder"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_told_before_the_work(
    tmp_path: Path, out: str, figures: str, told: str
) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit, match=f"(?s){told}.*Give another"):
        results.prepare(tmp_path / out, tmp_path / figures)


def test_every_program_with_outputs_prepares_them() -> None:
    with_outputs = {}
    for name in PROGRAMS:
        text = text_of(name)
        options = re.findall(r'"(--(?:out|json|sheet|shots|base))",[^()]*=Path\b', text)
        if options:
            with_outputs[name] = options
            assert re.search(r"\b(prepare|make_folder|HostServer)\(", text), (name, options)
    assert {
        "tools/client/automate.py",
        "tools/workshop/bench.py",
        "tools/evidence/evaluate.py",
    } <= set(with_outputs)


def test_figures_at_the_top_are_nobodys() -> None:
    """`bench --json bench.json`, and then `test`."""
    done = git("check-ignore", "-q", "bench.json")
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.returncode == 0 and git("check-ignore", "-q", "workflows/new.json").returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="a Python of its own would be needed there")
def test_paths_are_those_of_the_folder_that_dev_py_is_called_in(tmp_path: Path) -> None:
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\npwd\n", "utf-8")
    python.chmod(0o700)
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "dev.py"),
            "demo",
            "--host",
            ".",
            "--python",
            str(python),
            "--out",
            "pictures",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert Path(done.stdout.strip()) == tmp_path.resolve(), done


def test_the_commands_have_outputs() -> None:
    assert {"kindred-demo", "kindred-story", "kindred-evaluation", "pictures"} <= outputs()
    assert {"kindred-demo-flow", "kindred-evaluation-flow"} <= outputs()


def deaf() -> None:
    """In a child before its program: signals ignored and blocked, as a script, nohup or some CI runners leave them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD))


SIGNALS = """
import signal, subprocess
numbers = signal.SIGINT, signal.SIGTERM, signal.SIGCHLD
print(*(signal.getsignal(number) is not signal.SIG_IGN for number in numbers), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
print(subprocess.run([sys.executable, "-c", "raise SystemExit(3)"]).returncode)
"""


@pytest.mark.skipif(os.name == "nt", reason="no ignored signals there")
def test_programs_and_tests_do_not_inherit_ignored_signals() -> None:
    told = settled(SIGNALS, stdout=subprocess.PIPE, preexec_fn=deaf)
    assert told.stdout == "True True True set()\n3\n", told.stderr
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest{SIGNALS}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=deaf
    )
    assert done.stdout == told.stdout, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no ignored signals there")
@pytest.mark.parametrize("command, code, said", [("test", 1, "lint FAILED (3)"), ("bench", 3, "")])
def test_a_parent_that_ignores_its_children_hides_no_failure(
    tmp_path: Path, command: str, code: int, said: str
) -> None:
    """waitpid has no answer there, and subprocess then tells 0."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || exit 3\n', "utf-8")
    python.chmod(0o700)
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "dev.py"),
            command,
            "--host",
            str(tmp_path),
            "--python",
            str(python),
        ],
        capture_output=True,
        text=True,
        preexec_fn=deaf,
    )
    assert done.returncode == code and said in done.stdout, done
