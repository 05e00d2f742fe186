"""A tier at any location: the same block files under the same names, without an index.

    <location>/ab/ab12...

Blocks are published parents first and never removed by this package, so the stored blocks of a prompt are a run from
its beginning. The end of that run is found by asking for the existence of a few blocks, by bisection. A block that has
gone all the same ends the run where it is missed. Retention is the location's own (a lifecycle rule of a bucket).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

from hf_cachegen.prefix_cache.levels import Time, fetch_levels
from hf_cachegen.stores.objects import Objects

CONNECTIONS = 8
"""Requests at a time: one seldom fills a link."""
AHEAD = 16
"""Blocks that are fetched before they are asked for."""
MAX_BLOCK_BYTES = 4 << 30
"""Bounds what one block may claim: 32,768 tokens of 128 KiB each."""


class RemoteTier:
    """The blocks at one location.

    Args:
        objects: the location.
        writable: whether new blocks are published there.
    """

    def __init__(self, objects: Objects, writable: bool) -> None:
        self.objects, self.writable = objects, writable

    def __str__(self) -> str:
        return str(self.objects)

    def stored(self, keys: Sequence[bytes]) -> int:
        """Return how many of the first keys are stored.

        Raises:
            StoreError: the location cannot be asked.
        """
        low, high = 0, len(keys)
        if not keys or not self.objects.exists(name_of(keys[0])):
            return 0
        low = 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.objects.exists(name_of(keys[middle - 1])):
                low = middle
            else:
                high = middle - 1
        return low

    def present(self, keys: Sequence[bytes]) -> set[bytes]:
        """Return those of some keys that are stored, in any order; all are asked for in parallel.

        Raises:
            StoreError: the location cannot be asked.
        """
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="hf_cachegen-prefix-ask") as pool:
            there = list(pool.map(lambda key: self.objects.exists(name_of(key)), keys))
        return {key for key, stored in zip(keys, there, strict=True) if stored}

    def fetch(self, keys: Sequence[bytes], wait: Callable[[int], float | None]) -> Iterator[bytes | None]:
        """Yield the bytes of these blocks' files in order, not proved, fetched in parallel; None for a missing one.

        Args:
            keys: the keys of the blocks.
            wait: seconds that the block of this number may be waited for, None for any time; a later one is missing.

        Raises:
            StoreError: the location cannot be read.
            LimitError: a file is above MAX_BLOCK_BYTES.
        """
        pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="hf_cachegen-prefix-fetch")
        waiting: list[Future[bytes | None]] = []
        try:
            position = 0
            for number in range(len(keys)):
                while position < len(keys) and len(waiting) < AHEAD:
                    waiting.append(pool.submit(self.objects.get, name_of(keys[position]), MAX_BLOCK_BYTES))
                    position += 1
                try:
                    yield waiting.pop(0).result(wait(number))
                except FutureTimeoutError:
                    yield None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def fetch_levels(self, keys: Sequence[bytes], left: Time) -> Iterator[bytes | None]:
        """Yield the beginnings of these blocks' files, level by level as time is left (`levels.py`).

        Raises:
            StoreError: the location cannot be read.
            ArtifactError: a file does not begin as a block does.
        """
        yield from fetch_levels(self.objects, [name_of(key) for key in keys], MAX_BLOCK_BYTES, CONNECTIONS, left)

    def get(self, key: bytes) -> bytes | None:
        """Return the bytes of a block's file, not proved; None where it is not there. Raises StoreError, LimitError."""
        return self.objects.get(name_of(key), MAX_BLOCK_BYTES)

    def publish(self, key: bytes, data: bytes) -> bool:
        """Write a block unless it is there; report whether it was written.

        Raises:
            StoreError: the location cannot be written.
        """
        name = name_of(key)
        if self.objects.exists(name):
            return False
        self.objects.put(name, data)
        return True


def name_of(key: bytes) -> str:
    """Return the name of a block's file at a location."""
    text = key.hex()
    return f"{text[:2]}/{text}"
