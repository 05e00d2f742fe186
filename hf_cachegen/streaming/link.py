"""Streams of one process that come over one link take turns, chunk by chunk (section 5.3 of the paper: the chunks of
one index of all requests are one batch).

Without turns a stream that has more connections, or that began earlier, would starve the others. A turn goes to the
request whose stream has had the fewest so far; among equals, to the first that asked.
"""

from __future__ import annotations

import math
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
        self._free = slots
        self._shares: list[Share] = []
        self._waiting: list[tuple[int, int]] = []
        self._arrivals = count()
        self._changed = threading.Condition()

    @classmethod
    def to(cls, host: str) -> Link:
        """The link that this process has to a host; the same one each time."""
        with cls._known_lock:
            return cls._known.setdefault(host, cls())

    @contextmanager
    def stream(self) -> Iterator[Share]:
        """Within it one more stream uses the link."""
        with self._changed:
            # Who comes later begins with as many turns as the others have had, or it would have all turns for a while.
            share = Share(self, min((other.turns for other in self._shares), default=0))
            self._shares.append(share)
            rate = self.bandwidth.rate()
            share.expected = None if rate is None else rate / len(self._shares)
        try:
            yield share
        finally:
            with self._changed:
                self._shares.remove(share)


class Share:
    """One stream's part of a link. expected: bytes a second, from what the link gave to others before; None where
    nothing is known. turns: how many it has had.
    """

    def __init__(self, link: Link, turns: int) -> None:
        self.link, self.turns = link, turns
        self.expected: float | None = None

    @contextmanager
    def turn(self, given_up: Callable[[], bool], limit: float = math.inf) -> Iterator[bool]:
        """Waits for the turn of one request; False where `given_up` became true before. After `limit` seconds it goes
        on without one: requests that hang must not hold up others for ever.
        """
        link, end = self.link, time.monotonic() + limit
        with link._changed:
            entry = (self.turns, next(link._arrivals))
            self.turns += 1
            link._waiting.append(entry)
            while not given_up() and time.monotonic() < end and not self._is_next(entry):
                link._changed.wait(WAKE_SECONDS)
            slot = not given_up() and self._is_next(entry)
            link._waiting.remove(entry)
            link._free -= slot
            link._changed.notify_all()
        try:
            yield slot or not given_up()
        finally:
            with link._changed:
                link._free += slot
                link._changed.notify_all()

    def _is_next(self, entry: tuple[int, int]) -> bool:
        return self.link._free > 0 and min(self.link._waiting) == entry


WAKE_SECONDS = 0.2
"""How often a waiting request looks whether its stream has been given up."""
