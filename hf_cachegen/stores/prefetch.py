"""Fetch the ranges that a reader will ask for, ahead of it, in few requests.

The ranges are given in the order of use. Adjacent ranges of one file become one run, which is cut into requests of at
most REQUEST_BYTES. So small segments share a request (hubs limit their number), and large ones are spread over several
connections. Requests are sent in the order of use, `threads` at a time, and at most `ahead_bytes` ahead of the reader,
which bounds the memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

REQUEST_BYTES = 8 << 20
"""Largest request: large against the cost of a round trip, small against the loss when a connection breaks."""

Range = tuple[str, int, int]
"""(file, offset, length)"""


@dataclass
class _Request:
    number: int
    file: str
    start: int
    stop: int
    users: set[Range] = field(default_factory=set)
    future: Future[bytes] | None = None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Prefetcher:
    """Ranges that are fetched ahead, each of which `take` returns once. Threads may share it.

    Args:
        ranges: the ranges, in the order of use.
        fetch: reads (file, offset, length); called from any thread.
        threads: number of requests at a time.
        ahead_bytes: largest number of bytes that wait for the reader.
    """

    def __init__(
        self, ranges: Iterable[Range], fetch: Callable[[str, int, int], bytes], threads: int, ahead_bytes: int
    ) -> None:
        self._fetch, self._ahead_bytes = fetch, ahead_bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hf_cachegen-fetch")
        self._parts: dict[Range, list[_Request]] = {}
        self._requests = _plan(ranges, self._parts)
        self._lock = threading.Lock()
        self._sent = 0
        self._held = 0

    def take(self, wanted: Range) -> bytes | None:
        """Wait for a planned range and return its bytes; return None for any other range.

        An error of its requests is raised here, and ends the prefetch.
        """
        with self._lock:
            requests = self._parts.pop(wanted, None)
            if requests is None:
                return None
            self._send(upto=requests[-1].number)
            futures = [request.future for request in requests]
        _, start, length = wanted
        try:
            pieces = [
                future.result()[max(0, start - request.start) : start + length - request.start]
                for request, future in zip(requests, futures, strict=True)
                if future is not None
            ]
        except BaseException:
            self.close()  # an interrupted or failed load must not go on fetching
            raise
        finally:
            with self._lock:
                for request in requests:
                    request.users.discard(wanted)
                    if not request.users:
                        self._held -= request.nbytes
                        request.future = None
                self._send()
                if not self._parts:
                    self._pool.shutdown(wait=False)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Drop the ranges that were not taken; requests that are under way end by themselves."""
        with self._lock:
            self._parts.clear()
            self._sent = len(self._requests)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _send(self, upto: int = -1) -> None:
        """Send the requests up to that number, and more while `ahead_bytes` allows."""
        while self._sent < len(self._requests):
            request = self._requests[self._sent]
            if self._sent > upto and self._held + request.nbytes > self._ahead_bytes:
                return
            self._held += request.nbytes
            request.future = self._pool.submit(self._fetch, request.file, request.start, request.nbytes)
            self._sent += 1


def _plan(ranges: Iterable[Range], parts: dict[Range, list[_Request]]) -> list[_Request]:
    """Return the requests in the order of first use; enter the requests of each range into `parts`."""
    requests: list[_Request] = []
    open_request: dict[str, _Request] = {}
    for wanted in ranges:
        file, position, length = wanted
        if not length or wanted in parts:
            continue
        parts[wanted] = []
        while length:
            request = open_request.get(file)
            if request is None or request.stop != position or request.nbytes >= REQUEST_BYTES:
                request = open_request[file] = _Request(len(requests), file, position, position)
                requests.append(request)
            share = min(length, REQUEST_BYTES - request.nbytes)
            request.stop += share
            request.users.add(wanted)
            parts[wanted].append(request)
            position, length = position + share, length - share
    return requests
