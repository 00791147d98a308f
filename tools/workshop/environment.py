"""Make Kindred's environment, once: a virtual environment and a real ComfyUI in the user's cache folder, hash-checked.

Standard library only: this runs before anything is installed. The pins are in tools/workshop/pins; the folder is named by their hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TextIO

from archive import ELSEWHERE

PINS = Path(__file__).resolve().parent / "pins"
LOCK, HOST_PIN = PINS / "requirements.txt", PINS / "host.json"
PYTHONS = ((3, 11), (3, 14))  # first and last version that every pin has files for
FREE_BYTES = 9_000_000_000  # 5.5 GB stay, pip may keep 2 GB of downloads in its own cache
UNREACHABLE = re.compile(
    r"Retrying \(Retry|NewConnectionError|ConnectTimeout|Failed to establish|getaddrinfo|Name or service"
)
STRAYS = (
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "PYTHONSAFEPATH",
    "PYTHONOPTIMIZE",
    "PYTHONINSPECT",
    "PYTHONWARNINGS",
    "PYTHONDEVMODE",
    "PYTHONVERBOSE",
    "PYTHONPROFILEIMPORTTIME",
    "__PYVENV_LAUNCHER__",
    "PIP_USER",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_REQUIRE_VIRTUALENV",
    "PIP_QUIET",
    "PIP_NO_BINARY",
    "PIP_ONLY_BINARY",
    "PIP_DRY_RUN",
    "PYTEST_ADDOPTS",
    "PYTEST_PLUGINS",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD",
    *ELSEWHERE,
)


class Refusal(Exception):
    """One sentence for the person at the keyboard; the program ends with code 2."""


@dataclass(frozen=True)
class Environment:
    python: Path  # the interpreter that runs the host, the tests and the tools
    host: Path  # ComfyUI's folder, the one that holds main.py


def cache_folder() -> Path:
    """The folder of this user's caches for Kindred, by the platform's own rule."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser().absolute() / "kindred"


def pins_hash(version: tuple[int, int]) -> str:
    """Twelve hex digits of everything that decides what is installed."""
    place = f"{sys.platform} {platform.machine()} {version}".encode()
    # line endings as in the repository, whatever the checkout made of them
    return hashlib.sha256(
        place + LOCK.read_bytes().replace(b"\r", b"") + HOST_PIN.read_bytes().replace(b"\r", b"")
    ).hexdigest()[:12]


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def find_python() -> tuple[str, tuple[int, int]]:
    """An interpreter that the pins fit and that can make virtual environments: this one, else one on PATH."""
    newest, oldest = PYTHONS[1], PYTHONS[0]
    names = [sys.executable] + [f"python3.{minor}" for minor in range(newest[1], oldest[1] - 1, -1)]
    probe = "import sys, venv, ensurepip, ssl; print(*sys.version_info[:2])"
    for name in names:
        path = shutil.which(name)
        if not path or (name == sys.executable and not oldest <= sys.version_info[:2] <= newest):
            continue
        answer = subprocess.run(
            [path, "-c", probe], capture_output=True, encoding="utf-8", errors="replace"
        )
        if answer.returncode == 0:
            major, minor = map(int, answer.stdout.split())
            if oldest <= (major, minor) <= newest:
                return path, (major, minor)
    raise Refusal(
        f"Kindred's environment needs Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]} with venv; this is "
        f"{platform.python_version()} ({sys.executable}). Install one (on Debian and Ubuntu also python3-venv), "
        "or name your own ComfyUI and its Python with --host and --python."
    )


def inventory(folder: Path) -> dict[str, int]:
    """Relative name -> bytes of every file under `folder`; byte code is left out, for it comes and goes."""
    sizes: dict[str, int] = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in files:
            path = os.path.join(place, name)
            with contextlib.suppress(OSError):  # a dangling link counts as missing
                sizes[os.path.relpath(path, folder)] = os.stat(path).st_size
    return sizes


