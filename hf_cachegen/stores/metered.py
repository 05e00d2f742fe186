"""Count the transfers of a store: the requests that are under way, how long each takes, and the bytes that arrive.

A whole range arrives too late to show that a link has become slow, or to end its request. So bytes are counted piece by
piece: the store that reads the location reports each piece to the meter (`progress=meter.arrived`), and this wrapper
reports when each request begins and ends.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from hf_cachegen.artifact import Store


class Meter(Protocol):
    """The observer of a store's requests. Threads may share it. An error that a method raises ends the request."""

    def request(self) -> AbstractContextManager[None]:
        """Return a context that lasts as long as the calling thread's next request."""
        ...

    def arrived(self, nbytes: int) -> None:
        """Count bytes of the calling thread's request."""
        ...


class MeteredStore(Store):
    """A store of which each `size`, `open` and `read` is one metered request."""

    def __init__(self, store: Store, meter: Meter) -> None:
        self._store, self._meter = store, meter

    def __str__(self) -> str:
        return str(self._store)

    def unwrap(self) -> Store:
        """Return the store without the meter."""
        return self._store

    def size(self, name: str) -> int:
        """Return the length of a file in bytes."""
        with self._meter.request():
            return self._store.size(name)

    def open(self, name: str, first: int = 0) -> tuple[int, bytes]:
        """Return a file's size and the first bytes that arrived with it."""
        with self._meter.request():
            return self._store.open(name, first)

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Read exactly that range of a file."""
        with self._meter.request():
            return self._store.read(name, offset, length, xxh3)
