"""A ComfyUI process with this pack, in a base directory of its own, from the standard library.

with HostServer(Path("ComfyUI"), models={"checkpoints": [Path("sd15.safetensors")]}) as server:
    outputs = server.client.run(api_json)
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from checkout import ROOT
from client import Client, HostError
from environment import clean_environment
from results import make_folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def link(source: Path, target: Path) -> None:
    """Make `source` appear at `target`: a symlink, on Windows without that right a junction, else a copy."""
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if not source.is_dir():
            shutil.copyfile(source, target)
            return
        try:
            import _winapi

            _winapi.CreateJunction(str(source), str(target))
        except (ImportError, OSError):
            shutil.copytree(
                source, target, ignore=shutil.ignore_patterns(".git", "__pycache__", "out")
            )


def has_gpu(python: Path) -> bool:
    """Whether torch of that Python sees a device; torch is only asked where a driver is."""
    if sys.platform == "linux" and not any(
        Path("/dev").glob(pattern) for pattern in ("nvidia[0-9]*", "kfd", "dxg")
    ):
        return False
    probe = "import torch; raise SystemExit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"
    return subprocess.run([str(python), "-c", probe], capture_output=True).returncode == 0


class HostServer:
    """A ComfyUI process with this pack, in a base directory of its own; always gone when the `with` block is left.

    host: ComfyUI's folder, default $KINDRED_HOST; python: what runs it; cpu: None asks torch for a device;
    models: model folder -> files to link into it; packs: folders of other custom nodes;
    base: keep this base directory instead of a temporary one;
    log: the host's output goes there (default: a file in the base directory; None: to the terminal).
    """

    def __init__(
        self,
        host: Path | None = None,
        *,
        python: Path | str = sys.executable,
        port: int | None = None,
        cpu: bool | None = None,
        models: Mapping[str, Iterable[Path]] | None = None,
        packs: Iterable[Path] = (),
        base: Path | None = None,
        log: Path | str | None = "",
        api_nodes: bool = False,
        threads: int | None = None,
        arguments: Iterable[str] = (),
        wait: float = 600,
    ) -> None:
        host = host or os.environ.get("KINDRED_HOST")
        if not host or not (Path(host) / "main.py").is_file():
            raise HostError(
                f"{host or 'no host given'}: not a ComfyUI folder; set KINDRED_HOST or run through dev.py."
            )
        self.host, self.python, self.port, self.cpu = (
            Path(host),
            Path(python),
            port or free_port(),
            cpu,
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.client, self.models, self.threads, self.wait = (
            Client(self.url),
            dict(models or {}),
            threads,
            wait,
        )
        self.api_nodes, self.arguments, self.given_base, self.given_log = (
            api_nodes,
            list(arguments),
            base,
            log,
        )
        self.packs = (ROOT, *packs)
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> HostServer:
        with contextlib.ExitStack() as stack:
            if self.given_base is None:
                self.base = Path(
                    stack.enter_context(
                        tempfile.TemporaryDirectory(prefix="kindred-", ignore_cleanup_errors=True)
                    )
                )
            else:
                self.base = make_folder(Path(self.given_base).expanduser().absolute())
            self._furnish()
            if (
                threading.current_thread() is threading.main_thread()
                and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            ):
                signal.signal(
                    signal.SIGTERM, lambda *_: sys.exit(143)
                )  # a plain SIGTERM would leave the host running
            output = None
            self.log = (
                self.base / "host.log"
                if self.given_log == ""
                else self.given_log and Path(self.given_log)
            )
            if self.log is not None:
                output = stack.enter_context(open(self.log, "w", encoding="utf-8"))
            self.process = subprocess.Popen(
                self.argv(),
                cwd=self.host,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env=self._environment(),
            )
            stack.callback(self._stop)
            self._wait_until_ready()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def argv(self) -> list[str]:
        if self.cpu is None:
            self.cpu = not has_gpu(self.python)
        argv = [
            str(self.python),
            str(self.host / "main.py"),
            "--base-directory",
            str(self.base),
            "--port",
            str(self.port),
            "--listen",
            "127.0.0.1",
            "--disable-auto-launch",
            "--use-pytorch-cross-attention",
            "--database-url",
            "sqlite:///:memory:",
            "--log-stdout",
        ]
        return (
            argv
            + ["--cpu"] * self.cpu
            + ["--disable-api-nodes"] * (not self.api_nodes)
            + self.arguments
        )

    def _furnish(self) -> None:
        """The folders a host expects, with the pack and the given models linked in."""
        folders = ["custom_nodes", "input", "output", "temp", "user", "models/checkpoints"]
        for name in folders + [f"models/{kind}" for kind in self.models]:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        nodes = self.base / "custom_nodes"
        links = [(pack, nodes / ("kindred" if pack == ROOT else pack.name)) for pack in self.packs]
        links += [
            (Path(file).resolve(), self.base / "models" / kind / Path(file).name)
            for kind, files in self.models.items()
            for file in files
        ]
        for source, target in links:
            if not target.exists():
                link(source, target)

    def _environment(self) -> dict[str, str]:
        settings = clean_environment()
        if self.threads is not None:
            settings |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        return settings | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}

    def tail(self, lines: int = 25) -> str:
        """The end of the host's log, for error messages."""
        return (
            "(see above)"
            if self.log is None
            else "\n".join(self.log.read_text("utf-8", errors="replace").splitlines()[-lines:])
        )

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self.wait
        while True:
            if self.process.poll() is not None:
                raise HostError(
                    f"ComfyUI ended with code {self.process.returncode} while it started:\n{self.tail()}"
                )
            with contextlib.suppress(HostError):
                self.client.request("/system_stats", timeout=5)
                break
            if time.monotonic() > end:
                raise HostError(f"ComfyUI was not ready after {self.wait:.0f} s:\n{self.tail()}")
            time.sleep(0.1)
        # the host's own optional nodes may fail; the pack may not
        if self.log is not None and re.search(
            r"\(IMPORT FAILED\): .*custom_nodes", self.log.read_text("utf-8", "replace")
        ):
            raise HostError(f"ComfyUI runs, but could not load the pack:\n{self.tail(60)}")

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