def fault(home: Path) -> str | None:
    """Why the environment in `home` cannot be used, or None. A second, at most: names and sizes, no contents."""
    stamp = home / "ready.json"
    if not stamp.is_file():
        return "it was never finished"
    try:
        expected = json.loads(stamp.read_text("utf-8"))["files"]
    except (ValueError, KeyError, TypeError, OSError):
        return "its stamp cannot be read"
    present = inventory(home)
    for name, size in expected.items():
        if name not in present:
            return f"{name} is missing"
        if present[name] != size:
            return f"{name} has {present[name]} bytes instead of {size}"
    return None


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system drops it when the process dies, so a killed setup leaves none behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        said = False
        while True:
            try:
                if sys.platform == "win32":
                    import msvcrt

                    file.seek(0)
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not said:
                    print(
                        "Another setup is at work on this environment: waiting for it.", flush=True
                    )
                said = True
                time.sleep(0.5)
        try:
            yield
        finally:
            if sys.platform == "win32":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what would lead another interpreter, pip, pytest or git astray."""
    return {key: value for key, value in os.environ.items() if key not in STRAYS} | extra


class Progress:
    """One line that lives on a terminal; in a log, one line per large file and a sign of life every half minute."""

    def __init__(self, label: str) -> None:
        self.label, self.note, self.start, self.live = (
            label,
            "",
            time.monotonic(),
            sys.stdout.isatty(),
        )
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)

    def _tick(self) -> None:
        while not self.done.wait(0.5 if self.live else 30):
            self._show()

    def _show(self) -> None:
        text = f"  {self.label}: {self.note} ({time.monotonic() - self.start:.0f} s)"
        width = shutil.get_terminal_size().columns - 1
        print(
            "\r" + text[:width].ljust(width) if self.live else text,
            end="" if self.live else "\n",
            flush=True,
        )

    def say(self, note: str, loud: bool = False) -> None:
        self.note = note
        if loud and not self.live:
            self._show()

    def __enter__(self) -> Progress:
        self.say("starting", loud=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()
        self.note = "done" if error[0] is None else "failed"
        self._show()
        if self.live:
            print()


def pip(python: Path, arguments: list[str], log: Path, progress: Progress) -> None:
    """Run pip with its output in `log` and its course shown. Raises Refusal with the reason in one sentence."""
    quiet = ["--progress-bar", "off", "--no-input", "--disable-pip-version-check"]
    with (
        open(log, "a", encoding="utf-8") as file,
        subprocess.Popen(
            [str(python), "-m", "pip", *arguments, *quiet],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=clean_environment(PYTHONUNBUFFERED="1"),
        ) as process,
    ):
        try:
            show_course(process.stdout, file, progress)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        text = log.read_text("utf-8", errors="replace")
        raise Refusal(why_pip_failed(text) + f" All that pip said is in {log}.")


def show_course(lines: Iterable[str], log: TextIO, progress: Progress) -> None:
    """Keep what pip says in `log`, and tell of packages and megabytes."""
    collected = total = 0
    for line in lines:
        log.write(line)
        collected += line.startswith("Collecting ")
        if match := re.search(
            r"(?:Downloading|Using cached) (\S+?)-\d\S* \(([\d.]+) (kB|MB|GB)\)", line
        ):
            size = float(match[2]) * {"kB": 0.001, "MB": 1, "GB": 1000}[match[3]]
            total += size
            progress.say(
                f"{collected} packages, {total:.0f} MB so far, now {match[1].split('/')[-1]} {size:.0f} MB",
                loud=size > 100,
            )
        elif line.startswith("Installing collected"):
            progress.say(f"{total:.0f} MB are here, unpacking {collected} packages", loud=True)


def why_pip_failed(text: str) -> str:
    """pip's log -> the likely reason in one sentence, with the remedy."""
    errors = re.findall(r"^ERROR: (.+)$", text, re.M)
    if UNREACHABLE.search(text):
        return "The Python package index cannot be reached: check the network (or PIP_INDEX_URL, or the proxy) and run this again."
    if "HASHES" in text and "DO NOT MATCH" in text.upper():
        return "A downloaded file is not the pinned one (its hash differs), so it was refused; check the index you install from."
    if "No space left" in text:
        return f"The disk is full; {cache_folder()} and pip's cache need about {FREE_BYTES / 1e9:.0f} GB together."
    return f"pip could not install what is needed: {errors[-1] if errors else 'no reason given'}."


def unpack_host(archive: Path, folder: str, target: Path) -> int:
    """Write the files under `<top>/<folder>/` of a source archive into `target`; plain files only. Returns their number."""
    count = 0
    prefix = PurePosixPath(folder).parts
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if (
                ".." in parts
                or member.name.startswith("/")
                or "\\" in member.name
                or ":" in member.name
            ):
                raise Refusal(
                    f"{archive.name} holds a file that would leave its folder ({member.name}); it was not unpacked."
                )
            if member.isfile() and parts[1 : 1 + len(prefix)] == prefix:
                path = target.joinpath(*parts[1 + len(prefix) :])
                path.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(path, "wb") as sink:
                    shutil.copyfileobj(source, sink)
                count += 1
    if not (target / "main.py").is_file():
        raise Refusal(
            f"{archive.name} holds no {folder}/main.py: it is not the ComfyUI that Kindred pins."
        )
    return count


