"""How many bytes to ask for at a time, over all connections of a stream.

A link must never run dry, and what is asked for must grow from one round trip to the next where it did. But no plan can
change what is under way, so no more is asked for than that takes.
"""

from __future__ import annotations

from collections.abc import Sequence

WINDOW_SECONDS, ROUND_TRIPS, MOST_WINDOW_SECONDS = 0.02, 3, 0.5
"""Under way is what takes WINDOW_SECONDS and ROUND_TRIPS round trips, at most MOST_WINDOW_SECONDS."""
FIRST_REQUEST_BYTES = 1 << 19
"""Size of a request before the throughput was measured."""
LEAST_REQUESTS, SECONDS_PER_REQUEST = 2, 2.5e-3
"""At least LEAST_REQUESTS are under way, so that the next is there when one ends; beyond that one for each
SECONDS_PER_REQUEST of a round trip, in which a connection grows slowly. A short path is filled by few requests, and
each costs work."""
LEAST_REQUEST_BYTES, SHARED_BYTES, MOST_REQUEST_BYTES = 1 << 18, 1 << 20, 8 << 20
"""Bounds on a request. Requests are larger than SHARED_BYTES only where all connections have such."""


def request_bytes(
    rate: float | None, round_trip: float | None, under_way: Sequence[int], connections: int
) -> float | None:
    """Return the size of the next request.

    Args:
        rate: Measured throughput, bytes per second; None before the first sample.
        round_trip: Measured round trip, seconds; None before the first answer.
        under_way: Bytes of each request that is under way.
        connections: Number of requests at a time.

    Returns:
        Bytes; None where enough is under way.
    """
    seconds, few = MOST_WINDOW_SECONDS, connections
    if round_trip is not None:
        seconds = min(seconds, WINDOW_SECONDS + ROUND_TRIPS * round_trip)
        few = min(few, max(LEAST_REQUESTS, int(round_trip / SECONDS_PER_REQUEST)))
    window = few * FIRST_REQUEST_BYTES if rate is None else rate * seconds
    if len(under_way) >= LEAST_REQUESTS and sum(under_way) >= window:
        return None
    nbytes = max(min(window / few, SHARED_BYTES), window / connections)
    return min(MOST_REQUEST_BYTES, max(LEAST_REQUEST_BYTES, nbytes))
