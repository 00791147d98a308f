"""dev.py and the environment it makes, without making one: pins, places, faults, sentences."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import environment
import pytest
from checkout import ROOT
from environment import (
    Refusal,
    existing,
    fault,
    inventory,
    only_one,
    pins_hash,
    unpack_host,
    why_pip_failed,
)


def entries() -> dict[str, list[str]]:
    """The lock's packages -> their hashes."""
    text = environment.LOCK.read_text("utf-8").replace("\\\n", " ")
    rows = [row.split("#")[0] for row in text.splitlines() if "==" in row.split("#")[0]]
    return {
        row.split("--hash")[0].strip(): re.findall(r"--hash=sha256:([0-9a-f]{64})", row)
        for row in rows
    }


def test_every_pinned_package_has_hashes_and_the_lock_holds_every_pin():
    locked = entries()
    assert len(locked) > 90 and all(locked.values())
    wanted = [
        line.split("#")[0].strip().lower()
        for line in (environment.PINS / "requirements.in").read_text("utf-8").splitlines()
    ]
    have = {name.split(";")[0].strip().lower() for name in locked}
    assert {name for name in wanted if name} <= have
    assert not re.search(r"index-url|find-links|https?:", environment.LOCK.read_text("utf-8")), (
        "the lock names no index"
    )
    assert re.fullmatch(
        r"[0-9a-f]{64}", json.loads(environment.HOST_PIN.read_text("utf-8"))["sha256"]
    )


def test_the_folder_is_named_by_everything_that_decides_it(tmp_path, monkeypatch):
    first = pins_hash((3, 11))
    assert re.fullmatch(r"[0-9a-f]{12}", first) and first == pins_hash((3, 11)) != pins_hash(
        (3, 12)
    )
    for name in ("LOCK", "HOST_PIN"):
        changed = tmp_path / name
        changed.write_bytes(getattr(environment, name).read_bytes() + b"#")
        with monkeypatch.context() as patch:
            patch.setattr(environment, name, changed)
            assert pins_hash((3, 11)) != first
        changed.write_bytes(getattr(environment, name).read_bytes().replace(b"\n", b"\r\n"))
        with monkeypatch.context() as patch:
            patch.setattr(environment, name, changed)
            assert pins_hash((3, 11)) == first, "a checkout with other line ends has the same pins"


@pytest.mark.parametrize(
    "system, variable, tail",
    [("linux", "XDG_CACHE_HOME", "kindred"), ("win32", "LOCALAPPDATA", "kindred")],
)
def test_the_cache_lies_where_the_platform_says(system, variable, tail, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv(variable, str(tmp_path))
    assert environment.cache_folder() == tmp_path / tail
    monkeypatch.delenv(variable)
    assert environment.cache_folder().is_relative_to(Path.home())


@pytest.fixture
def home(tmp_path) -> Path:
    """A finished environment of two small files."""
    place = tmp_path / "abc"
    (place / "host").mkdir(parents=True)
    (place / "host" / "main.py").write_text("print()")
    (place / "host" / "comfy.py").write_text("x = 1")
    (place / "ready.json").write_text(json.dumps({"files": inventory(place)}))
    return place


def test_a_whole_environment_has_no_fault_even_after_byte_code_came(home):
    (home / "host" / "__pycache__").mkdir()
    (home / "host" / "__pycache__" / "main.pyc").write_text("x")
    assert fault(home) is None


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda home: (home / "ready.json").unlink(), "never finished"),
        (lambda home: (home / "ready.json").write_text('{"files": '), "cannot be read"),
        (lambda home: (home / "ready.json").write_text("[]"), "cannot be read"),
        (lambda home: (home / "host" / "main.py").unlink(), "main.py is missing"),
        (
            lambda home: (home / "host" / "comfy.py").write_text(""),
            "comfy.py has 0 bytes instead of 5",
        ),
    ],
)
def test_a_broken_environment_is_seen(home, damage, told):
    damage(home)
    assert told in fault(home)


def archive(path: Path, names: list[str], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"ab"))
        if link:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(member)
    return path


