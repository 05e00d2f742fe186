"""Requests that end in time, whatever the server does.

The standard library's timeout is for one silence: a server that sends a byte now and then, in its headers or its body,
keeps a request alive for ever. Here each read of a connection gets at most what is left until the request's deadline.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
import urllib.request
from functools import partial
from typing import Any


class Request(urllib.request.Request):
    """A request that must be answered, redirects included, before time.monotonic() is `deadline`."""

    def __init__(self, url: str, deadline: float, **options: Any) -> None:
        super().__init__(url, **options)
        self.deadline = deadline


class HTTPHandler(urllib.request.HTTPHandler):
    """Opens http URLs of a `Request` with its deadline."""

    def http_open(self, req: Any) -> Any:
        """As the base class's."""
        return self.do_open(partial(_Connection, deadline=req.deadline), req)


class HTTPSHandler(urllib.request.HTTPSHandler):
    """Opens https URLs of a `Request` with its deadline."""

    def https_open(self, req: Any) -> Any:
        """As the base class's, with the system's certificates."""
        return self.do_open(partial(_SecureConnection, deadline=req.deadline), req)


class _Reader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline, self._silence = sock, deadline, sock.gettimeout()
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("too slow")
        self._sock.settimeout(left if self._silence is None else min(left, self._silence))
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Socket:
    """All that a response wants of a socket."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._sock, self._deadline))


class _Connection(http.client.HTTPConnection):
    def __init__(self, *args: Any, deadline: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.response_class = partial(_response, deadline)  # type: ignore[assignment]


class _SecureConnection(http.client.HTTPSConnection):
    def __init__(self, *args: Any, deadline: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.response_class = partial(_response, deadline)  # type: ignore[assignment]


def _response(deadline: float, sock: socket.socket, **options: Any) -> http.client.HTTPResponse:
    return http.client.HTTPResponse(_Socket(sock, deadline), **options)  # type: ignore[arg-type]
