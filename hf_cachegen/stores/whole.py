"""Whole files of servers that ignore byte ranges (`python -m http.server`), kept on disk to read ranges from."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import weakref
from urllib.parse import urlsplit

from hf_cachegen.errors import StoreError

LOG = logging.getLogger("hf_cachegen.stores")
_warned: set[str] = set()
_warning = threading.Lock()


class Whole:
    """A temporary file without a name, which the system removes with the object or the process.

    Threads may share it after all of it was appended.

    Args:
        size: length of the file in bytes.
        location: its URL, for messages.

    Raises:
        StoreError: the disk has fewer than `size` bytes free.
    """

    def __init__(self, size: int, location: str) -> None:
        directory = tempfile.gettempdir()
        free = shutil.disk_usage(directory).free
        if size > free:
            raise StoreError(
                f"{location}: its server ignores byte ranges, so all {size} bytes are needed, and {directory} has "
                f"{free} free; set TMPDIR, or use a server that supports ranges (nginx, an object store, the Hub)"
            )
        self.size = size
        self._piece = bytearray()
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def room(self, most: int) -> memoryview:
        """Return memory for the next piece of the file, at most `most` bytes."""
        if len(self._piece) < most:
            self._piece = bytearray(most)
        return memoryview(self._piece)[:most]

    def took(self, count: int) -> None:
        """Append the first `count` bytes of the room."""
        view = memoryview(self._piece)[:count]
        while view:
            view = view[self._file.write(view) :]

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly that range."""
        pieces = bytearray()
        while len(pieces) < length:
            piece = os.pread(self._file.fileno(), length - len(pieces), offset + len(pieces))
            if not piece:
                raise StoreError(f"a temporary file ended early, at byte {offset + len(pieces)}: load it again")
            pieces += piece
        return bytes(pieces)


def warn_once(location: str) -> None:
    """Log a warning, once for each host in a process, that it ignores byte ranges."""
    host = urlsplit(location).netloc
    with _warning:
        if host in _warned:
            return
        _warned.add(host)
    LOG.warning(
        "%s ignores byte ranges: every file is fetched whole, also for a part of it. Use a server that supports ranges "
        "(nginx, an object store, the Hub) to transfer less.", host,
    )  # fmt: skip