def try_out(python: Path, host: Path, log: Path) -> None:
    """Start ComfyUI once, with byte code written: pip left it out, for most of it (126 s of two cores) is never needed."""
    settings = clean_environment(OMP_NUM_THREADS="2")
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        (Path(base) / "custom_nodes").mkdir()
        boot = [
            str(host / "main.py"),
            "--cpu",
            "--quick-test-for-ci",
            "--disable-api-nodes",
            "--base-directory",
            base,
            "--database-url",
            "sqlite:///:memory:",
        ]
        tools = [
            "-c",
            "import pytest, hypothesis, skimage.metrics, accelerate, transformers.models.clip.modeling_clip",
        ]
        for arguments in (boot, tools):
            answer = subprocess.run(
                [str(python), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=settings,
            )
            with open(log, "a", encoding="utf-8") as file:
                file.write(answer.stdout)
            if answer.returncode:
                last = (answer.stdout.strip().splitlines() or ["no reason given"])[-1]
                raise Refusal(f"The new environment does not work: {last} (more in {log}).")


def make(home: Path, interpreter: str) -> None:
    """Build the environment in `home` from nothing; ready.json is written last, so a half-made one is never used."""
    pin = json.loads(HOST_PIN.read_text("utf-8"))
    free = shutil.disk_usage(home.parent).free
    if free < FREE_BYTES:
        raise Refusal(
            f"{home.parent} has {free / 1e9:.1f} GB free, and the environment needs {FREE_BYTES / 1e9:.0f} GB. "
            "Make room, or set XDG_CACHE_HOME (Linux) or LOCALAPPDATA (Windows) to a larger disk."
        )
    if home.exists():
        (home / "ready.json").unlink(missing_ok=True)
        shutil.rmtree(home)
    home.mkdir()
    venv, log = home / "venv", home / "setup.log"
    print(
        f"Making Kindred's environment in {home} (once: about 2.7 GB to fetch, 6 GB on disk).",
        flush=True,
    )
    with Progress("1/4 virtual environment"):
        make_venv(interpreter, venv)
    python = venv_python(venv)
    install = ["install", "--require-hashes", "--no-deps", "--no-compile", "-r", str(LOCK)]
    with Progress("2/4 packages") as progress:
        pip(python, install, log, progress)
    with Progress(f"3/4 ComfyUI {pin['comfyui']}") as progress:
        fetch_host(python, pin, home, log, progress)
    with Progress("4/4 check") as progress:
        progress.say("ComfyUI starts", loud=True)
        try_out(python, home / "host", log)
        stamp = home / "ready.json.part"
        files = {name: size for name, size in inventory(home).items() if name != log.name}
        stamp.write_text(json.dumps({"comfyui": pin["comfyui"], "files": files}), "utf-8")
        os.replace(stamp, home / "ready.json")


def make_venv(interpreter: str, venv: Path) -> None:
    done = subprocess.run(
        [interpreter, "-m", "venv", str(venv)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=clean_environment(),
    )
    if done.returncode:
        raise Refusal(
            f"{interpreter} could not make a virtual environment: {(done.stderr or done.stdout).strip()[-300:]}"
        )


def fetch_host(
    python: Path, pin: Mapping[str, str], home: Path, log: Path, progress: Progress
) -> None:
    """The pinned ComfyUI into `home`/host. Raises Refusal where the file that came is another one."""
    with tempfile.TemporaryDirectory(dir=home) as folder:
        wanted = Path(folder) / "host.txt"
        wanted.write_text(
            f"{pin['name']}=={pin['version']} --hash=sha256:{pin['sha256']}\n", "utf-8"
        )
        # the installed, pinned setuptools reads the archive's metadata: no build packages are fetched unpinned
        how = ["--require-hashes", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        how += ["--ignore-requires-python"]
        pip(python, ["download", *how, "-d", folder, "-r", str(wanted)], log, progress)
        archive = next(Path(folder).glob("*.tar.gz"))
        if hashlib.sha256(archive.read_bytes()).hexdigest() != pin["sha256"]:
            raise Refusal(
                f"{archive.name} is not the pinned file (its hash differs), so it was refused."
            )
        progress.say(f"{unpack_host(archive, pin['folder'], home / 'host')} files", loud=True)


def setup(again: bool = False) -> Environment:
    """The environment of the pins: found in a second, or made, or made anew when something of it is missing."""
    interpreter, version = find_python()
    home = cache_folder() / pins_hash(version)
    try:
        with only_one(home.parent / f"{home.name}.lock"):
            reason = "asked for" if again else fault(home)
            if reason:
                if home.exists():
                    print(f"The environment in {home} is made anew: {reason}.", flush=True)
                start = time.monotonic()
                make(home, interpreter)
                print(f"Ready in {time.monotonic() - start:.0f} s.", flush=True)
                for old in sorted(
                    path
                    for path in home.parent.iterdir()
                    if re.fullmatch(r"[0-9a-f]{12}", path.name) and path.is_dir() and path != home
                ):
                    print(
                        f"{old} belongs to other pins; delete it if no other checkout of Kindred uses it.",
                        flush=True,
                    )
    except OSError as error:
        raise Refusal(
            f"{home} cannot be written: {error}. Set XDG_CACHE_HOME (Linux) or LOCALAPPDATA (Windows) to a folder "
            "of yours, or free some space."
        ) from error
    return Environment(venv_python(home / "venv"), home / "host")


def existing(host: Path | None, python: Path | None) -> Environment:
    """The person's own ComfyUI and Python, looked at before anything runs."""
    if host is None or python is None:
        raise Refusal(
            "--host and --python belong together: ComfyUI's folder, and the Python that runs it."
        )
    host, python = (
        host.expanduser().absolute(),
        Path(shutil.which(str(python)) or python).expanduser().absolute(),
    )
    if not (host / "main.py").is_file() or not (host / "comfy").is_dir():
        raise Refusal(f"--host {host} is not a ComfyUI folder: it holds no main.py and comfy/.")
    if not python.is_file():
        raise Refusal(f"--python {python} does not exist.")
    return Environment(python, host)
