"""One background thread that stores blocks after the answer, with bounded memory."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Literal

LOG = logging.getLogger("hf_cachegen.prefix_cache")

WhenFull = Literal["wait", "drop"]
IDLE_SECONDS = 5.0
"""How long the thread waits for more before it ends."""


class Worker:
    """Run functions one after the other in a thread that lives as long as there are some.

    What is submitted counts its bytes until it has run. When they exceed the limit, `submit` waits or refuses. A single
    item above the limit is taken when nothing else is queued. What is queued at the exit of the process still runs.
    """

    def __init__(self, max_bytes: int, when_full: WhenFull = "wait") -> None:
        self.max_bytes, self.when_full = max_bytes, when_full
        self._changed = threading.Condition()
        self._queue: deque[tuple[int, Callable[[], None]]] = deque()
        self._nbytes, self._running = 0, False
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        _finish_at_exit(self)

    @property
    def nbytes(self) -> int:
        """Bytes that wait or are being worked on."""
        return self._nbytes

    def submit(self, nbytes: int, function: Callable[[], None]) -> bool:
        """Queue a function that holds so many bytes; report whether it was taken."""
        if self._pid != os.getpid():
            self._forget()
        with self._changed:
            while self._nbytes and self._nbytes + nbytes > self.max_bytes:
                if self.when_full == "drop":
                    return False
                self._changed.wait()
            self._queue.append((nbytes, function))
            self._nbytes += nbytes
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hf_cachegen-prefix-cache", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was submitted has run, at most `timeout` seconds; report whether it has."""
        if self._pid != os.getpid() or threading.current_thread() is self._thread:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._running, timeout)

    def _forget(self) -> None:
        """Begin again in a forked child, which has neither the thread nor its parent's work."""
        self._changed, self._queue, self._thread = threading.Condition(), deque(), None
        self._nbytes, self._running, self._pid = 0, False, os.getpid()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: bool(self._queue), IDLE_SECONDS):
                    self._thread = None  # a thread would keep this object alive; the next `submit` starts another
                    return
                nbytes, function = self._queue.popleft()
                self._running = True
            try:
                function()
            except Exception:
                LOG.exception("a block was not stored")
            finally:
                del function
                with self._changed:
                    self._nbytes -= nbytes
                    self._running = False
                    self._changed.notify_all()


def _finish_at_exit(worker: Worker) -> None:
    reference = weakref.ref(worker)

    def finish() -> None:
        found = reference()
        if found is not None:
            found.flush()

    atexit.register(finish)
    weakref.finalize(worker, atexit.unregister, finish)
