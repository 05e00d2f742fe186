"""A pool of HTTP connections: a second request to a host needs no handshake and no slow start.

The standard library's opener closes a connection with its response. Here a connection returns to the pool when the body
was read to its last byte, and is closed after an error or an unfinished body. A server may close an idle connection at
any time. So a connection on which anything arrives while it is idle is not used again, and a request whose pooled
connection breaks before the answer begins is sent again over a new one. After a fork the child makes new connections.
"""

from __future__ import annotations

import os
import select
import ssl
import threading
import urllib.request
import weakref
from functools import partial
from typing import Any

from hf_cachegen.stores.deadline import Connection, Request, Response, SecureConnection

MOST_IDLE = 16
"""Largest number of idle connections; one more closes the connection that has been idle for longest."""
_Key = tuple[type[Connection], str, str | None]
"""The class, the host and port (of the proxy, if there is one), and the host behind a proxy's tunnel."""


class Pool:
    """Idle connections, the oldest first; closed with the pool. Threads may share it."""

    def __init__(self) -> None:
        self._idle: list[tuple[_Key, Connection]] = []
        self._lock = threading.Lock()
        self._process = os.getpid()
        weakref.finalize(self, _close, self._idle)

    def take(self, key: _Key) -> Connection | None:
        """Take the usable connection that was used last; None where there is none."""
        if self._process != os.getpid():
            # Two processes on one connection would read each other's answers, and the lock may be held by the parent.
            self._lock, self._process = threading.Lock(), os.getpid()
            _close(self._idle)
        with self._lock:
            own = [entry for entry in self._idle if entry[0] == key]
            for entry in reversed(own):
                self._idle.remove(entry)
                if _is_quiet(entry[1]):
                    return entry[1]
                entry[1].close()
        return None

    def give(self, key: _Key, connection: Connection, whole: bool) -> None:
        """Return a connection to the pool where its response was read whole, and close it otherwise."""
        with self._lock:
            if whole and connection.sock is not None:
                self._idle.append((key, connection))
                if len(self._idle) <= MOST_IDLE:
                    return
                _, connection = self._idle.pop(0)
        connection.close()


class HTTPHandler(urllib.request.HTTPHandler):
    """Opens http URLs of a `Request` over kept connections."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def http_open(self, req: Any) -> Any:
        """Open an http URL."""
        return _open(self.pool, Connection, req)


class HTTPSHandler(urllib.request.HTTPSHandler):
    """Opens https URLs of a `Request` over kept connections, with the system's certificates."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def https_open(self, req: Any) -> Any:
        """Open an https URL."""
        return _open(self.pool, SecureConnection, req)


def _open(pool: Pool, kind: type[Connection], request: Any) -> Response:
    key = (kind, request.host, request._tunnel_host)
    connection = pool.take(key)
    if connection is not None:
        try:
            return _send(pool, key, connection, request)
        except ConnectionError:
            pass  # the server closed it
    return _send(pool, key, kind(request.host), request)


def _send(pool: Pool, key: _Key, connection: Connection, request: Request) -> Response:
    headers = {**request.headers, **request.unredirected_hdrs}
    tunnel: str | None = key[2]
    connection.send_until(request.deadline, request.timeout)
    # Credentials for a proxy go neither to the host behind its tunnel nor to a host that a redirect reaches directly.
    names = [] if request.has_proxy() else [name for name in headers if name.lower() == "proxy-authorization"]
    for_proxy = {name: headers.pop(name) for name in names}
    try:
        if tunnel is not None and connection.sock is None:
            connection.set_tunnel(tunnel, headers=for_proxy)
        connection.request(request.get_method(), request.selector, headers=headers)
        response: Any = connection.getresponse()
    except BaseException:
        connection.close()
        raise
    response.closed_with = partial(pool.give, key, connection)
    response.url = request.full_url
    response.msg = response.reason  # where the opener looks for it
    return response


def _is_quiet(connection: Connection) -> bool:
    sock = connection.sock
    # Bytes that were decrypted together with a body's end wait above the socket.
    if sock is None or (isinstance(sock, ssl.SSLSocket) and sock.pending()):
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


def _close(idle: list[tuple[_Key, Connection]]) -> None:
    for _, connection in idle:
        connection.close()
    idle.clear()


POOL = Pool()
"""The pool of the process: a pool for each cache would keep its own connections to the same hosts."""
