"""ComfyUI's HTTP API from the standard library: start a host, queue a prompt, follow it, fetch its pictures.

with HostServer(Path("ComfyUI"), models={"checkpoints": [Path("sd15.safetensors")]}) as server:
    name = server.client.upload_image(Path("photo.png"))
    outputs = server.client.run(api_json, on_progress=print)
    png = server.client.view(outputs["9"]["images"][0])
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
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
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import clean_environment
from redirects import SameHost
from results import make_folder
from web_socket import WebSocket

ROOT = Path(__file__).resolve().parent.parent
Prompt = Mapping[str, Any]  # API JSON: node id -> {"class_type", "inputs"}


class HostError(RuntimeError):
    """The host did not start, went away, or answered with an error."""


class Unreachable(HostError):
    """Nothing answers there, or the line was cut: it may be worth another try."""


@dataclass(eq=False)
class Answered(HostError):
    """The host answered with an HTTP error."""

    url: str
    code: int
    text: str

    def __str__(self) -> str:
        return f"{self.url} answered {self.code}: {self.text}"


class Interrupted(HostError):
    """The run was stopped by someone."""


@dataclass(eq=False)
class PromptRefused(HostError):
    """HTTP 400: nothing ran. `nodes` holds node id -> the sentences of that node."""

    summary: str
    nodes: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join(
            [self.summary, *(f"node {key}: {' '.join(value)}" for key, value in self.nodes.items())]
        )


@dataclass(eq=False)
class NodeFailed(HostError):
    """A node raised while it ran; `sentence` is its own message."""

    node: str
    class_type: str
    kind: str  # the exception's name
    sentence: str

    def __str__(self) -> str:
        return f"{self.class_type} (node {self.node}): {self.sentence}"


@dataclass(frozen=True)
class Progress:
    """Node `node` has done `value` of `maximum` steps; maximum 0 says only that it started."""

    node: str
    value: int
    maximum: int


class Client:
    """One user of a running host at `url`, for instance http://127.0.0.1:8188; headers go with every request."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self.url, self.headers, self.id = url.rstrip("/"), dict(headers or {}), uuid.uuid4().hex

    def request(
        self,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        kind: str = "application/json",
        timeout: float = 60,
        length: int | None = None,
    ) -> bytes:
        """GET, or POST when there is a body; in pieces it needs its `length`.

        Raises Unreachable where nothing answers, Answered for an error, PromptRefused for a refused prompt.
        """
        headers = (
            self.headers
            | ({} if body is None else {"Content-Type": kind})
            | ({"Content-Length": str(length)} if length else {})
        )
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({}), SameHost).open(
                request, timeout=timeout
            ) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            if path == "/prompt" and error.code == 400:
                raise refusal(text) from None
            if 300 <= error.code < 400:
                raise HostError(
                    f"{self.url} sends on to {error.headers['Location']}, which is not followed; name that one."
                ) from None
            if error.code in (502, 503, 504):  # a proxy whose host is away
                raise Unreachable(
                    f"{self.url} answers {error.code}: nothing is behind it"
                ) from None
            raise Answered(self.url + path, error.code, text[:500]) from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(
                f"{self.url} does not answer: {getattr(error, 'reason', error) or type(error).__name__}"
            ) from None

    def json(self, path: str, body: Any = None) -> Any:
        answer = self.request(path, None if body is None else json.dumps(body).encode())
        try:
            return json.loads(answer) if answer else None
        except ValueError:
            raise HostError(
                f"{self.url}{path} answered with something that is not JSON; is it ComfyUI?"
            ) from None

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        return self.json("/object_info" + (f"/{node}" if node else ""))

    def websocket(self, timeout: float = 10) -> WebSocket:
        """The line on which the host tells how this client's prompts fare; OSError where there is none."""
        return WebSocket(f"{self.url}/ws?clientId={self.id}", timeout, self.headers)

    def upload(
        self,
        file: Path | bytes,
        name: str,
        *,
        folder: str = "input",
        subfolder: str = "",
        overwrite: bool = False,
    ) -> str:
        """Put a file of any kind into the host's input, output or temp folder. Returns its name below that folder.

        Unless `overwrite`, a name that is taken by other contents gets a number, and by the same contents is used as it is.
        """
        size, name = (
            len(file) if isinstance(file, bytes) else file.stat().st_size,
            re.sub(r'[\r\n"]', "_", name),
        )
        border = uuid.uuid4().hex
        fields = {
            "type": folder,
            "subfolder": subfolder,
            "overwrite": "true" if overwrite else "false",
        }
        head = "".join(
            f'--{border}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
            for key, value in fields.items()
        )
        head = f'{head}--{border}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
        tail = f"\r\n--{border}--\r\n".encode()

        def pieces() -> Iterator[bytes]:
            yield head
            with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as source:
                yield from iter(lambda: source.read(1 << 20), b"")
            yield tail

        answer = json.loads(
            self.request(
                "/upload/image",
                pieces(),
                f"multipart/form-data; boundary={border}",
                600,
                len(head) + size + len(tail),
            )
        )
        return "/".join(filter(None, (answer["subfolder"], answer["name"])))

    def upload_image(self, image: Path | bytes, name: str | None = None) -> str:
        """Put a picture into the host's input folder, over one of its name. Returns the name that LoadImage takes."""
        return self.upload(
            image,
            name or (f"{uuid.uuid4().hex}.png" if isinstance(image, bytes) else Path(image).name),
            overwrite=True,
        )

    def view(self, file: Mapping[str, str]) -> bytes:
        """The file behind one entry of an output's `images`, or any file {"filename", "subfolder", "type"} of output, input or temp."""
        keys = {key: file[key] for key in ("filename", "subfolder", "type") if key in file}
        return self.request("/view?" + urllib.parse.urlencode(keys))

    def queue(self, prompt: Prompt, prompt_id: str | None = None) -> str:
        """Hand a prompt over, under an id (a UUID) of the caller's if wanted; returns its id. PromptRefused when the host finds it invalid.

        The host does not look whether an id is taken: ask `state` before handing the same prompt over again.
        """
        named = {} if prompt_id is None else {"prompt_id": prompt_id}
        return self.json("/prompt", {"prompt": prompt, "client_id": self.id, **named})["prompt_id"]

    def state(self, prompt_id: str) -> str:
        """pending, in_progress, completed, failed or cancelled; unknown if the host never had it or forgot it."""
        try:
            return self.json(f"/api/jobs/{prompt_id}")["status"]
        except Answered as error:
            if error.code == 404:
                return "unknown"
            raise

    def cancel(self, prompt_id: str, wait: float = 30) -> str:
        """Interrupt or dequeue exactly this prompt, and wait until it is gone. Returns its state then."""
        end = time.monotonic() + wait
        while True:  # again and again: the host drops an interrupt that comes just before the prompt's first node
            self.request(f"/api/jobs/{prompt_id}/cancel", b"{}")
            state = self.state(prompt_id)
            if state not in ("pending", "in_progress") or time.monotonic() > end:
                return state
            time.sleep(0.2)

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What the host keeps of a finished prompt, or None while it waits or runs."""
        return self.json(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self) -> None:
        """Stop whatever runs, whoever asked for it; `cancel` stops one prompt."""
        self.request("/interrupt", b"{}")

    def free(self) -> None:
        """Let the host forget its models and cached results."""
        self.json("/free", {"unload_models": True, "free_memory": True})

    def run(
        self,
        prompt: Prompt,
        on_progress: Callable[[Progress], None] | None = None,
        timeout: float = 900,
    ) -> dict[str, Any]:
        """Queue, follow to the end and return node id -> outputs. NodeFailed, PromptRefused, Interrupted, HostError."""
        listener = Client(
            self.url, self.headers
        )  # an id of its own: the host forgets an id, newer lines too, whenever a line of it closes
        with contextlib.ExitStack() as stack:
            try:  # listen before queueing, or the first messages are lost
                line = listener.websocket()
                stack.callback(line.close)
            except OSError:
                line = None
            prompt_id = listener.queue(prompt)
            for message in self._messages(line, prompt_id, timeout):
                kind, data = message["type"], message.get("data", {})
                if data.get("prompt_id") != prompt_id or on_progress is None:
                    continue
                if kind == "progress":
                    on_progress(Progress(str(data["node"]), int(data["value"]), int(data["max"])))
                elif kind == "executing" and data.get("node") is not None:
                    on_progress(Progress(str(data["node"]), 0, 0))
        return outcome(self.history(prompt_id))

    def _messages(
        self, line: WebSocket | None, prompt_id: str, timeout: float
    ) -> Iterator[dict[str, Any]]:
        """The websocket's messages until the prompt is in the history; without a websocket, or in silence, it polls."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            message = None
            if line is None:
                time.sleep(0.2)
            else:
                try:
                    message = line.receive(2)
                except OSError:
                    line = None
            if message is not None:
                yield message
            # the final message comes just before the history is written
            final = message is not None and message["type"] in (
                "execution_success",
                "execution_error",
                "execution_interrupted",
            )
            for _ in range(20 if final else 1 if message is None else 0):
                if self.history(prompt_id) is not None:
                    if (
                        line is not None and not final
                    ):  # it ended while we asked: its last messages are still on the line
                        with contextlib.suppress(OSError):
                            yield from iter(lambda: line.receive(0.1), None)
                    return
                time.sleep(0.05 if final else 0)
        self.cancel(prompt_id)
        raise HostError(f"The prompt was not finished after {timeout:.0f} s; it was interrupted.")


