"""Receive the body of a response into its final memory: no piece of it is copied."""

from __future__ import annotations

import ctypes
from typing import Protocol

from hf_cachegen.new_bytes import address, new_bytes


class Sink(Protocol):
    """Takes a body piece by piece."""

    def room(self, most: int) -> memoryview:
        """Return memory for the next piece, at most `most` bytes."""
        ...

    def took(self, count: int) -> None:
        """Take the first `count` bytes of the room, which have arrived."""
        ...


class Body:
    """The body as bytes.

    Args:
        most: most bytes that may arrive.
    """

    def __init__(self, most: int) -> None:
        self._data = new_bytes(most)
        self._memory = memoryview((ctypes.c_char * most).from_address(address(self._data))).cast("B")
        self.filled = 0

    def room(self, most: int) -> memoryview:
        """Return memory for the next piece, at most `most` bytes."""
        return self._memory[self.filled : self.filled + most]

    def took(self, count: int) -> None:
        """Take the first `count` bytes of the room, which have arrived."""
        self.filled += count

    def done(self) -> bytes:
        """Return the bytes that have arrived. To be called once, at the end."""
        self._memory.release()
        return self._data if self.filled == len(self._data) else self._data[: self.filled]
