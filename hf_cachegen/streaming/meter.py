"""Measure a stream's transfers, and end those that are not waited for any more.

A thread that fetches says when its work is given up (`give_up_when`). The meter asks at each piece that arrives, and
ends the request with GivenUp.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hf_cachegen.streaming.bandwidth import Bandwidth


class GivenUp(Exception):
    """Ends a request that is not waited for any more. It never reaches the user."""


class _Caller(threading.local):
    """What the meters know of the calling thread."""

    given_up: Callable[[], bool] | None = None
    request_began: float | None = None


_CALLER = _Caller()


def give_up_when(given_up: Callable[[], bool]) -> None:
    """Give up the calling thread's requests once the function returns True."""
    _CALLER.given_up = given_up


def abandoned() -> bool:
    """Return whether the calling thread's requests are not waited for any more."""
    return _CALLER.given_up is not None and _CALLER.given_up()


class TransferMeter:
    """Reports a source's requests to throughput estimates (a `hf_cachegen.stores.metered.Meter`).

    It counts nothing before `start`: opening an artifact takes requests too small to tell the throughput of the link.
    Threads may share it.
    """

    def __init__(self, bandwidths: Sequence[Bandwidth]) -> None:
        self._bandwidths, self._counts = bandwidths, False

    def start(self) -> None:
        """Count from now on."""
        self._counts = True

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request of the calling thread. Raises GivenUp."""
        if not self._counts:
            yield
            return
        if abandoned():
            raise GivenUp
        ages = [bandwidth.began() for bandwidth in self._bandwidths]
        _CALLER.request_began = time.monotonic()
        try:
            yield
        finally:
            for bandwidth, age in zip(self._bandwidths, ages, strict=True):
                bandwidth.ended(age)

    def arrived(self, nbytes: int) -> None:
        """Count bytes of the calling thread's request. Raises GivenUp."""
        if not self._counts:
            return
        if abandoned():
            raise GivenUp
        began, _CALLER.request_began = _CALLER.request_began, None
        for bandwidth in self._bandwidths:
            if began is not None:
                bandwidth.answered(time.monotonic() - began)
            bandwidth.add(nbytes)