def outcome(history: Mapping[str, Any] | None) -> dict[str, Any]:
    """Node id -> outputs, from what the host keeps of a finished prompt. NodeFailed, Interrupted."""
    for kind, data in ((history or {}).get("status") or {}).get("messages", []):
        if kind == "execution_error":
            raise NodeFailed(
                str(data["node_id"]),
                data["node_type"],
                data["exception_type"].split(".")[-1],
                data["exception_message"].strip(),
            )
        if kind == "execution_interrupted":
            raise Interrupted("The run was interrupted.")
    return (history or {}).get("outputs", {})


def refusal(text: str) -> PromptRefused:
    """The body of a 400 answer, as an exception with each node's sentences."""
    try:
        body = json.loads(text)
    except ValueError:
        return PromptRefused(text[:500])
    error = body.get("error", {})
    summary = (
        error
        if isinstance(error, str)
        else f"{error.get('message', '')} {error.get('details', '')}".strip()
    )
    nodes = {
        key: [
            f"{item['message']}: {item['details']}".rstrip(": ") for item in value.get("errors", [])
        ]
        for key, value in (body.get("node_errors") or {}).items()
    }
    return PromptRefused(summary, nodes)


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
    models: model folder -> files to link into it; base: keep this base directory instead of a temporary one;
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
        links = [(ROOT, self.base / "custom_nodes" / "kindred")]
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
