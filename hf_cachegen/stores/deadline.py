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
from collections.abc import Callable
from functools import partial
from typing import Any


class Request(urllib.request.Request):
    """A request that must be answered, redirects included, before time.monotonic() is `deadline`."""

    def __init__(self, url: str, deadline: float, **options: Any) -> None:
        super().__init__(url, **options)
        self.deadline = deadline


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


class Connection(http.client.HTTPConnection):
    """Its responses are read until their deadline, which `send_until` sets for each request."""

    def send_until(self, deadline: float, silence: float | None) -> None:
        """The next request is to be answered before `deadline`, without a silence of more seconds than `silence`."""
        self.response_class = partial(_response, deadline)  # type: ignore[assignment]
        self.timeout = silence
        if self.sock is not None:
            self.sock.settimeout(silence)  # readers of earlier responses have shortened it


class SecureConnection(http.client.HTTPSConnection, Connection):
    """The same with the system's certificates."""


class Response(http.client.HTTPResponse):
    """closed_with: called once when it is closed, with whether its body was read to the last byte."""

    closed_with: Callable[[bool], None] | None = None
    _taken = 0

    def read1(self, n: int = -1) -> bytes:
        """As the base class's, which before Python 3.13 does not count."""
        data = super().read1(n)
        self._taken += len(data)
        return data

    def close(self) -> None:
        """Closes the response; what becomes of its connection is up to `closed_with`."""
        super().close()
        told, self.closed_with = self.closed_with, None
        if told is not None:
            told(not self.chunked and (self.length == 0 or self.headers.get("Content-Length") == str(self._taken)))


def _response(deadline: float, sock: socket.socket, **options: Any) -> Response:
    return Response(_Socket(sock, deadline), **options)  # type: ignore[arg-type]
