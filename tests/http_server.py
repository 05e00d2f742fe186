"""A small HTTP server on loopback that serves byte ranges, with faults that a test sets.

A fault is a function (request, body, headers) that answers a request by itself; `server.faults` holds the next ones:
each request for a file takes the first, None lets a request pass.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit


class Request(BaseHTTPRequestHandler):
    """One connection: GET with or without a range."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.requests.append((path, self.headers))
        fault = self.server.take_fault()
        data = self.server.files.get(path)
        if data is None:
            self.answer(404, b"no such file")
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"', "Accept-Ranges": "bytes"}
        status, body = self.ranged(data, headers)
        if fault is None:
            self.answer(status, body, headers)
        else:
            fault(self, body, headers)

    def ranged(self, data: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None:
            return 200, data
        first, last = int(match[1]), min(int(match[2]), len(data) - 1)
        if first >= len(data):
            headers["Content-Range"] = f"bytes */{len(data)}"
            return 416, b""
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, data[first : last + 1]

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


Fault = Callable[[Request, bytes, "dict[str, str]"], None]


class Server(ThreadingHTTPServer):
    """files: path without the first slash -> bytes. requests: (path, headers) of all GETs so far."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type[BaseHTTPRequestHandler] = Request) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[Fault | None] = []
        self.always: Fault | None = None
        self.requests: list[tuple[str, Any]] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def take_fault(self) -> Fault | None:
        with self._lock:
            return self.faults.pop(0) if self.faults else self.always

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error of a client that went away."""


@contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        with patch.dict(os.environ, {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}):
            yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def status(code: int, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request, body, good: request.answer(code, b"an error page", named)


def ignore_range(request: Request, body: bytes, headers: dict[str, str]) -> None:
    headers.pop("Content-Range")
    request.answer(200, request.server.files[request.path.lstrip("/")], headers)


def with_other_length(request: Request, body: bytes, headers: dict[str, str]) -> None:
    """Ignore the range and send another body, like an error page with status 200."""
    headers.pop("Content-Range")
    request.answer(200, request.server.files[request.path.lstrip("/")] + b"more", headers)


def whole_without_length(request: Request, body: bytes, headers: dict[str, str]) -> None:
    """Ignore the range; the end of the connection is the end of the file."""
    request.send_response(200)
    request.end_headers()
    request.wfile.write(request.server.files[request.path.lstrip("/")])
    request.close_connection = True


def whole_of_another(request: Request, body: bytes, headers: dict[str, str]) -> None:
    """Ignore the range, and send another file of the same length."""
    ignore_range(request, body, {**headers, "ETag": '"another"'})


def whole_cut(request: Request, body: bytes, headers: dict[str, str]) -> None:
    """Ignore the range, announce the whole file, send a part, and close."""
    whole = request.server.files[request.path.lstrip("/")]
    headers.pop("Content-Range")
    request.answer(200, whole[: len(whole) // 2], {**headers, "Content-Length": str(len(whole))})
    request.close_connection = True


def with_headers(**changes: str | None) -> Fault:
    """Send the right body under other headers; None leaves one out."""

    def fault(request: Request, body: bytes, headers: dict[str, str]) -> None:
        merged = {**headers, **{name.replace("_", "-"): value for name, value in changes.items()}}
        request.answer(206, body, {name: value for name, value in merged.items() if value is not None})

    return fault


def other_range(request: Request, body: bytes, headers: dict[str, str]) -> None:
    """Send the first bytes of the file for any range, with the matching headers."""
    total = headers["Content-Range"].rpartition("/")[2]
    request.answer(206, body, {**headers, "Content-Range": f"bytes 1-{len(body)}/{int(total) + 2}"})


def cut(fraction: float) -> Fault:
    """Announce all bytes, send a part, and close."""

    def fault(request: Request, body: bytes, headers: dict[str, str]) -> None:
        request.answer(206, body[: int(len(body) * fraction)], {**headers, "Content-Length": str(len(body))})
        request.close_connection = True

    return fault


def cut_without_length(request: Request, body: bytes, headers: dict[str, str]) -> None:
    """Act like an old server: without a length, the connection ends the body; here it ends too early."""
    request.send_response(206)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body[: len(body) // 2])
    request.close_connection = True


def reset_in_body(request: Request, body: bytes, headers: dict[str, str]) -> None:
    request.answer(206, body[: len(body) // 2], {**headers, "Content-Length": str(len(body))})
    request.reset()


def reset_at_once(request: Request, body: bytes, headers: dict[str, str]) -> None:
    request.reset()


def flip(request: Request, body: bytes, headers: dict[str, str]) -> None:
    request.answer(206, bytes([body[0] ^ 1]) + body[1:], headers)


def no_http(request: Request, body: bytes, headers: dict[str, str]) -> None:
    request.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    request.close_connection = True


def silent(seconds: float) -> Fault:
    return lambda request, body, headers: time.sleep(seconds)


def stall_in_body(seconds: float) -> Fault:
    def fault(request: Request, body: bytes, headers: dict[str, str]) -> None:
        request.answer(206, body[:1], {**headers, "Content-Length": str(len(body))})
        time.sleep(seconds)

    return fault


def trickle_headers(pause: float) -> Fault:
    """Send a header that never ends, a byte at a time."""

    def fault(request: Request, body: bytes, headers: dict[str, str]) -> None:
        request.wfile.write(b"HTTP/1.1 206 Partial Content\r\nX-Comment: ")
        for _ in range(200):
            request.wfile.write(b"a")
            time.sleep(pause)

    return fault


def trickle(pause: float) -> Fault:
    """Send a byte at a time, without a long silence."""

    def fault(request: Request, body: bytes, headers: dict[str, str]) -> None:
        request.answer(206, b"", {**headers, "Content-Length": str(len(body))})
        for index in range(len(body)):
            request.wfile.write(body[index : index + 1])
            time.sleep(pause)

    return fault
