"""A host that only pretends: ComfyUI's API with prompts that are done at once, and with the faults a test asks for. Tests import it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

SEED = ["INT", {"min": 0, "max": 2**64 - 1, "control_after_generate": True}]
INFO = {
    "Load": {"input": {"required": {"image": [["a.png"], {"image_upload": True}]}}},
    "KindredLoadReference": {
        "input": {"required": {"file": ["COMBO", {"options": ["old.safetensors"]}]}}
    },
    "Draw": {
        "input": {
            "required": {
                "prompts": ["STRING", {"multiline": True}],
                "seed": SEED,
                "steps": ["INT", {"min": 1, "max": 100}],
                "cfg": ["FLOAT", {"min": 0.0, "max": 30.0}],
                "sampler": [["euler", "ddim"]],
                "model": ["MODEL"],
            },
            "optional": {
                "tile": ["BOOLEAN", {}],
                "size": ["INT,FLOAT", {"max": 9}],
                "images": ["COMFY_AUTOGROW_V3", {}],
                "mode": ["COMFY_DYNAMICCOMBO_V3", {"options": [{"key": "whole"}, {"key": "part"}]}],
            },
        }
    },
    "Method": {"input": {"required": {"seed": ["INT", {"control_after_generate": False}]}}},
    "KindredSaveReference": {"input": {"required": {}}},
}


class FakeHost:
    """`with FakeHost() as host`: host.url. Faults are counts of how often they still happen.

    With away=True the port is taken, so that nobody else gets it, and every call is refused until `begin`.
    """

    def __init__(self, away: bool = False) -> None:
        self.posts: list[str] = []  # prompt ids, as they were put into the queue
        self.graphs: list[dict] = []
        self.states: dict[str, str] = {}
        self.uploads: dict[str, bytes] = {}
        self.cancelled: list[str] = []
        self.wires: list = []
        self.wrong: list[str] = []  # what no client may do
        self.outputs = {"2": {"images": [{"filename": "p.png", "subfolder": "", "type": "output"}]}}
        self.hold = False  # prompts go on running
        self.mistakes: dict = {}  # of nodes, which it finds before the work
        self.lose_post = self.lose_answer = self.bad_gateway = self.refuse = self.forget = (
            self.deaf
        ) = self.cut = self.limit = 0
        self.no_websocket = False
        self.lists_uploads = False  # as references, before it answers that it has them
        self.sent: list[str] = []
        self.away = away
        self.changed = threading.Condition()  # told of every prompt that is queued

    def __enter__(self) -> FakeHost:
        host = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                host.get(self)

            def do_POST(self):
                host.post(self, self.rfile.read(int(self.headers["Content-Length"])))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # lines are cut all the time here
        self.server.server_bind()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        if not self.away:
            self.begin()
        return self

    def begin(self) -> None:
        """Answer calls."""
        self.away = False
        self.server.server_activate()
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_) -> None:
        if not self.away:
            self.server.shutdown()
        self.server.server_close()
        self.cut_wires()
        assert not self.wrong, self.wrong

    def spend(self, fault: str) -> bool:
        left = getattr(self, fault)
        setattr(self, fault, max(0, left - 1))
        return left > 0

    def answer(self, handler, told, code: int = 200) -> None:
        data = told if isinstance(told, bytes) else json.dumps(told).encode()
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def hang_up(self, handler) -> None:
        handler.close_connection = True
        handler.connection.shutdown(2)

    def get(self, handler) -> None:
        address = urlsplit(handler.path)
        words = address.path.strip("/").split("/")
        if words[0] == "ws":
            return self.websocket(handler)
        if words[0] == "object_info":
            info = INFO
            if self.lists_uploads:
                files = ["COMBO", {"options": ["old.safetensors", *self.sent]}]
                info = INFO | {"KindredLoadReference": {"input": {"required": {"file": files}}}}
            return self.answer(handler, info if len(words) == 1 else {words[1]: info[words[1]]})
        if words[0] == "view":
            return self.answer(handler, ("file " + parse_qs(address.query)["filename"][0]).encode())
        if words[0] == "history":
            done = self.states.get(words[1]) in ("completed", "cancelled")
            return self.answer(
                handler,
                {words[1]: {"outputs": self.outputs, "status": {"messages": []}}} if done else {},
            )
        if self.cut and self.states.get(words[2]):
            self.cut -= 1
            self.cut_wires()
            return self.answer(handler, {"status": "in_progress"})
        if self.forget and self.states.get(
            words[2]
        ):  # a restart: nothing is known any more, and every line is cut
            self.forget -= 1
            self.states.clear()
            self.cut_wires()
        state = self.states.get(words[2])
        return self.answer(
            handler,
            {"status": state} if state else {"error": "Job not found"},
            200 if state else 404,
        )

    def post(self, handler, body: bytes) -> None:
        words = handler.path.strip("/").split("/")
        if words[0] == "upload":
            if self.limit and len(body) > self.limit:
                return self.answer(handler, b"too large", 413)
            name = body.split(b'name="image"; filename="')[1].split(b'"')[0].decode()
            self.sent.append(name)
            self.uploads[name] = body.split(b"\r\n\r\n")[-1].rpartition(b"\r\n--")[0]
            return self.answer(handler, {"name": name, "subfolder": "", "type": "input"})
        if words[0] == "prompt":
            if self.spend("bad_gateway"):
                return self.answer(handler, b"", 502)
            if self.spend("lose_post"):
                return self.hang_up(handler)
            if self.spend("refuse"):
                return self.answer(
                    handler,
                    {
                        "error": {"message": "no such checkpoint", "details": ""},
                        "node_errors": self.mistakes,
                    },
                    400,
                )
            told = json.loads(body)
            self.wrong += [f"{told['prompt_id']} was queued twice"] * (
                told["prompt_id"] in self.states
            )
            self.states[told["prompt_id"]] = "in_progress" if self.hold else "completed"
            self.posts.append(told["prompt_id"])
            self.graphs.append(told["prompt"])
            with self.changed:
                self.changed.notify_all()
            if self.spend("lose_answer"):
                return self.hang_up(handler)
            answer = {"prompt_id": told["prompt_id"], "node_errors": self.mistakes}
            return self.answer(handler, answer)
        if words[-1] == "cancel":
            self.cancelled.append(words[2])
            if not self.spend("deaf") and self.states.get(words[2]) == "in_progress":
                self.states[words[2]] = "cancelled"
            return self.answer(handler, {"cancelled": True})
        self.wrong.append(f"nobody should ask for {handler.path}")

    def websocket(self, handler) -> None:
        if self.no_websocket:
            return self.answer(handler, b"", 404)
        key = (
            handler.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        )  # RFC 6455, 1.3
        handler.send_response_only(101)
        handler.send_header(
            "Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        )
        self.wires.append(handler)  # before the client knows: cut from now on
        handler.end_headers()
        told: set[str] = set()
        while handler in self.wires:
            for prompt_id, state in [*self.states.items()]:
                if state == "completed" and prompt_id not in told:
                    told.add(prompt_id)
                    data = {"type": "execution_success", "data": {"prompt_id": prompt_id}}
                    text = json.dumps(data).encode()
                    handler.wfile.write(bytes([0x81, 126]) + struct.pack(">H", len(text)) + text)
            time.sleep(0.005)

    def cut_wires(self) -> None:
        """Cut when this returns: whoever is answered afterwards finds the line dead."""
        while self.wires:
            with contextlib.suppress(OSError):  # its client was faster
                self.hang_up(self.wires.pop())
