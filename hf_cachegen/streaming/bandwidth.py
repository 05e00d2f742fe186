"""Estimate the throughput of a stream from the bytes that arrive.

Time counts only while a request is under way, so a reader that pauses does not make its link look slow. A sample ends
after SAMPLE_SECONDS, or with the last request under way if it has SAMPLE_BYTES: fewer bytes measure round trips rather
than the link. Once the current sample is longer than SAMPLE_SECONDS, its own rate bounds the estimate. That rate falls
with every second of silence.

The round trip is the shortest time from a request to its first byte. Longer times are queues, or a slow server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SAMPLE_SECONDS = 0.1
"""Length of a sample: a plan can change as often."""
SAMPLE_BYTES = 1 << 18
"""Bytes of a shorter sample."""


class Bandwidth:
    """The throughput of one stream or of one link. Threads may share it.

    Args:
        smoothing: Weight of the old estimate in each new one, from 0 to below 1.
        clock: Gives the time in seconds.

    `total` is the number of bytes so far. `round_trip` is in seconds, None before the first answer. `last_byte` is the
    time of the last byte, or of the first request under way.
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
        """Record that a request was sent. Pass the returned value to `ended`."""
        with self._lock:
            if not self._under_way:
                self._since = self.last_byte = self._clock()
            self._under_way += 1
            return self._age

    def answered(self, seconds: float) -> None:
        """Record the time from a request to its first byte."""
        with self._lock:
            self.round_trip = seconds if self.round_trip is None else min(seconds, self.round_trip)

    def ended(self, began: int) -> None:
        """Record that a request ended or failed."""
        with self._lock:
            if began != self._age:
                return
            self._tick()
            self._under_way -= 1
            if not self._under_way and self._bytes >= SAMPLE_BYTES:
                self._close()

    def add(self, count: int) -> None:
        """Record that bytes arrived."""
        with self._lock:
            self._tick()
            self.last_byte = self._since
            self._bytes += count
            self.total += count
            if self._busy >= SAMPLE_SECONDS:
                self._close()

    def forget(self) -> None:
        """Forget all measurements and the requests under way: they were too small to measure the link, or came from
        another source.
        """
        with self._lock:
            self._tick()
            self._age += 1
            self._under_way = 0
            self._bytes, self._busy, self._rate, self.round_trip = 0, 0.0, None, None
            self.last_byte = self._since

    def expect(self, rate: float | None) -> None:
        """Set the estimate before the first sample; None: there is none."""
        with self._lock:
            self._rate = self._rate or rate

    def rate(self) -> float | None:
        """Return the expected bytes per second; None before enough has arrived to say."""
        with self._lock:
            self._tick()
            now = self._bytes / self._busy if self._busy > 0 else None
            if self._rate is None:
                measured = self._busy > SAMPLE_SECONDS or (self._bytes and not self._under_way)
                return now if measured else None
            return min(now, self._rate) if now is not None and self._busy > SAMPLE_SECONDS else self._rate

    def silence(self) -> float:
        """Return the seconds without a byte while requests are under way; 0 where none is."""
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
