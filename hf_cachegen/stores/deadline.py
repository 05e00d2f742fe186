"""HTTP requests with a deadline.

The standard library's timeout bounds one silence: a server that sends a byte now and then, in its headers or its body,
keeps a request alive for ever. Here each read of a connection may take at most the time left until the deadline.
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
    """A request that must be answered, redirects included, before time.monotonic() reaches `deadline` (seconds)."""

    def __init__(self, url: str, deadline: float, **options: Any) -> None:
        super().__init__(url, **options)
        self.deadline = deadline


class _Reader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline, self._silence = sock, deadline, sock.gettimeout()
        self._raw = sock.makefile("rb", buffering=0)
        self._limit = self._silence

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("too slow")
        limit = left if self._silence is None else min(left, self._silence)
        if limit != self._limit:  # each change is a system call
            self._sock.settimeout(limit)
            self._limit = limit
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Socket:
    """The part of a socket that a response uses."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._sock, self._deadline))


class Connection(http.client.HTTPConnection):
    """A connection whose responses have a deadline, which `send_until` sets for each request."""

    def send_until(self, deadline: float, silence: float | None) -> None:
        """Bound the next request.

        Args:
            deadline: value of time.monotonic(), in seconds, by which it must be answered.
            silence: longest silence of the server in seconds, None for no bound.
        """
        self.response_class = partial(_response, deadline)  # type: ignore[assignment]
        self.timeout = silence
        if self.sock is not None:
            self.sock.settimeout(silence)  # readers of earlier responses have shortened it


class SecureConnection(http.client.HTTPSConnection, Connection):
    """A TLS connection with a deadline, checked with the system's certificates."""


class Response(http.client.HTTPResponse):
    """A response that reports, when it is closed, whether its body was read to the last byte: to `closed_with`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.closed_with: Callable[[bool], None] | None = None
        self._taken = 0

    def read1(self, n: int = -1) -> bytes:
        """Read at most `n` bytes with one read of the socket, and count them (Python 3.13 counts, earlier ones do not).
        """
        data = super().read1(n)
        self._taken += len(data)
        return data

    def read_into(self, buffer: memoryview) -> int:
        """Read into `buffer` with one read of the socket. Return the number of bytes; 0 at the end of the body."""
        length = 0 if self.fp is None or self.chunked else min(len(buffer), self.length or 0)
        if length <= io.DEFAULT_BUFFER_SIZE:  # less is read through the reader's buffer, and so may be too much
            data = self.read1(len(buffer))
            buffer[: len(data)] = data
            return len(data)
        count = self.fp.readinto1(buffer[:length])
        self.length = (self.length or 0) - count
        self._taken += count
        return count

    def close(self) -> None:
        """Close the response, and hand its connection to `closed_with`."""
        super().close()
        report, self.closed_with = self.closed_with, None
        if report is not None:
            report(not self.chunked and (self.length == 0 or self.headers.get("Content-Length") == str(self._taken)))


def _response(deadline: float, sock: socket.socket, **options: Any) -> Response:
    return Response(_Socket(sock, deadline), **options)