def test_only_the_hosts_plain_files_are_unpacked(tmp_path):
    names = ["p-1/setup.py", "p-1/vendor/ComfyUI/main.py", "p-1/vendor/ComfyUI/comfy/a.py"]
    count = unpack_host(
        archive(tmp_path / "a.tar.gz", names, "p-1/vendor/ComfyUI/escape"),
        "vendor/ComfyUI",
        tmp_path / "out",
    )
    assert count == 2 and sorted(inventory(tmp_path / "out")) == [
        str(Path("comfy/a.py")),
        "main.py",
    ]
    assert not (tmp_path / "out" / "escape").is_symlink()


@pytest.mark.parametrize(
    "name", ["p-1/vendor/ComfyUI/../../../x.py", "/x.py", "p-1/vendor/ComfyUI/..\\x.py", "c:/x.py"]
)
def test_an_archive_that_would_leave_its_folder_is_refused(tmp_path, name):
    with pytest.raises(Refusal, match="leave its folder"):
        unpack_host(archive(tmp_path / "a.tar.gz", [name]), "vendor/ComfyUI", tmp_path / "out")


def test_two_setups_do_not_meet(tmp_path):
    """While the lock is held another process waits; when the holder is gone it gets through."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools' / 'workshop')!r})\n"
        "from pathlib import Path; from environment import only_one\n"
        f"with only_one(Path({str(tmp_path / 'l')!r})): print('in', flush=True)"
    )
    with only_one(tmp_path / "l"):
        other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert "waiting" in other.stdout.readline()
        assert other.poll() is None
    assert other.communicate()[0].strip() == "in"


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'\nERROR: No matching distribution",
            "network",
        ),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
            "hash differs",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "disk is full",
        ),
        (
            "ERROR: No matching distribution found for x==1",
            "No matching distribution found for x==1",
        ),
        ("", "no reason given"),
    ],
)
def test_pips_log_becomes_one_sentence(text, sentence):
    assert sentence in why_pip_failed(text) and "\n" not in why_pip_failed(text)


def test_a_host_of_ones_own_is_looked_at_first(tmp_path):
    for host, python, told in (
        (tmp_path, None, "belong together"),
        (tmp_path, Path(sys.executable), "no main.py"),
        (None, Path(sys.executable), "belong together"),
    ):
        with pytest.raises(Refusal, match=told):
            existing(host, python)
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    assert existing(tmp_path, Path(sys.executable)).host == tmp_path
    with pytest.raises(Refusal, match="does not exist"):
        existing(tmp_path, tmp_path / "python")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["test", "--host", "nowhere", "--python", sys.executable], "not a ComfyUI folder"),
        (["serve", "--host", "nowhere"], "belong together"),
    ],
)
def test_trouble_is_one_sentence_and_code_2(arguments, told):
    answer = subprocess.run(
        [sys.executable, str(ROOT / "dev.py"), *arguments], capture_output=True, text=True
    )
    assert answer.returncode == 2 and told in answer.stderr and "Traceback" not in answer.stderr


def test_the_front_door_needs_only_the_standard_library():
    """-S leaves out site-packages: --help must still come."""
    answer = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "dev.py"), "--help"], capture_output=True, text=True
    )
    assert answer.returncode == 0
    assert all(
        word in answer.stdout
        for word in ("setup", "demo", "test", "serve", "evaluate", "bench", "soak")
    )


# a program as dev.py starts it, in an interpreter without packages
BARE = (
    "import runpy, sys, pathlib; sys.argv = sys.argv[1:]; "
    "sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent)); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.mark.parametrize(
    "command, option",
    [
        ("demo", "--checkpoint"),
        ("demo --story", "--more"),
        ("evaluate", "--references"),
        ("bench", "--rounds"),
        ("soak", "--prompts"),
        ("workflows", "--shots"),
        ("serve", "--port"),
        ("test", "--fast"),
        ("test", "--long"),
        ("test", "--newest-frontend"),
        ("setup", "--again"),
    ],
)
def test_every_command_has_help_of_its_own_and_installs_nothing_for_it(command, option, tmp_path):
    """Without an environment: each tells its options and how to bring a ComfyUI."""
    answer = subprocess.run(
        [sys.executable, "-S", str(ROOT / "dev.py"), *command.split(), "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path)},
    )
    assert answer.returncode == 0, answer.stderr
    assert option in answer.stdout and "--python PATH" in answer.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", ["demo", "demo --story", "evaluate", "bench", "soak", "workflows"]
)
def test_the_help_of_a_program_needs_only_the_standard_library(command, monkeypatch):
    """It is asked for before anything is installed."""
    monkeypatch.syspath_prepend(ROOT)
    import dev

    name, *more = command.split()
    answer = subprocess.run(
        [sys.executable, "-I", "-S", "-c", BARE, str(dev.program(name)), *more, "--help"],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert f"usage: dev.py {command}" in answer.stdout


STRAYS = {
    "PYTHONPATH": "/nowhere",
    "PYTHONSAFEPATH": "1",
    "PYTHONOPTIMIZE": "1",
    "PYTHONINSPECT": "1",
    "PYTHONWARNINGS": "error",
    "PYTEST_ADDOPTS": "--no-such-option",
    "PYTEST_PLUGINS": "no_such_plugin",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "GIT_DIR": "/nowhere",
    "GIT_INDEX_FILE": "/nowhere",
}
WORDS = [
    "-c",
    "from sys import *; exit(flags.optimize + 2 * flags.inspect + 4 * bool(warnoptions) + 8 * ('/nowhere' in path))",
]


def test_nothing_in_the_environment_leads_a_child_astray(monkeypatch, tmp_path):
    """Asserts that are compiled away, a prompt after each program's end, options for every pytest, another repository."""
    monkeypatch.syspath_prepend(ROOT)
    import dev

    for name, value in STRAYS.items():
        monkeypatch.setenv(name, value)
    assert dev.run(SimpleNamespace(python=Path(sys.executable), host=tmp_path), WORDS) == 0
    kept = environment.clean_environment(ADDED="x")
    assert (
        not STRAYS.keys() & kept.keys()
        and kept["ADDED"] == "x"
        and kept["PATH"] == os.environ["PATH"]
    )


