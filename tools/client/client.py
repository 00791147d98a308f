"""ComfyUI's HTTP API from the standard library: queue a prompt, follow it, fetch its pictures.

client = Client("http://127.0.0.1:8188")
name = client.upload_image(Path("photo.png"))
outputs = client.run(api_json, on_progress=print)
png = client.view(outputs["9"]["images"][0])
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redirects import SameHost
from web_socket import WebSocket

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
    """The host finds a mistake before anything runs. `nodes` holds node id -> the sentences of that node."""

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
        name = re.sub(r'[\r\n"]', "_", name)
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        border = uuid.uuid4().hex
        fields = {
            "type": folder,
            "subfolder": subfolder,
            "overwrite": "true" if overwrite else "false",
        }
        head, tail = form_around_file(border, fields, name)

        def pieces() -> Iterator[bytes]:
            yield head
            with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as source:
                yield from iter(lambda: source.read(1 << 20), b"")
            yield tail

        length = len(head) + size + len(tail)
        kind = f"multipart/form-data; boundary={border}"
        answer = json.loads(self.request("/upload/image", pieces(), kind, 600, length))
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
        answer = self.json("/prompt", {"prompt": prompt, "client_id": self.id, **named})
        if answer.get("node_errors"):  # the host would run those outputs that no mistake reaches
            self.cancel(answer["prompt_id"])
            raise PromptRefused("A part cannot run", sentences(answer["node_errors"]))
        return answer["prompt_id"]

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


def form_around_file(border: str, fields: Mapping[str, str], name: str) -> tuple[bytes, bytes]:
    """A multipart form (RFC 7578) of fields and one file called `name`: what comes before its bytes and what after."""
    head = "".join(
        f'--{border}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in fields.items()
    )
    head += f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
    return head.encode(), f"\r\n--{border}--\r\n".encode()


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
    return PromptRefused(summary, sentences(body.get("node_errors") or {}))


def sentences(node_errors: Mapping[str, Any]) -> dict[str, list[str]]:
    """Node id -> its sentences, each once: of a node's own validation the host repeats one for every input."""
    return {
        key: list(dict.fromkeys(map(sentence, value.get("errors", []))))
        for key, value in node_errors.items()
    }


def sentence(error: Mapping[str, str]) -> str:
    """One entry of the host's list in words; a node's own sentence without what stands before it."""
    if error.get("type") == "custom_validation_failed" and " - " in error["details"]:
        return error["details"].partition(" - ")[2]
    return f"{error['message']}: {error['details']}".rstrip(": ")
