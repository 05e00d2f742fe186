"""Connections are reused from request to request, and a broken idle connection does no harm."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hf_cachegen.stores import Patience, connections
from hf_cachegen.stores.http import HttpFiles
from tests import http_server as faults
from tests.http_server import Request, Server, running

DATA = bytes(range(256)) * 4096
ONCE = Patience(attempts=1, timeout=5)


class Remembering(Request):
    """A handler that records the connection of each request, so that a test can break it."""

    server: Any

    def do_GET(self) -> None:
        self.server.connections.append(self.connection)
        super().do_GET()


@pytest.fixture
def server() -> Iterator[Any]:
    with running(Server(Remembering)) as found:
        found.connections = []  # type: ignore[attr-defined]
        found.files["data"] = DATA
        yield found


def files_of(server: Server, patience: Patience = ONCE, progress: Any = None) -> HttpFiles:
    return HttpFiles(lambda name: f"{server.url}/{name}", patience=patience, progress=progress)


def used(server: Any) -> int:
    """Return the number of connections."""
    return len(set(map(id, server.connections)))


def test_one_connection_serves_many_requests(server: Any) -> None:
    files = files_of(server)
    assert files.open("data")[0] == len(DATA)
    for offset in range(0, 100_000, 9_999):
        assert files.read("data", offset, 5_000) == DATA[offset : offset + 5_000]
    assert len(server.connections) == 12
    assert used(server) == 1


def test_threads_have_connections_of_their_own(server: Any) -> None:
    files = files_of(server)
    files.open("data")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: files.read("data", n * 1000, 1000), range(100)))
    assert b"".join(found) == DATA[:100_000]
    assert used(server) <= 5


def test_a_connection_that_was_closed_while_idle_costs_no_attempt(server: Any) -> None:
    files = files_of(server)
    files.open("data")
    for _ in range(3):
        server.connections[-1].shutdown(socket.SHUT_RDWR)
        assert files.read("data", 7, 100) == DATA[7:107]
    assert used(server) == 4


def test_a_connection_that_breaks_under_the_request_costs_no_attempt(server: Any) -> None:
    files = files_of(server)
    files.open("data")
    server.faults = [faults.reset_at_once]
    assert files.read("data", 7, 100) == DATA[7:107]
    assert len(server.connections) == 3


def test_a_broken_answer_is_not_followed_by_another_on_its_connection(server: Any) -> None:
    files = files_of(server, Patience(attempts=2, timeout=5, backoff=0.01))
    files.open("data")
    server.faults = [faults.cut(0.5)]
    assert files.read("data", 0, 100_000) == DATA[:100_000]
    assert used(server) == 2


def stray(request: Request, body: bytes, headers: dict[str, str]) -> None:
    """Send more than was announced: it would be the beginning of the next answer."""
    request.answer(206, body, headers)
    request.wfile.write(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nevil")


def test_unrequested_bytes_are_not_taken_for_an_answer(server: Any) -> None:
    files = files_of(server)
    server.faults = [stray]
    files.open("data")
    time.sleep(0.1)
    assert files.read("data", 100, 4) == DATA[100:104]
    assert used(server) == 2


def test_a_body_that_is_given_up_ends_its_connection(server: Any) -> None:
    enough: list[bool] = []

    def progress(count: int) -> None:
        if enough:
            raise KeyboardInterrupt

    files = files_of(server, progress=progress)
    files.open("data")
    enough.append(True)
    with pytest.raises(KeyboardInterrupt):
        files.read("data", 0, 500_000)
    enough.clear()
    assert files.read("data", 0, 1000) == DATA[:1000]
    assert used(server) == 2


def test_a_server_that_closes_after_each_answer(server: Any) -> None:
    files = files_of(server)
    server.always = faults.with_headers(Connection="close")
    files.open("data")
    for _ in range(3):
        assert files.read("data", 5, 5) == DATA[5:10]
    assert used(server) == 4


def test_a_forked_process_has_connections_of_its_own(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fork both processes hold the same sockets, and would read each other's answers."""
    files = files_of(server)
    files.open("data")
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert files.read("data", 5, 5) == DATA[5:10]
    assert files.read("data", 6, 5) == DATA[6:11]
    assert used(server) == 2


def test_stores_share_connections_and_keep_few_idle_ones(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many stores of one host and of others live at the same time."""
    files_of(server).open("data")
    files_of(server).open("data")
    assert used(server) == 1
    monkeypatch.setattr(connections, "MOST_IDLE", 1)
    first = server.connections[0]
    with running(Server()) as other:
        other.files = server.files
        files_of(other).open("data")
    for _ in range(500):
        if first.fileno() < 0:  # the server has seen the end, and closed its own
            return
        time.sleep(0.01)
    pytest.fail("the connection is still open")
