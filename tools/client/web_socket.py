"""The reading half of a websocket (RFC 6455) from the standard library: enough to follow what a ComfyUI host tells its client."""

from __future__ import annotations

import base64
import json
import secrets
import socket
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any


class WebSocket:
    """Text frames come out as JSON, pings are answered, pictures are skipped. Opening raises OSError where there is no websocket.

    url: the host's http or https address, with the path of the websocket and its query; headers go with the greeting.
    """

    def __init__(self, url: str, timeout: float, headers: Mapping[str, str] | None = None) -> None:
        address, self.buffer, self.text = urllib.parse.urlsplit(url), b"", b""
        self.kind = 1  # the opcode that the frames at hand belong to
        secure = address.scheme == "https"
        self.socket = socket.create_connection(
            (address.hostname, address.port or (443 if secure else 80)), timeout
        )
        try:
            if secure:
                self.socket = ssl.create_default_context().wrap_socket(
                    self.socket, server_hostname=address.hostname
                )
            self._greet(address, headers or {})
        except BaseException:
            self.socket.close()
            raise

    def _greet(self, address: urllib.parse.SplitResult, headers: Mapping[str, str]) -> None:
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        lines = [
            f"GET {address.path}?{address.query} HTTP/1.1",
            f"Host: {address.netloc.rpartition('@')[2]}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
        ]
        self.socket.sendall(
            "\r\n".join(
                [*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
            ).encode()
        )
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
        first, payload = self.buffer[0], self.buffer[start : start + length]
        self.buffer = self.buffer[start + length :]
        return bool(first & 0x80), first & 0x0F, payload

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next JSON message, or None after `timeout` seconds of silence. OSError when the line is cut."""
        end = time.monotonic() + timeout
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
                self.kind, self.text = opcode, b""
            if opcode in (0, 1, 2):
                self.text += payload
                if last and self.kind == 1:
                    return json.loads(self.text)

    def close(self) -> None:
        self.socket.close()
