"""Blocks from a location under an SLO, level by level, as contexts are streamed.

The base of every block is fetched first, in order. Refinements follow, one level of all blocks before the next level of
any, until the time that decoding and the rest of the prompt need. Each block is then decoded at the level that has
arrived; where a base has not arrived in time, the prompt is computed from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from hf_cachegen.errors import CacheGenError, LimitError
from hf_cachegen.prefix_cache.block import part_ends
from hf_cachegen.stores.objects import Objects

HEAD_BYTES = 14_000
"""First bytes of a file that are read to find its parts: the header of a block has a few kilobytes."""


@dataclass(frozen=True)
class Time:
    """How long a call may wait for blocks; each function returns seconds from now, None for any time.

    Attributes:
        base: the argument is the number of a block: its base must have arrived then.
        refinements: the argument is a number of blocks: their refinements must have arrived then; None where blocks are
            fetched whole.
    """

    base: Callable[[int], float | None] = lambda _: None
    refinements: Callable[[int], float] | None = None

    def after(self, blocks: int) -> Time:
        """Return the same for the blocks after the first so many."""
        base, refine = self.base, self.refinements
        later = None if refine is None else (lambda count: refine(blocks + count))
        return Time(lambda number: base(blocks + number), later)


class Parts:
    """The beginning of one block's file, which grows by parts. Threads fetch its parts in any order."""

    def __init__(self, objects: Objects, name: str, limit: int) -> None:
        self.objects, self.name, self.limit = objects, name, limit
        self.ends: list[int] = []
        self._pieces: dict[int, bytes] = {}

    def fetch_base(self) -> bool:
        """Fetch everything up to the end of the base; report whether the block exists."""
        found = self.objects.head(self.name)
        if found is None:
            return False
        size, head = found
        if size > self.limit:
            raise LimitError(f"{self.objects}/{self.name} has {size} bytes, the limit is {self.limit}")
        if (short := min(size, HEAD_BYTES) - len(head)) > 0:  # some filesystems give no head
            head += self._read(len(head), short)
        self.ends = [min(end, size) for end in part_ends(head, self._read)]
        missing = self.ends[0] - len(head)
        self._pieces[0] = head[: self.ends[0]] + (self._read(len(head), missing) if missing > 0 else b"")
        return True

    def fetch(self, part: int) -> None:
        """Fetch one refinement."""
        first = self.ends[part - 1]
        self._pieces[part] = self._read(first, self.ends[part] - first)

    def arrived(self) -> bytes:
        """Return the file up to the last part that all earlier ones have arrived before."""
        found = []
        for part in range(len(self.ends)):
            if part not in self._pieces:
                break
            found.append(self._pieces[part])
        return b"".join(found)

    def _read(self, first: int, length: int) -> bytes:
        return self.objects.read(self.name, first, length) if length else b""


def fetch_levels(
    objects: Objects, names: Sequence[str], limit: int, connections: int, left: Time
) -> Iterator[bytes | None]:
    """Yield the beginnings of blocks' files in order, as far as they have arrived; None for a missing block.

    Args:
        objects: the location.
        names: the names of the files.
        limit: most bytes that a file may have.
        connections: requests at a time.
        left: how long to wait.

    Raises:
        StoreError: the location cannot be read.
        ArtifactError: a file does not begin as a block does.
    """
    pool = ThreadPoolExecutor(connections, thread_name_prefix="hf_cachegen-prefix-levels")
    try:
        blocks = [Parts(objects, name, limit) for name in names]
        bases = [pool.submit(block.fetch_base) for block in blocks]
        count, failure = 0, None
        for number, base in enumerate(bases):
            try:
                if not base.result(left.base(number)):
                    break
            except FutureTimeoutError:
                break
            except CacheGenError as error:
                failure = error  # raised after the blocks before it
                break
            count += 1
        ready = blocks[:count]
        for base in bases[count:]:
            base.cancel()
        refinements = [
            pool.submit(block.fetch, part)
            for part in range(1, max((len(block.ends) for block in ready), default=1))
            for block in ready
            if part < len(block.ends)
        ]
        # One that fails or is late is left out: its block is decoded without it.
        wait(refinements, None if left.refinements is None else left.refinements(count))
        for block in ready:
            yield block.arrived()
        if failure is not None:
            raise failure
        if count < len(blocks):
            yield None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