def test_the_tests_children_are_not_led_astray_either(tmp_path):
    """However pytest was started."""
    program = (
        f"import os, sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest\n"
        f"print([name for name in {[*STRAYS]} if name in os.environ])"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {**STRAYS, "PYTHONINSPECT": ""},
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip() == "[]", told.stderr


def test_a_server_is_followed_from_its_greeting_to_its_end(capfd, tmp_path, monkeypatch):
    """Not what it said while it started; all that it said afterwards, the last line too."""
    monkeypatch.syspath_prepend(ROOT)
    import dev

    log = tmp_path / "host.log"
    log.write_text("starts\n", "utf-8")
    waits = "import sys; sys.stdin.read(); "
    says = f"open({str(log)!r}, 'a').write('got prompt\\n'); raise SystemExit(3)"
    with subprocess.Popen([sys.executable, "-c", waits + says], stdin=subprocess.PIPE) as host:
        # it speaks once it is followed, and not before
        monkeypatch.setattr(dev.time, "sleep", lambda _: host.stdin.close())
        assert dev.follow(host, log) == 3
    assert capfd.readouterr().out == "got prompt\n"


def test_what_runs_beside_is_shown_when_all_have_ended(capfd, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import dev

    own = SimpleNamespace(python=Path(sys.executable), host=tmp_path)
    waits = (
        "import pathlib, time\nprint('first', flush=True)\n"
        f"while not pathlib.Path({str(tmp_path / 'over')!r}).exists(): time.sleep(.01)\n"
    )
    leaves = f"import pathlib, sys; print('second', flush=True); pathlib.Path({str(tmp_path / 'over')!r}).touch(); sys.exit(3)"
    ends = dev.together(own, [["-c", waits + "print('first ends')"], ["-c", leaves]])
    assert [code for code, _ in ends] == [0, 3]
    assert capfd.readouterr().out.split("\n")[:3] == ["first", "first ends", "second"]


def test_nothing_that_ran_beside_outlives_its_end(tmp_path):
    """A child that waits for long dies with whoever waits for it, and what it said is not lost."""
    wait = (
        f"import os, pathlib, time; print(os.getpid(), flush=True); "
        f"pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(600)"
    )
    program = (
        "import dev, sys\nfrom types import SimpleNamespace\nfrom pathlib import Path\nimport signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"dev.together(SimpleNamespace(python=Path(sys.executable), host=Path({str(tmp_path)!r})), [['-c', {wait!r}]] * 2)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        while (
            len(list(tmp_path.iterdir())) < 2 and parent.poll() is None
        ):  # both have said who they are
            time.sleep(0.01)
        parent.terminate()
        first, second = map(int, parent.stdout.read().split())
        assert parent.wait() == 143
    for pid in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
