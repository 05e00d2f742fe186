"""Share a link between the streams of one process, chunk by chunk (section 5.3 of the paper: the chunks of one index of
all requests are one batch).

Without turns a stream with more connections, or an earlier one, would starve the others. A turn goes to the request
whose stream has had the fewest turns; among equals, to the first that asked.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count

from hf_cachegen.errors import ConfigError
from hf_cachegen.streaming.bandwidth import Bandwidth

SLOTS = 8
"""Default number of requests at a time over one link."""
WAKE_SECONDS = 0.2
"""How often a waiting request checks whether its stream was given up."""


class Link:
    """A link that streams share. The streams to one host share one by default. Threads may share it.

    Args:
        slots: Number of requests at a time.
        clock: Gives the time in seconds.

    Raises:
        ConfigError: `slots` is below 1.
    """

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
        """Return the link of this process to a host, the same one each time."""
        with cls._known_lock:
            return cls._known.setdefault(host, cls())

    @contextmanager
    def stream(self) -> Iterator[Share]:
        """Join the link for the time of this context."""
        with self._changed:
            # A later stream starts with as many turns as the others have had, or it would get all turns for a while.
            turns = min((other.turns for other in self._shares), default=0)
            rate = self.bandwidth.rate()
            share = Share(self, turns, None if rate is None else rate / (len(self._shares) + 1))
            self._shares.append(share)
        try:
            yield share
        finally:
            with self._changed:
                self._shares.remove(share)

    @contextmanager
    def turn(self, share: Share, given_up: Callable[[], bool], limit: float) -> Iterator[bool]:
        """Wait for a turn of a stream, as `Share.turn` says."""
        end = time.monotonic() + limit
        with self._changed:
            entry = (share.turns, next(self._arrivals))
            share.turns += 1
            self._waiting.append(entry)
            while not given_up() and time.monotonic() < end and not self._is_next(entry):
                self._changed.wait(WAKE_SECONDS)
            slot = not given_up() and self._is_next(entry)
            self._waiting.remove(entry)
            self._free -= slot
            self._changed.notify_all()
        try:
            yield slot or not given_up()
        finally:
            with self._changed:
                self._free += slot
                self._changed.notify_all()

    def _is_next(self, entry: tuple[int, int]) -> bool:
        return self._free > 0 and min(self._waiting) == entry


class Share:
    """One stream's part of a link.

    Args:
        link: The link.
        turns: The number of turns that it has had.
        expected: Its share of what the link gave to other streams, in bytes per second; None where nothing is known.
    """

    def __init__(self, link: Link, turns: int, expected: float | None) -> None:
        self.link, self.turns, self.expected = link, turns, expected

    def turn(self, given_up: Callable[[], bool], limit: float = math.inf) -> AbstractContextManager[bool]:
        """Wait for the turn of one request, which lasts for the time of the returned context.

        Args:
            given_up: Asked again and again while waiting.
            limit: Bound on the wait, in seconds. Then the request goes on without a turn: requests that hang must not
                hold up others for ever.

        Returns:
            A context that yields False where `given_up` returned True before the turn.
        """
        return self.link.turn(self, given_up, limit)
