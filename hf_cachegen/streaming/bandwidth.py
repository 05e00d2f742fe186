"""What throughput a stream gets, from the bytes that arrive.

Time counts only while a request is under way, so a reader that pauses does not make its link look slow. A sample ends
after SAMPLE_SECONDS, or with the last request under way if it has SAMPLE_BYTES: fewer tell of round trips, not of the
link. Between samples silence counts: once the current sample is longer than the last one was, its own rate, which
falls with every second without bytes, is what may be expected.

The shortest time from a request to its first byte is the round trip; whatever is longer is a queue, or a slow server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SAMPLE_SECONDS = 0.1
SAMPLE_BYTES = 1 << 18


class Bandwidth:
    """smoothing: the weight of what was before in each new estimate, 0 for none. total: bytes so far. round_trip:
    seconds, None before any request was answered. Threads share it.
    """

    def __init__(self, smoothing: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate: float | None = None
        self._smoothing, self._clock = smoothing, clock
        self._lock = threading.Lock()
        self._under_way, self._age = 0, 0
        self._bytes, self._busy, self._since = 0, 0.0, 0.0
        self.last_byte = clock()
        self.total = 0
        self.round_trip: float | None = None

    def began(self) -> int:
        """A request was sent; what is returned tells `ended` which."""
        with self._lock:
            if not self._under_way:
                self._since = self.last_byte = self._clock()
            self._under_way += 1
            return self._age

    def answered(self, seconds: float) -> None:
        """A request's first byte came so long after it was sent."""
        with self._lock:
            self.round_trip = seconds if self.round_trip is None else min(seconds, self.round_trip)

    def ended(self, began: int) -> None:
        """A request is over, or failed."""
        with self._lock:
            if began != self._age:
                return
            self._tick()
            self._under_way -= 1
            if not self._under_way and self._bytes >= SAMPLE_BYTES:
                self._close()

    def add(self, count: int) -> None:
        """So many bytes arrived."""
        with self._lock:
            self._tick()
            self.last_byte = self._since
            self._bytes += count
            self.total += count
            if self._busy >= SAMPLE_SECONDS:
                self._close()

    def forget(self) -> None:
        """Nothing is known any more: what arrived so far was too small to tell anything, or came from elsewhere. Nor do
        the requests count that are under way.
        """
        with self._lock:
            self._tick()
            self._age += 1
            self._under_way = 0
            self._bytes, self._busy, self._rate, self.round_trip = 0, 0.0, None, None
            self.last_byte = self._since

    def expect(self, rate: float | None) -> None:
        """What was known before the first sample."""
        with self._lock:
            self._rate = self._rate or rate

    def rate(self) -> float | None:
        """Bytes a second to be expected; None before anything can be told."""
        with self._lock:
            self._tick()
            now = self._bytes / self._busy if self._busy > 0 else None
            if self._rate is None:
                told = self._busy > SAMPLE_SECONDS or (self._bytes and not self._under_way)
                return now if told else None
            return min(now, self._rate) if now is not None and self._busy > SAMPLE_SECONDS else self._rate

    def silence(self) -> float:
        """Seconds without a byte while requests are under way; 0 where none is."""
        with self._lock:
            return self._clock() - self.last_byte if self._under_way else 0.0

    def _tick(self) -> None:
        now = self._clock()
        if self._under_way:
            self._busy += now - self._since
        self._since = now

    def _close(self) -> None:
        if self._busy > 0:
            sample = self._bytes / self._busy
            old = self._smoothing if self._rate is not None else 0.0
            self._rate = old * (self._rate or 0.0) + (1 - old) * sample
        self._bytes, self._busy = 0, 0.0
