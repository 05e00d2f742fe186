"""Whole files of servers that ignore byte ranges (`python -m http.server`), kept to serve ranges from."""

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
    """One file in the directory for temporary files, without a name: it goes with the object, or with the process.

    Threads may share it once all of it was appended. Raises StoreError where the disk cannot hold `size` bytes.
    """

    def __init__(self, size: int, location: str) -> None:
        directory = tempfile.gettempdir()
        free = shutil.disk_usage(directory).free
        if size > free:
            raise StoreError(
                f"{location}: its server ignores byte ranges, so that all {size} bytes are needed, and {directory} has "
                f"{free} left; set TMPDIR, or use a server that knows ranges (nginx, an object store, the Hub)"
            )
        self.size = size
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def append(self, data: bytes) -> None:
        """Adds the next bytes."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly that range."""
        pieces = bytearray()
        while len(pieces) < length:
            piece = os.pread(self._file.fileno(), length - len(pieces), offset + len(pieces))
            if not piece:
                raise StoreError(f"a temporary file ended at byte {offset + len(pieces)}: something truncated it")
            pieces += piece
        return bytes(pieces)


def warn_once(location: str) -> None:
    """Logs, once for each host in a process, that it ignores byte ranges."""
    host = urlsplit(location).netloc
    with _warning:
        if host in _warned:
            return
        _warned.add(host)
    LOG.warning(
        "%s ignores byte ranges: every file is fetched whole, also for a part of it. A server that knows ranges "
        "(nginx, an object store, the Hub) sends less, sooner.", host,
    )  # fmt: skip
