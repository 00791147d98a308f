"""ComfyUI's HTTP API from the standard library: start a host, queue a prompt, follow it, fetch its pictures.

with HostServer(Path("ComfyUI"), models={"checkpoints": [Path("sd15.safetensors")]}) as server:
    name = server.client.upload_image(Path("photo.png"))
    outputs = server.client.run(api_json, on_progress=print)
    png = server.client.view(outputs["9"]["images"][0])
"""
from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
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

ROOT = Path(__file__).resolve().parent.parent
Prompt = Mapping[str, Any]  # API JSON: node id -> {"class_type", "inputs"}


class HostError(RuntimeError):
    """The host did not start, went away, or answered with an error."""


class Interrupted(HostError):
    """The run was stopped by someone."""


@dataclass(eq=False)
class PromptRefused(HostError):
    """HTTP 400: nothing ran. `nodes` holds node id -> the sentences of that node."""
    summary: str
    nodes: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join([self.summary, *(f"node {key}: {' '.join(value)}" for key, value in self.nodes.items())])


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


class WebSocket:
    """The reading half of RFC 6455, enough for the host: text frames come out, pings are answered, pictures are skipped."""

    def __init__(self, host: str, port: int, path: str, timeout: float) -> None:
        self.socket, self.buffer, self.text = socket.create_connection((host, port), timeout), b"", b""
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        self.socket.sendall((f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n").encode())
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise ConnectionError(f"no websocket: {head[:80]!r}")

    def _more(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the host closed the websocket")
        self.buffer += data

    def _frame(self) -> tuple[bool, int, bytes] | None:
        """(last, opcode, payload) of the frame at the buffer's front, or None while it is incomplete."""
        if len(self.buffer) < 2:
            return None
        length, start = self.buffer[1] & 0x7F, 2
        if length > 125:
            start = 4 if length == 126 else 10
            if len(self.buffer) < start:
                return None
            length = int.from_bytes(self.buffer[2:start], "big")
        if len(self.buffer) < start + length:
            return None
        first, payload = self.buffer[0], self.buffer[start:start + length]
        self.buffer = self.buffer[start + length:]
        return bool(first & 0x80), first & 0x0F, payload

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next JSON message, or None after `timeout` seconds of silence. ConnectionError when the line is cut."""
        end = time.monotonic() + timeout
        kind = 1
        while True:
            frame = self._frame()
            if frame is None:
                left = end - time.monotonic()
                if left <= 0:
                    return None
                self.socket.settimeout(left)
                try:
                    self._more()
                except TimeoutError:
                    return None
                continue
            last, opcode, payload = frame
            if opcode == 8:
                raise ConnectionError("the host closed the websocket")
            if opcode == 9:  # ping; a client's frames are masked, here with zeros
                self.socket.sendall(bytes([0x8A, 0x80 | len(payload)]) + bytes(4) + payload)
            if opcode in (1, 2):
                kind, self.text = opcode, b""
            if opcode in (0, 1, 2):
                self.text += payload
                if last and kind == 1:
                    return json.loads(self.text)

    def close(self) -> None:
        self.socket.close()


class Client:
    """One user of a running host at `url`, for instance http://127.0.0.1:8188."""

    def __init__(self, url: str) -> None:
        self.url, self.id = url.rstrip("/"), uuid.uuid4().hex

    def request(self, path: str, body: bytes | None = None, kind: str = "application/json", timeout: float = 60) -> bytes:
        """GET, or POST when there is a body. HostError names the address; a refused prompt is PromptRefused."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind} if body is not None else {})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            if path == "/prompt" and error.code == 400:
                raise refusal(text) from None
            raise HostError(f"{self.url}{path} answered {error.code}: {text[:500]}") from None
        except OSError as error:
            raise HostError(f"{self.url} does not answer: {error}") from None

    def json(self, path: str, body: Any = None) -> Any:
        answer = self.request(path, None if body is None else json.dumps(body).encode())
        return json.loads(answer) if answer else None

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        return self.json("/object_info" + (f"/{node}" if node else ""))

    def upload_image(self, image: Path | bytes, name: str | None = None) -> str:
        """Put a picture into the host's input folder. Returns the name that LoadImage takes."""
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        name = (name or (f"{uuid.uuid4().hex}.png" if isinstance(image, bytes) else Path(image).name)).replace('"', "_")
        border = uuid.uuid4().hex
        head = f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
        tail = f'\r\n--{border}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{border}--\r\n'.encode()
        answer = json.loads(self.request("/upload/image", head + data + tail, f"multipart/form-data; boundary={border}"))
        return "/".join(filter(None, (answer["subfolder"], answer["name"])))

    def view(self, picture: Mapping[str, str]) -> bytes:
        """The file behind one entry of an output's `images`."""
        keys = {key: picture[key] for key in ("filename", "subfolder", "type") if key in picture}
        return self.request("/view?" + urllib.parse.urlencode(keys))

    def queue(self, prompt: Prompt) -> str:
        """Hand a prompt over; returns its id. PromptRefused when the host finds it invalid."""
        return self.json("/prompt", {"prompt": prompt, "client_id": self.id})["prompt_id"]

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What the host keeps of a finished prompt, or None while it waits or runs."""
        return self.json(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self) -> None:
        self.request("/interrupt", b"{}")

    def free(self) -> None:
        """Let the host forget its models and cached results."""
        self.json("/free", {"unload_models": True, "free_memory": True})

    def run(self, prompt: Prompt, on_progress: Callable[[Progress], None] | None = None, timeout: float = 900) -> dict[str, Any]:
        """Queue, follow to the end and return node id -> outputs. NodeFailed, PromptRefused, Interrupted, HostError."""
        with contextlib.ExitStack() as stack:
            try:  # listen before queueing, or the first messages are lost
                address = urllib.parse.urlsplit(self.url)
                line = WebSocket(address.hostname, address.port or 80, f"/ws?clientId={self.id}", timeout=10)
                stack.callback(line.close)
            except OSError:
                line = None
            prompt_id = self.queue(prompt)
            for message in self._messages(line, prompt_id, timeout):
                kind, data = message["type"], message.get("data", {})
                if data.get("prompt_id") != prompt_id or on_progress is None:
                    continue
                if kind == "progress":
                    on_progress(Progress(str(data["node"]), int(data["value"]), int(data["max"])))
                elif kind == "executing" and data.get("node") is not None:
                    on_progress(Progress(str(data["node"]), 0, 0))
        return self._outcome(self.history(prompt_id))

    def _messages(self, line: WebSocket | None, prompt_id: str, timeout: float) -> Iterator[dict[str, Any]]:
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
            final = message is not None and message["type"] in ("execution_success", "execution_error", "execution_interrupted")
            for _ in range(20 if final else 1 if message is None else 0):
                if self.history(prompt_id) is not None:
                    if line is not None and not final:  # it ended while we asked: its last messages are still on the line
                        with contextlib.suppress(OSError):
                            yield from iter(lambda: line.receive(0.1), None)
                    return
                time.sleep(0.05 if final else 0)
        self.interrupt()
        raise HostError(f"The prompt was not finished after {timeout:.0f} s; it was interrupted.")

    @staticmethod
    def _outcome(history: Mapping[str, Any] | None) -> dict[str, Any]:
        for kind, data in (history or {}).get("status", {}).get("messages", []):
            if kind == "execution_error":
                raise NodeFailed(str(data["node_id"]), data["node_type"], data["exception_type"].split(".")[-1],
                                 data["exception_message"].strip())
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
    summary = error if isinstance(error, str) else f"{error.get('message', '')} {error.get('details', '')}".strip()
    nodes = {key: [f"{item['message']}: {item['details']}".rstrip(": ") for item in value.get("errors", [])]
             for key, value in (body.get("node_errors") or {}).items()}
    return PromptRefused(summary, nodes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
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
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", "__pycache__", "out"))


def has_gpu(python: Path) -> bool:
    """Whether torch of that Python sees a device; torch is only asked where a driver is."""
    if sys.platform == "linux" and not any(Path("/dev").glob(pattern) for pattern in ("nvidia[0-9]*", "kfd", "dxg")):
        return False
    probe = "import torch; raise SystemExit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"
    return subprocess.run([str(python), "-c", probe], capture_output=True).returncode == 0


class HostServer:
    """A ComfyUI process with this pack, in a base directory of its own; always gone when the `with` block is left.

    host: ComfyUI's folder, default $KINDRED_HOST; python: what runs it; cpu: None asks torch for a device;
    models: model folder -> files to link into it; base: keep this base directory instead of a temporary one;
    log: the host's output goes there (default: a file in the base directory; None: to the terminal).
    """

    def __init__(self, host: Path | None = None, *, python: Path | str = sys.executable, port: int | None = None,
                 cpu: bool | None = None, models: Mapping[str, Iterable[Path]] | None = None, base: Path | None = None,
                 log: Path | str | None = "", api_nodes: bool = False, threads: int | None = None,
                 arguments: Iterable[str] = (), wait: float = 600) -> None:
        host = host or os.environ.get("KINDRED_HOST")
        if not host or not (Path(host) / "main.py").is_file():
            raise HostError(f"{host or 'no host given'}: not a ComfyUI folder; set KINDRED_HOST or run through dev.py.")
        self.host, self.python, self.port, self.cpu = Path(host), Path(python), port or free_port(), cpu
        self.url = f"http://127.0.0.1:{self.port}"
        self.client, self.models, self.threads, self.wait = Client(self.url), dict(models or {}), threads, wait
        self.api_nodes, self.arguments, self.given_base, self.given_log = api_nodes, list(arguments), base, log
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> HostServer:
        with contextlib.ExitStack() as stack:
            if self.given_base is None:
                self.base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kindred-", ignore_cleanup_errors=True)))
            else:
                self.base = Path(self.given_base).expanduser().absolute()
            self._furnish()
            if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a plain SIGTERM would leave the host running
            output = None
            self.log = self.base / "host.log" if self.given_log == "" else self.given_log and Path(self.given_log)
            if self.log is not None:
                output = stack.enter_context(open(self.log, "w", encoding="utf-8"))
            self.process = subprocess.Popen(self.argv(), cwd=self.host, stdin=subprocess.DEVNULL, stdout=output,
                                            stderr=subprocess.STDOUT if output else None, env=self._environment())
            stack.callback(self._stop)
            self._wait_until_ready()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def argv(self) -> list[str]:
        if self.cpu is None:
            self.cpu = not has_gpu(self.python)
        argv = [str(self.python), str(self.host / "main.py"), "--base-directory", str(self.base), "--port", str(self.port),
                "--listen", "127.0.0.1", "--disable-auto-launch", "--use-pytorch-cross-attention",
                "--database-url", "sqlite:///:memory:", "--log-stdout"]
        return argv + ["--cpu"] * self.cpu + ["--disable-api-nodes"] * (not self.api_nodes) + self.arguments

    def _furnish(self) -> None:
        """The folders a host expects, with the pack and the given models linked in."""
        folders = ["custom_nodes", "input", "output", "temp", "user", "models/checkpoints"]
        for name in folders + [f"models/{kind}" for kind in self.models]:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        links = [(ROOT, self.base / "custom_nodes" / "kindred")]
        links += [(Path(file).resolve(), self.base / "models" / kind / Path(file).name)
                  for kind, files in self.models.items() for file in files]
        for source, target in links:
            if not target.exists():
                link(source, target)

    def _environment(self) -> dict[str, str]:
        settings = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        if self.threads is not None:
            settings |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        return settings | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}

    def tail(self, lines: int = 25) -> str:
        """The end of the host's log, for error messages."""
        if self.log is None:
            return "(see above)"
        return "\n".join(self.log.read_text("utf-8", errors="replace").splitlines()[-lines:])

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self.wait
        while True:
            if self.process.poll() is not None:
                raise HostError(f"ComfyUI ended with code {self.process.returncode} while it started:\n{self.tail()}")
            with contextlib.suppress(HostError):
                self.client.request("/system_stats", timeout=5)
                break
            if time.monotonic() > end:
                raise HostError(f"ComfyUI was not ready after {self.wait:.0f} s:\n{self.tail()}")
            time.sleep(0.1)
        # the host's own optional nodes may fail; the pack may not
        if self.log is not None and re.search(r"\(IMPORT FAILED\): .*custom_nodes", self.log.read_text("utf-8", "replace")):
            raise HostError(f"ComfyUI runs, but could not load the pack:\n{self.tail(60)}")

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
