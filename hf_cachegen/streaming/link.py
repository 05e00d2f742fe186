"""Streams of one process that come over one link take turns, chunk by chunk (section 5.3 of the paper: the chunks of
one index of all requests are one batch).

Without turns a stream that has more connections, or that began earlier, would starve the others. A turn goes to the
request whose stream has had the fewest so far; among equals, to the first that asked.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from hf_cachegen.errors import ConfigError
from hf_cachegen.streaming.bandwidth import Bandwidth

SLOTS = 8
"""Requests at a time over one link."""


class Link:
    """slots: requests at a time. Threads share it; the streams to one host share one unless told otherwise."""

    _known: dict[str, Link] = {}  # noqa: RUF012
    _known_lock = threading.Lock()

    def __init__(self, slots: int = SLOTS, clock: Callable[[], float] = time.monotonic) -> None:
        if slots < 1:
            raise ConfigError(f"slots must be at least 1, got {slots}")
        self.bandwidth = Bandwidth(clock=clock)
        self._free, self._streams = slots, 0
        self._waiting: list[tuple[int, int]] = []
        self._arrivals = count()
        self._changed = threading.Condition()

    @classmethod
    def to(cls, host: str) -> Link:
        """The link that this process has to a host; the same one each time."""
        with cls._known_lock:
            return cls._known.setdefault(host, cls())

    @contextmanager
    def stream(self) -> Iterator[float | None]:
        """Within it one more stream uses the link. Yields what throughput it may expect: its share of what the link
        gave to others before; None where nothing is known.
        """
        with self._changed:
            self._streams += 1
            rate = self.bandwidth.rate()
            share = None if rate is None else rate / self._streams
        try:
            yield share
        finally:
            with self._changed:
                self._streams -= 1

    @contextmanager
    def turn(self, number: int, given_up: Callable[[], bool]) -> Iterator[bool]:
        """Waits for the turn of a stream's request, its `number`-th; False where `given_up` became true before."""
        entry = (number, next(self._arrivals))
        with self._changed:
            heapq.heappush(self._waiting, entry)
            while not given_up() and not (self._free and self._waiting[0] == entry):
                self._changed.wait(WAKE_SECONDS)
            self._waiting.remove(entry)
            heapq.heapify(self._waiting)
            granted = not given_up()
            self._free -= granted
            self._changed.notify_all()
        try:
            yield granted
        finally:
            with self._changed:
                self._free += granted
                self._changed.notify_all()


WAKE_SECONDS = 0.2
"""How often a waiting request looks whether its stream has been given up."""
